"""Losses and measures against pairwise oracles, closed forms and finite differences."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from ncreg import functional as nf

torch.set_num_threads(1)


def batch(seed=0, samples=12, dim=5, classes=4, dtype=torch.float64):
    """Features (with a length of their own each) and labels in which the last class never occurs."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(samples, dim, generator=g, dtype=dtype)
    features *= torch.rand(samples, 1, generator=g, dtype=dtype) * 3 + 0.1
    return features, torch.randint(classes - 1, (samples,), generator=g)


def simplex(classes, dtype=torch.float64):
    """Unit rows with pairwise cosine −1/(C−1) in C dimensions."""
    eye = torch.eye(classes, dtype=dtype)
    return math.sqrt(classes / (classes - 1)) * (eye - 1 / classes)


def pairwise_cosines(features, target, classes, center):
    """Intra- and inter-class cosines by a loop over all pairs of samples, in numpy."""
    h, y = features.detach().numpy(), target.numpy()
    middle = h.mean(0) if center == "batch" else np.zeros(h.shape[1]) if center is None else center.numpy()
    pairs = [[[] for _ in range(classes)] for _ in range(classes)]
    for i in range(len(h)):
        for j in range(len(h)):
            a, b = h[i] - middle, h[j] - middle
            pairs[y[i]][y[j]].append(a @ b / math.sqrt((a @ a) * (b @ b)))
    return np.array([[np.mean(cell) if cell else np.nan for cell in row] for row in pairs])


CENTERS = [None, "batch", torch.linspace(-1, 1, 5, dtype=torch.float64)]


@pytest.mark.parametrize("center", CENTERS, ids=["none", "batch", "vector"])
@pytest.mark.parametrize("classes", [4, 50])
def test_cosines_equal_the_mean_over_all_pairs(center, classes):
    features, target = batch()
    table = pairwise_cosines(features, target, classes, center)
    inter = nf.inter_class_cosine(features, target, classes, center=center)
    intra = nf.intra_class_cosine(features, target, classes, center=center)
    np.testing.assert_allclose(inter, table, atol=1e-13)
    np.testing.assert_allclose(intra, np.diag(table), atol=1e-13)

    off = table[~np.eye(classes, dtype=bool)]
    wanted_inter = np.nanmean((off + 1 / (classes - 1)) ** 2)
    loss = nf.inter_class_cosine_loss(features, target, classes, center=center)
    np.testing.assert_allclose(loss, wanted_inter, atol=1e-13)
    loss = nf.intra_class_cosine_loss(features, target, center=center)
    np.testing.assert_allclose(loss, 1 - np.nanmean(np.diag(table)), atol=1e-13)


@pytest.mark.parametrize("center", CENTERS, ids=["none", "batch", "vector"])
def test_cosine_losses_pass_gradcheck(center):
    features, target = batch(samples=7)
    features.requires_grad_()
    assert gradcheck(lambda h: nf.intra_class_cosine_loss(h, target, center=center), features)
    for classes in (4, 9):  # more samples than classes, and fewer
        assert gradcheck(lambda h, c=classes: nf.inter_class_cosine_loss(h, target, c, center=center), features)


def test_dot_regression_equals_its_formula_and_passes_gradcheck():
    features, target = batch()
    weight = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cos = [F.cosine_similarity(h, weight[y], dim=0) for h, y in zip(features, target, strict=True)]
    wanted = torch.stack([(c - 1) ** 2 / 2 for c in cos])
    torch.testing.assert_close(nf.dot_regression_loss(features, target, weight, reduction="none"), wanted)
    raw = torch.stack([(h @ weight[y] - 6) ** 2 / 12 for h, y in zip(features, target, strict=True)])
    got = nf.dot_regression_loss(features, target, weight, normalize=False, length=6.0, reduction="sum")
    torch.testing.assert_close(got, raw.sum())
    # Scaling both unit vectors so that their product is 6 is the same as asking for the length of the raw loss.
    unit_h, unit_w = F.normalize(features) * 2, F.normalize(weight) * 3
    torch.testing.assert_close(
        nf.dot_regression_loss(features, target, weight, length=6.0),
        nf.dot_regression_loss(unit_h, target, unit_w, normalize=False, length=6.0),
    )
    features.requires_grad_()
    weight.requires_grad_()
    for normalize in (True, False):
        assert gradcheck(
            lambda h, w, n=normalize: nf.dot_regression_loss(h, target, w, normalize=n, length=2.0),
            (features, weight),
        )


def test_dot_regression_pulls_and_never_pushes():
    """At unit length without normalisation the gradient is −(1 − cos θ) w_y (theory: pull only)."""
    features, target = batch()
    weight = simplex(5)
    h = F.normalize(features).requires_grad_()
    nf.dot_regression_loss(h, target, weight, normalize=False, reduction="sum").backward()
    cosine = (h.detach() * weight[target]).sum(1, keepdim=True)
    torch.testing.assert_close(h.grad, -(1 - cosine) * weight[target])


@given(seed=st.integers(0, 10_000), classes=st.integers(2, 12), samples=st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_cosine_losses_keep_under_rotation_scale_and_relabelling(seed, classes, samples):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(samples, 4, generator=g, dtype=torch.float64)
    target = torch.randint(classes, (samples,), generator=g)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64)).Q
    stretch = torch.rand(samples, 1, generator=g, dtype=torch.float64) + 0.1
    order, names = torch.randperm(samples, generator=g), torch.randperm(classes, generator=g)
    moved, relabelled = (features @ turn * stretch)[order], names[target][order]
    for loss in (nf.intra_class_cosine_loss, lambda h, y: nf.inter_class_cosine_loss(h, y, classes)):
        torch.testing.assert_close(loss(moved, relabelled), loss(features, target), rtol=0, atol=1e-12)
