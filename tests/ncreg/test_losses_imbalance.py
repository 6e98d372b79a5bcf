"""Logit adjustment and class weights against their formulas, written out sample by sample in numpy."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ncreg import functional as nf
from ncreg import losses

COUNTS = [500, 60, 7, 1]


def batch(seed=0, dtype=torch.float64, samples=9, classes=4):
    draw = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(samples, classes, generator=draw, dtype=torch.float64)
    return z.to(dtype), torch.arange(samples) % classes


def reference(z, y, counts, tau):
    """Menon et al.'s pairwise form: ln(1 + Σ_{c≠y} (n_c/n_y)^τ e^{z_c − z_y})."""
    z, counts = np.asarray(z), np.asarray(counts, dtype=float)
    out = []
    for row, own in zip(z, np.asarray(y), strict=True):
        rest = [(counts[c] / counts[own]) ** tau * math.exp(row[c] - row[own]) for c in range(len(row)) if c != own]
        out.append(math.log1p(sum(rest)))
    return np.array(out)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.5, -1.0])
def test_the_loss_is_menons_pairwise_form(tau):
    z, y = batch()
    wanted = reference(z, y, COUNTS, tau)
    got = nf.logit_adjusted_cross_entropy(z, y, COUNTS, tau=tau, reduction="none")
    np.testing.assert_allclose(got, wanted, rtol=1e-12)
    np.testing.assert_allclose(nf.logit_adjusted_cross_entropy(z, y, COUNTS, tau=tau), wanted.mean(), rtol=1e-12)
    np.testing.assert_allclose(
        nf.logit_adjusted_cross_entropy(z, y, COUNTS, tau=tau, reduction="sum"), wanted.sum(), rtol=1e-12
    )


def test_tau_one_is_balanced_softmax_and_tau_zero_cross_entropy():
    z, y = batch()
    n = np.array(COUNTS, dtype=float)
    e = n * np.exp(z.numpy())
    balanced = -np.log(e[np.arange(len(y)), y] / e.sum(1))
    np.testing.assert_allclose(nf.logit_adjusted_cross_entropy(z, y, COUNTS, reduction="none"), balanced, rtol=1e-12)
    torch.testing.assert_close(nf.logit_adjusted_cross_entropy(z, y, COUNTS, tau=0.0), F.cross_entropy(z, y))
    equal = nf.logit_adjusted_cross_entropy(z, y, [7] * 4, tau=3.0)
    torch.testing.assert_close(equal, F.cross_entropy(z, y))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=4, max_size=4), st.floats(0.1, 1000), st.integers(0, 99))
def test_only_shares_matter_and_classes_may_be_renamed(counts, factor, seed):
    z, y = batch(seed)
    loss = nf.logit_adjusted_cross_entropy(z, y, counts)
    scaled = nf.logit_adjusted_cross_entropy(z, y, torch.tensor(counts, dtype=torch.float64) * factor)
    torch.testing.assert_close(scaled, loss)
    order = torch.tensor([2, 0, 3, 1])
    renamed = nf.logit_adjusted_cross_entropy(z[:, order], order.argsort()[y], [counts[i] for i in order])
    torch.testing.assert_close(renamed, loss)


def test_its_bayes_rule_is_the_balanced_one():
    """Fitted to samples of p(x|y)π_y, free logits come out as ln p(x|y) up to a constant of x, whatever π."""
    given_class = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3]], dtype=torch.float64)  # p(x|y): 2 classes, 3 inputs
    prior = torch.tensor([0.9, 0.1], dtype=torch.float64)
    joint = (prior[:, None] * given_class).T  # (x, y)
    z = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([z], 1, 200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        soft = joint / joint.sum(1, keepdim=True)
        per_input = nf.logit_adjusted_cross_entropy(z, soft, [90, 10], reduction="none")
        loss = (joint.sum(1) * per_input).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    wanted = (given_class[0] / given_class[1]).log()
    torch.testing.assert_close((z[:, 0] - z[:, 1]).detach(), wanted, rtol=0, atol=1e-6)


def test_soft_labels_mix_hard_ones_and_weights_weigh():
    z, y = batch()
    hot = F.one_hot(y, 4).double()
    torch.testing.assert_close(
        nf.logit_adjusted_cross_entropy(z, hot, COUNTS), nf.logit_adjusted_cross_entropy(z, y, COUNTS)
    )
    other = hot.roll(1, 0)
    hard = [nf.logit_adjusted_cross_entropy(z, part, COUNTS, reduction="none") for part in (hot, other)]
    mixed = nf.logit_adjusted_cross_entropy(z, 0.3 * hot + 0.7 * other, COUNTS, reduction="none")
    torch.testing.assert_close(mixed, 0.3 * hard[0] + 0.7 * hard[1])
    share = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    weighted = nf.logit_adjusted_cross_entropy(z, y, COUNTS, class_weight=share)
    torch.testing.assert_close(weighted, (hard[0] * share[y]).sum() / share[y].sum())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_without_adjustment_it_is_torchs_cross_entropy_weights_and_smoothing_included(reduction, smoothing):
    z, y = batch()
    share = torch.tensor([1.0, 2.0, 3.0, 40.0], dtype=torch.float64)
    options = {"label_smoothing": smoothing, "reduction": reduction}
    ours = nf.logit_adjusted_cross_entropy(z, y, [5, 3, 2, 1], tau=0.0, class_weight=share, **options)
    torch.testing.assert_close(ours, F.cross_entropy(z, y, weight=share, **options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_smoothing_goes_by_the_shares_and_its_optimum_has_equal_wrong_logits(tau):
    """Against torch's smoothing at τ = 0, against the definition, and at the optimum in closed form."""
    z, y = batch()
    s, share = 0.2, torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)
    got = nf.logit_adjusted_cross_entropy(z, y, COUNTS, tau=tau, label_smoothing=s, reduction="none")
    each = torch.stack(
        [nf.logit_adjusted_cross_entropy(z, torch.full_like(y, c), COUNTS, tau=tau, reduction="none") for c in range(4)]
    )
    spread = share**tau / (share**tau).sum()
    torch.testing.assert_close(got, (1 - s) * each.gather(0, y[None])[0] + s * spread @ each)
    if tau == 0:
        torch.testing.assert_close(got, F.cross_entropy(z, y, label_smoothing=s, reduction="none"))
    hot = F.one_hot(y, 4).double()
    soft = nf.logit_adjusted_cross_entropy(z, hot, COUNTS, tau=tau, label_smoothing=s, reduction="none")
    torch.testing.assert_close(soft, got)
    # Adjusted probabilities equal to the smoothed label are its minimum: there the gradient vanishes.
    label = (1 - s) * F.one_hot(torch.tensor([0]), 4).double() + s * spread
    best = (label.log() - tau * share.log()).requires_grad_()
    (slope,) = torch.autograd.grad(
        nf.logit_adjusted_cross_entropy(best, torch.tensor([0]), COUNTS, tau=tau, label_smoothing=s), best
    )
    assert slope.abs().max() < 1e-15
    torch.testing.assert_close(best[0, 1:], best[0, 1].expand(3))


@pytest.mark.parametrize(("ratio", "wins"), [(90, True), (92, False)])
def test_labels_smoothed_evenly_lose_a_class_to_one_with_a_91st_of_its_images(ratio, wins):
    """The warning of the docstring: (1 − s)·C/s + 1 = 91 for ten classes and s = 0.1."""
    counts = torch.tensor([ratio, *[10] * 8, 1], dtype=torch.float64)
    for even in (True, False):
        spread = torch.full((10,), 0.1, dtype=torch.float64) if even else counts / counts.sum()
        label = 0.9 * F.one_hot(torch.tensor([0]), 10).double() + 0.1 * spread
        best = (label.log() - (counts / counts.sum()).log()).requires_grad_()
        smoothing = {} if even else {"label_smoothing": 0.1}
        target = nf.smooth_labels(torch.tensor([0]), 10, 0.1, dtype=torch.float64) if even else torch.tensor([0])
        (slope,) = torch.autograd.grad(nf.logit_adjusted_cross_entropy(best, target, counts, **smoothing), best)
        assert slope.abs().max() < 1e-15
        assert (best.argmax() == 0) == (wins or not even)


def test_gradients():
    z, y = batch()
    assert gradcheck(lambda z: nf.logit_adjusted_cross_entropy(z, y, COUNTS, tau=1.3), z.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_lifted(dtype):
    z, y = batch(dtype=dtype)
    module = losses.LogitAdjustedLoss(COUNTS).to(dtype)  # counts stay exact
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = module(z, y)
    np.testing.assert_allclose(got.item(), reference(z.double(), y, COUNTS, 1.0).mean(), rtol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_one_hot_label_is_its_index_with_weights_and_smoothing(reduction):
    z, y = batch()
    options = {"label_smoothing": 0.3, "class_weight": torch.tensor([0.2, 1.0, 3.0, 0.5]), "reduction": reduction}
    hard, soft = (
        nf.logit_adjusted_cross_entropy(z, target, COUNTS, **options) for target in (y, F.one_hot(y).double())
    )
    torch.testing.assert_close(soft, hard)


def test_the_module_holds_its_counts():
    z, y = batch(dtype=torch.float32)
    share = torch.tensor([1.0, 2.0, 3.0, 4.0])
    module = losses.LogitAdjustedLoss(torch.tensor(COUNTS), tau=0.5, class_weight=share, reduction="sum")
    wanted = nf.logit_adjusted_cross_entropy(z, y, COUNTS, tau=0.5, class_weight=share, reduction="sum")
    assert module.consumes == ("logits", "target")
    torch.testing.assert_close(module(z, y), wanted)
    torch.testing.assert_close(pickle.loads(pickle.dumps(module))(z, y), wanted)
    assert set(module.state_dict()) == {"class_counts", "class_weight"}
    assert repr(module) == "LogitAdjustedLoss(tau=0.5, label_smoothing=0.0, reduction='sum', gather=False)"


def test_it_moves_decisions_towards_rare_classes():
    """On overlapping classes at 50 to 1, plain cross-entropy gives the rare one up; the adjusted one does not."""
    draw = torch.Generator().manual_seed(0)
    counts = [1000, 20]
    x = torch.cat([torch.randn(n, 1, generator=draw, dtype=torch.float64) + c for c, n in enumerate(counts)])
    y = torch.arange(2).repeat_interleave(torch.tensor(counts))
    cuts = []
    for loss in (torch.nn.CrossEntropyLoss(), losses.LogitAdjustedLoss(counts)):
        w = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

        def closure(loss=loss, w=w, optimizer=optimizer):
            optimizer.zero_grad()
            value = loss(x * w[0] + w[1], y)
            value.backward()
            return value

        optimizer.step(closure)
        (slope, offset) = (w[:, 1] - w[:, 0]).tolist()
        cuts.append(-offset / slope)
    assert cuts[0] > 3  # beyond the rare class's own mean, at 1
    assert abs(cuts[1] - 0.5) < 0.3  # the midpoint, which is what balanced classes would have


# ---- class weights


def test_inverse_weights_give_every_class_the_same_say():
    weight = nf.class_weights(COUNTS)
    np.testing.assert_allclose(weight * torch.tensor(COUNTS), (weight * torch.tensor(COUNTS))[0].expand(4), rtol=1e-6)
    np.testing.assert_allclose(weight.sum(), 4, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 1 - 1e-7])
def test_effective_weights_are_cuis(beta):
    """The effective number is a geometric series: 1 + β + … + β^(n−1)."""
    counts = [1, 2, 5, 40]
    number = np.array([math.fsum(beta**k for k in range(n)) for n in counts])
    wanted = 4 * (1 / number) / (1 / number).sum()
    np.testing.assert_allclose(nf.class_weights(counts, "effective", beta=beta), wanted, rtol=1e-6)


def test_effective_weights_run_from_none_to_inverse():
    np.testing.assert_allclose(nf.class_weights(COUNTS, "effective", beta=0.0), np.ones(4))
    near = nf.class_weights(COUNTS, "effective", beta=1 - 1e-12)
    np.testing.assert_allclose(near, nf.class_weights(COUNTS), rtol=1e-6)
    assert nf.class_weights(torch.tensor(COUNTS)).dtype == torch.float32


# ---- refusals

Z, Y = torch.zeros(3, 4), torch.tensor([0, 1, 2])
REFUSED = [
    (lambda: nf.logit_adjusted_cross_entropy(Z, Y, [5, 0, 2, 1]), ValueError, r"class_counts\[1\]=0: every class"),
    (lambda: nf.logit_adjusted_cross_entropy(Z, Y, [5, 1, 2]), ValueError, r"shape \(4,\), .* got shape \(3,\)"),
    (lambda: nf.logit_adjusted_cross_entropy(Z, Y, [5, 1, 2, -1]), ValueError, r"class_counts\[3\]=-1"),
    (lambda: nf.logit_adjusted_cross_entropy(Z, Y, [5, 1, 2, math.nan]), ValueError, r"class_counts\[3\]=nan"),
    (lambda: nf.logit_adjusted_cross_entropy(Z, Y, "many"), TypeError, "one number a class, got 'many'"),
    (lambda: nf.logit_adjusted_cross_entropy(Z, Y, COUNTS, tau=math.inf), ValueError, "tau=inf must be finite"),
    (lambda: nf.logit_adjusted_cross_entropy(Z, Y, COUNTS, tau="1"), TypeError, "tau='1' must be a number"),
    (lambda: losses.LogitAdjustedLoss(COUNTS, label_smoothing=1.1), ValueError, "label_smoothing=1.1 must be in"),
    (lambda: losses.LogitAdjustedLoss(COUNTS, label_smoothing="1"), TypeError, "label_smoothing=.* must be a number"),
    (lambda: nf.logit_adjusted_cross_entropy(Z, Y + 2, COUNTS), ValueError, r"in \[0, 4\), got indices from 2 to 4"),
    (lambda: nf.logit_adjusted_cross_entropy(Z.long(), Y, COUNTS), TypeError, "logits must hold floating-point"),
    (
        lambda: nf.logit_adjusted_cross_entropy(Z, Y, COUNTS, reduction="avg"),
        ValueError,
        "reduction='avg' must be one of",
    ),
    (lambda: losses.LogitAdjustedLoss([3, 0]), ValueError, r"class_counts\[1\]=0"),
    (lambda: losses.LogitAdjustedLoss([3]), ValueError, "two or more"),
    (lambda: losses.LogitAdjustedLoss([3, 1], tau=math.nan), ValueError, "tau=nan"),
    (lambda: losses.LogitAdjustedLoss([3, 1], reduction="avg"), ValueError, "reduction='avg' must be one of"),
    (lambda: nf.class_weights([3, 0]), ValueError, r"class_counts\[1\]=0"),
    (lambda: nf.class_weights([3, 1], "root"), ValueError, "scheme='root' must be one of"),
    (lambda: nf.class_weights([3, 1], "effective", beta=1.0), ValueError, r"beta=1.0 must be in \[0, 1\)"),
    (lambda: nf.class_weights(torch.tensor([True, True])), TypeError, "numbers, got torch.bool"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("call", "error", "words"), REFUSED)
def test_refusals_name_the_argument_and_the_value(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("counts", [COUNTS, [0.7, 0.2, 0.1, 1e-9], torch.tensor(COUNTS)])
def test_the_default_device_plays_no_part(counts):
    """Device meta stands for it: a loss that is made together with a model there still knows its counts."""
    z, y = batch()
    expected = reference(z, y, counts, 1.0).mean()
    with torch.device("meta"):
        loss = losses.LogitAdjustedLoss(counts)
        found = nf.logit_adjusted_cross_entropy(z, y, counts)
        weights = nf.class_weights(counts)
    np.testing.assert_allclose([loss(z, y), found], 2 * [expected], rtol=1e-12)
    assert weights.is_meta == (not isinstance(counts, torch.Tensor))  # a list's weights go where new tensors go


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int32], ids=str)
def test_counts_of_every_integer_type(dtype):
    counts = torch.tensor([30, 10], dtype=dtype)
    assert nf.class_weights(counts, dtype=torch.float64).tolist() == pytest.approx([0.5, 1.5], abs=1e-15)
    loss = nf.logit_adjusted_cross_entropy(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([1]), counts)
    assert loss.item() == pytest.approx(math.log(4), abs=1e-15)
    with pytest.raises(ValueError, match=r"class_counts\[1\]=0: every class needs a training sample"):
        nf.class_weights(torch.tensor([30, 0], dtype=dtype))


@pytest.mark.parametrize("counts", [COUNTS, [0.7, 0.2, 0.1, 1e-9], [22, 11, 2**25 + 1, 3]])
def test_counts_survive_averages_of_buffers_and_every_dtype(counts):
    z, y = batch()
    loss = losses.LogitAdjustedLoss(counts)
    exact = torch.tensor(counts, dtype=torch.float64)
    for decay in (0.9, 0.9995, 0.9999):
        average = get_ema_multi_avg_fn(decay)
        averaged = AveragedModel(loss, use_buffers=True, multi_avg_fn=average)
        for _ in range(50):
            averaged.update_parameters(loss)
        torch.testing.assert_close(averaged.module.class_counts.double(), exact, rtol=1e-14, atol=0)
    for change in (lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.half().double(), lambda m: m.to("cpu")):
        changed = change(copy.deepcopy(loss))
        assert torch.equal(changed.class_counts.double(), exact)
        np.testing.assert_allclose(changed(z, y), reference(z, y, counts, 1.0).mean(), rtol=1e-12)
    old = losses.LogitAdjustedLoss([1, 1, 1, 1])
    old.load_state_dict({"class_counts": torch.tensor([500, 60, 7, 1])})  # as such buffers were, integers
    assert old.class_counts.tolist() == [500, 60, 7, 1]
