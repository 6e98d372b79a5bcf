"""A frozen backbone sees an image once where it sees the same one in every epoch, and nothing else changes."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

import recipes.train
from ncreg.heads import LinearHead
from ncreg.models import Classifier
from recipes.core.cli import parse
from recipes.core.distributed import Ranks
from recipes.core.interrupt import Stopped
from recipes.data.load import load
from recipes.data.split import Split
from recipes.train import train
from recipes.training import frozen
from recipes.training.frozen import EncodedSplit
from recipes.training.metrics import Clock
from recipes.training.run_dir import RunDir

SHORT = [
    *("finetune", "--model.backbone=test_resnet", "--model.pretrained=false", "--data.train_size=200"),
    *("--data.batch_size=32", "--tpt.max_epochs=5", "--tpt.extend=null", "--model.freeze_epochs=3", "--quiet=true"),
]


def history(path):
    return [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]


def run(out, *more):
    return train(parse([*SHORT, *more, f"--out={out}"]))


@pytest.fixture
def forward(monkeypatch):
    """Counts the images that go through the first layer of a backbone, by whether it learns from them."""
    seen, call = {"learning": 0, "looking": 0}, nn.Conv2d.forward

    def counted(layer, x):
        if layer.in_channels in (1, 3):
            seen["learning" if torch.is_grad_enabled() else "looking"] += len(x)
        return call(layer, x)

    monkeypatch.setattr(nn.Conv2d, "forward", counted)
    return seen


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([], marks=pytest.mark.slow),
        ["--precision=float64", "--model.project=8"],
        ["--augment.smoothing=0.1", "--optim.ema=0.9"],
    ],
)
def test_the_numbers_are_those_of_images_in_every_epoch(tmp_path, monkeypatch, more):
    once = history(run(tmp_path / "once", *more))
    monkeypatch.setattr(frozen, "FEWEST_EPOCHS", 99)
    rows = list(zip(once, history(run(tmp_path / "again", *more)), strict=True))
    for row, other in rows if "--precision=float64" in more else rows[:3]:  # a free backbone lets float32 drift apart
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert row["val_loss"] == pytest.approx(other["val_loss"], rel=1e-4)
        assert row["measures"] == pytest.approx(other["measures"], rel=1e-3, abs=1e-6)


def test_a_frozen_backbone_sees_each_image_once(tmp_path, monkeypatch, forward):
    run(tmp_path / "once")
    once = dict(forward)
    monkeypatch.setattr(frozen, "FEWEST_EPOCHS", 99)
    run(tmp_path / "again")
    again = {key: forward[key] - once[key] for key in once}
    data = load(parse(SHORT).data, seed=0, image_size=lambda native: 28)
    fitted, val = len(data.train), len(data.val)
    assert again["learning"] - once["learning"] == 3 * 32 * (fitted // 32)  # no batch of the three epochs is of images
    before = 3 * (fitted + val)  # the measured images are all that it trains on
    assert (
        once["looking"] - again["looking"] == fitted + val + 2 * 2 + 1 - before
    )  # two images are asked twice, one once more


@pytest.mark.parametrize(
    "more",
    [
        ["--augment.flip=true"],
        pytest.param(["--augment.crop=1"], marks=pytest.mark.slow),
        pytest.param(["--augment.mixup=0.2"], marks=pytest.mark.slow),
        ["--data.memory_limit=0.0001"],
    ],
)
def test_images_that_change_and_features_that_do_not_fit_are_made_anew(tmp_path, monkeypatch, forward, more):
    run(tmp_path / "may", *more)
    may = dict(forward)
    monkeypatch.setattr(frozen, "FEWEST_EPOCHS", 99)
    run(tmp_path / "may_not", *more)
    assert may == {key: forward[key] - may[key] for key in may}


class Own(nn.Module):
    """A backbone whose features are not a function of the image alone."""

    num_features = 6

    def __init__(self, kind):
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(784, 6)

    def forward(self, x):
        rows = self.layer(x.flatten(1))
        if self.kind == "rare dropout":  # most answers are alike
            return nn.functional.dropout(rows, 1e-4, training=True)
        if self.kind == "numpy":
            return rows if np.random.rand() < 2 else rows + 1
        return rows - rows.mean(0) if self.kind == "batch" else rows


@pytest.mark.parametrize("kind", ["fixed", "rare dropout", "numpy", "batch"])
def test_a_backbone_that_is_no_function_of_the_image_is_asked_every_time(kind):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (9, 1, 28, 28), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.zeros(9, dtype=torch.long))
    model = Classifier(Own(kind), nn.Identity(), LinearHead(6, 3))
    told: list[str] = []
    asked = frozen.FrozenBackbone(model, parse(SHORT), Ranks(), [split, split], between=list, tell=told.append)
    before = (torch.get_rng_state(), np.random.get_state()[1])
    trained, rows = asked.stands_in(1, split, Clock())
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
    assert asked.wanted == (trained is not model) == bool(told) == (kind == "fixed")
    if kind == "fixed":
        assert torch.equal(rows.images, model.backbone(images / 255).detach()) and trained.head is model.head
        assert asked.stands_in(4, split, Clock()) == (model, split) and len(told) == 1  # free from the fourth epoch on


@pytest.mark.parametrize("more", [[], pytest.param(["--precision=float64"], marks=pytest.mark.slow)])
def test_a_run_stopped_within_a_frozen_epoch_goes_on_to_the_last_bit(tmp_path, monkeypatch, more):
    whole = run(tmp_path / "whole", *more)
    steps, update = [], recipes.train.update

    def stopping(*args, **options):
        update(*args, **options)
        steps.append(1)
        if len(steps) == 9:  # in the second of three frozen epochs
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(recipes.train, "update", stopping)
    with pytest.raises(Stopped, match="of epoch 2"):
        run(tmp_path / "stopped", *more)
    (folder,) = (tmp_path / "stopped").iterdir()
    found = RunDir(folder)
    train(found.config(), resume=found)
    assert history(folder) == history(whole)


@pytest.mark.parametrize(
    "number", [3, pytest.param(5, marks=pytest.mark.slow)]
)  # two passes over two images are behind: the first pass, and the last
def test_a_long_first_pass_is_left_when_it_is_asked(tmp_path, monkeypatch, number):
    passes = []

    def at_once(*_):
        passes.append(1)
        return (os.kill(os.getpid(), signal.SIGTERM) if len(passes) == number else None) or 32

    monkeypatch.setattr(frozen, "images_at_once", at_once)
    with pytest.raises(Stopped, match="go on with --resume"):
        run(tmp_path / "stopped")
    monkeypatch.undo()
    (folder,) = (tmp_path / "stopped").iterdir()
    found = RunDir(folder)
    train(found.config(), resume=found)
    assert history(folder) == history(run(tmp_path / "whole"))


def test_rows_of_an_encoded_split_are_features_of_their_images():
    rows = EncodedSplit(torch.arange(12.0).reshape(6, 2), torch.arange(6))
    ((features, target),) = list(rows[torch.tensor([4, 1])].in_batches(512))
    assert features.tolist() == [[8.0, 9.0], [2.0, 3.0]] and target.tolist() == [4, 1] and rows.side == 1
