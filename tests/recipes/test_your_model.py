"""Models that recipes/train.py did not make: found, brought together with data, evaluated; the page's commands."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from sklearn.metrics import log_loss
from torch import nn

from ncreg.models import fold, swap_head
from recipes import evaluate, plot_collapse, predict, robustness, train
from recipes.core.errors import UserError
from recipes.data.side import Side
from recipes.data.split import resized
from recipes.evaluation.class_order import class_order
from recipes.evaluation.collapse import rankme
from recipes.evaluation.model_images import images_of
from recipes.evaluation.model_options import ModelOptions
from recipes.evaluation.model_under_test import open_model
from recipes.evaluation.presets import SPLITS
from recipes.evaluation.run_under_test import RunUnderTest

PAGE = Path(__file__).parents[2] / "docs" / "your_model_your_data.md"
SCRIPTS = {
    script.__name__.rpartition(".")[2]: script for script in (evaluate, plot_collapse, predict, robustness, train)
}
COLOURS = {"blue": (40, 40, 220), "green": (30, 200, 40), "red": (220, 30, 30)}

OWN = """
import torch
from torch import nn

def build(outputs=3, channels=3, bias=True):
    torch.manual_seed(0)
    body = [nn.Conv2d(channels, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(8, outputs, bias=bias))

def five(): return build(5)
def two(): return build(2)
def gray(): return build(channels=1)
def no_bias(): return build(bias=False)
def named():
    model = build()
    model.class_names = ["red", "blue", "green"]
    return model
def half(): return named().half()
def double(): return named().double()
def numbered():  # as config.json holds them
    model = build(12)
    model.config = type("Config", (), {"id2label": {str(number): f"class {number}" for number in range(12)}})()
    return model
def strangers():
    model = build()
    model.class_names = ["cat", "dog", "owl"]
    return model
def broken(): return 1 / 0
def number(): return 3
"""


BY_NAME = """
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

def vit():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=3))

class Plain(nn.Module):
    def __init__(self, name=None):
        super().__init__()
        torch.manual_seed(0)
        self.name, self.fc = name, nn.Linear(8, 3)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x):
        logits = self.fc(self.body(x))
        return logits if self.name is None else {self.name: logits, "aux": None}

def plain(): return Plain()
def mapping(): return Plain("logits")
def other(): return Plain("out")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images of three colours, weights, a file of one's own, a folded model and features."""
    place = tmp_path_factory.mktemp("place")
    draw = np.random.default_rng(0)
    for part, count in (("train", 10), ("test", 5)):
        for name, colour in COLOURS.items():
            folder = place / "my_images" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = draw.integers(-30, 30, (24, 30, 3))
                Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    stored = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": stored}, place / "mine.pth")
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), place / "tv.pth")
    (place / "my_model.py").write_text(OWN)
    timm.models.save_for_hf(fold(swap_head("test_resnet", "linear", num_classes=3).eval()), str(place / "folded"))
    for name, count in (("train", 90), ("test", 30)):
        target = np.arange(count) % 3
        features = (3 * np.eye(3, 6)[target] + draw.normal(size=(count, 6))).astype(np.float32)
        weight = {"weight": np.eye(3, 6, dtype=np.float32), "bias": np.zeros(3, np.float32)}
        np.savez(place / f"{name}.npz", features=features, target=target, **(weight if name == "train" else {}))
    return place


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


DATA = ["--data.name", "folder", "--data.root", "my_images"]
COMMANDS = re.findall(
    r"^\$ python recipes/(\w+)\.py (.*)$", PAGE.read_text().partition("## Your data")[0], re.MULTILINE
)


@pytest.mark.parametrize(("script", "words"), COMMANDS, ids=[" ".join(command)[:70] for command in COMMANDS])
def test_every_command_of_the_page_runs(script, words, here, capsys):
    assert SCRIPTS[script].main(shlex.split(words)) == 0, capsys.readouterr().err


def result_of(args, here, out):
    assert evaluate.main([*args, "--out-dir", str(out)]) == 0
    (path,) = out.glob("*.json")
    return json.loads(path.read_text()), path.with_suffix(".html").read_text()


@torch.no_grad()
def test_a_timm_models_numbers_are_those_of_timms_own_pipeline(here, tmp_path):
    """Accuracy, loss and confusions against timm's transform and the model itself; NC4's classifier is the same."""
    result, page = result_of(["timm:test_resnet", "--weights", "mine.pth", *DATA], here, tmp_path / "out")
    model = timm.create_model("test_resnet", num_classes=3)
    stored = torch.load("mine.pth")["state_dict"]
    model.load_state_dict({name.removeprefix("module."): value for name, value in stored.items()})
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    files = [(file, label) for label, name in enumerate(COLOURS) for file in Path("my_images/test", name).iterdir()]
    images = torch.stack([transform(Image.open(file)) for file, _ in files])
    target = np.array([label for _, label in files])
    logits = model.eval()(images)
    assert result["accuracy"] == pytest.approx((logits.argmax(1).numpy() == target).mean())
    assert result["loss"] == pytest.approx(log_loss(target, logits.double().softmax(1).numpy()), rel=2e-2)
    assert result["classifier_accuracy"] == pytest.approx(result["accuracy"])
    own = logits[range(len(target)), target]
    rival = logits.clone()
    rival[range(len(target)), target] = -torch.inf
    median = float((own - rival.amax(1)).median())
    assert result["report"]["test"]["margins"]["median"] == pytest.approx(median, abs=0.02 * float(logits.std()))
    assert set(result["report"]) == {"train", "test"} and result["report"]["train"]["images"] == 27
    assert "http" not in re.sub(r'(xmlns|xlink|rdf|cc|dc)[:\w]*="[^"]*"', "", page).replace("http://www.w3.org", "")
    assert "share a direction" in page and page.count("<svg") >= 5


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("size", [(50, 80), (300, 200), (224, 224)])
def test_images_are_scaled_and_cropped_as_timm_does(interpolation, size):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)).resize(size[::-1])
    transform = timm.data.create_transform((3, 96, 96), interpolation=interpolation, crop_pct=0.875, mean=0.0, std=1.0)
    expected = transform(image)
    side = Side(96, shorter=109, interpolation=interpolation)
    got = resized(torch.from_numpy(np.array(image)).permute(2, 0, 1), side) / 255
    assert got.shape == expected.shape
    shift = [(got - expected.roll((a, b), (1, 2)))[:, 2:-2, 2:-2].abs() for a in (-1, 0, 1) for b in (-1, 0, 1)]
    assert min(float(gap.mean()) for gap in shift) < 0.5 / 255 if interpolation != "nearest" else True


@pytest.mark.parametrize(
    ("options", "shorter"),
    [({}, 256), ({"image_size": 48}, 48), ({"image_size": 48, "crop_pct": 0.875}, 54), ({"crop_pct": 1.0}, 224)],
)
def test_of_a_model_that_says_nothing_a_named_size_is_not_cut_out_of_a_larger_one(options, shorter):
    """A net trained on whole images of 48 pixels lost 17 points to a crop that nobody had asked for."""
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    side = images_of(swap_head(plain, "keep", norm="none"), ModelOptions(**options)).side
    assert (int(side), side.shorter) == (options.get("image_size", 224), shorter)
    timms = swap_head(timm.create_model("test_resnet", num_classes=3), "keep")  # which says 0.95
    assert images_of(timms, ModelOptions(image_size=48)).side.shorter == 50


def test_classes_go_by_name(here, tmp_path):
    """The outputs are red, blue, green; the folders are sorted blue, green, red."""
    small = ["--image-size", "32", *DATA]
    by_order, _ = result_of(["my_model.py:build", *small], here, tmp_path / "order")
    by_name, _ = result_of(["my_model.py:named", *small], here, tmp_path / "name")
    assert list(by_name["per_class"]) == ["red", "blue", "green"]
    rows = np.array(by_order["confusion"])  # by order: output 0 is blue, 1 green, 2 red; the model is the same
    moved = rows[[2, 0, 1]]
    assert by_name["confusion"] == moved.tolist()
    said, _ = result_of(["my_model.py:build", "--class-names", "red,blue,green", *small], here, tmp_path / "said")
    assert said["confusion"] == by_name["confusion"]


def test_classes_without_images_are_null(here, tmp_path):
    result, page = result_of(["my_model.py:five", "--image-size", "32", *DATA], here, tmp_path / "out")
    assert list(result["per_class"]) == [*COLOURS, "output 3", "output 4"]
    assert result["per_class"]["output 4"] is None and "no image" in page
    row = result["report"]["test"]["per_class"]["output 3"]
    assert row == {"images": 0, "accuracy": None, "nearest": None, "cosine": None, "length": None}
    assert np.array(result["confusion"]).shape == (5, 5) and np.isfinite(result["nc1"])


def test_evaluations_that_need_every_class_say_so(here, tmp_path):
    words = ["my_model.py:five", "--image-size", "16", *DATA, "--quick", "--parts", "ood,long_tail,calibration"]
    assert robustness.main([*words, "--quiet", "--out-dir", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "robustness" / "results.json").read_text())
    assert "2 outputs of the model have none" in found["skipped"]["ood"] and "calibration" in found["parts"]
    assert "2 of the 5 classes have no training image" in found["skipped"]["long_tail"]


def test_results_of_a_model_on_other_images_are_not_taken_for_those_of_these(here, tmp_path, capsys):
    """Another folder, another image in it, another size or other classes: what is kept is of other images."""
    for name in ("one", "two"):
        shutil.copytree("my_images", tmp_path / name)
    words = ["my_model.py:named", "--data.name", "folder", "--quick", "--parts", "calibration", "--quiet"]
    words += ["--out-dir", str(tmp_path / "out"), "--data.root"]
    image = tmp_path / "two" / "test" / "red" / "0.png"
    assert robustness.main([*words, str(tmp_path / "one"), "--image-size", "16"]) == 0
    kept = (tmp_path / "out" / "robustness" / "results.json").read_bytes()
    assert robustness.main([*words, str(tmp_path / "two"), "--image-size", "16"]) == 0  # the same images elsewhere
    Image.fromarray(np.full((24, 30, 3), 9, np.uint8)).save(image)
    others = ["--image-size", "16"], ["--image-size", "20"], ["--image-size", "16", "--data.train_size", "12"]
    for place, more in zip(("two", "one", "one"), others, strict=True):
        capsys.readouterr()
        assert robustness.main([*words, str(tmp_path / place), *more]) == 2
        said = capsys.readouterr().err
        assert "results.json was made with images='" in said and "--out NAME keeps both, --fresh replaces" in said
    assert (tmp_path / "out" / "robustness" / "results.json").read_bytes() == kept
    assert robustness.main([*words, str(tmp_path / "two"), "--image-size", "16", "--out", "other"]) == 0
    assert (tmp_path / "out" / "other" / "results.json").read_bytes() != kept


def test_classes_that_are_held_out_shift_no_other(here, tmp_path):
    words = ["my_model.py:named", "--image-size", "16", *DATA]
    whole, _ = result_of(words, here, tmp_path / "whole")
    less, _ = result_of([*words, "--data.hold_out", "[1]"], here, tmp_path / "less")
    assert less["per_class"] == whole["per_class"] | {"green": None} and less["images"] == 10
    every, _ = result_of([*words, "--data.hold_out", "[1]", "--split", "all"], here, tmp_path / "all")
    assert every["images"] == 30 and every["per_class"]["green"] is None
    overrides = ["--data.name=folder", "--data.root=my_images", "--data.hold_out=[1]"]
    tested = RunUnderTest.open("my_model.py:named", options=ModelOptions(image_size=16), overrides=overrides)
    assert {tested.data.class_names[label] for label in tested.data.test.target.tolist()} == {"red", "blue"}
    assert tested.unseen_classes().images.shape == (5, 3, 16, 16)


def test_a_head_without_bias_and_gray_images(here, tmp_path, capsys):
    assert result_of(["my_model.py:no_bias", "--image-size", "32", *DATA], here, tmp_path / "bias")[0]["images"] == 15
    result_of(["my_model.py:gray", "--image-size", "32", *DATA], here, tmp_path / "gray")
    assert "colour is taken as gray" in capsys.readouterr().err
    digits = ["timm:test_resnet", "--weights", "mine.pth", "--image-size", "32", "--data.name", "digits"]
    assert evaluate.main(digits) == 2
    assert "MODEL has 3 outputs, the data 10 classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["my_model.py:two", *DATA], "MODEL has 2 outputs, the data 3 classes (blue, green, red): it needs"),
        (["my_model.py:strangers", *DATA], "classes differ: MODEL knows 3 (cat, dog, owl), the data has 3 (blue,"),
        (["my_model.py:broken", *DATA], "MODEL my_model.py:broken: calling it fails at line 28: ZeroDivisionError"),
        (["my_model.py:number", *DATA], "MODEL my_model.py:number returns an int, not a torch.nn.Module"),
        (["my_model.py:nothing", *DATA], "my_model.py has no 'nothing'"),
        (["my_model.py", *DATA], "MODEL my_model.py: name the function that returns the model, my_model.py:FUNCTION"),
        (["mine.pth", *DATA], "MODEL mine.pth holds weights alone: name their model, timm:NAME --weights mine.pth"),
        (["timm:test_resnet", "--weights", "mine.pth"], "MODEL timm:test_resnet comes without data: --data.name SET"),
        (["timm:test_resnet", "--weights", "none.pth", *DATA], "--weights none.pth: "),
        (["timm:test_resnet", "--weights", "tv.pth", *DATA], "MODEL timm:test_resnet: model='test_resnet': weights: "),
        (
            ["timm:test_resnext", "--weights", "mine.pth", *DATA],
            "MODEL timm:test_resnext: model='test_resnext' is no timm",
        ),
        (["timm:test_resnet", "--weights", "mine.pth", "--num-classes", "4", *DATA], "MODEL timm:test_resnet: "),
        (
            ["folded", "--weights", "mine.pth", *DATA],
            "--weights is for timm: and torchvision: models; MODEL folded has",
        ),
        (["my_images", *DATA], "RUN my_images is no run folder"),
        (["my_model.py:build", "--mean", "0.5,0.5", *DATA], "--mean (0.5, 0.5): MODEL takes 3 channels"),
        (["my_model.py:build", "--std", "0", *DATA], "--std (0.0,): must be positive"),
        (["my_model.py:build", "--crop-pct", "7", *DATA], "--crop-pct 7.0: must be a share in (0, 1]"),
        (["my_model.py:build", "--layers", "nose", *DATA], "--layers: layer 'nose' is none of"),
        (["my_model.py:build", "--class-names", "a,b", *DATA], "--class-names has 2 (a, b) names for 3 outputs"),
        (["my_model.py:build", "--checkpoint", "onset", *DATA], "--checkpoint onset is for run folders"),
        (["my_model.py:build", "--test-features", "test.npz", *DATA], "--test-features goes with --features"),
        (["my_model.py:build", "--features", "test.npz"], "give one of them alone: MODEL, --features FILE"),
        (["--features", "test.npz", *DATA], "--data.name with --features: the file holds the data"),
        (["--features", "test.npz", "--layers", "all"], "--layers with --features: it needs a model"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(words, line, here, capsys):
    assert evaluate.main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and line in printed.err, printed.err


def test_a_run_keeps_its_own_data_and_its_own_images(here, capsys):
    words = ["etf", "--data.train_size", "64", "--data.batch_size", "32", "--tpt.max_epochs", "1", "--out", "own"]
    assert train.main([*words, "--quiet"]) == 0
    (run,) = map(str, Path("own").glob("digits-*"))
    for script in (robustness, plot_collapse):
        assert script.main([run, "--data.name", "digits"]) == 2
        assert script.main([run, "--out-dir", "elsewhere"]) == 2
        assert capsys.readouterr().err.count("is for models that are no runs") == 2
    assert evaluate.main([run, "--image-size", "64"]) == 2
    assert "--image-size is for models that are no runs" in capsys.readouterr().err
    assert evaluate.main([run]) == 0 and Path(run, "evaluation-digits-test.html").is_file()


def numpy_measures(features, target):
    """RankMe, and the largest cosine of two centred class means."""
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    shares = values / values.sum() + 1e-7
    means = np.stack([features[target == label].mean(0) for label in np.unique(target)]).astype(np.float64)
    means -= means.mean(0)
    unit = means / np.linalg.norm(means, axis=1, keepdims=True)
    return np.exp(-(shares * np.log(shares)).sum()), np.max(unit @ unit.T - 2 * np.eye(len(unit)))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("kind", ["float32", "float64", "float16", ">f4"])
def test_features_alone_against_numpy(here, tmp_path, monkeypatch, save, kind):
    monkeypatch.setattr("recipes.evaluation.feature_store.BLOCK_BYTES", 400)  # many blocks
    with np.load("train.npz") as held:
        features, target, weight = held["features"], held["target"], held["weight"]
    save(tmp_path / "f.npz", features=features.astype(kind), target=target.astype(np.int32), weight=weight)
    assert evaluate.main(["--features", str(tmp_path / "f.npz"), "--out-dir", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "features.json").read_text())["report"]["train"]
    used, closest = numpy_measures(features.astype(kind).astype(np.float64), target)
    assert record["measures"]["rankme"] == pytest.approx(used, rel=1e-5)
    assert record["closest"][0]["cosine"] == pytest.approx(closest, rel=1e-4)
    guess = (features @ weight.T).argmax(1)
    assert record["measures"]["accuracy"] == pytest.approx((guess == target).mean(), abs=0.02)


def test_features_without_a_last_layer_say_nothing_of_one(here, tmp_path):
    assert evaluate.main(["--features", "test.npz", "--out-dir", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "features.json").read_text())["report"]["train"]
    assert "nc3" not in record["measures"] and "margins" not in record and record["measures"]["nc1"] > 0
    assert "no array weight" in (tmp_path / "features.html").read_text()


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ({"target": np.arange(4)}, "it has no array features; there: target"),
        ({"features": np.ones((4, 2))}, "target must be 4 whole numbers"),
        ({"features": np.ones((4, 2)), "target": np.arange(5)}, "target must be 4 whole numbers"),
        ({"features": np.ones((4, 2), int), "target": np.arange(4)}, "features must be numbers (N, d), floating point"),
        ({"features": np.full((4, 2), np.nan), "target": np.arange(4)}, "features hold NaN or infinite values"),
        ({"features": np.ones((4, 2)), "target": -np.arange(4)}, "target holds -3: classes are counted from 0"),
        (
            {"features": np.ones((0, 16)), "target": np.arange(0)},
            "features (0, 16) are empty: the file holds 0 rows of 16",
        ),
        (
            {"features": np.ones((4, 2)), "target": np.arange(4)[:, None]},
            "target must be 4 whole numbers, shape (4,), a class for each row of features; it is int64 (4, 1)",
        ),
        (
            {"features": np.ones((4, 2)), "target": np.arange(4) % 3 * 10**9},
            "target goes up to 2000000000 with 3 distinct values: classes are counted from 0; _, target = numpy.unique",
        ),
        ({"features": np.ones((4, 2)), "target": np.arange(4), "bias": np.ones(4)}, "has an array bias but no weight"),
        ({"features": np.ones((4, 2)), "target": np.arange(4), "weight": np.ones((3, 2))}, "weight has 3 rows, target"),
        ({"features": np.ones((4, 2)), "target": np.arange(4), "weight": np.ones((4, 5))}, "weight must be floating"),
    ],
)
def test_features_that_cannot_be_measured_are_one_line(arrays, line, tmp_path, capsys):
    np.savez(tmp_path / "f.npz", **arrays)
    assert evaluate.main(["--features", str(tmp_path / "f.npz")]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and line in printed, printed


def test_features_by_column_give_the_same_numbers(here, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.evaluation.feature_store.BLOCK_BYTES", 240)  # several blocks
    held = dict(np.load("train.npz"))
    by_column = held | {"features": np.asfortranarray(held["features"])}
    reports = []
    for name, arrays in (("rows", held), ("columns", by_column)):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        result, _ = result_of(["--features", str(tmp_path / f"{name}.npz")], here, tmp_path / name)
        reports.append(result["report"])
    assert reports[0] == reports[1]


def test_labels_that_begin_at_one_are_said(tmp_path, capsys):
    target = np.arange(40) % 3 + 1
    features = np.eye(4)[target] + np.random.default_rng(0).normal(size=(40, 4))
    np.savez(tmp_path / "f.npz", features=features, target=target)
    assert evaluate.main(["--features", str(tmp_path / "f.npz"), "--out-dir", str(tmp_path / "out")]) == 0
    assert "note: labels of --features begin at 1: class 0 has no samples" in capsys.readouterr().err


def test_images_that_may_have_been_trained_on_are_said(here, tmp_path, capsys):
    """Of class folders alone a part is drawn; beside it, what is told is the way that takes held-out images alone."""
    model = ["my_model.py:named", "--data.name", "folder", "--image-size", "32", "--out-dir", str(tmp_path)]
    alone = ["--data.root", "my_images/train"]
    caveat = "if model was trained on this data, these images are not held out"

    def said(script, *words):
        assert script.main([*model, *words]) == 0
        return capsys.readouterr().err.lower()

    few = ["--train-images", "0"]
    told = said(evaluate, *alone, *few)
    assert f"a fifth was drawn; --split all takes every image. {caveat}" in told and "with --split all" in told
    told = said(evaluate, *alone, *few, "--split", "val")
    assert "no validation part" in told and caveat in told and "val/ and test/ beside train/" in told
    for words in [*alone, "--split", "all"], [*alone, "--split", "train"], ["--data.root", "my_images"]:
        assert caveat not in said(evaluate, *words, *few)
    calibration = ["--parts", "calibration", "--quick"]
    told = said(robustness, *alone, *calibration)
    assert f"a fifth was drawn. {caveat}" in told and "--split all" not in told  # which it does not have
    assert caveat not in said(robustness, "--data.root", "my_images", *calibration, "--fresh", "--out", "other")
    assert caveat not in said(plot_collapse, *alone) and caveat in said(plot_collapse, *alone, "--split", "test")


def test_images_of_a_single_class_are_evaluated(here, tmp_path, capsys):
    """The outputs are red, blue, green: what is counted is what the model says of the green images."""
    alone = tmp_path / "alone" / "green"
    shutil.copytree("my_images/train/green", alone)
    data = ["--data.name", "folder", "--data.root", str(alone.parent), "--image-size", "32"]
    out = ["--split", "all", "--out-dir", str(tmp_path / "out")]
    assert evaluate.main(["my_model.py:named", *data, *out]) == 0, capsys.readouterr().err
    (path,) = (tmp_path / "out").glob("*.json")
    result = json.loads(path.read_text())
    whole, _ = result_of(["my_model.py:named", *DATA, "--image-size", "32", "--split", "train"], here, tmp_path / "w")
    assert [result["per_class"][name] for name in ("red", "blue")] == [None, None]
    assert np.array(result["confusion"]).sum() == 10 and result["accuracy"] == result["per_class"]["green"]
    assert result["nc1"] is None
    assert (
        plot_collapse.main(["my_model.py:named", *data, "--out-dir", str(tmp_path / "figure"), "--split", "all"]) == 0
    )
    printed = capsys.readouterr()
    assert "no image of 2 (red, blue) among those shown: the figure is of 1 (green)" in printed.err
    (view,) = json.loads((tmp_path / "figure/collapse/view-all.json").read_text())["views"]
    assert (
        view["share"] is None
        and view["means"] == [[0, 0]]
        and np.mean(view["samples"], 0) == pytest.approx(0, abs=5e-4)
    )
    results = tmp_path / "robustness"
    parts = ["--parts", "calibration,ood,long_tail,bits", "--quick", "--split", "val"]
    assert robustness.main(["my_model.py:named", *data, *parts, "--out-dir", str(results)]) == 0
    assert "not done\n  calibration: one half of the validation images fits T" in capsys.readouterr().out
    assert robustness.main(["my_model.py:named", *data, *parts[:3], "--out-dir", str(results)]) == 0
    found = json.loads((results / "robustness/results.json").read_text())
    assert found["parts"]["calibration"]["samples"] == 2 and found["parts"]["bits"]["levels"]["full"]["nc1"] is None
    assert found["skipped"] == {
        "ood": "its scores need training images of every class; 2 outputs of the model have none",
        "long_tail": "2 of the 3 classes have no training image",
    }
    assert train.main(["etf", *data[:4]]) == 2
    assert "has 1 class folder: a classifier needs at least 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("counts", "split", "tested", "not_done"),
    [
        ({"green": 1}, "test", 1, ["calibration", "ood", "transfer", "long_tail"]),
        ({"green": 1}, "val", 1, ["calibration", "ood", "transfer", "long_tail"]),
        ({"green": 2}, "test", 1, ["calibration", "ood", "transfer", "long_tail"]),
        ({"red": 1, "blue": 1, "green": 1}, "test", 3, ["calibration", "ood", "transfer", "long_tail"]),
        ({"red": 1, "blue": 1, "green": 1}, "val", 3, ["ood", "transfer", "long_tail"]),
    ],
)
def test_images_too_few_to_be_divided_are_evaluated(
    counts, split, tested, not_done, here, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("recipes.evaluation.run_under_test.SETS", ())
    for name, count in counts.items():
        (tmp_path / "few" / name).mkdir(parents=True)
        for number in range(count):
            shutil.copy(f"my_images/train/{name}/{number}.png", tmp_path / "few" / name)
    data = ["--data.name", "folder", "--data.root", str(tmp_path / "few"), "--image-size", "32"]
    words = ["my_model.py:named", *data, "--split", split, "--out-dir", str(tmp_path / "out")]
    parts = "calibration,ood,transfer,long_tail,bits,distances"
    assert robustness.main([*words, "--quick", "--parts", parts]) == 0, capsys.readouterr().err
    printed = capsys.readouterr()
    (path,) = (tmp_path / "out").glob("robustness*/results.json")
    found = json.loads(path.read_text())
    assert sorted(found["skipped"]) == sorted(not_done) and all(f"  {name}: " in printed.out for name in not_done)
    assert found["parts"]["bits"]["images"] == found["parts"]["distances"]["images"] == tested
    alone = ["my_model.py:named", *data, "--out-dir", str(tmp_path / "alone"), "--split", "all"]
    assert evaluate.main(alone) == 0
    (path,) = (tmp_path / "alone").glob("*.json")
    whole = json.loads(path.read_text())
    assert whole["images"] == sum(counts.values())
    if tested == whole["images"]:  # the same decisions, counted elsewhere
        assert found["parts"]["bits"]["levels"]["full"]["accuracy"] == whole["accuracy"]
        assert f"this data has no {SPLITS[split]} part, and too few images to draw one" in printed.err
    assert plot_collapse.main(alone) == 0
    (view,) = json.loads((tmp_path / "alone/collapse/view-all.json").read_text())["views"]
    assert len(view["samples"]) == sum(counts.values()) and (view["share"] is None) is (len(counts) == 1)


def test_models_in_other_precisions_get_images_in_theirs(here, tmp_path, capsys):
    found = {}
    for name in ("named", "half", "double"):
        words, out = [f"my_model.py:{name}", "--image-size", "32"], tmp_path / name
        more = [*DATA, "--out-dir", str(out)]
        assert robustness.main([*words, *more, "--quick", "--parts", "calibration,distances"]) == 0
        assert plot_collapse.main([*words, *more, "--split", "test"]) == 0
        assert predict.main([*words, "my_images/test", "--out", str(out / "p.json"), "--format", "json"]) == 0
        parts = json.loads((out / "robustness/results.json").read_text())["parts"]
        rows = json.loads((out / "p.json").read_text())
        numbers = [*parts["calibration"]["before"].values()][:5]
        found[name] = [*numbers, parts["distances"]["rho"], *(p for row in rows for p in row["probabilities"].values())]
    capsys.readouterr()
    assert len(found["named"]) == 6 + 3 * 15
    np.testing.assert_allclose(found["double"], found["named"], rtol=1e-4)
    np.testing.assert_allclose(found["half"][6:], found["named"][6:], atol=2e-3)
    np.testing.assert_allclose(found["half"][3:6], found["named"][3:6], rtol=5e-2)  # Brier score, loss and ρ


def test_a_share_that_another_would_mend_is_still_refused(here, capsys):
    for script in (robustness, plot_collapse):
        assert script.main(["my_model.py:named", *DATA, "--image-size", "32", "--data.val_share", "0.01"]) == 2
        assert "0.1 to 0.9 would do" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "words", "line"),
    [
        (evaluate, ["my_model.py:build", *DATA, "--out-dir", "mine.pth"], "--out-dir mine.pth cannot be written to"),
        (evaluate, ["--features", "train.npz", "--out-dir", "mine.pth/a"], "--out-dir mine.pth/a cannot be written to"),
        (robustness, ["my_model.py:build", *DATA, "--out-dir", "mine.pth"], "mine.pth is a file, not a folder"),
        (plot_collapse, ["my_model.py:build", *DATA, "--out-dir", "mine.pth"], "mine.pth is a file, not a folder"),
        (
            predict,
            ["my_model.py:build", "my_images", "--out", "no/p.csv"],
            "--out no/p.csv cannot be written: the folder",
        ),
        (
            predict,
            ["my_model.py:build", "my_images", "--out", "my_images"],
            "--out my_images cannot be written: it is a",
        ),
    ],
)
def test_results_that_cannot_be_written_are_refused_before_any_work(script, words, line, here, capsys, monkeypatch):
    monkeypatch.setattr("recipes.evaluation.model_under_test.find_model", None)  # not reached
    assert script.main(words) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and line in printed.err, printed.err


def test_weights_that_are_no_tensors_by_name(here, capsys):
    model = timm.create_model("test_resnet", num_classes=3)
    torch.save(model, "whole.pth")
    Path("empty.pth").write_bytes(b"")
    body = {name: value for name, value in model.state_dict().items() if not name.startswith("fc.")}
    torch.save(body, "body.pth")
    torch.save({**model.state_dict(), "fc.bias": torch.full((3,), torch.inf)}, "inf.pth")
    for name, line in (
        (
            "whole",
            "hold objects of Python (timm.models.resnet.ResNet), such as a whole model, not tensors by name alone",
        ),
        ("empty", "weights empty.pth cannot be read: the file is empty"),
        ("body", "only the classifier is missing, fc.weight, fc.bias: they are of a backbone alone"),
        ("inf", "hold infinite values: fc.bias"),
        ("none", "none.pth does not exist: weights are a file .pth, .pt, .bin or .safetensors"),
    ):
        assert evaluate.main(["timm:test_resnet", "--weights", f"{name}.pth", *DATA]) == 2
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1 and line in printed.err and "\x1b" not in printed.err, printed.err


def test_models_that_return_logits_by_name(here, tmp_path, capsys):
    """A model of Hugging Face and one that returns a dict: the accuracy is that of their own logits."""
    pytest.importorskip("transformers")
    (tmp_path / "hf.py").write_text(BY_NAME)
    size = ["--image-size", "32", "--crop-pct", "1", *DATA]
    for name in ("vit", "mapping"):
        result, _ = result_of([f"{tmp_path}/hf.py:{name}", *size], here, tmp_path / name)
        assert result["images"] == 15 and result["classifier_accuracy"] == pytest.approx(result["accuracy"])
    plain, _ = result_of([f"{tmp_path}/hf.py:plain", *size], here, tmp_path / "plain")
    assert plain["loss"] == json.loads(next((tmp_path / "mapping").glob("*.json")).read_text())["loss"]
    capsys.readouterr()
    assert evaluate.main([f"{tmp_path}/hf.py:other", *size]) == 2
    assert "forward returns a dict: wrap it in a module that returns logits" in capsys.readouterr().err


def test_a_relu_behind_the_last_layer_is_said(here, tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1(num_classes=3).state_dict(), "squeeze.pth")
    words = ["torchvision:squeezenet1_1", "--weights", "squeeze.pth", "--image-size", "32", *DATA]
    result_of(words, here, tmp_path / "out")
    assert "note: MODEL's logits are no affine map of its pooled features" in capsys.readouterr().err


def test_one_image_of_each_class_points_to_all(here, tmp_path, capsys):
    for name, colour in COLOURS.items():
        (tmp_path / "few" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), colour).save(tmp_path / "few" / name / "0.png")
    words = ["my_model.py:build", "--image-size", "32", "--data.name", "folder", "--data.root", str(tmp_path / "few")]
    assert evaluate.main(words) == 2
    assert "--split all evaluates every image" in capsys.readouterr().err
    assert evaluate.main([*words, "--split", "all", "--out-dir", str(tmp_path / "out")]) == 0


def test_damaged_and_other_files_of_features_are_one_line(here, tmp_path, capsys):
    whole = Path("train.npz").read_bytes()
    for content in (b"nothing", whole[: len(whole) // 2]):
        (tmp_path / "f.npz").write_bytes(content)
        assert evaluate.main(["--features", str(tmp_path / "f.npz")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    np.savez(tmp_path / "g.npz", features=np.ones((3, 9)), target=np.arange(3))
    assert evaluate.main(["--features", "train.npz", "--test-features", str(tmp_path / "g.npz")]) == 2
    assert "has 9 dimensions" in capsys.readouterr().err


def test_rankme_of_equal_directions_is_their_number():
    counts = torch.tensor([5, 5, 5])
    assert rankme(torch.zeros(8, 8).double(), torch.eye(3, 8).double(), counts) == pytest.approx(3, rel=1e-4)


def test_the_order_of_classes():
    order = class_order([("n01", "n02"), ("cat", "dog")], ("dog",), 2, model="MODEL")
    assert order.names == ("cat", "dog") and order.output.tolist() == [1] and not order.note
    with pytest.raises(UserError, match=r"classes differ: MODEL knows 2 \(n01, n02\), the data has 1 \(owl\)"):
        class_order([("n01", "n02"), ("cat", "dog")], ("owl",), 2, model="MODEL")


def test_classes_named_by_numbers():
    """ImageNetV2 has a folder for each output of ImageNet's models, "0" to "999", which sort as text to 0, 1, 10 …"""
    folders = sorted(str(number) for number in range(12))
    wordnet = tuple(f"n{1440764 + number:08}" for number in range(12))
    order = class_order([wordnet], folders, 12, model="MODEL")
    assert [order.names[output] for output in order.output] == [wordnet[int(folder)] for folder in folders]
    assert "numbers of MODEL's outputs, 0 for n01440764;" in order.note
    assert class_order([wordnet], ["07", "3"], 12, model="MODEL").output.tolist() == [7, 3]
    words = tuple(f"word {number}" for number in range(12))
    for known, wrong in ((wordnet, ["0", "12"]), (wordnet, ["1", "01"]), (wordnet, ["1", "x"]), (words, folders)):
        with pytest.raises(UserError, match="classes differ"):
            class_order([known], wrong, 12, model="MODEL")
    nameless = class_order([], folders, 12, model="MODEL")
    assert nameless.output.tolist() == list(range(12)) and "sorted as text" in nameless.note
    assert "sorted as text" not in class_order([], folders[:2], 12, model="MODEL").note
    assert "sorted as text" not in class_order([], ["cat", "dog"], 2, model="MODEL").note


def test_names_under_numbers_as_strings_are_in_the_order_of_the_numbers(here):
    tested = open_model("my_model.py:numbered", ModelOptions(image_size=32), needs_data=False)
    assert tested.names == [tuple(f"class {n}" for n in range(12))]


def test_names_come_from_the_file_of_weights(here, tmp_path):
    held = torch.load("mine.pth")
    torch.save(held | {"class_to_idx": {"red": 0, "blue": 1, "green": 2}}, tmp_path / "named.pth")
    options = ModelOptions(weights=tmp_path / "named.pth")
    tested = open_model("timm:test_resnet", options, needs_data=False)
    assert tested.names == [("red", "blue", "green")]
    assert "92 tensors taken, from under state_dict.module" in tested.notes[0]
    assert not any(isinstance(part, nn.Dropout) and part.training for part in tested.model.modules())


def test_classes_that_only_look_like_a_models_are_named():
    with pytest.raises(
        UserError, match=re.escape(r"'cafe\u0301' and 'caf\xe9' differ only in case, spaces or the comp")
    ):
        class_order([("bar", "caf\xe9")], ("bar", "cafe\u0301"), 2, model="MODEL")
