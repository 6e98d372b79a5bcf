"""The certificate of a run: its bounds against the features themselves, for every kind of head."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from ncreg import swap_head
from recipes.data.split import Split
from recipes.training.metrics import affine_map, balanced, certificate, outputs


def split_of(counts=(9, 7, 8), side=8):
    generator = torch.Generator().manual_seed(0)
    target = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    images = torch.randint(0, 60, (len(target), 1, side, side), generator=generator, dtype=torch.uint8)
    images[:, 0, :, : side // 2] += (90 * target).to(torch.uint8)[:, None, None]
    order = torch.randperm(len(target), generator=generator)
    return Split(images[order], target[order])


class Pixels(nn.Module):
    """A backbone whose features are a learned linear map of the pixels."""

    def __init__(self):
        super().__init__()
        self.map, self.fc = nn.Linear(64, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.map(x.flatten(1).to(self.map.weight.dtype)))


def trained(head, steps=150):
    torch.manual_seed(0)
    model = swap_head(Pixels(), head, num_classes=3, norm="none", input_size=(1, 8, 8)).double()
    split = split_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(split.images.double() / 255), split.target).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("head", ["linear", "etf", "cosine"])
def test_bounds_hold_for_the_features_that_were_seen(head):
    model, split = trained(head), split_of()
    found = certificate(model, split)
    chosen = balanced(split.target, 3, 10_000)
    features, logits = outputs(model, split[chosen])
    seen = features.numpy()
    if head != "linear":
        seen = seen / np.linalg.norm(seen, axis=1, keepdims=True)
    target = split.target[chosen].numpy()
    means = np.stack([seen[target == c].mean(0) for c in range(3)])
    between = ((means - means.mean(0)) ** 2).sum(1).mean()
    total = ((seen - seen.mean(0)) ** 2).sum(1).mean()
    z = logits.numpy()
    margins = [z[i, y] - z[i, j] for i, y in enumerate(target) for j in range(3) if j != y]
    assert found["measured_within_share"] == pytest.approx(1 - between / total, abs=1e-9)
    assert found["measured_within_share"] <= found["within_share"] + 1e-9 <= 1 + 1e-9
    assert found["between_variance"] <= between * (1 + 1e-9)
    assert found["mean_margin"] <= np.mean(margins) * (1 + 1e-9)


def test_equally_many_of_each_class_and_never_more_than_asked():
    target = split_of().target
    for most, each in ((10_000, 7), (12, 4), (2, 0)):
        assert torch.bincount(target[balanced(target, 3, most)], minlength=3).tolist() == [each] * 3


def test_nothing_is_claimed_where_nothing_follows():
    fresh, split = trained("linear", steps=0), split_of()
    with torch.no_grad():
        fresh.head.weight.mul_(-50)  # a loss beyond ln C
    features, logits = outputs(fresh, split)
    assert nn.functional.cross_entropy(logits, split.target) > math.log(3)
    assert certificate(fresh, split) is None
    model = trained("linear", steps=5)
    assert affine_map(model, features, features[:, :3].square()) is None


def test_the_model_is_left_as_it_was():
    model = trained("linear", steps=1).train()
    certificate(model, split_of())
    assert model.training and all(p.requires_grad for p in model.parameters())
