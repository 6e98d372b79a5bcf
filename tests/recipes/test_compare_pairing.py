"""Recipes of one seed start from the same split, the same backbone weights and the same batch order."""

import functools
from functools import partial

import pytest
import torch
from miniature_study import TINY

from recipes.core.cli import parse, recipes
from recipes.data.augment import epoch_order
from recipes.data.load import load
from recipes.training.build import build_model, image_size


@functools.cache
def start(name, seed):
    """A recipe's backbone before the first step, its data, and its first batch orders."""
    config = parse([name, f"--seed={seed}", *(f"--{key}={value}" for key, value in TINY.items())])
    config.model.pretrained = False
    data = load(
        config.data,
        seed=config.seed,
        image_size=partial(image_size, backbone=config.model.backbone, requested=config.data.image_size),
    )
    return (
        build_model(config.model, data, seed=config.seed).backbone.state_dict(),
        data,
        [epoch_order(config.seed, e, 128) for e in (1, 2)],
    )


@pytest.mark.parametrize("name", [name for name in recipes() if name not in ("baseline", "finetune")])
def test_recipes_of_one_seed_start_alike(name):
    """Backbone weights, split and batch order equal the baseline's to the last bit, so that differences are paired."""
    (ours, data, turns), (theirs, base, base_turns) = start(name, 3), start("baseline", 3)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(data, part).images, getattr(base, part).images)
        assert torch.equal(getattr(data, part).target, getattr(base, part).target)
    assert all(torch.equal(*pair) for pair in zip(turns, base_turns, strict=True))


def test_another_seed_starts_otherwise_but_tests_on_the_same_images():
    (ours, data, turns), (theirs, base, base_turns) = start("etf", 3), start("etf", 4)
    assert any(not torch.equal(ours[key], theirs[key]) for key in ours)
    assert not torch.equal(data.train.images, base.train.images) and not torch.equal(turns[0], base_turns[0])
    assert torch.equal(data.test.images, base.test.images)
