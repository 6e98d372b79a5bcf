"""Sampled negatives: an unbiased sum, a loss that is biased low, and gradients of the rows drawn alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ncreg.functional import sampled_cross_entropy
from ncreg.heads import CodeHead, CosineHead, ETFHead, LinearHead

DIM, CLASSES = 8, 60


def batch():
    generator = torch.Generator().manual_seed(1)
    features = 2 * torch.randn(5, DIM, dtype=torch.float64, generator=generator)
    return (
        features,
        torch.tensor([0, 3, 3, 59, 20]),
        torch.rand(CLASSES, dtype=torch.float64, generator=generator) + 0.1,
    )


def sampled(head, number, *, draws=2000, **options):
    features, target, _ = batch()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        many = [
            sampled_cross_entropy(features, head, target, number, reduction="none", generator=generator, **options)
            for _ in range(draws)
        ]
    return torch.stack(many)


@pytest.mark.parametrize("drawn_alike", [True, False])
@pytest.mark.parametrize("build", [LinearHead, CosineHead, CodeHead])
def test_the_sum_is_unbiased_and_the_loss_lies_below_the_exact_one_by_its_variance(build, drawn_alike):
    head = (build(DIM, CLASSES, scale=4.0) if build is not LinearHead else build(DIM, CLASSES)).double()
    features, target, chances = batch()
    losses = sampled(head, 30, draws=1000, **({} if drawn_alike else {"probabilities": chances}))
    exact = F.cross_entropy(head(features), target, reduction="none").detach()
    ratio = (losses - exact).exp()  # estimated over true sum of all classes
    error = ratio.std(0) / len(ratio) ** 0.5
    assert ((ratio.mean(0) - 1).abs() < 4 * error).all()
    bias, spread = (losses - exact).mean(0), ratio.var(0)
    assert (bias < 0).all()
    torch.testing.assert_close(bias, -spread / 2, rtol=0.6, atol=4 * float(error.max()))


def test_bias_falls_with_the_number_of_draws():
    head = LinearHead(DIM, CLASSES).double()
    features, target, _ = batch()
    exact = F.cross_entropy(head(features), target, reduction="none").detach()
    few, many = ((sampled(head, number, draws=1000) - exact).mean().abs() for number in (5, 80))
    assert many < few / 8  # 1/16 in the limit


def test_sparse_gradient_is_the_dense_one_on_the_rows_drawn():
    features, target, _ = batch()
    head = nn.Linear(DIM, CLASSES).double()
    found = []
    for sparse in (False, True):
        head.zero_grad()
        generator = torch.Generator().manual_seed(3)
        sampled_cross_entropy(features, head, target, 10, sparse=sparse, generator=generator).backward()
        found.append(head.weight.grad)
    dense, rows = found
    assert rows.is_sparse and rows.coalesce().indices().shape[1] <= 15
    torch.testing.assert_close(rows.to_dense(), dense)


def test_the_default_device_plays_no_part():
    features, target, _ = batch()
    head, generator = LinearHead(DIM, CLASSES).double(), torch.Generator()
    expected = sampled_cross_entropy(features, head, target, 10, generator=generator.manual_seed(3))
    with torch.device("meta"):
        assert sampled_cross_entropy(features, head, target, 10, generator=generator.manual_seed(3)) == expected


@pytest.mark.usefixtures("unchecked")
def test_refusals():
    features, target, chances = batch()
    head = LinearHead(DIM, CLASSES).double()
    with pytest.raises(ValueError, match="num_sampled=0 must be at least 1"):
        sampled_cross_entropy(features, head, target, 0)
    with pytest.raises(ValueError, match=r"probabilities must be a tensor of shape \(60,\), one a class, got \(3,\)"):
        sampled_cross_entropy(features, head, target, 5, probabilities=torch.ones(3))
    with pytest.raises(ValueError, match="probabilities must be a tensor .* got list"):
        sampled_cross_entropy(features, head, target, 5, probabilities=[1 / 60] * 60)
    with pytest.raises(ValueError, match="above 0: a class that is never drawn"):
        sampled_cross_entropy(features, head, target, 5, probabilities=chances.index_fill(0, torch.tensor([4]), 0))
    structured = ETFHead(DIM, DIM, structure="grouped").double()
    with pytest.raises(TypeError, match="holds no class vectors"):
        sampled_cross_entropy(features, structured, target % DIM, 5)
