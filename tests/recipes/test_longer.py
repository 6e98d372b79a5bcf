"""A run trained longer than it was begun for, held against the run that had the later end from its start."""

import json
import os
import shutil
import signal

import pytest
import torch
import yaml
from test_faults import Killed
from test_faults_files import one_line

from ncreg.checkpoint import load_checkpoint
from recipes.core.cli import BOUNDS, ON_RESUME, parse
from recipes.core.config import TPTConfig
from recipes.core.interrupt import EXIT_CODE
from recipes.study.runner import find_run_dir
from recipes.train import main, train
from recipes.training.longer import way_to_longer
from recipes.training.run_dir import RunDir

SMALL = ["--data.train_size", "64", "--data.batch_size", "32", "--quiet", "true", "--optim.lr", "0.2"]
NEVER = ["baseline", *SMALL, "--optim.schedule", "constant", "--tpt.threshold", "1"]
"""No zero error in so few epochs, and a rate that does not depend on the end."""

SOON = ["baseline", *SMALL, "--tpt.threshold", "0.12", "--tpt.extend", "0.5", "--tpt.terminal", "constant"]
SOON += ["--optim.schedule", "constant", "--tpt.max_epochs", "30"]


def run(tmp_path, *words):
    return train(parse([*words, "--out", str(tmp_path)]))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A run that ended at tpt.max_epochs 2."""
    return run(tmp_path_factory.mktemp("short"), *NEVER, "--tpt.max_epochs", "2")


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """The run that had tpt.max_epochs 4 from its start."""
    return run(tmp_path_factory.mktemp("long"), *NEVER, "--tpt.max_epochs", "4")


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A run that ended because its terminal phase of two epochs was complete."""
    return run(tmp_path_factory.mktemp("complete"), *SOON, "--tpt.min_terminal", "2")


@pytest.fixture
def copy(tmp_path):
    """Copies a run, so that it can be changed."""
    return lambda path: shutil.copytree(path, tmp_path / path.parent.name / path.name)


def texts(path):
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def same(one, two):
    for name in ("summary.json", "history.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    first, second = (load_checkpoint(path / "checkpoints" / "last.pt") for path in (one, two))
    assert first["scheduler"] == second["scheduler"]
    for key in ("model", "optimizer"):
        assert str(first[key]) == str(second[key])
    assert all(torch.equal(first["model"][key], second["model"][key]) for key in first["model"])


def test_a_finished_run_becomes_the_longer_one_to_the_digit(short, long, copy, capsys):
    path = copy(short)
    summary = (path / "summary.json").read_bytes()
    assert main(["--resume", str(path), "--tpt.max_epochs", "4", "--quiet=false"]) == 0
    same(long, path)
    said = capsys.readouterr()
    assert "tpt.max_epochs 2 -> 4: the run ends as one that had these bounds from its start" in said.out
    assert "at epoch 3" in said.out and "note: tpt" not in said.err
    # what told of the former end is kept beside
    assert (path / "until-epoch-2" / "summary.json").read_bytes() == summary
    assert list((path / "until-epoch-2" / "figures").iterdir()) and list((path / "figures").iterdir())
    ended = load_checkpoint(short / "checkpoints" / "last.pt")["model"]
    kept = load_checkpoint(path / "checkpoints" / "end-2.pt")["model"]
    assert all(torch.equal(kept[name], value) for name, value in ended.items())
    # the run says so
    text = (path / "config.yaml").read_text()
    assert text.startswith("# extended at epoch 2: tpt.max_epochs 2 -> 4\n")
    was = yaml.safe_load((short / "config.yaml").read_text())
    assert yaml.safe_load(text) == was | {"tpt": was["tpt"] | {"max_epochs": 4}}
    (entry,) = json.loads((path / "extensions.json").read_text())["extensions"]
    assert (entry["epoch"], entry["from"], entry["to"]) == (2, {"tpt.max_epochs": 2}, {"tpt.max_epochs": 4})
    assert "--tpt.max_epochs" in entry["environment"]["command"]
    # and again
    assert main(["--resume", str(path), "--tpt.max_epochs=5"]) == 0
    assert len((path / "history.jsonl").read_text().splitlines()) == 5
    assert [entry["epoch"] for entry in RunDir(path).extensions()] == [2, 4]
    assert (path / "until-epoch-4").is_dir() and (path / "until-epoch-2").is_dir()


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["--tpt.min_terminal", "5"], marks=pytest.mark.slow),
        ["--tpt.extend", "9", "--tpt.max_terminal", "5", "--tpt.stop_patience", "7"],
    ],
)
def test_a_complete_terminal_phase_is_extended_and_its_onset_kept(complete, copy, tmp_path, words):
    long, path = run(tmp_path / "long", *SOON, "--tpt.min_terminal", "2", *words), copy(complete)
    before = json.loads((path / "summary.json").read_text())
    onset = (path / "checkpoints" / "onset.pt").read_bytes()
    assert main(["--resume", str(path), *words]) == 0
    same(long, path)
    after = json.loads((path / "summary.json").read_text())
    assert after["epochs"] == before["onset_epoch"] + 5 and after["at_onset"] == before["at_onset"]
    assert (path / "checkpoints" / "onset.pt").read_bytes() == onset


def test_a_phase_that_stop_patience_ended_goes_on_with_more(copy, tmp_path):
    words = [
        *SOON,
        "--tpt.threshold",
        "0.02",
        "--tpt.min_terminal",
        "1",
        "--tpt.extend",
        "4",
        "--tpt.stop_measure",
        "nc2_equinorm",
    ]
    path = run(tmp_path / "stopped", *words, "--tpt.stop_patience", "1")
    long = run(tmp_path / "long", *words, "--tpt.stop_patience", "3")
    epochs = [json.loads((one / "summary.json").read_text())["epochs"] for one in (path, long)]
    assert epochs[0] < epochs[1]  # else this test shows nothing
    assert main(["--resume", str(path), "--tpt.stop_patience", "3"]) == 0
    same(long, path)


def test_a_rate_that_depends_on_the_end_is_that_of_the_longer_run_from_then_on(tmp_path, capsys):
    words = ["cosine", *SMALL, "--tpt.threshold", "1"]
    path = run(tmp_path / "short", *words, "--tpt.max_epochs", "2")
    long = run(tmp_path / "long", *words, "--tpt.max_epochs", "5")
    capsys.readouterr()
    assert main(["--resume", str(path), "--tpt.max_epochs", "5"]) == 0
    rates = [
        [json.loads(row)["lr"] for row in (one / "history.jsonl").read_text().splitlines()] for one in (path, long)
    ]
    assert rates[0][2:] == rates[1][2:] and rates[0][1] != rates[1][1]
    said = capsys.readouterr().err
    note = "since epoch 2 it had others (in epoch 2 0.1, not 0.181), so it ends near such a run, not with its digits"
    assert said.count("note: tpt.max_epochs 2 -> 5: ") == 1 and note in said


@pytest.mark.parametrize(
    "where", [pytest.param("before an epoch", marks=pytest.mark.slow), "within an epoch", "while it moves files"]
)
def test_a_killed_extension_goes_on_by_resume_alone(short, long, copy, monkeypatch, where):
    path = copy(short)
    calls, step, replace = [], torch.optim.SGD.step, os.replace

    def dying(self, *args, **kwargs):
        calls.append(0)
        if len(calls) == {"before an epoch": 1, "within an epoch": 4}[where]:
            raise Killed
        return step(self, *args, **kwargs)

    def dying_move(one, two):
        if "until-epoch-2" in str(two) and "summary" not in str(two):
            raise Killed
        return replace(one, two)

    if where == "while it moves files":
        monkeypatch.setattr(os, "replace", dying_move)
    else:
        monkeypatch.setattr(torch.optim.SGD, "step", dying)
    with pytest.raises(Killed):
        main(["--resume", str(path), "--tpt.max_epochs", "4"])
    monkeypatch.undo()
    assert main(["--resume", str(path)]) == 0
    if where == "while it moves files":  # the new end was not written down yet: the run has its former one again
        same(short, path)
        assert main(["--resume", str(path), "--tpt.max_epochs", "4"]) == 0
        assert [entry["epoch"] for entry in RunDir(path).extensions()] == [2]
    same(long, path)


def stopped(args, out, step):
    """The folder of a run that was stopped after a step."""
    calls, real = [], torch.optim.SGD.step

    def signalled(self, *given, **options):
        calls.append(0)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", signalled)
        assert main([*args, "--out", str(out)]) == EXIT_CODE
    (path,) = out.iterdir()
    return path


@pytest.mark.parametrize(("bound", "step"), [pytest.param("2", 2, marks=pytest.mark.slow), ("2", 3), ("7", 4)])
def test_an_unfinished_run_takes_new_bounds(long, tmp_path, bound, step):
    """Longer, and shorter where nothing is cut off that it has trained; also within an epoch."""
    path = stopped([*NEVER, "--tpt.max_epochs", bound], tmp_path / "stopped", step)
    assert main(["--resume", str(path), "--tpt.max_epochs", "4"]) == 0
    same(long, path)


def test_bounds_that_add_nothing_are_refused_and_leave_the_run_as_it_is(short, complete, copy, tmp_path, capsys):
    short, complete = copy(short), copy(complete)
    before = [texts(short), texts(complete)]
    onset = json.loads((complete / "summary.json").read_text())["onset_epoch"]
    done = f"it ended at epoch {onset + 2}, because its terminal phase, 2 epochs after the onset at {onset}, is"
    for path, words, said in (
        (short, [], ["is finished", "--tpt.max_epochs N"]),
        (short, ["--device", "cpu"], ["is finished", "--tpt.max_epochs N"]),
        (short, ["--tpt.max_epochs", "2"], ["is finished", "--tpt.max_epochs N"]),
        (short, ["--tpt.max_epochs", "1"], ["--tpt.max_epochs 1 ends the run at epoch 1", "trained epoch 2"]),
        (short, ["--tpt.max_epochs", "0"], ["tpt.max_epochs=0: must be between 1 and 1,000,000"]),
        (short, ["--tpt.max_epochs", "many"], ['"tpt.max_epochs": expected int, got many']),
        (short, ["--tpt.max_epochs", "nan"], ["tpt.max_epochs"]),
        (short, ["--tpt.min_terminal", "90"], ["tpt.max_epochs is 2; it goes on with --tpt.max_epochs of more than 2"]),
        (short, ["--tpt.max_epochs", "3", "--tpt.threshold", "0.5"], ["such as --tpt.threshold 0.5, than"]),
        (complete, ["--tpt.max_epochs", "300"], [done, "goes on with --tpt.min_terminal of more than 2"]),
        (complete, ["--tpt.max_epochs", f"{onset + 1}"], [f"epoch {onset + 1}, but", f"has trained epoch {onset + 2}"]),
        (complete, ["--tpt.min_terminal=9", "--tpt.max_terminal=2"], ["max_terminal"]),
        (complete, ["--tpt.stop_patience", "1"], []),
    ):
        assert main(["--resume", str(path), *words]) == 2, words
        one_line(capsys, *said)
    assert [texts(short), texts(complete)] == before
    path = stopped([*NEVER, "--tpt.max_epochs", "9"], tmp_path / "stopped", 3)  # in its second epoch
    before = texts(path)
    capsys.readouterr()
    assert main(["--resume", str(path), "--tpt.max_epochs", "1"]) == 2
    one_line(capsys, "--tpt.max_epochs 1 ends the run at epoch 1", "has begun epoch 2")
    assert texts(path) == before


def test_which_bounds_a_run_needs_is_said_of_each_way_to_end():
    class Ended:
        epoch, onset_epoch = 20, 5

    for bounds, words in (
        ({"max_epochs": 20, "min_terminal": 50}, ["tpt.max_epochs is 20", "--tpt.max_epochs of more than 20"]),
        ({"max_epochs": 20, "min_terminal": 15}, ["more than 20 and --tpt.min_terminal of more than 15"]),
        ({"min_terminal": 1, "extend": 3.0}, ["15 epochs after the onset at 5", "--tpt.min_terminal of more than 15"]),
        ({"min_terminal": 15, "max_terminal": 15}, ["more than 15 and --tpt.max_terminal of more than 15 or null"]),
        ({"min_terminal": 1, "extend": 9.0, "max_terminal": 15}, ["with --tpt.max_terminal of more than 15 or null"]),
        ({"min_terminal": 5, "extend": 9.0, "stop_patience": 2}, ["nc1 stands still", "a larger --tpt.stop_patience"]),
        ({"max_epochs": 20, "extend": None}, ["with --tpt.max_epochs of more than 20"]),
    ):
        said = way_to_longer(TPTConfig(**bounds), Ended())
        assert all(word in said for word in words), said


def test_a_study_does_not_take_an_extended_run_for_its_own(short, copy):
    path = copy(short)
    assert find_run_dir(path.parent) == path
    assert main(["--resume", str(path), "--tpt.max_epochs", "3"]) == 0
    assert find_run_dir(path.parent) is None


def test_what_may_change_is_listed_in_help_and_in_the_documents(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    with open(os.path.join(os.path.dirname(__file__), "../../docs/training.md")) as file:
        told = file.read()
    assert set(BOUNDS) < set(ON_RESUME)
    assert all(key in shown.split("--resume RUN")[1].split("--plan")[0] for key in ON_RESUME)
    assert all(f"`{key}`" in told.split("## Stopping and going on")[1].split("\n## ")[0] for key in ON_RESUME)
