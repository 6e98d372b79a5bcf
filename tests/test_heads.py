"""Heads against their own dense product, torch's modules and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from ncreg.heads import HEADS, CosineHead, ETFHead, LinearHead

F64 = {"dtype": torch.float64}


@pytest.mark.parametrize("num_classes", [2, 10, 100, 1000])
def test_default_scale_reaches_one_hundredth(num_classes):
    """At a feature on its class vector the cross-entropy is 0.01, and no unit feature does better."""
    head = ETFHead(num_classes - 1, num_classes, **F64)
    target = torch.arange(num_classes)
    assert F.cross_entropy(head(3 * head.weight), target).item() == pytest.approx(0.01, rel=1e-9)
    nearby = head.weight + 0.01 * torch.randn(head.weight.shape, **F64)
    assert F.cross_entropy(head(nearby), target).item() > 0.01


@pytest.mark.parametrize("normalize", [True, False])
def test_etf_logits_are_scaled_cosines(normalize):
    head = ETFHead(12, 5, normalize=normalize, scale=3.0, **F64)
    features = torch.randn(7, 12, **F64, requires_grad=True)
    unit = F.normalize(features, dim=1) if normalize else features
    assert torch.allclose(head(features), 3 * unit @ head.weight.T, atol=1e-12)
    assert torch.autograd.gradcheck(head, features)


def test_frame_is_a_buffer():
    head = ETFHead(12, 5)
    assert not list(head.parameters())
    assert list(head.state_dict()) == ["weight"]
    assert head.double().weight.dtype == torch.float64


def test_zero_feature_has_a_bounded_gradient():
    features = torch.zeros(2, 12, requires_grad=True)
    ETFHead(12, 5)(features).logsumexp(1).sum().backward()
    assert features.grad.isfinite().all()
    assert features.grad.abs().max() < 1e8


def test_linear_head_is_nn_linear():
    head, plain = LinearHead(12, 5), torch.nn.Linear(12, 5)
    plain.load_state_dict(head.state_dict())
    features = torch.randn(7, 12)
    assert torch.equal(head(features), plain(features))
    assert (head.in_features, head.num_classes, head.scale) == (12, 5, 1.0)
    assert head.weight.abs().max() <= 1 / math.sqrt(12)


def test_cosine_head_ignores_lengths():
    head = CosineHead(12, 5, scale=2.0, **F64)
    features = torch.randn(7, 12, **F64, requires_grad=True)
    cosines = F.cosine_similarity(features[:, None], head.weight[None], dim=2)
    with torch.no_grad():
        head.weight.mul_(7)
    assert torch.allclose(head(features), 2 * cosines, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(head, {"weight": w}, x), (features, head.weight)
    )


@pytest.mark.parametrize("name", HEADS)
def test_heads_draw_from_their_own_generator(name):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = HEADS[name](16, 4), HEADS[name](16, 4), HEADS[name](16, 4, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", HEADS)
def test_heads_refuse(name):
    build = HEADS[name]
    with pytest.raises(ValueError, match="num_classes=1"):
        build(8, 1)
    with pytest.raises(TypeError, match="in_features=8.5"):
        build(8.5, 4)
    with pytest.raises(ValueError, match=r"\(2, 8, 1, 1\)"):
        build(8, 4)(torch.zeros(2, 8, 1, 1))
    with pytest.raises(ValueError, match=r"\(batch, 8\)"):
        build(8, 4)(torch.zeros(2, 9))
