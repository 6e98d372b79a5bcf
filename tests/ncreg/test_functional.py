"""Losses and measures against pairwise oracles, closed forms and finite differences."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

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


def exact_ntce(features, target, weight, temperature, negatives_only):
    """NTCE or NONL, one sample at a time, in numpy."""
    u, w = unit(features), unit(weight)
    losses = []
    for i, y in enumerate(target.tolist()):
        others = [j for j in range(len(u)) if not (negatives_only and target[j] == y)]
        denominator = sum(math.exp(w[y] @ u[j] / temperature) for j in others)
        losses.append(-math.log(math.exp(w[y] @ u[i] / temperature) / denominator))
    return np.array(losses)


def exact_supcon(features, target, temperature):
    """SupCon over all pairs; NaN for samples without a positive."""
    u, y = unit(features), target.tolist()
    losses = []
    for i in range(len(u)):
        weights = [math.exp(u[i] @ u[k] / temperature) for k in range(len(u))]
        rest = sum(weights) - weights[i]
        terms = [-math.log(weights[j] / rest) for j in range(len(u)) if j != i and y[j] == y[i]]
        losses.append(np.mean(terms) if terms else np.nan)
    return np.array(losses)


def unit(rows):
    rows = rows.detach().numpy()
    return rows / np.sqrt((rows**2).sum(1, keepdims=True))


@pytest.mark.parametrize("classes", [4, 30])
def test_contrastive_losses_equal_their_sums_over_pairs(classes):
    features, target = batch()
    weight = torch.randn(classes, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for loss, negatives_only in ((nf.ntce_loss, False), (nf.nonl_loss, True)):
        got = loss(features, target, weight, temperature=0.3, reduction="none")
        np.testing.assert_allclose(got, exact_ntce(features, target, weight, 0.3, negatives_only), rtol=1e-12)

    target = torch.cat([target[:-1], torch.tensor([9])])  # one sample alone of its class
    wanted = exact_supcon(features, target, 0.3)
    got = nf.supcon_loss(features, target, temperature=0.3, reduction="none")
    np.testing.assert_allclose(got, np.nan_to_num(wanted), rtol=1e-12)
    np.testing.assert_allclose(nf.supcon_loss(features, target, temperature=0.3), np.nanmean(wanted), rtol=1e-12)


def test_logit_losses_and_centre_loss_equal_their_formulas():
    logits, target = batch(dim=4)
    probability = torch.softmax(logits, 1)
    for i, y in enumerate(target.tolist()):
        squares = sum((z - (k == y)) ** 2 for k, z in enumerate(logits[i].tolist())) / 2
        np.testing.assert_allclose(nf.mse_one_hot_loss(logits, target, reduction="none")[i], squares)
        decoupled = -math.log(probability[i, y]) + 0.35 * sum(z * z for z in logits[i].tolist())
        got = nf.spectral_decoupling_loss(logits, target, coefficient=0.7, reduction="none")[i]
        np.testing.assert_allclose(got, decoupled)
        gap = np.linalg.norm(logits[i].numpy() - np.arange(4) * y)
        centers = torch.arange(6).outer(torch.arange(4)).double()
        np.testing.assert_allclose(nf.center_loss(logits, target, centers, reduction="none")[i], gap**2 / 2)


# Every loss of features, target and class vectors, and every one of logits and target.
OF_FEATURES = {
    "intra": lambda h, y, w, **kw: nf.intra_class_cosine_loss(h, y),
    "inter": lambda h, y, w, **kw: nf.inter_class_cosine_loss(h, y, len(w)),
    "dot regression": nf.dot_regression_loss,
    "ntce": nf.ntce_loss,
    "nonl": nf.nonl_loss,
    "supcon": lambda h, y, w, **kw: nf.supcon_loss(h, y, **kw),
}
OF_LOGITS = {"mse": nf.mse_one_hot_loss, "spectral decoupling": nf.spectral_decoupling_loss}
REDUCED = [name for name in OF_FEATURES if name not in ("intra", "inter")]


@pytest.mark.parametrize("name", OF_FEATURES)
@pytest.mark.parametrize("classes", [4, 9], ids=["more samples", "more classes"])
def test_gradcheck_of_feature_losses(name, classes):
    features, target = batch(samples=7)
    weight = torch.randn(classes, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    loss = OF_FEATURES[name]
    inputs = features.requires_grad_(), weight.requires_grad_(name in ("dot regression", "ntce", "nonl"))
    assert gradcheck(lambda h, w: loss(h, target, w), inputs)


@pytest.mark.parametrize("name", [*OF_LOGITS, "centre"])
def test_gradcheck_of_logit_losses(name):
    logits, target = batch(samples=7, dim=4)
    loss = OF_LOGITS.get(name, lambda h, y: nf.center_loss(h, y, torch.eye(4, dtype=torch.float64)))
    assert gradcheck(lambda z: loss(z, target), logits.requires_grad_())


def test_second_derivatives_hold():
    """The unit vectors have a backward of their own: a gradient penalty must see through it."""
    features, target = batch(samples=5)
    features.requires_grad_()
    assert gradgradcheck(lambda h: nf.inter_class_cosine_loss(h, target, 4), features)
    tiny = torch.rand(3, 2, dtype=torch.float64) * 1e-7  # below the smallest length that counts
    tiny.requires_grad_()
    labels, weight = torch.tensor([0, 1, 0]), torch.eye(2, dtype=torch.float64)
    (got,) = torch.autograd.grad(nf.dot_regression_loss(tiny, labels, weight), tiny)
    wanted = (F.normalize(tiny, eps=1e-6) * weight[labels]).sum(1).sub(1).square().mean() / 2
    torch.testing.assert_close(got, torch.autograd.grad(wanted, tiny)[0])


@pytest.mark.parametrize("dim", [1, 3])
def test_the_cosine_measures_have_their_gradient_on_the_axes_too(dim):
    """One-hot features, and one dimension, where the largest entry is the length; the plain quotient is the oracle."""
    features = torch.cat([2.0 * torch.eye(dim), -3.0 * torch.eye(dim), torch.ones(2, dim)]).double().requires_grad_()
    target = torch.arange(len(features)) % 2
    unit = features / features.square().sum(1, keepdim=True).sqrt()
    means = torch.stack([unit[target == c].mean(0) for c in range(2)])
    upstream = torch.tensor([[1.0, 0.3], [-0.7, 0.5]], dtype=torch.float64)
    (inter,) = torch.autograd.grad((nf.inter_class_cosine(features, target, 2) * upstream).sum(), features)
    (wanted,) = torch.autograd.grad(((means @ means.T) * upstream).sum(), features, retain_graph=True)
    torch.testing.assert_close(inter, wanted, atol=1e-12, rtol=0)
    (intra,) = torch.autograd.grad(nf.intra_class_cosine(features, target, 2) @ upstream[0], features)
    (wanted,) = torch.autograd.grad(means.square().sum(1) @ upstream[0], features)
    torch.testing.assert_close(intra, wanted, atol=1e-12, rtol=0)


@given(seed=st.integers(0, 10_000), classes=st.integers(2, 12), samples=st.integers(2, 20))
@settings(max_examples=40, deadline=None)
def test_losses_keep_under_rotation_scale_and_relabelling(seed, classes, samples):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(samples, 4, generator=g, dtype=torch.float64)
    weight = torch.randn(classes, 4, generator=g, dtype=torch.float64)
    target = torch.randint(classes, (samples,), generator=g)
    target[:2] = torch.randperm(classes, generator=g)[:2]  # two classes at least
    turn = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64)).Q
    stretch = torch.rand(samples, 1, generator=g, dtype=torch.float64) + 0.1
    order, names = torch.randperm(samples, generator=g), torch.randperm(classes, generator=g)
    moved, relabelled = (features @ turn * stretch)[order], names[target][order]
    renamed = torch.empty_like(weight)
    renamed[names] = 3 * weight @ turn
    for name, loss in OF_FEATURES.items():
        torch.testing.assert_close(
            loss(moved, relabelled, renamed), loss(features, target, weight), rtol=0, atol=1e-11, msg=name
        )
    logits = features @ weight.T
    shuffled = torch.empty_like(logits[order])
    shuffled[:, names] = logits[order]
    for name, loss in OF_LOGITS.items():
        torch.testing.assert_close(loss(shuffled, relabelled), loss(logits, target), rtol=1e-12, atol=0, msg=name)


@pytest.mark.parametrize("name", REDUCED)
def test_reductions_agree_and_weights_are_a_weighted_mean(name):
    features, target = batch()
    weight = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    loss = OF_FEATURES[name]
    each = loss(features, target, weight, reduction="none")
    torch.testing.assert_close(loss(features, target, weight, reduction="sum"), each.sum())
    torch.testing.assert_close(loss(features, target, weight), each.mean())
    if name != "supcon":
        share = torch.tensor([0.5, 2.0, 1.0, 7.0], dtype=torch.float64)
        weighted = loss(features, target, weight, class_weight=share)
        np.testing.assert_allclose(weighted, np.average(each, weights=share[target]))


@pytest.mark.parametrize("name", ["dot regression", *OF_LOGITS])
def test_a_class_of_weight_two_counts_as_if_each_sample_came_twice(name):
    rows, target = batch(dim=4)
    loss = OF_LOGITS.get(name, lambda h, y, **kw: nf.dot_regression_loss(h, y, simplex(4), **kw))
    again = target == 1
    doubled = loss(torch.cat([rows, rows[again]]), torch.cat([target, target[again]]))
    share = torch.tensor([1.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(loss(rows, target, class_weight=share), doubled)
    soft = F.one_hot(target, 4).double()
    torch.testing.assert_close(loss(rows, soft, class_weight=share), doubled)


@pytest.mark.parametrize("name", ["dot regression", "ntce", "spectral decoupling", "mse"])
def test_soft_labels_mix_the_losses_of_their_classes(name):
    rows, target = batch(dim=4)
    other = (target + 1) % 4
    weight = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    loss = OF_LOGITS.get(name) or (lambda h, y, **kw: OF_FEATURES[name](h, y, weight, **kw))
    soft = 0.7 * F.one_hot(target, 4).double() + 0.3 * F.one_hot(other, 4)
    got = loss(rows, soft, reduction="none")
    if name == "mse":  # quadratic in the label
        wanted = (rows - soft).pow(2).sum(1) / 2
    else:
        wanted = 0.7 * loss(rows, target, reduction="none") + 0.3 * loss(rows, other, reduction="none")
    torch.testing.assert_close(got, wanted)
    leaf = rows.clone().requires_grad_()
    assert gradcheck(lambda h: loss(h, soft), leaf)


@pytest.mark.parametrize("name", ["dot regression", "ntce", "spectral decoupling", "logit adjusted"])
def test_a_soft_label_weighs_each_class_by_its_own_weight(name):
    """Σ_c t_c w_c ℓ_c over Σ t w, from the losses of hard labels; torch's cross-entropy has the same sum."""
    rows, target = batch(dim=4)
    g = torch.Generator().manual_seed(3)
    weight, share = (torch.rand(*size, dtype=torch.float64, generator=g) for size in ((4, 4), (4,)))
    share[2] = 0
    if name == "logit adjusted":
        loss = lambda z, y, **kw: nf.logit_adjusted_cross_entropy(z, y, [1, 1, 1, 1], tau=0.0, **kw)  # noqa: E731
    else:
        loss = OF_LOGITS.get(name) or (lambda h, y, **kw: OF_FEATURES[name](h, y, weight, **kw))
    soft = torch.rand(len(rows), 4, dtype=torch.float64, generator=g)
    soft = soft / soft.sum(1, keepdim=True)
    soft[0] = torch.tensor([0.0, 0.0, 1.0, 0.0])  # all of it of weight 0
    hard = torch.stack([loss(rows, torch.full_like(target, c), reduction="none") for c in range(4)], 1)
    wanted = (soft * share * hard).sum(1)
    torch.testing.assert_close(loss(rows, soft, class_weight=share, reduction="none"), wanted)
    mean = loss(rows, soft, class_weight=share)
    torch.testing.assert_close(mean, wanted.sum() / (soft * share).sum())
    if name == "logit adjusted":
        torch.testing.assert_close(F.cross_entropy(rows, soft, weight=share, reduction="none"), wanted)
    leaf = rows.clone().requires_grad_()
    assert gradcheck(lambda h: loss(h, soft, class_weight=share), leaf)


def test_labels_and_weights_come_in_the_precision_asked_for():
    target, counts = torch.tensor([1, 0]), [3, 7, 1]
    exact = nf.smooth_labels(target, 3, 0.1, dtype=torch.float64)
    assert exact.dtype == torch.float64 and exact[0].tolist() == [0.1 / 3, 0.9 + 0.1 / 3, 0.1 / 3]
    weights = nf.class_weights(counts, dtype=torch.float64)
    wanted = 1 / np.array(counts)
    np.testing.assert_allclose(weights, wanted * 3 / wanted.sum(), rtol=1e-15)
    z, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1])
    shares = [0.1, 0.2, 0.7]  # as Python has them, not as float32 does
    wanted = F.cross_entropy(z + torch.tensor(shares, dtype=torch.float64).log(), y)
    got = nf.logit_adjusted_cross_entropy(z, y, shares)
    torch.testing.assert_close(got, wanted, rtol=1e-14, atol=0)


def test_smoothed_labels_are_torchs():
    logits, target = batch(dim=4)
    smooth = nf.smooth_labels(target, 4, 0.2)
    got = nf.spectral_decoupling_loss(logits, smooth, coefficient=1e-12)
    torch.testing.assert_close(got, F.cross_entropy(logits, target, label_smoothing=0.2), rtol=0, atol=1e-7)


# ---- closed forms


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_a_simplex_is_the_optimum_of_the_cosine_losses(classes):
    """Value and gradient vanish, balanced or not, also for d = C−1; a batch centre would push it away."""
    corners = simplex(classes) @ torch.linalg.svd(simplex(classes)).Vh[: classes - 1].T
    target = torch.arange(classes).repeat_interleave(torch.arange(classes) + 1)
    for center in (None, "batch"):
        features = (3 * corners[target]).requires_grad_()
        loss = nf.intra_class_cosine_loss(features, target, center=center)
        loss = loss + nf.inter_class_cosine_loss(features, target, classes, center=center)
        (grad,) = torch.autograd.grad(loss, features)
        exact = center is None or classes == 2  # on a line unit vectors have nowhere to turn
        assert (loss.abs() < 1e-12) == exact
        assert (grad.abs().max() < 1e-8) == exact


@pytest.mark.parametrize(("classes", "each", "temperature"), [(3, 4, 0.5), (10, 2, 0.1), (2, 3, 1.0)])
def test_contrastive_losses_at_a_simplex(classes, each, temperature):
    corners, target = simplex(classes), torch.arange(classes).repeat(each)
    apart = math.exp(-classes / ((classes - 1) * temperature))
    supcon = math.log(each - 1 + each * (classes - 1) * apart)
    np.testing.assert_allclose(nf.supcon_loss(corners[target], target, temperature=temperature), supcon)
    ntce = math.log(each + each * (classes - 1) * apart)
    np.testing.assert_allclose(nf.ntce_loss(corners[target], target, corners, temperature=temperature), ntce)
    nonl = math.log(each * (classes - 1) * apart)
    np.testing.assert_allclose(nf.nonl_loss(corners[target], target, corners, temperature=temperature), nonl)


def test_spectral_decoupling_settles_where_its_logits_balance():
    """At the optimum z_y = q/λ, q the probability of the wrong classes (theory §3)."""
    coefficient, classes = 0.05, 5
    low, high = 0.0, 50.0
    for _ in range(200):  # bisection of x(C−1)λ/C = (C−1)/(eˣ + C−1)
        x = (low + high) / 2
        rising = x * (classes - 1) * coefficient / classes > (classes - 1) / (math.exp(x) + classes - 1)
        low, high = (low, x) if rising else (x, high)
    q = (classes - 1) / (math.exp(x) + classes - 1)
    logits = torch.full((1, classes), -q / coefficient / (classes - 1), dtype=torch.float64)
    logits[0, 2] = q / coefficient
    logits.requires_grad_()
    nf.spectral_decoupling_loss(logits, torch.tensor([2]), coefficient=coefficient).backward()
    assert logits.grad.abs().max() < 1e-12


def test_contrastive_gradient_in_the_features():
    """NTCE: (1/τ)·Σ_c p_cj ŵ_c n_c − ŵ_y per sample j, p_c the softmax of class c over the batch."""
    features, target = batch()
    h = F.normalize(features).requires_grad_()
    w = simplex(5)[:4]
    nf.ntce_loss(h, target, w, temperature=0.5, reduction="sum").backward()
    share = torch.softmax(h.detach() @ w.T / 0.5, dim=0)
    sizes = target.bincount(minlength=4).double()
    raw = ((share * sizes) @ w - w[target]) / 0.5
    tangent = raw - (raw * h.detach()).sum(1, keepdim=True) * h.detach()
    torch.testing.assert_close(h.grad, tangent)


@pytest.mark.parametrize("size", [1e-200, 1e-30, 1e-7, 1e200])
@pytest.mark.parametrize("center", [None, "batch"])
def test_cosine_measures_know_no_scale(size, center):
    features, target = batch()[:2]
    for measure in (nf.intra_class_cosine, nf.inter_class_cosine):
        wanted = measure(features, target, 4, center=center)
        torch.testing.assert_close(
            measure(features * size, target, 4, center=center), wanted, rtol=0, atol=1e-13, equal_nan=True
        )
    assert not nf.intra_class_cosine(features * 0, target * 0, 4)[0]


# ---- KoLeo


def test_koleo_is_the_log_distance_to_the_nearest_neighbour():
    h = batch(samples=20)[0]
    rows = h.numpy() / np.linalg.norm(h.numpy(), axis=1, keepdims=True)
    nearest = [min(math.dist(u, v) for j, v in enumerate(rows) if j != i) for i, u in enumerate(rows)]
    np.testing.assert_allclose(nf.koleo_loss(h, reduction="none"), -np.log(np.array(nearest) + 1e-8), rtol=1e-12)
    np.testing.assert_allclose(nf.koleo_loss(h), -np.mean(np.log(np.array(nearest) + 1e-8)), rtol=1e-12)
    assert gradcheck(nf.koleo_loss, h.requires_grad_()) and gradgradcheck(nf.koleo_loss, h)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_koleo_knows_the_neighbours_of_collapsed_features(dtype):
    """Rows (1, t) at the angles t: a cosine in float32 is 1 for all of them."""
    angles = torch.tensor([[1, 2, 6, 7.5, 16], [-1, -2.5, 20, 24, 25]], dtype=dtype) * 2.0**-13
    h = torch.zeros(2, 5, 4, dtype=dtype)
    h[0, :, 0], h[0, :, 1], h[1, :, 2], h[1, :, 3] = 1, angles[0], 2, 2 * angles[1]
    gaps = (angles.double().atan()[:, :, None] - angles.double().atan()[:, None]).abs() + torch.eye(5) * 9
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    found = nf.koleo_loss(h.flatten(0, 1)[order], reduction="none").double()
    np.testing.assert_allclose(found, -gaps.amin(2).flatten()[order].log(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_koleo_at_a_simplex(classes):
    wanted = -0.5 * math.log(2 * classes / (classes - 1))
    assert float(nf.koleo_loss(7 * simplex(classes))) == pytest.approx(wanted, abs=2e-8)


def test_koleo_leaves_equal_directions_where_they_are():
    """Distance 0 counts −ln(1e−8) and gives no gradient; the third row is pushed from the nearer of the others."""
    h = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    each = nf.koleo_loss(h, reduction="none")
    np.testing.assert_allclose(each.detach(), [-math.log(1e-8)] * 2 + [-math.log(math.sqrt(2) + 1e-8)], rtol=1e-12)
    (pull,) = torch.autograd.grad(each[:2].sum(), h)
    assert not pull.any()
