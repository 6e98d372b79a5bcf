"""Faults from outside: damaged and foreign checkpoints, disks, data that change, clocks that err."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_data import fashion
from test_faults import ARGS, Killed, same_end

import recipes.data.gray_sets
import recipes.training.run_dir
from ncreg.checkpoint import load_checkpoint, load_classifier, save_checkpoint
from ncreg.models import Normalize, swap_head
from recipes import evaluate
from recipes.core.cli import parse
from recipes.core.config import as_yaml
from recipes.train import main, train
from recipes.training.run_dir import RunDir


def dies(*args, **kwargs):
    raise Killed


def one_line(capsys, *words):
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: "), said
    assert all(word in said for word in words), said


def killed(args, out, step):
    """The folder of a run that was killed at a step."""
    calls, real, before = [], torch.optim.SGD.step, set(out.glob("*"))

    def dying(self, *given, **options):
        calls.append(0)
        return real(self, *given, **options) if len(calls) < step else dies()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", dying)
        with pytest.raises(Killed):
            train(parse([*args, "--out", str(out)]))
    (path,) = set(out.glob("*")) - before
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing happens to."""
    return train(parse([*ARGS, "--out", str(tmp_path_factory.mktemp("whole"))]))


@pytest.fixture(scope="module")
def nearly(tmp_path_factory):
    """A run killed between its last epoch and its summary: last.pt is an epoch ahead of previous.pt."""
    out = tmp_path_factory.mktemp("nearly")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recipes.training.records.measure_all", dies)
        with pytest.raises(Killed):
            train(parse([*ARGS, "--out", str(out)]))
    (path,) = out.iterdir()
    return path


@pytest.fixture
def ended(nearly, tmp_path):
    """A copy of it to be damaged."""
    return shutil.copytree(nearly, tmp_path / nearly.name)


@pytest.mark.parametrize(
    "offset",
    [0, 100, 0.5, 0.99, -1]
    + [pytest.param(offset, marks=pytest.mark.slow) for offset in (1, 4, 4096, 0.1, 0.25, 0.75, 0.9, -64, -22)],
)
def test_a_checkpoint_truncated_anywhere_falls_back_and_ends_bit_equal(whole, ended, capsys, offset):
    last = ended / "checkpoints" / "last.pt"
    content = last.read_bytes()
    at = round(offset * len(content)) if isinstance(offset, float) else offset % len(content)
    last.write_bytes(content[:at])
    assert main(["--resume", str(ended)]) == 0
    said = capsys.readouterr().err
    assert "note: checkpoint" in said and "last.pt cannot be read" in said and "going back to epoch" in said
    same_end(whole, ended)


def test_a_measurement_of_a_damaged_checkpoint_names_the_one_before_and_does_not_take_it(ended, capsys):
    last, previous = (ended / "checkpoints" / f"{name}.pt" for name in ("last", "previous"))
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=rf"last\.pt cannot be read .*; the epoch before is in {previous}: name that file"
    ):
        load_classifier(ended)
    assert evaluate.main([str(ended), "--device", "cpu"]) == 2
    one_line(capsys, f"the epoch before is in {previous}")
    assert evaluate.main([str(ended), "--checkpoint", "previous", "--device", "cpu"]) == 0
    assert load_classifier(previous).num_classes == 10
    previous.unlink()
    with pytest.raises(ValueError, match="last.pt cannot be read .*no checkpoint$"):
        load_classifier(ended)


def test_a_configuration_that_was_damaged_names_its_file(ended, capsys):
    file = ended / "config.yaml"
    file.write_text(file.read_text().replace("lr: ", "lr: quick #", 1))
    for command in (evaluate.main, lambda words: main(["--resume", *words])):
        assert command([str(ended)]) == 2
        one_line(capsys, f"{file} cannot be read: ", "optim.lr", "quick", "changed or damaged")


def of_seven_classes(state):
    other = swap_head(**state["build"] | {"num_classes": 7})
    other.preprocess = Normalize([0.0], [1.0])
    return state | {"model": other.state_dict()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: {"weight": torch.ones(1)}, "is of format None; this version reads 1"),
        (lambda state: state | {"format": 0}, "is of format 0; this version reads 1"),
        (lambda state: state | {"extra": Path("pickled")}, "is refused: it holds more than tensors"),
        (lambda state: {"format": 1, "weight": torch.ones(1)}, "was not written by a training run"),
        (lambda state: {key: state[key] for key in state if key != "random"}, "KeyError 'random'"),
        (lambda state: state | {"model": swap_head("test_vit", num_classes=10).state_dict()}, "does not fit this run"),
        (of_seven_classes, "size mismatch for head.weight"),
        (lambda state: state | {"random": [{"torch": torch.zeros(3)}]}, "does not fit this run"),
    ],
)
def test_a_checkpoint_that_is_not_this_runs_is_one_line(ended, capsys, change, words):
    state = load_checkpoint(ended / "checkpoints" / "last.pt")
    for name in ("last", "previous"):
        torch.save(change(state), ended / "checkpoints" / f"{name}.pt")
    assert main(["--resume", str(ended)]) == 2
    one_line(capsys, words)


def test_a_foreign_checkpoint_falls_back_to_the_runs_own(whole, ended, capsys):
    save_checkpoint(ended / "checkpoints" / "last.pt", {"weight": torch.ones(1)})
    assert main(["--resume", str(ended)]) == 0
    assert "was not written by a training run; going back to epoch" in capsys.readouterr().err
    same_end(whole, ended)


READ_ONLY, FULL = OSError(30, "Read-only file system"), OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (".coming.pt", READ_ONLY),
        pytest.param("history.jsonl", FULL, marks=pytest.mark.slow),
        pytest.param(".timing.json", READ_ONLY, marks=pytest.mark.slow),
        (".summary.json", FULL),
    ],
)
def test_a_disk_that_fails_on_the_way_is_one_line_and_loses_nothing(
    whole,
    tmp_path,
    monkeypatch,
    capsys,
    name,
    error,
):
    """Root may write anywhere, so the system's refusal is played, at an opening after the first checkpoints."""
    calls, real = [], Path.open

    def refused(self, mode="r", *args, **kwargs):
        if self.name.startswith(name) and mode != "r":
            calls.append(0)
            if len(calls) == (3 if name in (".coming.pt", "history.jsonl") else 1):
                raise error
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refused)
    assert main([*ARGS, "--out", str(tmp_path)]) == 2
    one_line(capsys, error.strerror, "cannot be written to", "the last good checkpoint is")
    monkeypatch.undo()
    (path,) = tmp_path.iterdir()
    assert not [file for file in path.rglob(".*") if file.is_file()]  # no half-written file stays
    assert main(["--resume", str(path)]) == 0
    same_end(whole, path)


def test_a_loss_that_was_not_finite_once_is_made_good_by_a_resume(whole, tmp_path, monkeypatch, capsys):
    calls, real = [], torch.nn.functional.cross_entropy

    def broken(*args, **kwargs):
        calls.append(0)
        return real(*args, **kwargs) * (float("nan") if len(calls) == 9 else 1.0)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", broken)
    assert main([*ARGS, "--out", str(tmp_path)]) == 2
    one_line(capsys, "the loss is nan at step", "the last good checkpoint is")
    monkeypatch.undo()
    (path,) = tmp_path.iterdir()
    assert main(["--resume", str(path)]) == 0
    same_end(whole, path)


@pytest.fixture
def images(tmp_path):
    """Three classes of twelve noisy images, and the arguments of a short run on them."""
    draw = torch.Generator().manual_seed(0)
    for index, name in enumerate("abc"):
        for number in range(12):
            pixels = torch.randint(80 * index, 80 * index + 90, (28, 28, 3), generator=draw, dtype=torch.uint8)
            (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(tmp_path / "images" / name / f"{number}.png")
    args = ["tpt", "--data.name", "folder", "--data.root", str(tmp_path / "images"), "--data.image_size", "28"]
    return tmp_path / "images", [*args, "--data.batch_size", "8", "--tpt.max_epochs", "2", "--quiet", "true"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: (root / "b" / "3.png").unlink(), "3.png is gone"),
        (lambda root: (root / "b" / "4.png").write_bytes((root / "c" / "4.png").read_bytes()), "4.png has changed"),
        (lambda root: shutil.copy(root / "a" / "0.png", root / "c" / "new.png"), "new.png is new"),
        (lambda root: (root / "a" / "5.png").write_bytes(b"no picture"), "5.png is not a readable image"),
        (lambda root: [path.unlink() for path in (root / "a").iterdir()], "no image of class a"),
        (shutil.rmtree, "is not a folder"),
    ],
)
def test_images_that_change_between_runs_are_named(images, tmp_path, capsys, change, words):
    root, args = images
    path = killed(args, tmp_path / "runs", 3)
    change(root)
    assert main(["--resume", str(path)]) == 2
    one_line(capsys, words)


def test_images_that_stay_are_gone_on_with(images, tmp_path):
    root, args = images
    path = killed(args, tmp_path / "runs", 3)
    for file in root.rglob("*.png"):
        os.utime(file, (0, 0))  # a date is no change
    (root / "notes.txt").write_text("nor is what is no image")
    assert main(["--resume", str(path)]) == 0
    assert load_classifier(path).class_names == tuple("abc")


def test_a_file_of_fashion_mnist_that_is_gone_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "set").mkdir()
    fashion(tmp_path / "set", 60)
    monkeypatch.setattr(recipes.data.gray_sets, "DEBIAN", tmp_path / "nowhere")
    args = ["tpt", "--data.name", "fashion_mnist", "--data.root", str(tmp_path / "set"), "--data.val_share", "0.25"]
    args += ["--data.batch_size", "8", "--tpt.max_epochs", "2", "--quiet", "true"]
    path = killed(args, tmp_path / "runs", 3)
    (tmp_path / "set" / "train-labels-idx1-ubyte.gz").unlink()
    assert main(["--resume", str(path)]) == 2
    one_line(capsys, "train-labels-idx1-ubyte.gz")


class Stopped(datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 1, tzinfo=tz)


def test_runs_that_start_in_the_same_second_never_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes.training.run_dir, "datetime", Stopped)
    config = parse([*ARGS, "--out", str(tmp_path), "--tpt.max_epochs", "1"])
    with ThreadPoolExecutor(8) as threads:
        made = list(
            threads.map(lambda _: RunDir.create(tmp_path, "run", config=as_yaml(config), command=[]).path, range(8))
        )
    assert len(set(made)) == 8
    one, two = train(config), train(config)
    assert one != two and (one / "summary.json").read_bytes() == (two / "summary.json").read_bytes()
    assert len(list(tmp_path.iterdir())) == 10


def test_a_clock_that_is_set_back_loses_no_run_and_misleads_no_resume(whole, tmp_path, monkeypatch):
    class Backwards(datetime):
        hours = 0

        @classmethod
        def now(cls, tz=None):
            cls.hours += 1
            return datetime(2026, 1, 1) - timedelta(hours=cls.hours)

    monkeypatch.setattr(recipes.training.run_dir, "datetime", Backwards)
    monkeypatch.setattr("time.time", lambda: 0.0)
    far, near = killed(ARGS, tmp_path, 9), killed(ARGS, tmp_path, 2)
    assert far.name > near.name  # the later run bears the earlier date
    os.utime(far, (0, 0))  # and here the earlier folder the earlier one
    config = parse([*ARGS, "--out", str(tmp_path)])
    assert RunDir.unfinished(config.out, as_yaml(config)).path == far
    assert main([*ARGS, "--out", str(tmp_path), "--resume", "auto"]) == 0
    same_end(whole, far)
    timing = json.loads((far / "timing.json").read_text())
    assert all(value > 0 for value in [*timing["seconds"].values(), timing["train_images_per_second"]])
    assert RunDir.unfinished(config.out, as_yaml(config)).path == near  # what is left


@pytest.mark.parametrize(
    "words",
    [b"\xff\xfe\x80", *(pytest.param(text, marks=pytest.mark.slow) for text in (b"seed: 2026-99-99", b"[" * 5000))],
)
def test_what_is_no_run_beside_the_runs_stops_none(tmp_path, words):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_bytes(words)
    config = parse([*ARGS, "--out", str(tmp_path)])
    for unreadable in (True, False):
        assert RunDir.unfinished(config.out, as_yaml(config), unreadable=unreadable) is None


def test_how_a_run_goes_on_may_change_and_what_it_is_may_not(whole, ended, capsys):
    words = ["--quiet", "--device=cpu", "--data.workers", "0", "--data.memory_limit=0", "--tensorboard=false"]
    assert main(["--resume", str(ended), *words, "--optim.lr", "0.5"]) == 2
    one_line(capsys, "give no other key with it, such as --optim.lr 0.5, than quiet, device")
    assert main(["--resume", str(ended), *words]) == 0
    same_end(whole, ended)
