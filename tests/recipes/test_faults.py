"""Runs that are stopped, killed or damaged go on and end bit-equal to the run that never was."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import recipes.train
from ncreg import checkpoint
from ncreg.checkpoint import load_checkpoint
from recipes.core.cli import parse
from recipes.core.config import as_yaml
from recipes.core.errors import UserError
from recipes.core.interrupt import EXIT_CODE, StopRequest
from recipes.train import main, train
from recipes.training.run_dir import RunDir

ROOT = Path(__file__).parents[2]
ARGS = [
    *("cosine", "--data.train_size", "192", "--data.batch_size", "64", "--tpt.max_epochs", "6", "--quiet", "true"),
    *("--tpt.threshold", "0.15", "--tpt.min_terminal", "3", "--tpt.extend", "0.5", "--optim.lr", "0.2"),
    *("--model.model_args", "{drop_path_rate: 0.1}"),  # draws from the global generator at every step
]


def same_end(one, two):
    for name in ("summary.json", "history.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    for name in ("last", "onset", "best"):
        first, second = (load_checkpoint(path / "checkpoints" / f"{name}.pt") for path in (one, two))
        assert all(torch.equal(first["model"][key], second["model"][key]) for key in first["model"]), name
        assert first["scheduler"] == second["scheduler"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing happens to."""
    return train(parse([*ARGS, "--out", str(tmp_path_factory.mktemp("whole"))]))


class Killed(BaseException):
    """Stands for a kill: nothing in the loop catches it."""


@pytest.mark.parametrize("where", [1, 9, *(pytest.param(step, marks=pytest.mark.slow) for step in (5, 14))])
def test_a_run_killed_at_a_step_goes_on_bit_equal(whole, tmp_path, monkeypatch, where):
    calls, step = [], torch.optim.SGD.step

    def dying(self, *args, **kwargs):
        calls.append(0)
        if len(calls) == where:
            raise Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", dying)
    config = parse([*ARGS, "--out", str(tmp_path)])
    with pytest.raises(Killed):
        train(config)
    monkeypatch.undo()
    torch.manual_seed(12345)  # whatever the process drew meanwhile
    same_end(whole, train(config, resume=RunDir.unfinished(config.out, as_yaml(config))))


@pytest.mark.parametrize("where", [2, 3, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 4, 7))])
def test_a_run_killed_while_it_saves_goes_on_bit_equal(whole, tmp_path, monkeypatch, where):
    """The kill comes between any two of the renames that make a checkpoint the last one."""
    calls, replace = [], os.replace

    def dying(*args):
        if "checkpoints" in str(args[1]):
            calls.append(0)
            if len(calls) == where + 2:  # the first save, before the first step, is left whole
                raise Killed
        return replace(*args)

    monkeypatch.setattr(os, "replace", dying)
    config = parse([*ARGS, "--out", str(tmp_path)])
    with pytest.raises(Killed):
        train(config)
    monkeypatch.undo()
    same_end(whole, train(config, resume=RunDir.unfinished(config.out, as_yaml(config))))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(whole, tmp_path, monkeypatch, capsys, number):
    calls, step = [], torch.optim.SGD.step

    def signalled(self, *args, **kwargs):
        calls.append(0)
        if len(calls) == 5:
            os.kill(os.getpid(), number)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", signalled)
    assert main([*ARGS, "--out", str(tmp_path)]) == EXIT_CODE
    monkeypatch.undo()
    (path,) = tmp_path.iterdir()
    said = capsys.readouterr().err
    assert f"stopped at step 2 of epoch 2; go on with --resume {path}" in said
    assert len(load_checkpoint(path / "checkpoints" / "last.pt")["taken"][0]) == 2
    assert main(["--resume", str(path)]) == 0
    same_end(whole, path)
    assert main(["--resume", str(path)]) == 2 and "is finished" in capsys.readouterr().err


def test_a_second_signal_acts_as_it_would_have():
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested and not came
            os.kill(os.getpid(), signal.SIGTERM)
            assert came == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(came) == 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(whole, tmp_path, monkeypatch, capsys):
    config = parse([*ARGS, "--out", str(tmp_path)])
    monkeypatch.setattr(recipes.train, "measure_all", lambda *args, **kwargs: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        train(config)
    monkeypatch.undo()
    run = RunDir.unfinished(config.out, as_yaml(config))
    last = run.checkpoint("last")
    last.write_bytes(last.read_bytes()[:1000])
    same_end(whole, train(config, resume=run))
    assert "last.pt cannot be read" in capsys.readouterr().err
    for path in run.checkpoints():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be resumed: .*last.pt.*previous.pt"):
        run.load()


def test_resume_auto_takes_the_newest_unfinished_run_of_the_same_configuration(whole, tmp_path, monkeypatch):
    config = parse([*ARGS, "--out", str(tmp_path)])
    assert RunDir.unfinished(config.out, as_yaml(config)) is None
    assert (
        RunDir.unfinished(whole.parent, as_yaml(parse([*ARGS, "--out", str(whole.parent)]))) is None
    )  # that one is finished
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        train(config)
    monkeypatch.undo()
    (path,) = tmp_path.iterdir()
    assert RunDir.unfinished(tmp_path, as_yaml(parse([*ARGS, "--out", str(tmp_path), "--seed", "1"]))) is None
    elsewhere = ["--data.workers", "0", "--data.memory_limit", "7", "--device", "cpu"]  # no other numbers
    assert main([*ARGS, *elsewhere, "--out", str(tmp_path), "--resume", "auto"]) == 0
    assert list(tmp_path.iterdir()) == [path]
    same_end(whole, path)


@pytest.mark.parametrize("failing", ["fsync", "write"])
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch, capsys, failing):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    calls, real = [], checkpoint.torch.save

    def save(*args, **kwargs):
        calls.append(0)
        return full() if len(calls) > 4 else real(*args, **kwargs)

    monkeypatch.setattr(checkpoint.torch, "save", save)
    assert main([*ARGS, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No space left" in said and "last good checkpoint is" in said
    monkeypatch.undo()
    (path,) = tmp_path.iterdir()
    assert load_checkpoint(path / "checkpoints" / "last.pt")["epoch"] >= 1


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    assert main([*ARGS, "--out", str(tmp_path / "file")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--out FOLDER" in said


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--resume", "nowhere"], "nowhere is no run folder"),
        (["etf", "--resume", "nowhere"], "give no other key"),
        (["--resume=nowhere", "--seed", "3"], "give no other key"),
    ],
)
def test_wrong_resumes_are_refused(args, words, capsys):
    assert main(args) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said


def test_a_checkpoint_of_another_model_is_refused(whole, tmp_path):
    config = parse([*ARGS, "--out", str(tmp_path), "--model.head", "etf", "--model.head_args", "{}"])
    with pytest.raises(UserError, match="does not fit this run's configuration"):
        train(config, resume=RunDir(whole))


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(20))
def test_sigkill_at_a_random_moment(whole, tmp_path, trial):
    """A real process, really killed, again and again until it comes through."""
    draw = random.Random(trial)
    command = [sys.executable, str(ROOT / "recipes" / "train.py"), *ARGS, "--out", str(tmp_path), "--resume", "auto"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    for attempt in range(8):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + (draw.uniform(4, 14) if attempt < 3 else 120)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if process.poll() is None:
            process.kill()
        error = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), error
        if any((path / "summary.json").exists() for path in tmp_path.iterdir()):  # a late kill finds the run finished
            break
    ends = [path for path in tmp_path.iterdir() if (path / "summary.json").exists()]
    assert len(ends) == 1
    same_end(whole, ends[0])
