"""torchrun against one process: the same run, to the last digits where the backbone has no batch statistics."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ncreg.checkpoint import load_checkpoint, load_classifier
from recipes.core.cli import parse
from recipes.core.distributed import Ranks, join_ranks
from recipes.core.errors import UserError
from recipes.data.load import load
from recipes.training.metrics import measure
from tests import warm_start

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
ARGS = [
    *("cosine", "--model.backbone", "test_vit", "--model.model_args", "{img_size: 32, patch_size: 16}"),
    *("--data.image_size", "32", "--data.train_size", "203", "--data.batch_size", "40", "--precision", "float64"),
    *("--tpt.max_epochs", "4", "--tpt.threshold", "0.01", "--tpt.min_terminal", "3", "--tpt.ramp_epochs", "0"),
    *("--optim.lr", "0.05", "--quiet", "true"),
]


def launch(out, ranks, *more):
    """On one rank as a person types it, on several as torchrun starts them: `torchrun` is that itself."""
    train = [str(ROOT / "recipes" / "train.py"), *ARGS, "--out", str(out), *more]
    return warm_start.run(train, ranks, environment=ENVIRONMENT)


def torchrun(out, ranks, *more):
    train = [str(ROOT / "recipes" / "train.py"), *ARGS, "--out", str(out), *more]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *train]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)


def ending(out):
    (path,) = out.iterdir()
    history = [json.loads(row) for row in (path / "history.jsonl").read_text().splitlines()]
    return load_checkpoint(path / "checkpoints" / "last.pt"), history, json.loads((path / "summary.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    done = launch(out, 1)
    assert done.returncode == 0, done.stderr
    return ending(out)


@pytest.mark.parametrize(
    ("starts", "ranks"),
    [(launch, 2), pytest.param(torchrun, 2, marks=pytest.mark.slow), pytest.param(torchrun, 4, marks=pytest.mark.slow)],
)
def test_ranks_train_the_same_run_as_one_process(alone, tmp_path, starts, ranks):
    """20 steps in float64: 203 images leave uneven shares to measure, and a share of 10 lacks some of 10 classes."""
    done = starts(tmp_path, ranks)
    assert done.returncode == 0, done.stderr
    (one, history, summary), (many, other_history, other_summary) = alone, ending(tmp_path)
    for name, value in one["model"].items():
        torch.testing.assert_close(many["model"][name], value, rtol=1e-9, atol=1e-9)
    for first, second in zip(history, other_history, strict=True):
        assert first["train_accuracy"] == second["train_accuracy"] and first["phase"] == second["phase"]
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-9)
        for name, value in first["measures"].items():
            assert second["measures"][name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    assert summary["onset_epoch"] == other_summary["onset_epoch"] == 1
    assert done.stdout.count("run folder:") == 1


def test_a_batch_that_does_not_divide_is_refused_once(tmp_path):
    done = launch(tmp_path, 2, "--data.batch_size", "41")
    assert done.returncode != 0 and "a multiple of the 2 ranks" in done.stderr
    assert done.stderr.count("error: data.batch_size=41") == 1 and not list(tmp_path.iterdir())


def test_alone_every_exchange_is_the_identity():
    ranks, values = Ranks(), torch.arange(3.0)
    assert ranks.sum(values) is values and ranks.gather("a") == ["a"] and ranks.from_main(3) == 3
    assert ranks.any(True, values.device) and not ranks.any(False, values.device)
    assert ranks.images_per_rank(7) == 7


@pytest.mark.slow
def test_ranks_see_the_same_augmented_and_mixed_images_as_one_process(tmp_path):
    more = ["--augment.crop", "2", "--augment.flip", "true", "--augment.mixup", "0.5"]
    more += ["--loss", "{cross_entropy: {}}", "--optim.ema", "0.9", "--model.freeze_epochs", "1"]
    ends = []
    for ranks in (1, 2):
        done = launch(tmp_path / str(ranks), ranks, *more)
        assert done.returncode == 0, done.stderr
        ends.append(ending(tmp_path / str(ranks))[0])
    for key in ("model", "ema"):
        for name, value in ends[0][key].items():
            torch.testing.assert_close(ends[1][key][name], value, rtol=1e-9, atol=1e-9)


def children(pid):
    """The processes that a process has started, from /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if parent == pid:
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the ranks in /proc")
def test_a_rank_that_dies_ends_the_job_which_can_be_resumed(alone, tmp_path):
    train = [str(ROOT / "recipes" / "train.py"), *ARGS, "--out", str(tmp_path), "--resume", "auto"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *train]
    job = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/checkpoints/previous.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = children(job.pid)
    assert len(ranks) == 2 and job.poll() is None
    os.kill(ranks[1], signal.SIGKILL)
    said = job.communicate(timeout=60)[1]  # within a minute
    assert job.returncode != 0 and "exitcode" in said and "-9" in said
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert not list(tmp_path.glob("*/summary.json"))
    done = launch(tmp_path, 2, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    state, history, _ = ending(tmp_path)
    assert [entry["epoch"] for entry in history] == [1, 2, 3, 4]
    for name, value in alone[0]["model"].items():
        torch.testing.assert_close(state["model"][name], value, rtol=1e-9, atol=1e-9)


def test_ranks_measure_the_model_that_is_kept_and_let_a_head_rest(tmp_path):
    """BatchNorm's statistics differ between ranks; from the onset on no loss looks at the logits or the head's bias."""
    resnet = ("--model.backbone", "test_resnet", "--model.model_args", "{}", "--model.head", "linear")
    terms = "{cross_entropy: {phase: fitting}, dot_regression: {phase: terminal}}"
    done = launch(tmp_path, 2, *resnet, "--loss", terms, "--optim.ema", "0.5", "--tpt.max_epochs", "3")
    assert done.returncode == 0, done.stderr
    _, history, summary = ending(tmp_path)
    (path,) = tmp_path.iterdir()
    config = parse(["--config", str(path / "config.yaml")])
    data = load(config.data, seed=config.seed, image_size=lambda native: 32)
    found = measure(load_classifier(path), data.train)
    assert history[-1]["phase"] == "terminal"
    for name in ("accuracy", "loss", "nc1", "intra_cosine"):
        assert summary["at_end"]["train"][name] == pytest.approx(found[name], rel=1e-9), name
    average = measure(load_classifier(path, ema=True), data.val, collapse=False)
    assert history[-1]["ema"]["loss"] == pytest.approx(average["loss"], rel=1e-9)


def test_a_rank_takes_its_own_gpu_before_it_joins(monkeypatch):
    calls = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(str(device)))
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *args, name=name: calls.append(name))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with join_ranks(torch.device("cuda:1")) as ranks:
        assert ranks == Ranks(1, 2)
    assert calls == ["cuda:1", "init_process_group", "destroy_process_group"]


def test_a_rank_gets_two_images_of_a_batch_at_least():
    with pytest.raises(UserError, match="data.batch_size=8 leaves each of the 4 ranks one image.*at least 16"):
        Ranks(0, 4).images_per_rank(8, 2)


OWN_DATA = """
import os
import torch


class Images(torch.utils.data.Dataset):
    targets = [number % 4 for number in range(120)]

    def __init__(self):
        self.reads = 0

    def __len__(self):
        return 120

    def __getitem__(self, number):
        self.reads += 1
        if os.environ.get("RANK", "1") == "1" and (FAULT):
            raise OSError("the disk of this node is gone")
        image = torch.full((1, 28, 28), 0.1)
        image[0, :, 7 * self.targets[number] :] = 0.9
        return image, self.targets[number]


def images():
    return Images()
"""


@pytest.mark.parametrize(
    ("fault", "more", "words"),
    [
        ("self.reads > 260", (), "mend or remove what is unreadable"),
        ("number == 9", ("--data.memory_limit", "8"), "the disk of this node is gone"),
    ],
)
def test_what_one_rank_cannot_read_is_said_and_ends_all(tmp_path, fault, more, words):
    """Late, when the other rank waits for it in a step; and at the start, when that rank has read everything."""
    (tmp_path / "own.py").write_text(OWN_DATA.replace("FAULT", fault))
    own = ("--data.name", f"{tmp_path}/own.py:images", "--data.train_size", "null", "--data.batch_size", "16")
    began = time.monotonic()
    done = launch(tmp_path / "runs", 2, *own, "--data.memory_limit", "0", "--data.workers", "0", *more)
    assert done.returncode != 0 and time.monotonic() - began < 300
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert sum(words in line for line in errors) == 1 and "the disk of this node is gone" in done.stderr, done.stderr
    assert "Error: [" not in done.stderr  # no traceback of gloo


def test_all_ranks_skip_what_one_cannot_read(tmp_path):
    (tmp_path / "own.py").write_text(OWN_DATA.replace("FAULT", "number == 9"))
    own = ("--data.name", f"{tmp_path}/own.py:images", "--data.train_size", "null", "--data.batch_size", "16")
    counts = []
    for ranks in (1, 2):
        done = launch(tmp_path / str(ranks), ranks, *own, "--data.unreadable", "skip", "--tpt.max_epochs", "1")
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("left out as data.unreadable=skip says: 1 unreadable images") == 1
        counts.append(ending(tmp_path / str(ranks))[2]["class_counts"])
    assert counts[0] == counts[1] and sum(counts[0]) < 120
