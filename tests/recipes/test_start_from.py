"""--start-from RUN: a new run from the weights of another, with its head where the classes are the same."""

import json

import pytest
import torch
from test_faults_files import killed, one_line

from ncreg import load_classifier
from ncreg.checkpoint import load_checkpoint, save_checkpoint
from recipes.core.cli import parse
from recipes.core.config import TrainConfig
from recipes.study.trials import config_hash, dotted_config
from recipes.train import main, train

SHORT = ["--data.train_size", "64", "--data.batch_size", "32", "--tpt.max_epochs", "1", "--quiet", "true"]
HALF = ["--data.hold_out", "[0, 1, 2, 3, 4]"]
KEPT = "projection, norm and head are kept: the same 10 classes, the same kind of head\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run with a projection, a last norm and an ETF head."""
    return train(parse(["etf", *SHORT, "--model.project", "12", "--out", str(tmp_path_factory.mktemp("source"))]))


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    return train(parse(["baseline", *SHORT, "--out", str(tmp_path_factory.mktemp("linear"))]))


def start(path):
    """The weights that a run began with, of one that was killed at its first step."""
    saved = load_checkpoint(path / "checkpoints" / "last.pt")
    assert saved["epoch"] == 0
    return saved["model"]


def begun(tmp_path, *words):
    return start(killed(words, tmp_path / "new", 1))


def test_the_new_run_begins_with_all_that_the_other_ended_with(source, tmp_path, capsys):
    found = begun(tmp_path, "etf", *SHORT, "--model.project", "12", "--seed", "9", "--start-from", str(source))
    wanted = load_checkpoint(source / "checkpoints" / "last.pt")["model"]
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    said = capsys.readouterr().err
    matched = sum(name.startswith("backbone.") for name in wanted)
    assert f"start-from={source}: the backbone's weights ({matched} tensors, under model.backbone.); {KEPT}" in said
    assert "not used" not in said


def test_from_python_and_from_an_onset_and_what_became_of_it_resumes_alone(linear, tmp_path, monkeypatch):
    config = parse(["baseline", *SHORT, "--model.start_from", str(linear / "checkpoints" / "best.pt")])
    config.out, config.tpt.max_epochs = tmp_path / "whole", 2
    whole = train(config)
    words = ["baseline", *SHORT, "--tpt.max_epochs=2", f"--start_from={linear / 'checkpoints' / 'best.pt'}"]
    path = killed(words, tmp_path / "killed", 3)
    hidden = linear.rename(linear.with_name("moved"))
    assert main(["--resume", str(path)]) == 0
    hidden.rename(linear)
    for name in ("summary.json", "history.jsonl"):
        assert (whole / name).read_bytes() == (path / name).read_bytes()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["etf", "--model.norm", "none", *HALF], "0, 1, 2, 3 and 1 more are classes of one of the two runs alone"),
        (["etf", "--model.norm", "none"], "head is linear there, etf here"),
        (["baseline", "--model.norm", "batch"], "norm is none there, batch here"),
        (["baseline", "--model.project", "20"], "project is None there, 20 here"),
        (["baseline", "--model.head_args", "{bias: false}"], "the head there has other tensors"),
    ],
)
def test_a_head_that_does_not_fit_is_new_and_a_line_says_why(linear, tmp_path, capsys, words, why):
    given = [*words, *SHORT, "--seed", "3"]
    found, fresh = begun(tmp_path / "a", *given, "--start-from", str(linear)), begun(tmp_path / "b", *given)
    assert capsys.readouterr().err.count(f"projection, norm and head are new: {why}") == 1
    wanted = load_checkpoint(linear / "checkpoints" / "last.pt")["model"]
    for name, value in found.items():
        of_source = name.startswith(("backbone.", "preprocess."))
        assert torch.equal(value, wanted[name] if of_source else fresh[name]), name


def test_a_frame_that_follows_from_the_seed_is_kept_with_this_seed_alone(tmp_path, capsys):
    words = ["etf", *SHORT, "--model.project", "9", "--model.head_args", "{structure: householder}"]
    source = train(parse([*words, "--out", str(tmp_path / "source")]))
    images = torch.rand(4, 1, 32, 32)
    logits = load_classifier(source)(images)
    capsys.readouterr()
    new = killed([*words, "--seed", "5", "--start-from", str(source)], tmp_path / "new", 1)
    said = capsys.readouterr().err
    assert "are new: seed of the head is 0 there, 5 here; --model.head_args '{seed: 0}' keeps it" in said
    assert not torch.allclose(load_classifier(new)(images), logits)
    words[-1] = "{structure: householder, seed: 0}"
    kept = killed([*words, "--seed", "5", "--start-from", str(source)], tmp_path / "kept", 1)
    assert "are kept" in capsys.readouterr().err
    assert torch.equal(load_classifier(kept)(images), logits)


def test_classes_in_another_order_find_their_rows(linear, tmp_path, capsys):
    """A run whose classes were listed the other way round, made by turning those of a checkpoint."""
    saved = load_checkpoint(linear / "checkpoints" / "last.pt")
    turned = saved | {"class_names": saved["class_names"][::-1], "model": dict(saved["model"])}
    for name in ("head.weight", "head.bias"):
        turned["model"][name] = saved["model"][name].flip(0)
    save_checkpoint(tmp_path / "turned.pt", turned)
    found = begun(tmp_path, "baseline", *SHORT, "--start-from", str(tmp_path / "turned.pt"))
    assert KEPT in capsys.readouterr().err
    assert all(torch.equal(found[name], saved["model"][name]) for name in found)


def test_bad_starts_are_one_line(source, linear, tmp_path, capsys):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    saved = load_checkpoint(linear / "checkpoints" / "last.pt")
    saved["model"]["head.bias"][3] = float("nan")
    save_checkpoint(tmp_path / "nan.pt", saved)
    for words, said in (
        (["--start-from", "gone"], ["start-from=gone", "does not exist"]),
        (["--start-from", str(tmp_path)], [f"start-from={tmp_path}", "holds neither checkpoints/"]),
        (["--start-from", str(tmp_path / "other.pth")], ["is no run of recipes/train.py", "--model.weights"]),
        (
            ["--start-from", str(linear / "config.yaml")],
            ["it is a text file", f"{linear} is the run, which can be given itself"],
        ),
        (["--start-from", str(tmp_path / "nan.pt")], ["the head of", "is not finite"]),
        (["--start-from", str(linear), "--model.weights", "x.pth"], ["model.start_from", "model.weights=x.pth"]),
        (
            ["--start-from", str(linear), "--model.backbone", "test_vit"],
            ["test_resnet", "--model.backbone test_resnet"],
        ),
        (["--start-from", str(linear), "--model.norm", "bach"], ["error: model.norm='bach' is unknown", "mean batch?"]),
        (["--start-fom", str(linear)], ["--start-fom is unknown; did you mean --start_from?"]),
        (["--start-from"], ["start_from"]),
    ):
        assert main(["baseline", *SHORT, "--out", str(tmp_path / "runs"), *words]) == 2, words
        one_line(capsys, *said)
    assert not (tmp_path / "runs").exists()
    assert main(["--resume", str(linear), "--start-from", str(source)]) == 2
    one_line(capsys, f"give no other key with it, such as --start-from {source}")


def test_the_key_changes_no_identity_and_is_known_by_the_weights(linear, source):
    config = dotted_config(TrainConfig())
    assert config.pop("model.start_from") is None
    assert config_hash(config) == config_hash(dotted_config(TrainConfig()))
    keys = {config_hash(dotted_config(parse(["baseline", "--start-from", str(one)]))) for one in (linear, source)}
    assert len(keys) == 2 and config_hash(config) not in keys
    assert json.loads((linear / "summary.json").read_text())["epochs"] == 1
