"""Unit rows by blocks: the bits of the plain formula, whatever the block, and its derivatives."""

import pytest
import torch
import torch.nn.functional as F

from ncreg.functional import dot_regression_loss, inter_class_cosine_loss, intra_class_cosine_loss, ntce_loss
from ncreg.losses import _row_blocks

CLASSES = 7


def batch(rows, dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows * dim)
    features = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    features[:: max(2, rows // 3)] = 0  # below the least length, the divisor is constant
    target = torch.randint(CLASSES, (rows,), generator=generator)
    weight = torch.randn(CLASSES, dim, generator=generator, dtype=torch.float64)
    return features.to(dtype), target, weight.to(dtype)


LOSSES = {
    "dot regression": lambda h, y, w: (
        dot_regression_loss(h, y, w, reduction="none") @ torch.arange(1.0, len(h) + 1).to(h)
    ),
    "intra": lambda h, y, w: intra_class_cosine_loss(h, y),
    "inter": lambda h, y, w: inter_class_cosine_loss(h, y, CLASSES, center=w[0]),
    "ntce": ntce_loss,
}


def value_and_gradient(loss, features, target, weight):
    features = features.clone().requires_grad_()
    value = loss(features, target, weight)
    return value.detach(), torch.autograd.grad(value, features)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (5, 3), (33, 17), (64, 512), (129, 100)])
@pytest.mark.parametrize("name", LOSSES)
def test_blocks_give_the_bits_of_the_plain_formula(monkeypatch, name, rows, dim, dtype):
    loss, inputs = LOSSES[name], batch(rows, dim, dtype)
    found = []
    for entries in (1, 9 * dim, 2**18):
        monkeypatch.setattr(_row_blocks, "ENTRIES", entries)
        found.append(value_and_gradient(loss, *inputs))
    for module in ("_inputs", "_directions"):
        monkeypatch.setattr(f"ncreg.losses.{module}.blocks_pay", lambda rows: False)
    monkeypatch.setattr(_row_blocks, "_once", lambda rows, grad: False)
    value, gradient = value_and_gradient(loss, *inputs)
    for by_blocks, its_gradient in found:
        assert torch.equal(by_blocks, value)
        assert torch.equal(its_gradient, gradient)


def test_cosines_and_their_gradient_are_those_of_torch():
    features, target, weight = batch(40, 9, torch.float64)
    features[features.abs().sum(1) == 0] = 1.0
    other = features.clone().requires_grad_()
    features.requires_grad_()
    ((dot_regression_loss(features, target, weight)) * 3).backward()
    (((F.cosine_similarity(other, weight[target]) - 1) ** 2 / 2).mean() * 3).backward()
    assert (features.grad - other.grad).abs().max() < 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_first_and_second_derivatives(name):
    features, target, weight = batch(6, 4, torch.float64)
    features = (features + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: LOSSES[name](h, target, weight), features)
    assert torch.autograd.gradgradcheck(lambda h: LOSSES[name](h, target, weight), features)


@pytest.mark.parametrize("name", LOSSES)
def test_other_layouts_and_a_weight_that_learns_take_the_plain_formula(name):
    features, target, weight = batch(12, 5, torch.float64)
    expected = value_and_gradient(LOSSES[name], features, target, weight)
    turned = features.T.contiguous().T
    for found, wanted in zip(value_and_gradient(LOSSES[name], turned, target, weight), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    learned = weight.clone().requires_grad_()
    found = value_and_gradient(LOSSES[name], features, target, learned)
    for mine, wanted in zip(found, expected, strict=True):
        assert torch.allclose(mine, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["dot regression", "intra"])
def test_autocast_rounds_no_gradient_that_keeps_its_graph(name):
    features, target, weight = batch(33, 64)

    def gradient():
        rows = features.clone().requires_grad_()
        return torch.autograd.grad(LOSSES[name](rows, target, weight), rows, create_graph=True)[0].detach()

    wanted = gradient()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gradient(), wanted)


def test_batched_gradients_of_one_graph():
    """is_grads_batched runs backward under vmap, which writes into no memory at hand."""
    features, target, weight = batch(8, 5, torch.float64)
    features.requires_grad_()
    losses = dot_regression_loss(features, target, weight, reduction="none")
    (jacobian,) = torch.autograd.grad(
        losses, features, torch.eye(8, dtype=torch.float64), is_grads_batched=True, retain_graph=True
    )
    one_by_one = torch.stack([torch.autograd.grad(loss, features, retain_graph=True)[0] for loss in losses])
    assert (jacobian - one_by_one).abs().max() < 1e-14
