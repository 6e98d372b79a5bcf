"""Sets that memory does not hold: read from their files by workers, they give the same run to the last bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from test_data import cifar, native
from test_faults import Killed, same_end

import recipes.data as data
from ncreg.checkpoint import load_checkpoint
from recipes import evaluate, unread
from recipes.config import DataConfig, UserError, parse
from recipes.data import load
from recipes.run_folder import RunFolder
from recipes.signals import EXIT_CODE
from recipes.split import Split
from recipes.train import main, train
from recipes.unread import Unread, reading_processes

ROOT = Path(__file__).parents[1]
ON_DISK = ["--data.memory_limit", "0"]
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # a machine of one core


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of photographs of sorts, unequal in size, shape and format."""
    root, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in {"train": 50, "test": 8}.items():
        for index, name in enumerate("abc"):
            (root / part / name).mkdir(parents=True)
            for number in range(count + 10 * index):
                height, width = draw.integers(28, 60, 2)
                rows, columns = np.mgrid[:height, :width]
                wave = 128 + 60 * np.sin((rows * (index + 1) + columns) / 6 + draw.uniform(0, 6))
                pixels = (wave[..., None] + draw.normal(0, 30, (height, width, 3))).clip(0, 255).astype(np.uint8)
                kind = ("png", "jpg", "bmp")[number % 3]
                Image.fromarray(pixels if number % 5 else pixels[..., 0]).save(root / part / name / f"{number}.{kind}")
    return root


@pytest.fixture(scope="module")
def args(folder):
    return [
        *("cosine", "--data.name", "folder", "--data.root", str(folder), "--data.image_size", "28"),
        *("--data.batch_size", "32", "--tpt.max_epochs", "3", "--tpt.threshold", "0.2", "--tpt.min_terminal", "1"),
        *("--tpt.extend", "1", "--quiet", "true", "--measure_size", "100", "--data.label_noise", "0.1"),
        *("--augment.crop", "2", "--augment.flip", "true", "--model.model_args", "{drop_path_rate: 0.1}"),
        *("--data.train_size", "140",),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def in_memory(args, tmp_path_factory):
    return train(parse([*args, "--out", str(tmp_path_factory.mktemp("memory"))]))


@pytest.mark.parametrize("workers", ["0", "1", "2"])
def test_a_run_is_bit_equal_whether_its_images_are_held_in_memory_or_not(args, in_memory, tmp_path, workers):
    config = parse([*args, *ON_DISK, "--data.workers", workers, "--out", str(tmp_path)])
    loaded = load(config.data, seed=0, image_size=lambda own: 28)
    assert all(isinstance(part.images, Unread) for part in (loaded.train, loaded.val, loaded.test))
    same_end(in_memory, train(config))


def test_a_run_with_workers_that_was_killed_goes_on_bit_equal(args, in_memory, tmp_path, monkeypatch):
    calls, step = [], torch.optim.SGD.step

    def dying(self, *more, **kwargs):
        calls.append(0)
        if len(calls) == 6:
            raise Killed
        return step(self, *more, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", dying)
    config = parse([*args, *ON_DISK, "--data.workers", "2", "--out", str(tmp_path)])
    with pytest.raises(Killed):
        train(config)
    monkeypatch.undo()
    same_end(in_memory, train(config, resume=RunFolder.unfinished(config)))
