"""rank_backbones.py: its scores against scikit-learn and numpy on features of plain timm models; faults; the page."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ncreg.transferability import logme, naswot, ncti
from recipes import rank_backbones, train
from recipes.core.config import DataConfig
from recipes.core.errors import UserError
from recipes.data.load import load
from recipes.data.split import stratified
from recipes.evaluation.backbone_scores import BackboneRanking, BackboneScores
from recipes.evaluation.backbone_table import draw_ranking, ranking_table
from recipes.evaluation.candidates import read_candidates

PAGE = Path(__file__).parents[2] / "docs" / "robustness.md"
COMMANDS = re.findall(r"^\$ python recipes/rank_backbones\.py (.*)$", PAGE.read_text(), re.MULTILINE)
DIGITS = ["--data.name", "digits", "--data.image_size", "32"]
COLOURS = {"blue": (40, 40, 220), "green": (30, 200, 40), "red": (220, 30, 30)}

OWN = """
import torch
from torch import nn

def small(outputs=7):
    body = [nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(8, outputs))

def dead():
    model = small()
    nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
    return model

def sick():
    model = small()
    nn.init.constant_(model[0].weight, float("nan"))
    return model

class Raises(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
    def forward(self, x):
        return self.fc(x.mean((2, 3)) if len(x) < 5 else {}["nothing"])

def raises(): return Raises()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images of three colours, weights of a file, a function of one's own, a list, a run on gray images."""
    place = tmp_path_factory.mktemp("place")
    draw = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        folder = place / "my_images" / name
        folder.mkdir(parents=True)
        for number in range(20):
            noise = draw.integers(-30, 30, (24, 30, 3))
            Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), place / "mine.pth")
    (place / "my_model.py").write_text(OWN)
    (place / "candidates.yaml").write_text(
        "- my_model.py:small=untrained\n- {model: timm:test_resnet, weights: mine.pth, name: ours, image_size: 32}\n"
    )
    words = ["baseline", "--tpt.max_epochs=1", "--data.train_size=64", "--data.batch_size=32", "--quiet"]
    assert train.main([*words, f"--out={place / 'made'}"]) == 0
    (run,) = (place / "made").iterdir()
    run.rename(place / "RUN")
    return place


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def ranked(words, out, code=0):
    assert rank_backbones.main([*words, "--out-dir", str(out)]) == code
    found = json.loads((out / "rank_backbones.json").read_text())
    return found, {row["name"]: row for row in found["scores"]}


@torch.no_grad()
def plain(name, seed, images):
    """An untrained timm model on images in [0, 1], gray as three channels, by timm alone."""
    torch.manual_seed(seed)
    model = timm.create_model(name).eval()
    cfg = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[key])[:, None, None] for key in ("mean", "std"))
    inputs = (images.expand(-1, 3, -1, -1) - mean) / std
    return model, inputs, model.forward_head(model.forward_features(inputs), pre_logits=True)


def test_the_scores_are_those_of_scikit_learn_and_numpy_on_timms_own_features(tmp_path):
    names = ("test_resnet", "test_efficientnet")
    whole = "weights: untrained, image_size: 32, crop_pct: 1.0, interpolation: bilinear"  # as train.py reads them
    (tmp_path / "list.yaml").write_text("".join(f"- {{model: timm:{name}, {whole}}}\n" for name in names))
    words = [str(tmp_path / "list.yaml"), "--data.name", "digits", "--images", "200", "--seed", "3"]
    found, rows = ranked([*words, "--split", "test"], tmp_path)
    config = DataConfig(name="digits", image_size=32, batch_size=2)
    data = load(config, seed=3, image_size=lambda native: 32)
    assert found["train_images"] == 200 and found["held_out_images"] == 200 and found["classes"] == 10
    train_part, test = (stratified(part, 200, seed=3, what="") for part in (data.train, data.test))
    target, held = train_part.target.numpy(), test.target.numpy()
    features = {}
    for name in names:
        row = rows[f"timm:{name}=untrained"]
        model, inputs, tensor = plain(name, 3, train_part.images.float() / 255)
        features[name] = tensor
        x, y = tensor.double().numpy(), plain(name, 3, test.images.float() / 255)[2].double().numpy()
        scaler = StandardScaler().fit(x)
        probe = LogisticRegression(C=1 / (row["probe_l2"] * len(x)), max_iter=5000, tol=1e-8)
        probe.fit(scaler.transform(x), target)
        assert row["linear_probe"] == pytest.approx(probe.score(scaler.transform(y), held), abs=1 / 200 + 1e-9)
        nearest = []
        for i in range(len(x)):
            rest = np.arange(len(x)) != i
            centres = np.stack([x[rest & (target == c)].mean(0) for c in range(10)])
            nearest.append(np.argmin(((x[i] - centres) ** 2).sum(1)) == target[i])
        assert row["nearest_center"] == pytest.approx(np.mean(nearest), abs=1 / 200 + 1e-9)
        means = [x[target == c].mean(0) for c in range(10)]
        spread = [((x[target == c] - means[c]) ** 2).sum(1).mean() for c in range(10)]
        pairs = [
            (spread[i] + spread[j]) / (2 * ((means[i] - means[j]) ** 2).sum())
            for i in range(10)
            for j in range(10)
            if i != j
        ]
        assert row["cdnv"] == pytest.approx(np.mean(pairs), rel=1e-3)
        assert row["logme"] == pytest.approx(logme(tensor, train_part.target), abs=1e-3)
        assert row["dim"] == x.shape[1]
        assert row["parameters"] == sum(p.numel() for p in model.parameters()) - 1000 * (x.shape[1] + 1)
        if name == "test_resnet":
            chosen = torch.linspace(0, 199, 128).round().long()
            assert row["naswot"] == pytest.approx(naswot(model, inputs[chosen]), rel=1e-5)
        else:
            assert row["naswot"] is None and "silu" in row["no_naswot"]
    expected = ncti(features, train_part.target)
    assert {name: rows[f"timm:{name}=untrained"]["ncti"] for name in names} == {
        name: score.score for name, score in expected.items()
    }


def test_a_candidate_that_fails_is_named_and_the_others_keep_their_scores(here, tmp_path, capsys):
    failing = [
        "timm:resnet1=untrained",
        "timm:test_resnet=nowhere.pth",
        "my_model.py:dead",
        "my_model.py:sick",
        "my_model.py:raises",
        "timm:resnet18d_not=untrained",
    ]
    words = ["my_model.py:small=untrained", *failing, "--data.name", "folder", "--data.root", "my_images"]
    found, rows = ranked([*words, "--data.image_size", "32"], tmp_path, code=3)
    assert list(rows) == ["my_model.py:small=untrained"] and list(found["failed"]) == failing
    assert rows["my_model.py:small=untrained"]["ncti"] is None  # ranks need a second candidate
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith("error: 6 of 7 candidates could not be scored: timm:resnet1=untrained, ")
    assert all(f"NOT SCORED {name}: " in out for name in failing) and "Traceback" not in out + err
    assert "no timm model" in found["failed"][failing[0]]
    assert "nowhere.pth" in found["failed"][failing[1]]
    assert "the same for every image" in found["failed"][failing[2]]
    assert "not finite" in found["failed"][failing[3]]
    assert "KeyError" in found["failed"][failing[4]]
    assert (tmp_path / "rank_backbones.png").exists() and (tmp_path / "rank_backbones.svg").stat().st_size


def test_runs_weights_and_own_functions_stand_beside_each_other_on_any_images(here, tmp_path):
    """A run on gray images of ten classes scores colours of three: it sees gray, and its classes do not count."""
    words = ["RUN", "candidates.yaml", "--data.name", "folder", "--data.root", "my_images"]
    found, rows = ranked(words, tmp_path)
    assert set(rows) == {"RUN", "my_model.py:small=untrained", "ours"} and found["classes"] == 3
    assert rows["ours"]["image_size"] == 32 and rows["RUN"]["image_size"] == 28
    assert rows["ours"]["naswot"] is None and rows["my_model.py:small=untrained"]["naswot"] is not None
    assert rows["my_model.py:small=untrained"]["linear_probe"] == 1.0  # colours of their own
    assert found["scores"] == sorted(found["scores"], key=lambda row: -row["linear_probe"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["timm:test_resnet=untrained"], "name the images: --data.name SET"),
        (["timm:a", "--data.name", "digit"], "data.name='digit' is unknown"),
        (["timm:test_resnet=untrained", "timm:test_resnet=untrained", *DIGITS], "is given twice"),
        (["timm:test_resnet", *DIGITS, "--data.image_size", "-1"], "data.image_size=-1: must be pixels"),
        (["none.yaml", *DIGITS], "MODELS none.yaml cannot be read"),
        (["empty.yaml", *DIGITS], "empty.yaml holds no list"),
        (["key.yaml", *DIGITS], "'weight' is unknown"),
        (["kind.yaml", *DIGITS], "image_size='big': must be a whole number"),
        (["timm:test_resnet=untrained", *DIGITS, "--images", "0"], "--images 0: must be at least 1"),
        (["timm:test_resnet=untrained", *DIGITS, "--seed", "-1"], "--seed -1: must be"),
        (["nothing", *DIGITS], "is no run folder"),
        ([*DIGITS], "the following arguments are required: MODEL"),
        (["RUN", *DIGITS], "data.image_size=32: it takes images of 28 pixels"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(words, message, here, tmp_path, capsys):
    (here / "empty.yaml").write_text("")
    (here / "key.yaml").write_text("- {model: timm:test_resnet, weight: a.pth}\n")
    (here / "kind.yaml").write_text("- {model: timm:test_resnet, image_size: big}\n")
    assert rank_backbones.main([*words, "--out-dir", str(tmp_path / "out")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_model_without_pretrained_weights_is_told_both_ways_out(tmp_path):
    words = ["timm:darknet17", "timm:test_resnet=untrained", *DIGITS, "--images", "100"]
    found, _ = ranked(words, tmp_path, code=3)
    assert found["failed"] == {"timm:darknet17": "it has no pretrained weights: timm:darknet17=FILE or =untrained"}


def test_weights_behind_an_equals_sign_are_told_from_one_in_a_path():
    words = ["timm:a=b=c.pth", "runs/lr=0.1", "torchvision:vgg11=untrained", "dir/m.py:f=w.pth"]
    found = read_candidates(words, seed=4)
    assert [(c.word, str(c.options.weights), c.options.untrained) for c in found] == [
        ("timm:a", "b=c.pth", None),
        ("runs/lr=0.1", "None", None),
        ("torchvision:vgg11", "None", 4),
        ("dir/m.py:f", "w.pth", None),
    ]


def test_numbers_that_are_not_there_leave_table_and_figure_whole(tmp_path):
    """Features that fit their labels exactly have an infinite LogME; $ and _ in names are no formulas."""
    rows = tuple(
        BackboneScores(name, 0.5, (0.4, 0.6), 1.0, 0.5, float("inf"), float("inf"), 8, 10, 28, 2.0, 50.0)
        for name in ("a$b_c$", "x" * 90)
    )
    ranking = BackboneRanking("digits", {}, 10, 80, "val", 20, 0, rows, {"other": "no such file"})
    table = ranking_table(ranking)
    assert "inf" in table and "NOT SCORED other: no such file" in table and max(map(len, table.splitlines())) < 170
    drawn = draw_ranking(ranking, tmp_path / "figure.json")
    assert [path.suffix for path in drawn] == [".png", ".svg"] and "a$b_c$" in drawn[1].read_text()
    assert "LogME" not in drawn[1].read_text()


def test_one_folder_under_two_spellings_is_one_candidate():
    with pytest.raises(UserError, match="given twice"):
        read_candidates(["RUN", "RUN/"])


@pytest.mark.parametrize("words", COMMANDS, ids=[command[:60] for command in COMMANDS])
def test_every_command_of_the_page_runs(words, here, capsys):
    assert rank_backbones.main(shlex.split(words)) == 0, capsys.readouterr().err
