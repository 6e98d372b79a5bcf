"""Probes of frozen features against scikit-learn, and what scaling, seeds and few samples do to them."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ncreg import robustness as R
from ncreg.robustness.intervals import t_quantile
from ncreg.robustness.transfer.evaluate import stratified_split


def digits(classes=10, train=300, test=200):
    """Raw pixels as features, a constant one among them."""
    x, y = load_digits(return_X_y=True)
    keep = y < classes
    x, y = torch.from_numpy(x[keep][: train + test]), torch.from_numpy(y[keep][: train + test])
    return x[:train], y[:train], x[train:], y[train:]


GRID = (0.1, 10.0, 1.0, 0.01)
SCALES = torch.logspace(-3, 3, 64, dtype=torch.float64)


# ---- logistic regression


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-3])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_linear_probe_is_sklearns_logistic_regression(classes, l2):
    x, y, test, _ = digits(classes)
    probe = R.fit_linear_probe(x, y, l2)
    scaler = StandardScaler().fit(x)
    strength = (2 if classes == 2 else 1) / (l2 * len(x))
    model = LogisticRegression(C=strength, tol=1e-10, max_iter=1000, solver="newton-cg").fit(scaler.transform(x), y)
    assert probe.converged
    np.testing.assert_allclose(probe(test).softmax(1), model.predict_proba(scaler.transform(test)), atol=1e-5)
    if classes > 2:
        np.testing.assert_allclose(probe.weight, model.coef_, atol=1e-4)
        np.testing.assert_allclose(probe.bias, model.intercept_, atol=1e-3)
    else:
        np.testing.assert_allclose(probe.weight[1] - probe.weight[0], model.coef_[0], atol=1e-4)


def test_the_probe_is_the_minimum():
    """At the minimum the gradient is nought, taken here by hand: Xᵀ(p − y)/N + λW."""
    x, y, _, _ = digits()
    probe = R.fit_linear_probe(x, y, 0.05)
    p = probe(x).softmax(1).numpy()
    rows = ((x - probe.mean) / probe.scale).numpy()
    error = p - np.eye(10)[y.numpy()]
    np.testing.assert_allclose(error.T @ rows / len(x) + 0.05 * probe.weight.numpy(), 0, atol=1e-6)
    np.testing.assert_allclose(error.mean(0), 0, atol=1e-6)


def test_the_chosen_penalty_is_the_best_on_validation_and_comes_from_there_alone():
    x, y, test, wanted = digits()
    found = R.linear_probe(x, y, test, wanted, seed=3, l2_grid=GRID)
    fit, held = stratified_split(y, 0.2, seed=3)
    scaler = StandardScaler().fit(x[fit])
    for l2, accuracy in found.validation.items():
        model = LogisticRegression(C=1 / (l2 * len(fit)), tol=1e-8, max_iter=20_000)
        model.fit(scaler.transform(x[fit]), y[fit])
        assert math.isclose(accuracy, model.score(scaler.transform(x[held]), y[held]), abs_tol=0.01)
    best = max(found.validation.values())
    assert found.chosen == max(l2 for l2, accuracy in found.validation.items() if accuracy == best)
    final = R.fit_linear_probe(x, y, found.chosen)(test).argmax(1)
    assert found.accuracy == float((final == wanted).double().mean()) > 0.85
    assert found.interval == R.binomial_interval(int((final == wanted).sum()), len(wanted))
    other = R.linear_probe(x, y, test, torch.zeros_like(wanted), seed=3, l2_grid=GRID)
    assert other.chosen == found.chosen and other.validation == found.validation


def test_features_scales_and_offsets_do_not_matter():
    x, y, test, wanted = digits()
    plain = R.linear_probe(x, y, test, wanted, l2_grid=[1.0, 0.1, 0.01])
    shifted = R.linear_probe(x * SCALES + 7, y, test * SCALES + 7, wanted, l2_grid=[1.0, 0.1, 0.01])
    assert shifted == plain
    shot = R.few_shot(x, y, test, wanted, shots=3, draws=3)
    assert R.few_shot(x * SCALES - 2, y, test * SCALES - 2, wanted, shots=3, draws=3) == shot
    near = R.knn_probe(x, y, test, wanted)
    assert R.knn_probe(x * 1e-6, y, test * 1e6, wanted) == near  # cosines know no length
    turn = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).double())[0]
    assert R.knn_probe(x @ turn, y, test @ turn, wanted).validation == near.validation


def test_collapsed_features_of_another_task_are_worth_no_more_than_they_hold():
    """Features that know parity alone: the probe of ten digits gets two tenths, whatever the setting."""
    x, y, test, wanted = digits()
    draw = torch.Generator().manual_seed(0)
    parity = [torch.stack([1.0 - t % 2, t % 2], 1) + 1e-6 * torch.randn(len(t), 2, generator=draw) for t in (y, wanted)]
    for found in (
        R.linear_probe(parity[0], y, parity[1], wanted, l2_grid=[1.0, 0.01]),
        R.knn_probe(parity[0], y, parity[1], wanted),
    ):
        assert 0.1 < found.accuracy < 0.3


def test_at_edge_says_that_the_grid_was_too_short():
    x, y, test, wanted = digits()
    assert R.linear_probe(x, y, test, wanted, l2_grid=[100.0, 10.0, 1.0]).at_edge
    assert not R.linear_probe(x, y, test, wanted, l2_grid=[100.0, 0.1, 1e-4]).at_edge
    assert not R.linear_probe(x, y, test, wanted, l2_grid=[0.1]).at_edge
    assert not R.knn_probe(x, y, test, wanted, neighbours_grid=[1, 100]).at_edge  # fewer than one is none


# ---- nearest neighbours


@pytest.mark.parametrize("k", [1, 4, 15])
def test_votes_are_counted_and_ties_go_to_the_nearer(k):
    x, y, test, wanted = digits()
    found = R.knn_probe(x, y, test, wanted, neighbours_grid=[k])
    unit, rows = (part.numpy() / np.linalg.norm(part.numpy(), axis=1, keepdims=True) for part in (x, test))
    correct = 0
    for row, own in zip(rows, wanted.tolist(), strict=True):
        cosines = unit @ row
        near = np.argsort(-cosines)[:k]
        voters = y.numpy()[near]
        votes = [((voters == c).sum(), cosines[near][voters == c].sum()) for c in range(10)]
        correct += max(range(10), key=lambda c: votes[c]) == own
    assert found.accuracy == correct / len(wanted)
    assert found.chosen == k


def test_two_far_votes_beat_one_near_vote():
    train = torch.tensor([[1.0, 0.0], [1.0, 0.9], [0.9, 1.0], [-1.0, 0.0], [-1.0, 0.1], [-1.0, 0.2]])
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    found = R.knn_probe(train, labels, torch.tensor([[1.0, 0.05]]), torch.tensor([1]), neighbours_grid=[3])
    assert found.accuracy == 1


# ---- few labels


def test_few_shot_means_its_draws_with_students_interval():
    x, y, test, wanted = digits()
    found = R.few_shot(x, y, test, wanted, shots=2, draws=5, seed=1)
    assert len(found.draws) == 5 and len(set(found.draws)) > 1
    interval = stats.t.interval(0.95, 4, np.mean(found.draws), stats.sem(found.draws))
    np.testing.assert_allclose(found.interval, interval, rtol=1e-4)
    assert found == R.few_shot(x, y, test, wanted, shots=2, draws=5, seed=1)
    assert found.draws[:3] == R.few_shot(x, y, test, wanted, shots=2, draws=3, seed=1).draws
    more = R.few_shot(x, y, test, wanted, shots=10, draws=5, seed=1)
    assert more.accuracy > found.accuracy + 0.1


def test_all_shots_are_the_whole_training_set():
    x, y, test, wanted = digits()
    few = torch.cat([(y == c).nonzero().flatten()[:5] for c in range(10)])
    found = R.few_shot(x[few], y[few], test, wanted, shots=5, draws=2, l2=0.1)
    whole = R.fit_linear_probe(x[few], y[few], 0.1)(test).argmax(1)
    assert found.draws == ((whole == wanted).double().mean().item(),) * 2
    assert found.interval == pytest.approx((found.accuracy, found.accuracy))


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 30, 1000])
def test_t_quantiles(degrees):
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-12)


def test_splits_are_stratified_disjoint_and_seeded():
    y = torch.arange(3).repeat_interleave(torch.tensor([50, 10, 2]))
    fit, held = stratified_split(y, 0.2, seed=0)
    assert sorted(torch.cat([fit, held]).tolist()) == list(range(62))
    assert torch.bincount(y[held]).tolist() == [10, 2, 1]
    again = stratified_split(y, 0.2, seed=0)
    assert torch.equal(again[0], fit) and torch.equal(again[1], held)
    assert not torch.equal(stratified_split(y, 0.2, seed=1)[1], held)


def test_the_global_generator_is_left_alone():
    x, y, test, wanted = digits(3, 60, 30)
    before = torch.get_rng_state()
    R.linear_probe(x, y, test, wanted, l2_grid=[0.1])
    R.few_shot(x, y, test, wanted, shots=2, draws=2)
    assert torch.equal(before, torch.get_rng_state())


def test_half_precision_and_gradients_of_features_are_no_matter():
    x, y, test, wanted = digits(3, 60, 30)
    plain = R.linear_probe(x, y, test, wanted, l2_grid=[0.1])
    assert (
        R.linear_probe(x.bfloat16(), y, test.half().requires_grad_(), wanted, l2_grid=[0.1]) == plain
    )  # whole numbers
    with torch.no_grad():
        assert R.linear_probe(x, y.int(), test, wanted, l2_grid=[0.1]) == plain
    with torch.inference_mode():
        assert R.linear_probe(x.clone(), y, test, wanted, l2_grid=[0.1]) == plain


# ---- refusals

X, Y, T, W = digits(3, 30, 12)
NAN = X.clone()
NAN[0, 0] = math.nan
REFUSED = [
    (lambda: R.linear_probe(NAN, Y, T, W), ValueError, "train_features holds NaN or infinite values in 1 of 30"),
    (lambda: R.linear_probe(X, Y, T[:, :5], W), ValueError, "test_features has 5 columns"),
    (lambda: R.linear_probe(X, Y[:9], T, W), ValueError, r"train_target must have shape \(30,\)"),
    (lambda: R.linear_probe(X, Y, T, W + 1), ValueError, r"test_target must lie in \[0, 3\)"),
    (lambda: R.linear_probe(X, Y * 2, T, W), ValueError, r"no sample of class 1, 3 \(5 classes\)"),
    (lambda: R.linear_probe(X, Y * 0, T, W), ValueError, "class 0 alone"),
    (lambda: R.linear_probe(X, Y, T[:0], W[:0]), ValueError, "test_features is empty"),
    (lambda: R.linear_probe(X, Y, T, W, val_share=1.0), ValueError, "val_share=1.0 must be between 0 and 1"),
    (lambda: R.linear_probe(X, Y, T, W, l2_grid=[]), ValueError, "l2_grid is empty"),
    (lambda: R.linear_probe(X, Y, T, W, l2_grid=[0.0]), ValueError, "l2_grid=0.0 must be finite and above 0"),
    (
        lambda: R.linear_probe(X, Y, T, W, l2_grid=0.1),
        TypeError,
        "l2_grid=0.1 must be a sequence of numbers, not float",
    ),
    (lambda: R.knn_probe(X, Y, T, W, neighbours_grid=5), TypeError, "neighbours_grid=5 must be a sequence of numbers"),
    (lambda: R.linear_probe(X[:3], torch.arange(3), T, W), ValueError, "class 0 has 1 training sample"),
    (lambda: R.knn_probe(X, Y, T, W, neighbours_grid=[99]), ValueError, "none is at most the 24 samples"),
    (
        lambda: R.knn_probe(X, Y, T, W, neighbours_grid=[math.nan, 1]),
        TypeError,
        "neighbours_grid=nan must be an integer",
    ),
    (lambda: R.linear_probe(X, Y, T, W, val_share="0.2"), TypeError, "val_share='0.2' must be a number"),
    (lambda: R.knn_probe(X.long(), Y, T, W), TypeError, "train_features must hold floating-point"),
    (lambda: R.few_shot(X, Y, T, W, shots=50), ValueError, "shots=50 but a class has only"),
    (lambda: R.few_shot(X, Y, T, W, shots=0), ValueError, "shots=0 must be at least 1"),
    (lambda: R.few_shot(X, Y, T, W, shots=1, draws=1), ValueError, "draws=1 must be at least 2"),
    (lambda: R.fit_linear_probe(X, Y, -1.0), ValueError, "l2=-1.0"),
    (lambda: R.fit_linear_probe(X, Y.double(), 1.0), TypeError, "integer class indices, got torch.float64"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("call", "error", "words"), REFUSED)
def test_refusals_name_the_argument_and_the_value(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.usefixtures("unchecked")
def test_seeds_of_any_size_and_of_numpy_are_welcome():
    target = torch.arange(40) % 4
    for seed in (np.int64(3), 2**62, -5):
        first, again = stratified_split(target, 0.2, seed=seed), stratified_split(target, 0.2, seed=int(seed))
        assert torch.equal(first[1], again[1]) and len(first[1]) == 8
    with pytest.raises(TypeError, match="seed=1.5 must be an integer"):
        stratified_split(target, 0.2, seed=1.5)
