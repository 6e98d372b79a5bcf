"""Calibration against torchmetrics, numpy written by the definition, closed forms and a known temperature."""

import itertools
import json
from math import inf, log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from ncreg.robustness import calibration as cal

MEASURES = (
    cal.reliability_bins,
    cal.expected_calibration_error,
    cal.adaptive_calibration_error,
    cal.classwise_calibration_error,
    cal.brier_score,
    cal.negative_log_likelihood,
    cal.risk_coverage,
)


def sample(n=600, classes=5, sharpness=1.0, seed=0):
    """Logits whose softmax the labels follow, times a sharpness."""
    g = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(n, classes, generator=g, dtype=torch.float64)
    return sharpness * z, torch.multinomial(z.softmax(1), 1, generator=g).squeeze(1)


def ece_by_loops(confidence, correct, bins):
    """Guo et al.'s sum, a bin and a sample at a time."""
    total = 0.0
    for m in range(bins):
        rows = [i for i, c in enumerate(confidence) if m / bins < c <= (m + 1) / bins or (m == 0 and c == 0)]
        if rows:
            total += abs(sum(correct[i] - confidence[i] for i in rows))
    return total / len(confidence)


@pytest.mark.parametrize("bins", [1, 7, 15])
@pytest.mark.parametrize(("classes", "sharpness"), [(2, 1), (5, 3), (40, 0.3)])
def test_ece_is_torchmetrics_and_the_definition(classes, sharpness, bins):
    z, y = sample(classes=classes, sharpness=sharpness)
    p = z.softmax(1)
    ours = cal.expected_calibration_error(p, y, bins=bins)
    assert ours == pytest.approx(multiclass_calibration_error(p, y, classes, n_bins=bins).item(), abs=1e-6)
    confidence, predicted = p.max(1)
    assert ours == pytest.approx(ece_by_loops(confidence.tolist(), (predicted == y).double().tolist(), bins), abs=1e-12)
    hits = [(p[:, c].tolist(), (y == c).double().tolist()) for c in range(classes)]
    by_class = np.mean([ece_by_loops(*pair, bins) for pair in hits])
    assert cal.classwise_calibration_error(p, y, bins=bins) == pytest.approx(by_class, abs=1e-12)


def test_brier_and_nll_by_loops():
    z, y = sample(50)
    p = z.softmax(1)
    rows = p.tolist()
    brier = sum(sum((v - (c == k)) ** 2 for c, v in enumerate(row)) for row, k in zip(rows, y.tolist(), strict=True))
    assert cal.brier_score(p, y) == pytest.approx(brier / 50, abs=1e-12)
    nll = -sum(log(row[k]) for row, k in zip(rows, y.tolist(), strict=True)) / 50
    assert cal.negative_log_likelihood(p, y) == pytest.approx(nll, abs=1e-12)


def test_closed_forms():
    # A constant forecast of 0.75 that is right 3 times in 4 is calibrated, one right half the time is 0.25 off.
    p = torch.tensor([[0.75, 0.25]], dtype=torch.float64).expand(8, 2)
    right, half = torch.tensor([0, 0, 0, 1] * 2), torch.tensor([0, 1] * 4)
    for error in (
        cal.expected_calibration_error,
        cal.adaptive_calibration_error,
        cal.classwise_calibration_error,
    ):
        assert error(p, right) == pytest.approx(0, abs=1e-15)
        assert error(p, half) == pytest.approx(0.25, abs=1e-15)
    assert cal.brier_score(p, right) == pytest.approx(2 * 0.75 * 0.25)
    uniform = torch.full((10, 5), 0.2)
    assert cal.brier_score(uniform, torch.arange(10) % 5) == pytest.approx(0.8, abs=1e-7)
    assert cal.negative_log_likelihood(uniform, torch.arange(10) % 5) == pytest.approx(log(5), abs=1e-7)
    sure = torch.eye(4, dtype=torch.float64)
    assert cal.brier_score(sure, torch.arange(4)) == 0 == cal.expected_calibration_error(sure, torch.arange(4))
    assert cal.brier_score(sure, (torch.arange(4) + 1) % 4) == 2
    assert cal.expected_calibration_error(sure, (torch.arange(4) + 1) % 4) == 1
    assert cal.negative_log_likelihood(sure, (torch.arange(4) + 1) % 4) == inf


def test_a_calibrated_forecast_has_the_error_of_its_sample_size_only():
    z, y = sample(20_000)
    errors = [f(z.softmax(1), y) for f in MEASURES[1:4]]
    assert max(errors) < 0.015
    z, y = sample(20_000, sharpness=4)
    assert cal.expected_calibration_error(z.softmax(1), y) > 0.15


def test_reliability_bins_hold_every_sample_and_edges_belong_below():
    z, y = sample(300)
    found = cal.reliability_bins(z.softmax(1), y, bins=10)
    assert int(found.count.sum()) == 300
    filled = found.count > 0
    accuracy = float((z.argmax(1) == y).double().mean())
    assert float((found.count * found.accuracy)[filled].sum() / 300) == pytest.approx(accuracy)
    assert bool(((found.confidence > found.edges[:-1]) & (found.confidence <= found.edges[1:]))[filled].all())
    assert bool(found.accuracy[~filled].isnan().all()) and bool((~filled).any())
    edge = torch.tensor([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]], dtype=torch.float64)
    assert cal.reliability_bins(edge, torch.zeros(3, dtype=torch.int64), bins=4).count.tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("bins", [10, 15, 20, 100])
def test_every_edge_is_the_nearest_number_to_its_fraction(bins):
    edges = np.array([m / bins for m in range(bins + 1)])
    on_edges = torch.from_numpy(np.stack([edges, 1 - edges], 1)[bins // 2 + 1 :])
    found = cal.reliability_bins(on_edges, torch.zeros(len(on_edges), dtype=torch.int64), bins=bins)
    assert found.edges.tolist() == edges.tolist()
    assert found.count.tolist() == [0] * (bins // 2) + [1] * (bins - bins // 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("votes", [5, 10, 20])
def test_confidences_that_are_votes_fall_into_their_own_bins_in_every_precision(votes, dtype):
    """3 of 5 votes are 0.6000000238 in float32: above the edge 0.6 of float64, and so in the bin of 4 votes of 5."""
    first = np.repeat(np.arange(votes + 1), 7)  # of so many votes for class 0
    target = np.arange(len(first)) * 5 % 3 // 2
    probabilities = torch.from_numpy(np.stack([first, votes - first], 1) / votes).to(dtype)
    p, labels = probabilities.double().numpy(), torch.from_numpy(target)
    top, right = np.maximum(first, votes - first), (first < votes - first) == target

    def error(count, hits, confidence):  # no votes and one share the first bin
        kept = [np.maximum(count, 1) == one for one in range(1, votes + 1)]
        return sum(abs((hits - confidence)[chosen].sum()) for chosen in kept) / len(count)

    found = cal.reliability_bins(probabilities, labels, bins=votes)
    assert found.count.tolist() == [int((top == count).sum()) for count in range(1, votes + 1)]
    found = cal.expected_calibration_error(probabilities, labels, bins=votes)
    assert found == pytest.approx(error(top, right, p.max(1)), abs=1e-12)
    each = [error(count, target == c, p[:, c]) for c, count in enumerate((first, votes - first))]
    found = cal.classwise_calibration_error(probabilities, labels, bins=votes)
    assert found == pytest.approx(sum(each) / 2, abs=1e-12)


def test_adaptive_error_by_sorting_and_with_ties_by_every_order():
    z, y = sample(60, classes=3)
    p = z.softmax(1)
    confidence, correct = p.max(1).values.numpy(), (p.argmax(1) == y).numpy().astype(float)
    order = np.argsort(confidence)
    expected = sum(abs((correct[part] - confidence[part]).sum()) for part in np.array_split(order, 7)) / 60
    assert cal.adaptive_calibration_error(p, y, bins=7) == pytest.approx(expected, abs=1e-12)
    # Two confidences, ties across the bins' ends: the order of the rows must not matter.
    p = torch.tensor([[0.6, 0.4]] * 3 + [[0.9, 0.1]] * 2, dtype=torch.float64)
    found = {
        round(cal.adaptive_calibration_error(p[list(o)], torch.tensor([0, 1, 1, 0, 1])[list(o)], bins=2), 12)
        for o in itertools.permutations(range(5))
    }
    # bins of 3 and 2: |3·(1/3 − 0.6)| + |2·(1/2 − 0.9)|, over 5
    assert found == {round((0.8 + 0.8) / 5, 12)}


def test_risk_is_the_mean_over_all_orders_of_the_ties():
    confidence = torch.tensor([0.9, 0.7, 0.7, 0.7, 0.6], dtype=torch.float64)
    p, y = torch.stack([confidence, 1 - confidence], 1), torch.tensor([0, 1, 0, 0, 1])
    wrong = y.numpy()
    risks = []
    for tie in itertools.permutations([1, 2, 3]):
        order = [0, *tie, 4]
        risks.append(np.cumsum(wrong[order]) / np.arange(1, 6))
    curve = cal.risk_coverage(p, y)
    np.testing.assert_allclose(curve.risk, np.mean(risks, 0), atol=1e-12)
    np.testing.assert_allclose(curve.coverage, np.arange(1, 6) / 5)
    assert curve.aurc == pytest.approx(np.mean(risks))
    best = np.array([0, 0, 0, 1 / 4, 2 / 5]).mean()
    assert curve.excess_aurc == pytest.approx(np.mean(risks) - best)


def test_area_of_perfect_useless_and_inverted_rankings():
    y = torch.tensor([0] * 80 + [1] * 20)
    p = torch.tensor([[0.8, 0.2]]).expand(100, 2)
    right = (y == 0).double()
    assert cal.risk_coverage(p, y).aurc == pytest.approx(0.2)  # a constant confidence: the error rate at any coverage
    perfect = cal.risk_coverage(p, y, confidence=right)
    assert perfect.excess_aurc == 0
    assert perfect.aurc == pytest.approx(np.mean([max(0, k - 80) / k for k in range(1, 101)]))
    inverted = cal.risk_coverage(p, y, confidence=-right)
    assert inverted.aurc == pytest.approx(np.mean([min(k, 20) / k for k in range(1, 101)]))
    assert inverted.risk[:20].tolist() == [1.0] * 20


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(2, 6), st.integers(1, 20))
def test_no_measure_depends_on_the_order_of_the_samples(seed, n, classes, bins):
    g = torch.Generator().manual_seed(seed)
    p = torch.randn(n, classes, generator=g, dtype=torch.float64).mul(2).round().softmax(1)  # many ties
    y = torch.randint(classes, (n,), generator=g)
    order = torch.randperm(n, generator=g)
    for measure in MEASURES[1:4]:
        first, second = measure(p, y, bins=bins), measure(p[order], y[order], bins=bins)
        assert first == pytest.approx(second, abs=1e-12) and 0 <= first <= 1
    curves = [cal.risk_coverage(p[o], y[o]) for o in (torch.arange(n), order)]
    torch.testing.assert_close(curves[0].risk, curves[1].risk)
    assert 0 <= curves[0].excess_aurc <= curves[0].aurc <= 1
    assert float(curves[0].risk[-1]) == pytest.approx(float((p.argmax(1) != y).double().mean()))


@pytest.mark.parametrize("scale", [1e-20, 0.05, 1.0, 30.0, 1e30])
def test_temperature_recovers_the_scale_of_calibrated_logits(scale):
    z, y = sample(20_000)
    fitted = cal.temperature_scaling(scale * z, y)
    assert fitted / scale == pytest.approx(1, abs=0.03)
    assert fitted / scale == pytest.approx(cal.temperature_scaling(z, y), rel=1e-9)


@pytest.mark.parametrize(("classes", "sharpness", "seed"), [(2, 0.2, 0), (3, 5, 1), (10, 1, 2)])
def test_temperature_is_the_minimum_that_scipy_finds(classes, sharpness, seed):
    z, y = sample(200, classes, sharpness, seed)

    def loss(u):
        logs = z.numpy() / np.exp(u)
        logs = logs - logs.max(1, keepdims=True)
        logs = logs - np.log(np.exp(logs).sum(1, keepdims=True))
        return -logs[np.arange(200), y.numpy()].mean()

    best = minimize_scalar(loss, bounds=(-6, 6), method="bounded", options={"xatol": 1e-10})
    ours = cal.temperature_scaling(z, y)
    assert loss(np.log(ours)) <= best.fun + 1e-14
    assert ours == pytest.approx(np.exp(best.x), rel=1e-6)
    # Adding a constant to a row's logits changes no probability.
    shifted = z + torch.randn(200, 1, dtype=torch.float64)
    assert cal.temperature_scaling(shifted, y) == pytest.approx(ours, rel=1e-9)


def test_temperature_by_hand():
    # p_0 = 3/4 where the logit gap is 2: 2/T = log 3.
    z = torch.tensor([[5.0, 3.0]] * 4)
    assert cal.temperature_scaling(z, torch.tensor([0, 0, 1, 0])) == pytest.approx(2 / log(3), rel=1e-12)


def test_temperature_without_a_minimum_is_a_bound_with_a_word():
    z, y = sample(100, classes=3)
    size = float((z - z.mean(1, keepdim=True)).square().mean().sqrt())
    with pytest.warns(UserWarning, match="every sample is right"):
        assert cal.temperature_scaling(z, z.argmax(1)) == pytest.approx(size / 1000)
    with pytest.warns(UserWarning, match="no better than chance"):
        assert cal.temperature_scaling(z, z.argmin(1)) == pytest.approx(size * 1000)
    with pytest.warns(UserWarning, match="all logits are equal"):
        assert cal.temperature_scaling(torch.full((4, 3), 7.0), torch.tensor([0, 1, 2, 0])) == 1


@pytest.mark.parametrize("mask", [-1e3, -1e4, -1e9, torch.finfo(torch.float32).min])
def test_temperature_of_a_class_that_is_ruled_out_is_that_without_it(mask):
    z, y = sample(2000, classes=4)
    masked = torch.cat([z, torch.full((len(z), 1), mask, dtype=z.dtype)], 1)
    assert cal.temperature_scaling(masked, y) == pytest.approx(cal.temperature_scaling(z, y), rel=1e-9)


@pytest.mark.parametrize("mask", [-1e6, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize(
    ("labels", "said"), [(Tensor.argmin, "no better than chance"), (Tensor.argmax, "every sample is right")]
)
def test_a_bound_is_said_and_the_same_where_classes_are_ruled_out(mask, labels, said):
    """With labels worse than chance the mask alone ended the search, at millions; with right ones T was as large."""
    z, _ = sample(2000, classes=4)
    y = labels(z, 1)
    out = torch.full((len(z), 3), mask, dtype=z.dtype)
    with pytest.warns(UserWarning, match=said):
        bound = cal.temperature_scaling(z, y)
    with pytest.warns(UserWarning, match=said):
        assert cal.temperature_scaling(torch.cat([z, out], 1), y) == pytest.approx(bound, rel=1e-9)


def test_temperature_where_one_class_is_label_and_prediction_of_all():
    z = torch.tensor([[2.0, 0.0, -1.0]] * 5)
    with pytest.warns(UserWarning, match="every sample is right"):
        assert 0 < cal.temperature_scaling(z, torch.zeros(5, dtype=torch.long)) < 0.01


def test_report_puts_the_same_measures_side_by_side():
    z, y = sample(4000, sharpness=3)
    report = cal.evaluate_calibration(z[:2000], y[:2000], z[2000:], y[2000:], bins=12)
    assert report.temperature == cal.temperature_scaling(z[2000:], y[2000:])
    assert report.temperature_at_bound is None and report.samples == 2000
    assert report.accuracy == pytest.approx(float((z[:2000].argmax(1) == y[:2000]).double().mean()))
    for scores, t in ((report.before, 1.0), (report.after, report.temperature)):
        p = (z[:2000] / t).softmax(1)
        assert scores.ece == pytest.approx(cal.expected_calibration_error(p, y[:2000], bins=12), abs=1e-12)
        assert scores.adaptive_ece == pytest.approx(cal.adaptive_calibration_error(p, y[:2000], bins=12), abs=1e-12)
        assert scores.classwise_ece == pytest.approx(cal.classwise_calibration_error(p, y[:2000], bins=12), abs=1e-12)
        assert scores.brier == pytest.approx(cal.brier_score(p, y[:2000]), abs=1e-12)
        assert scores.nll == pytest.approx(cal.negative_log_likelihood(p, y[:2000]), abs=1e-12)
        kept = np.argsort(-p.max(1).values.numpy(), kind="stable")
        wrong = (p.argmax(1) != y[:2000]).numpy()[kept]
        assert scores.aurc == pytest.approx(np.mean(np.cumsum(wrong) / np.arange(1, 2001)), abs=1e-12)
    assert report.after.ece < report.before.ece / 3 and report.after.nll < report.before.nll
    assert report.risk_coverage.aurc == pytest.approx(cal.risk_coverage(z[:2000].softmax(1), y[:2000]).aurc)


@pytest.mark.parametrize("scale", [1e-300, 1e-20, 1e-16, 1e-14, 1.0, 1e200])
def test_report_takes_the_largest_logit_for_the_prediction_where_probabilities_round_to_ties(scale):
    z, y = sample(300, classes=10)
    report = cal.evaluate_calibration(scale * z, y, scale * z, y)
    assert report.accuracy == np.mean(z.numpy().argmax(1) == y.numpy())
    assert report.before.aurc == report.risk_coverage.aurc
    if scale <= 1e-20:  # every confidence is 0.1: no ranking is better than chance
        assert report.before.aurc == pytest.approx(1 - report.accuracy, abs=1e-12)
        assert report.before.ece == pytest.approx(report.accuracy - 0.1, abs=1e-12)


def test_report_of_an_overconfident_net_stays_finite_and_flags_a_separable_validation_set():
    z, y = sample(500, sharpness=1e4)
    report = cal.evaluate_calibration(z, y, z, z.argmax(1))
    assert report.temperature_at_bound == "lower"
    numbers = [report.before.nll, report.after.nll, report.before.brier, report.after.ece, report.temperature]
    json.dumps(numbers, allow_nan=False)
    assert cal.evaluate_calibration(z, y, z, z.argmin(1)).temperature_at_bound == "upper"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precisions_are_taken_and_measured_in_float64(dtype):
    z, y = sample(400, classes=40)
    p = z.softmax(1).to(dtype)
    exact = cal.brier_score(p.double() / p.double().sum(1, keepdim=True), y)
    assert cal.brier_score(p, y) == pytest.approx(exact, abs=2e-3)
    assert isinstance(cal.temperature_scaling(z.to(dtype), y), float)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("measure", MEASURES, ids=lambda f: f.__name__)
def test_what_is_no_probability_is_refused(measure):
    y = torch.tensor([0, 1])
    good = torch.tensor([[0.5, 0.5], [0.2, 0.8]])
    measure(good, y)
    for bad, message in (
        (torch.tensor([[2.0, -1.0], [0.0, 1.0]]), r"pass logits.softmax\(1\)"),
        (torch.tensor([[0.5, 0.4], [0.5, 0.5]]), "sum to 1"),
        (torch.tensor([[0.5, float("nan")], [0.5, 0.5]]), "finite"),
        (torch.ones(2, 1), "of one class p make two"),
        (torch.zeros(0, 2), "empty"),
        (torch.ones(2), r"\(batch, classes\)"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(bad, y[: len(bad)])
    with pytest.raises(ValueError, match="target"):
        measure(good, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="target"):
        measure(good, torch.tensor([0]))
    with pytest.raises(TypeError, match="target"):
        measure(good, torch.tensor([0.0, 1.0]))
    with pytest.raises(TypeError, match="probabilities must be a tensor"):
        measure(good.numpy(), y)
    with pytest.raises(TypeError, match="floating"):
        measure(torch.tensor([[1, 0], [0, 1]]), y)


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_logit_is_refused():
    z, y = sample(20, classes=3)

    def report(logits, target):
        return cal.evaluate_calibration(logits, target, z, y)

    for bad, error, words in (
        (z * float("nan"), ValueError, "are not finite .* in 20 of 20 rows: the model diverged"),
        (
            z.index_fill(1, torch.tensor(2), -torch.inf),
            ValueError,
            ".* in 20 of 20 rows: .* take -1e9 in place of -inf",
        ),
        (z.index_fill(0, torch.tensor(2), -torch.inf), ValueError, ".* in 1 of 20 rows: the model diverged"),
        (z[:0], ValueError, r"is empty, shape \(0, 3\)"),
        (z.long(), TypeError, "must be floating-point logits, got torch.int64"),
        (z.tolist(), TypeError, "must be a tensor of logits, got list"),
        (z.softmax(1), ValueError, "are probabilities"),
    ):
        with pytest.raises(error, match=f"^logits {words}"):
            cal.temperature_scaling(bad, y)
        with pytest.raises(error, match=f"^logits_test {words}"):
            report(bad, y)
        with pytest.raises(error, match=f"^logits_val {words}"):
            cal.evaluate_calibration(z, y, bad, y)
    with pytest.raises(ValueError, match=r"^target_val must lie in \[0, 3\), got classes from 1 to 3"):
        cal.evaluate_calibration(z, y, z, y + 1 - y.min())
    for function in (cal.temperature_scaling, report):
        with pytest.raises(ValueError, match="probabilities"):
            function(z.softmax(1), y)
        with pytest.raises(ValueError, match="not finite"):
            function(torch.where(z > 3, torch.inf, z), y)
        with pytest.raises(ValueError, match="at least 2 classes"):
            function(z[:, :1], y)
        with pytest.raises(ValueError, match="empty"):
            function(z[:0], y[:0])
        with pytest.raises(ValueError, match="target"):
            function(z, y + 1)
    with pytest.raises(ValueError, match="use one model"):
        cal.evaluate_calibration(z, y, torch.cat([z, z], 1), y)
    with pytest.raises(ValueError, match="bins=0"):
        cal.evaluate_calibration(z, y, z, y, bins=0)
    with pytest.raises(TypeError, match="bins"):
        cal.expected_calibration_error(z.softmax(1), y, bins=1.5)
    with pytest.raises(ValueError, match="confidence"):
        cal.risk_coverage(z.softmax(1), y, confidence=torch.zeros(3))
    with pytest.raises(ValueError, match="NaN"):
        cal.risk_coverage(z.softmax(1), y, confidence=torch.full((20,), torch.nan))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_weighted_sum_of_probabilities_may_exceed_one_by_rounding(dtype):
    """Ten members of weight 0.1 that are sure sum to a little more than 1; nothing of it is left in the measures."""
    target = torch.arange(8) % 2
    summed = sum(torch.eye(2, dtype=dtype)[target] * 0.1 for _ in range(10))
    found = [measure(summed, target) for measure in (cal.expected_calibration_error, cal.brier_score)]
    assert found == pytest.approx([0, 0], abs=1e-2 if dtype == torch.bfloat16 else 1e-12)
    with pytest.raises(ValueError, match="got values from -0.01 to 1.01"):
        cal.brier_score(torch.tensor([[1.01, -0.01]]), torch.tensor([0]))
