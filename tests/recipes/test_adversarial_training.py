"""Adversarial training: the attack against closed forms on an affine model, and what it leaves untouched."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from recipes.core.cli import parse
from recipes.core.config import AdversarialConfig
from recipes.core.distributed import Ranks
from recipes.data.augment import Batch
from recipes.train import main, train
from recipes.training.adversarial import Adversary, attacked


def batch_of(count=12, side=5, classes=2, low=0.3, high=0.7):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 1, side, side, generator=generator, dtype=torch.float64) * (high - low) + low
    target = torch.arange(count) % classes
    return Batch(images, target, target)


@pytest.fixture
def affine():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(25, 2)).double()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_two_classes_of_an_affine_model_have_their_worst_image_in_closed_form(affine, norm):
    """Cross-entropy of two classes grows along w_other - w_y alone: to the corner of the cube, or to the sphere."""
    batch, epsilon = batch_of(), 0.1
    start = torch.rand(batch.images.shape, generator=torch.Generator().manual_seed(2)) * 2 - 1
    found = attacked(affine, batch, start, AdversarialConfig(epsilon=epsilon, steps=60, step_size=0.05, norm=norm))
    weight = affine[1].weight.detach().view(2, 1, 5, 5)
    uphill = weight[1 - batch.target] - weight[batch.target]
    unit = uphill.sign() if norm == "linf" else uphill / uphill.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(found, batch.images + epsilon * unit, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_adversarial_images_stay_in_the_ball_and_in_range(affine, norm):
    batch = batch_of(low=0.0, high=1.0)
    start = torch.rand(batch.images.shape, generator=torch.Generator().manual_seed(2)) * 2 - 1
    found = attacked(affine, batch, start, AdversarialConfig(epsilon=0.2, steps=3, norm=norm))
    change = (found - batch.images).flatten(1)
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert size.max() <= 0.2 * (1 + 1e-6) and found.min() >= 0 and found.max() <= 1
    before, after = (nn.functional.cross_entropy(affine(images), batch.target) for images in (batch.images, found))
    assert after > before


def test_the_attack_reads_the_model_in_eval_mode_and_leaves_it_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(25, 2)).double()
    model[2].weight.requires_grad_(False)
    model[0].eval()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    config = AdversarialConfig(epsilon=0.1, steps=2, step_size=0.01)
    batch = batch_of()
    one = Adversary(config, model, Ranks())(batch, epoch=1, step=0)
    assert [module.training for module in model] == [False, True, True] and not model[2].weight.requires_grad
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    again, other = (Adversary(config, model, Ranks())(batch, epoch=1, step=step) for step in (0, 1))
    assert torch.equal(one.images, again.images) and not torch.equal(one.images, other.images)
    assert one.target is batch.target


def test_ranks_and_accumulation_attack_the_same_images_as_one_process(affine):
    batch, config = batch_of(), AdversarialConfig(epsilon=0.1, steps=2)
    whole = Adversary(config, affine, Ranks())(batch, epoch=3, step=5).images
    shares = []
    for rank in range(2):
        part = Batch(*(tensor.chunk(2)[rank] for tensor in (batch.images, batch.target, batch.labels)))
        shares.append(Adversary(config, affine, Ranks(rank, 2), chunks=3)(part, epoch=3, step=5).images)
    torch.testing.assert_close(torch.cat(shares), whole, rtol=0, atol=1e-12)


def test_it_acts_in_the_phase_asked_for():
    def active(**config):
        made = Adversary(AdversarialConfig(**config), SimpleNamespace(), Ranks())
        return [made.active(phase) for phase in ("fitting", "terminal")]

    assert active() == [False, False]
    assert active(epsilon=0.1) == [True, True]
    assert active(epsilon=0.1, phase="terminal") == [False, True]


def test_a_run_is_trained_on_what_the_attack_makes(tmp_path):
    short = ["--data.train_size", "192", "--data.batch_size", "64", "--tpt.max_epochs", "2", "--quiet", "true"]
    loss = {}
    for epsilon in ("0", "0.05", "0.3"):
        path = train(parse(["adversarial", *short, "--adversarial.epsilon", epsilon, "--out", str(tmp_path / epsilon)]))
        rows = [json.loads(row) for row in (path / "history.jsonl").read_text().splitlines()]
        loss[epsilon] = rows[-1]["loss"]
    assert loss["0"] < loss["0.05"] < loss["0.3"]


@pytest.mark.parametrize("words", ["--adversarial.epsilon -1", "--adversarial.steps 0", "--adversarial.step_size 0"])
def test_wrong_values_are_refused_by_their_key(tmp_path, capsys, words):
    assert main(["adversarial", *words.split(), "--out", str(tmp_path)]) == 2
    assert f"error: {words.split()[0].removeprefix('--')}=" in capsys.readouterr().err and not list(tmp_path.iterdir())
