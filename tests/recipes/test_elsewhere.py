"""A run that goes on with other code, libraries or another processor: said, noted, and told by studies."""

import json
import shutil

import pytest
from test_faults import ARGS, Killed, same_end

from ncreg.checkpoint import load_checkpoint
from recipes.core.cli import parse
from recipes.core.files import environment
from recipes.study.records import _each
from recipes.train import main, train
from recipes.training import elsewhere


def dies(*args, **kwargs):
    raise Killed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(parse([*ARGS, "--out", str(tmp_path_factory.mktemp("whole"))]))


@pytest.fixture(scope="module")
def nearly(tmp_path_factory):
    """A run killed between its last epoch and its summary."""
    out = tmp_path_factory.mktemp("nearly")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recipes.training.records.measure_all", dies)
        with pytest.raises(Killed):
            train(parse([*ARGS, "--out", str(out)]))
    (path,) = out.iterdir()
    return path


@pytest.fixture
def ended(nearly, tmp_path):
    return shutil.copytree(nearly, tmp_path / nearly.name)


def told(run):
    return json.loads((run / "environment.json").read_text())


def moved_to(monkeypatch, **changes):
    """Play another machine."""

    def other(command):
        now = environment(command)
        return now | {"packages": now["packages"] | changes.get("packages", {})} | changes.get("beside", {})

    monkeypatch.setattr(elsewhere, "environment", other)


def test_a_run_that_goes_on_where_it_was_says_and_notes_nothing(whole, ended, capsys):
    before = told(ended)
    assert main(["--resume", str(ended)]) == 0
    assert capsys.readouterr().err == "" and told(ended) == before
    same_end(whole, ended)


def test_another_processor_and_library_are_said_noted_and_told_by_studies(ended, capsys, monkeypatch):
    before, epoch = told(ended), load_checkpoint(ended / "checkpoints" / "last.pt")["epoch"]
    moved_to(monkeypatch, packages={"torch": "9.9.9"}, beside={"processor": "Abacus", "git_commit": "f" * 40})
    assert main(["--resume", str(ended)]) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("note: goes on with torch 9.9.9 ("), said
    assert f"processor Abacus ({before['processor']} before), commit {'f' * 40} (" in said and "may differ" in said
    after = told(ended)
    (moved,) = after.pop("resumed")
    assert after == before
    assert moved["epoch"] == epoch + 1 and moved["environment"]["processor"] == "Abacus"
    assert moved["environment"]["command"] == ["recipes/train.py", "--resume", str(ended)]
    assert _each(told(ended), "processor") == f"{before['processor']}, then Abacus"
    assert _each(told(ended), "git_commit") == f"{before['git_commit']}, then {'f' * 40}"


def test_only_what_changed_since_the_last_start_is_said(ended, capsys, monkeypatch):
    content = told(ended)
    there = content | {"processor": "Abacus"}
    (ended / "environment.json").write_text(json.dumps(content | {"resumed": [{"epoch": 1, "environment": there}]}))
    moved_to(monkeypatch, beside={"processor": "Abacus"})
    assert main(["--resume", str(ended)]) == 0
    assert capsys.readouterr().err == "" and len(told(ended)["resumed"]) == 1


def test_a_checkpoint_of_other_code_that_does_not_fit_names_that_code(ended, capsys, monkeypatch):
    before = told(ended)["packages"]["ncreg"]
    moved_to(monkeypatch, packages={"ncreg": "9.0.0"})
    monkeypatch.setattr("ncreg.tpt.TPTScheduler.load_state_dict", lambda self, state: state["as it will be called"])
    assert main(["--resume", str(ended)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "does not fit this run's configuration: KeyError" in said, said
    assert f"it was written with ncreg {before}: go on with that, or begin a new run" in said
    assert "resumed" not in told(ended)


@pytest.mark.parametrize("damaged", ["{", "[1]", '{"resumed": [1]}'])
def test_a_run_whose_environment_is_damaged_goes_on(whole, ended, capsys, damaged):
    (ended / "environment.json").write_text(damaged)
    assert main(["--resume", str(ended)]) == 0
    assert capsys.readouterr().err == ""
    same_end(whole, ended)
