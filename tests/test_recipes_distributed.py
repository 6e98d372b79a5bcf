"""torchrun against one process: the same run, to the last digits where the backbone has no batch statistics."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ncreg.checkpoint import load_checkpoint
from recipes.ranks import Ranks

ROOT = Path(__file__).parents[1]
ARGS = [
    *("cosine", "--model.backbone", "test_vit", "--model.model_args", "{img_size: 32, patch_size: 16}"),
    *("--data.image_size", "32", "--data.train_size", "203", "--data.batch_size", "40", "--precision", "float64"),
    *("--tpt.max_epochs", "4", "--tpt.threshold", "0.01", "--tpt.min_terminal", "3", "--tpt.ramp_epochs", "0"),
    *("--optim.lr", "0.05", "--quiet", "true"),
]


def launch(out, ranks, *more):
    train = [str(ROOT / "recipes" / "train.py"), *ARGS, "--out", str(out), *more]
    alone = [sys.executable, *train]
    many = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *train]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(alone if ranks == 1 else many, capture_output=True, text=True, env=environment, timeout=600)


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


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_train_the_same_run_as_one_process(alone, tmp_path, ranks):
    """20 steps in float64: 203 images leave uneven shares to measure, and a share of 10 lacks some of 10 classes."""
    done = launch(tmp_path, ranks)
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
    assert ranks.share_of_batch(7) == 7
