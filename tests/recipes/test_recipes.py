"""The command line and the training loop: real runs on digits, small; every promise of a run folder; every refusal."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from ncreg.checkpoint import load_checkpoint, load_classifier, save_checkpoint
from ncreg.heads import ETFHead
from ncreg.metrics import NeuralCollapse
from ncreg.norms import LastBatchNorm
from recipes.core.cli import CONFIGS, parse, recipes
from recipes.core.config import TermConfig, TrainConfig, as_yaml
from recipes.core.errors import UserError
from recipes.data.augment import epoch_order
from recipes.data.load import load
from recipes.train import main, train
from recipes.training import reporting as report
from recipes.training.build import build_model
from recipes.training.loss_terms import build_terms
from tests import warm_start

ROOT = Path(__file__).parents[2]
SHORT = ["--data.train_size", "256", "--data.batch_size", "64", "--tpt.max_epochs", "4", "--tpt.min_terminal", "2"]
EARLY = ["--tpt.threshold", "0.3", "--tpt.patience", "1", "--tpt.extend", "0.5", "--quiet", "true"]


def read(path):
    return json.loads(path.read_text())


def epochs(path):
    return [json.loads(row) for row in (path / "history.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One short run of the etf recipe that finds its (lowered) onset and passes through the terminal phase."""
    out = tmp_path_factory.mktemp("runs")
    config = parse(["etf", *SHORT, *EARLY, "--out", str(out), "--tpt.max_epochs", "12", "--optim.lr", "0.2"])
    return train(config, ["recipes/train.py", "etf"])


def test_a_run_leaves_everything_it_promises(run):
    assert {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()} == {
        "config.yaml",
        "data.json",
        "environment.json",
        "lock",
        "history.jsonl",
        "summary.json",
        "timing.json",
        "checkpoints/last.pt",
        "checkpoints/previous.pt",
        "checkpoints/best.pt",
        "checkpoints/onset.pt",
        "figures/accuracy.png",
        "figures/collapse.png",
    }
    summary, history = read(run / "summary.json"), epochs(run)
    assert [entry["epoch"] for entry in history] == list(range(1, summary["epochs"] + 1))
    onset = summary["onset_epoch"]
    assert onset and summary["epochs"] == min(12, onset + max(2, round(0.5 * onset)))
    assert [entry["phase"] for entry in history] == ["fitting"] * onset + ["terminal"] * (summary["epochs"] - onset)
    assert (
        history[onset - 1]["train_accuracy"] >= 0.3 > max([entry["train_accuracy"] for entry in history[: onset - 1]])
    )
    assert read(run / "environment.json")["command"] == ["recipes/train.py", "etf"]
    assert read(run / "environment.json")["processor"].endswith(torch.backends.cpu.get_cpu_capability())
    seconds = read(run / "timing.json")["seconds"]
    assert set(seconds) == {"setup", "train", "measure_forward", "measure_collapse", "save"}
    assert all(value > 0 for value in seconds.values())


@pytest.mark.parametrize("end", ["onset", "last"])
def test_the_summary_is_what_its_checkpoint_gives(run, end):
    """Rebuilds the classifier from the folder alone and recomputes accuracy, loss and NC measures by hand."""
    state = load_checkpoint(run / "checkpoints" / f"{end}.pt")
    config = parse(["--config", str(run / "config.yaml")])
    data = load(config.data, seed=config.seed, image_size=lambda native: state["image_shape"][-1])
    model = build_model(config.model, data, seed=config.seed)
    model.load_state_dict(state["model"])
    model.eval()
    reported = read(run / "summary.json")["at_onset" if end == "onset" else "at_end"]
    for part in ("train", "val", "test"):
        split = getattr(data, part)
        images = split.images.float() / 255
        with torch.no_grad():
            features = model.forward(images, with_features=True).features
            logits = model.head(features)
        assert (logits.argmax(1) == split.target).float().mean().item() == pytest.approx(reported[part]["accuracy"])
        assert F.cross_entropy(logits, split.target).item() == pytest.approx(reported[part]["loss"], rel=1e-4)
        if part == "train":
            metric = NeuralCollapse(10, features.shape[1], classifier=model.head)
            metric.update(features, split.target)
            for name, value in metric.compute().items():
                assert float(value) == pytest.approx(reported[part][name], rel=1e-3, abs=1e-6, nan_ok=True), name


@pytest.mark.parametrize("file", [".", "checkpoints/last.pt"])
def test_load_classifier_gives_the_trained_model_back(run, file):
    model = load_classifier(run / file)
    assert not model.training and model.class_names == tuple("0123456789") and model.image_shape == (1, 28, 28)
    config = parse(["--config", str(run / "config.yaml")])
    test = load(config.data, seed=config.seed, image_size=lambda native: 28).test
    with torch.no_grad():
        accuracy = (model(test.images.float() / 255).argmax(1) == test.target).float().mean().item()
    assert accuracy == pytest.approx(read(run / "summary.json")["at_end"]["test"]["accuracy"])


def test_load_classifier_refuses_what_is_no_run(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no run folder: it has no checkpoints/last.pt"):
        load_classifier(tmp_path)
    save_checkpoint(tmp_path / "weights.pt", {"model": {}})
    with pytest.raises(ValueError, match="lacks build, class_names, image_shape"):
        load_classifier(tmp_path / "weights.pt")
    state = load_checkpoint(run / "checkpoints" / "last.pt")
    state.pop("format")
    save_checkpoint(tmp_path / "other.pt", state | {"build": state["build"] | {"num_classes": 7}})
    with pytest.raises(ValueError, match="does not give back its classifier"):
        load_classifier(tmp_path / "other.pt")


def test_the_model_is_built_as_the_recipe_says(run):
    config = parse(["--config", str(run / "config.yaml")])
    data = load(config.data, seed=config.seed, image_size=lambda native: 28)
    model = build_model(config.model, data, seed=config.seed)
    assert isinstance(model.head, ETFHead) and isinstance(model.norm, LastBatchNorm)
    pixels = data.train.images.double().numpy() / 255
    torch.testing.assert_close(
        model.preprocess.mean.flatten().double(), torch.tensor([pixels.mean()]), rtol=1e-6, atol=0
    )
    normal = model.preprocess(data.train.images.float() / 255)
    assert abs(normal.mean().item()) < 1e-4 and normal.std().item() == pytest.approx(1, abs=1e-4)


def test_two_runs_of_one_seed_are_bit_equal_and_never_share_a_folder(tmp_path):
    config = parse(["cosine", *SHORT, *EARLY, "--out", str(tmp_path), "--tpt.max_epochs", "3"])
    one, two = train(config), train(config)
    assert one != two
    for name in ("summary.json", "history.jsonl", "config.yaml"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    first, second = (load_checkpoint(path / "checkpoints" / "last.pt")["model"] for path in (one, two))
    assert all(torch.equal(first[name], second[name]) for name in first)


def built(args, data):
    """The model at the start of the run of a command line."""
    config = parse(args)
    return build_model(config.model, data, seed=config.seed)


def test_runs_that_differ_in_the_head_alone_start_from_the_same_backbone():
    data = load(parse(["etf"]).data, seed=0, image_size=lambda native: 28)
    etf, linear = (built([name, "--model.norm", "batch"], data) for name in ("etf", "baseline"))
    for (name, one), (_, two) in zip(
        etf.backbone.state_dict().items(), linear.backbone.state_dict().items(), strict=True
    ):
        assert torch.equal(one, two), name


def test_the_seed_reaches_the_head():
    data = load(parse(["etf"]).data, seed=0, image_size=lambda native: 28)
    for recipe in ("etf", "baseline"):
        one, again, two = (built([recipe, "--seed", seed], data).head.weight for seed in ("0", "0", "1"))
        assert torch.equal(one, again) and not torch.equal(one, two)


def test_the_batch_order_depends_on_seed_and_epoch_alone():
    draws = {(seed, epoch): epoch_order(seed, epoch, 50).tolist() for seed in (0, 1) for epoch in (1, 2)}
    assert len({tuple(value) for value in draws.values()}) == 4
    assert draws[1, 2] == epoch_order(1, 2, 50).tolist() and sorted(draws[1, 2]) == list(range(50))


def test_zero_error_that_never_comes_is_said(tmp_path, capsys):
    args = [*SHORT, "--out", str(tmp_path), "--tpt.max_epochs", "2", "--quiet", "true"]
    assert main(["tpt", *args]) == 0
    printed = capsys.readouterr().out
    assert "zero error not found in 2 epochs" in printed and "raise --tpt.max_epochs" in printed
    summary = read(next(tmp_path.iterdir()) / "summary.json")
    assert summary["onset_epoch"] is None and summary["at_onset"] is None and summary["epochs"] == 2


def test_closing_lines_show_both_ends(run):
    summary = read(run / "summary.json")
    lines = report.closing_lines(summary, run).splitlines()
    assert f"at epoch {summary['onset_epoch']}, terminal phase to epoch {summary['epochs']}" in lines[0]
    (accuracy,) = (line for line in lines if line.startswith("test accuracy"))
    shown = [float(cell) for cell in re.findall(r"([\d.]+)%", accuracy)]
    expected = [100 * summary[end]["test"]["accuracy"] for end in ("at_onset", "at_end")]
    np.testing.assert_allclose(shown, expected, atol=0.005)
    assert lines[-1] == f"run folder: {run}"
    for name in ("NC1", "NC2", "NC3", "NC4", "intra-class", "inter-class"):
        assert any(name in line for line in lines)
    summary["at_end"]["train"]["nc1"] = float("nan")  # a class without images
    (line,) = (line for line in report.closing_lines(summary, run).splitlines() if line.startswith("NC1"))
    assert line.endswith("   not defined") and "nan" not in line


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_card_parses_and_takes_a_step(name, tmp_path):
    """A fresh config says the same after a round trip, and two epochs of it train."""
    untrained = ["--model.pretrained", "false", "--model.backbone", "test_resnet"]
    few = ["--data.train_size", "128", "--data.batch_size", "32"]
    config = parse(
        [
            name,
            *untrained,
            *few,
            "--tpt.min_terminal",
            "2",
            "--tpt.threshold",
            "0.05",
            "--tpt.max_epochs",
            "2",
            "--quiet",
            "true",
        ]
    )
    (tmp_path / "again.yaml").write_text(as_yaml(config))
    assert parse(["--config", str(tmp_path / "again.yaml")]) == config
    assert config.recipe == name
    card = (CONFIGS / f"{name}.yaml").read_text()
    assert card.startswith("# ") and all(word in card for word in ("What it does", "When to use it", "What it costs"))
    path = train(dataclasses.replace(config, out=tmp_path))
    losses = [entry["loss"] for entry in epochs(path)]
    assert len(losses) == 2 and losses[1] < losses[0]


def test_terms_fade_with_the_ramp():
    config = {
        "cross_entropy": TermConfig(weight=2.0, phase="fitting", args={"label_smoothing": 0.1}),
        "dot_regression": TermConfig(weight=3.0, phase="terminal"),
        "intra_class_cosine": TermConfig(weight=0.5),
    }
    terms = build_terms(config, class_counts=torch.ones(4), num_features=6)
    assert [[term.weight(ramp) for term in terms] for ramp in (0, 0.25, 1)] == [
        [2, 0, 0.5],
        [1.5, 0.75, 0.5],
        [0, 3, 0.5],
    ]
    features, target, weight = torch.randn(8, 6), torch.arange(8) % 4, F.normalize(torch.randn(4, 6), dim=1)
    available = {"features": features, "logits": features @ weight.T, "target": target, "weight": weight}
    smoothed = F.cross_entropy(features @ weight.T, target, label_smoothing=0.1)
    assert terms[0](available).item() == pytest.approx(smoothed.item())
    cosine = (F.normalize(features, dim=1) * weight[target]).sum(1)
    assert terms[1](available).item() == pytest.approx(((cosine - 1) ** 2 / 2).mean().item(), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    calls = []

    def breaking(self, logits, target):
        calls.append(0)
        return F.cross_entropy(logits, target) * (
            float("nan") if len(calls) == 8 else 1.0
        )  # tried out once, then epoch 2, step 3

    monkeypatch.setattr(nn.CrossEntropyLoss, "forward", breaking)
    assert main(["tpt", *SHORT, "--out", str(tmp_path), "--quiet", "true"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "loss is nan at step 3 of epoch 2 (step 7 of the run)" in said
    (path,) = tmp_path.iterdir()
    state = load_checkpoint(path / "checkpoints" / "last.pt")
    assert state["epoch"] == 1 and all(value.isfinite().all() for value in state["model"].values())
    assert str(path / "checkpoints" / "last.pt") in said


def test_a_last_step_that_breaks_the_model_stops_the_run_in_one_line(tmp_path, capsys):
    args = ["--data.train_size", "128", "--data.batch_size", "128", "--optim.lr", "1e30", "--quiet", "true"]
    assert main(["baseline", *args, "--tpt.max_epochs", "2", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "epoch 1 left a model that is not finite" in said
    (path,) = tmp_path.iterdir()
    assert f"the last good checkpoint is {path / 'checkpoints' / 'last.pt'}" in said
    state = load_checkpoint(path / "checkpoints" / "last.pt")
    assert state["epoch"] == 0 and all(value.isfinite().all() for value in state["model"].values())


REFUSED = {
    "unknown recipe": (["eft"], r"recipe='eft' is unknown: one of adversarial, baseline, bn_wd, cosine, default, etf"),
    "unknown key": (["etf", "--model.hed", "etf"], r"--model\.hed.*--help"),
    "abbreviated key": (["etf", "--see", "3"], "--see"),
    "wrong type": (["etf", "--seed", "one"], r"\"seed\".*int.*one"),
    "wrong type in a union": (["etf", "--model.project", "3.5"], r"model.project.*one of int, 'fixed', null, got 3.5"),
    "wrong choice": (["etf", "--optim.name", "lion"], "optim.name.*'sgd', 'adamw'"),
    "missing file": (["--config", "none.yaml"], "none.yaml"),
    "unknown backbone": (
        ["etf", "--model.backbone", "resnet81"],
        r"'resnet81' is no timm model: did you mean resnet18",
    ),
    "unknown head": (["etf", "--model.head", "eft"], "eft"),
    "unknown head argument": (["etf", "--model.head_args.colour", "3"], "colour"),
    "unknown norm": (["etf", "--model.norm", "bach"], "bach"),
    "too few dimensions": (["etf", "--model.project", "5"], r"5.*10"),
    "unknown data": (["etf", "--data.name", "mnits"], "data.name='mnits' is unknown"),
    "too many images": (["etf", "--data.train_size", "9999"], "data.train_size=9999: only"),
    "one-image batches": (["etf", "--data.batch_size", "1"], "data.batch_size=1"),
    "batch beyond the set": (["etf", "--data.batch_size", "4096"], "lower --data.batch_size"),
    "shift out of sight": (["etf", "--augment.crop", "28"], "augment.crop=28 moves whole images of 28 pixels"),
    "unknown loss": (["etf", "--loss.centre.weight", "1"], "loss.centre is unknown: one of cross_entropy"),
    "unknown loss argument": (["etf", "--loss.cross_entropy.args", "{tau: 1}"], "loss.cross_entropy.args.*tau"),
    "nothing at all": ([], r"name a recipe \(adversarial, baseline"),
    "loss argument out of range": (
        ["etf", "--loss", '{"cross_entropy": {"args": {"label_smoothing": 2}}}'],
        "loss.cross_entropy.*label_smoothing",
    ),
    "loss of many numbers": (
        ["etf", "--loss", '{"cross_entropy": {"args": {"reduction": "none"}}}'],
        "loss.cross_entropy gives 4 numbers.*reduction",
    ),
    "no loss": (["etf", "--loss", "{}"], "at least one term"),
    "no loss while fitting": (["etf", "--loss.cross_entropy.phase", "terminal"], "no term.*fitting"),
    "infinite weight": (["etf", "--loss.cross_entropy.weight", ".inf"], "loss.cross_entropy.weight=inf"),
    "negative rate": (["etf", "--optim.lr", "-1"], "optim.lr=-1"),
    "threshold in per cent": (["etf", "--tpt.threshold", "99.9"], "threshold=99.9"),
    "warm-up as long as the run": (["etf", "--optim.warmup_epochs", "200"], "optim.warmup_epochs=200"),
    "no such device": (["etf", "--device", "tpu9"], "device='tpu9'"),
    "image too small": (["etf", "--data.image_size", "2", "--model.backbone", "vgg11"], "--data.image_size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_with_a_way_out(case, capsys, tmp_path):
    args, words = REFUSED[case]
    assert main([*args, *([] if not args or "--config" in args else ["--out", str(tmp_path), "--quiet", "true"])]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert re.search(words, captured.err), captured.err
    assert not list(tmp_path.iterdir())


def test_the_command_itself(tmp_path):
    """As a person types it, from another folder."""
    command = [sys.executable, str(ROOT / "recipes" / "train.py")]
    refused = warm_start.run([*command[1:], "eft"], folder=tmp_path)
    assert refused.returncode == 2 and refused.stderr.startswith("error: recipe='eft'") and refused.stdout == ""
    shown = subprocess.run(
        [*command, "etf", "--seed", "3", "--print_config"], cwd=tmp_path, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    printed = yaml.safe_load(shown.stdout)
    assert printed["seed"] == 3 and printed["model"]["head"] == "etf" and "cross_entropy" in printed["loss"]


def test_help_lists_the_recipes(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"  {name}" in printed for name in recipes()) and "--model.backbone" in printed


def test_a_config_out_of_range_is_refused_in_python_too():
    with pytest.raises(ValueError, match="seed=-1"):
        TrainConfig(seed=-1)
    with pytest.raises(UserError, match="loss.nothing is unknown"):
        build_terms({"nothing": TermConfig()}, class_counts=torch.ones(3), num_features=2)
