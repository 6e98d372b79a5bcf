"""The statistics of a study against oracles written another way, and every verdict word against its rule."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from recipes.study.paired_tests import (
    bootstrap_interval,
    compare_arms,
    compare_contrasts,
    holm,
    paired_p,
    spread,
    subtract,
    t_interval,
    verdict,
)
from recipes.study.spec import Contrast, Measure
from recipes.study.tables import format_difference, format_interval

ACCURACY = Measure("at_end.test.accuracy")


def test_the_t_interval_and_p_are_those_of_the_paired_t_test():
    draw = np.random.default_rng(0)
    ours, theirs = draw.normal(0.9, 0.02, 7), draw.normal(0.88, 0.02, 7)
    oracle = stats.ttest_rel(ours, theirs)
    entries = compare_arms(
        ACCURACY,
        {"base": dict(enumerate(theirs)), "arm": dict(enumerate(ours))},
        base="base",
        min_seeds=3,
    )
    entry = entries[1]
    assert entry["p"] == pytest.approx(oracle.pvalue, rel=1e-9)
    low, high = oracle.confidence_interval(0.95)
    assert (entry["difference_low"], entry["difference_high"]) == pytest.approx((low, high), rel=1e-9)
    assert entry["difference"] == pytest.approx(ours.mean() - theirs.mean(), rel=1e-9)


def test_mean_and_sd_by_hand():
    found = spread([1.0, 2.0, 4.0])
    assert found["n"] == 3 and found["mean"] == pytest.approx(7 / 3)
    assert found["sd"] == pytest.approx(((16 + 1 + 25) / 9 / 2) ** 0.5)  # deviations -4/3, -1/3, 5/3
    half = 4.302652729911275 * found["sd"] / 3**0.5  # t of two degrees of freedom at 0.975, from tables
    assert (found["low"], found["high"]) == pytest.approx((7 / 3 - half, 7 / 3 + half))
    assert spread([]) == {"n": 0, "mean": None, "sd": None, "low": None, "high": None}
    assert spread([5.0])["sd"] is None and spread([5.0])["low"] is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_closed_testing_with_bonferroni(values):
    """Holm's adjusted p of a hypothesis: the largest Bonferroni p over all intersections that hold it."""
    named = {str(index): value for index, value in enumerate(values)}
    adjusted = holm(named)
    for name in named:
        others = [other for other in named if other != name]
        oracle = max(
            min(1.0, (len(subset) + 1) * min([named[name], *(named[other] for other in subset)]))
            for size in range(len(others) + 1)
            for subset in itertools.combinations(others, size)
        )
        assert adjusted[name] == pytest.approx(oracle, abs=1e-12)


def test_only_seeds_that_both_have_are_paired():
    values = {"base": {0: 0.5, 1: 0.6, 2: 0.7}, "arm": {1: 0.7, 2: 0.9, 3: 0.1}}
    entry = compare_arms(ACCURACY, values, base="base", min_seeds=3)[1]
    assert entry["n"] == 3 and entry["pairs"] == 2
    assert entry["difference"] == pytest.approx(0.15) and entry["verdict"] == "too few seeds"


def test_equal_differences_are_judged_by_the_sign_test():
    """No spread leaves t without meaning: 0.8 - 0.7 and 0.9 - 0.8 differ by rounding alone."""
    differences = subtract([0.8, 0.9, 0.3], [0.7, 0.8, 0.2])
    assert np.ptp(differences) == 0
    assert paired_p(differences) == pytest.approx(0.25)
    assert paired_p(np.zeros(4)) == 1.0
    values = {"base": {s: 0.1 * s for s in range(6)}, "arm": {s: 0.1 * s + 0.05 for s in range(6)}}
    entry = compare_arms(ACCURACY, values, base="base", min_seeds=3)[1]
    assert entry["p"] == pytest.approx(2 / 64) and entry["verdict"] == "better"
    same = compare_arms(ACCURACY, {"base": values["base"], "arm": values["base"]}, base="base", min_seeds=3)[1]
    assert same["verdict"] == "no difference shown" and same["difference"] == 0


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10_000), st.integers(-4, 4))
def test_the_bootstrap_scales_with_the_data_and_repeats_itself(seed, power):
    data = np.random.default_rng(seed).normal(size=6)
    low, high = bootstrap_interval(data)
    assert bootstrap_interval(data) == (low, high)
    scaled = bootstrap_interval(data * 2.0**power)  # exact in floating point, so that no tie is broken otherwise
    assert scaled == pytest.approx((low * 2.0**power, high * 2.0**power), rel=1e-12)
    assert data.min() <= low < data.mean() < high <= data.max()


def test_the_bootstrap_of_many_values_agrees_with_t():
    data = np.random.default_rng(1).normal(3, 1, 400)
    assert bootstrap_interval(data) == pytest.approx(t_interval(data), abs=0.02)
    assert bootstrap_interval(np.array([1.0])) == (None, None)
    assert bootstrap_interval(np.array([2.0, 2.0])) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("difference", "p", "beyond", "within", "not_worse", "pairs", "better", "word"),
    [
        (0.02, 0.01, None, None, None, 5, "larger", "better"),
        (0.02, 0.01, None, None, None, 5, "smaller", "worse"),
        (0.02, 0.01, None, None, None, 5, "neither", "higher"),
        (-0.02, 0.01, None, None, None, 5, "larger", "worse"),
        (-0.02, 0.01, None, None, None, 5, "smaller", "better"),
        (-0.02, 0.01, None, None, None, 5, "neither", "lower"),
        (0.02, 0.05, None, None, None, 5, "larger", "no difference shown"),
        (0.02, 0.3, None, None, None, 5, "larger", "no difference shown"),
        (0.02, 0.01, None, None, None, 2, "larger", "too few seeds"),
        (None, None, None, None, None, 1, "larger", "too few seeds"),
        (None, None, None, None, None, 0, "larger", "too few seeds"),
        (0.02, 0.01, 0.04, 1.0, 0.001, 5, "larger", "better"),
        (0.02, 0.01, 0.04, 1.0, None, 5, "neither", "higher"),
        (-0.02, 0.01, 0.04, 1.0, 1.0, 5, "larger", "worse"),
        (0.02, 0.01, 0.05, 1.0, 0.001, 5, "larger", "not worse"),
        (-0.02, 0.01, 0.06, 1.0, 0.9, 5, "larger", "no difference shown"),
        (0.001, 0.01, 1.0, 0.049, 0.02, 5, "larger", "equivalent"),
        (0.001, 0.01, 1.0, 0.049, None, 5, "neither", "equivalent"),
        (0.001, 0.5, 1.0, 0.05, 0.05, 5, "larger", "no difference shown"),
        (0.001, 0.5, 1.0, 0.01, 0.01, 2, "larger", "too few seeds"),
    ],
)
def test_every_word_follows_its_rule(difference, p, beyond, within, not_worse, pairs, better, word):
    tests = {"beyond": beyond, "equivalent": within, "not_worse": not_worse}
    tests = {name: value for name, value in tests.items() if value is not None}
    entry = {"difference": difference, "p_holm": p, "margin_p_holm": tests, "pairs": pairs}
    measure = Measure("x", better=better, margin=None if beyond is None else 0.003)
    assert verdict(measure, entry, min_seeds=3) == word


def test_what_no_run_reached_is_not_a_matter_of_seeds():
    """None stands for a finished run without the measure; an arm of which no run has ended says nothing yet."""
    some, none = {0: 0.5, 1: 0.6, 2: 0.7}, {0: None, 1: None, 2: None}
    values = {"base": some, "never": none, "partly": {0: None, 1: 0.7, 2: None}, "to come": {}}
    entries = {entry["arm"]: entry for entry in compare_arms(ACCURACY, values, base="base", min_seeds=3)}
    assert [entry["verdict"] for entry in entries.values()] == [
        "baseline",
        "not reached",
        "too few seeds",
        "too few seeds",
    ]
    assert [(entry["n"], entry["runs"]) for entry in entries.values()] == [(3, 3), (0, 3), (1, 3), (0, 0)]
    assert entries["partly"]["by_seed"] == {"1": 0.7} and entries["partly"]["pairs"] == 1
    turned = compare_arms(ACCURACY, {"base": none, "arm": some, "never": none}, base="base", min_seeds=3)
    assert [entry["verdict"] for entry in turned] == ["baseline", "baseline not reached", "not reached"]


def test_a_contrast_is_the_paired_test_of_its_two_arms():
    """Against scipy; corrected over the contrasts, whatever other arms the study has."""
    draw = np.random.default_rng(5)
    values = {
        arm: {seed: float(draw.normal(mean)) for seed in range(6)}
        for arm, mean in zip("abcd", (0, 0, 3, 9), strict=True)
    }
    del values["c"][2]
    pairs = [Contrast("c", "b"), Contrast("d", "c")]
    first, second = compare_contrasts(ACCURACY, values, pairs, min_seeds=3)
    shared = [0, 1, 3, 4, 5]
    for entry, (ours, theirs) in ((first, "cb"), (second, "dc")):
        rows = [[values[arm][seed] for seed in shared] for arm in (ours, theirs)]
        test = stats.ttest_rel(*rows)
        low, high = test.confidence_interval(0.95)
        assert (entry["arm"], entry["against"], entry["pairs"]) == (ours, theirs, 5)
        assert entry["p"] == pytest.approx(test.pvalue, rel=1e-9)
        assert [entry["difference_low"], entry["difference_high"]] == pytest.approx([low, high], rel=1e-9)
        assert entry["difference_sd"] == pytest.approx(np.std(np.subtract(*rows), ddof=1))
    smaller, larger = sorted((first, second), key=lambda entry: entry["p"])
    assert smaller["p_holm"] == pytest.approx(2 * smaller["p"]) and larger["p_holm"] >= larger["p"]
    assert second["verdict"] == "better"
    (turned,) = compare_contrasts(ACCURACY, values, [Contrast("c", "d")], min_seeds=3)
    assert turned["verdict"] == "worse" and turned["difference"] == pytest.approx(-second["difference"])
    assert compare_contrasts(ACCURACY, values, [], min_seeds=3) == []


def test_a_contrast_with_what_was_never_reached_says_so():
    values = {"a": {0: 1.0, 1: 2.0, 2: 3.0}, "b": {0: None, 1: None, 2: None}}
    entries = compare_contrasts(ACCURACY, values, [Contrast("a", "b"), Contrast("b", "a")], min_seeds=3)
    assert [entry["verdict"] for entry in entries] == ["baseline not reached", "not reached"]
    assert all(entry["pairs"] == 0 and entry["difference"] is None and entry["p_holm"] is None for entry in entries)


def test_a_small_difference_of_scattered_arms_has_digits_of_its_own():
    base = dict(enumerate((0.50, 1.10, 0.20, 1.60, 0.90)))
    arm = {seed: base[seed] + more for seed, more in enumerate((0.0031, 0.0029, 0.0030, 0.0032, 0.0028))}
    _, entry = compare_arms(ACCURACY, {"base": base, "arm": arm}, base="base", min_seeds=3)
    assert format_difference(entry, ACCURACY) == "+0.00300"
    assert format_interval(entry, ACCURACY, "difference") == "[+0.00280, +0.00320]"


@pytest.mark.parametrize(("low", "high", "text"), [(-4e-5, 0.0182, "[−0.00, +1.82]"), (-3e-2, -4e-5, "[−3.00, −0.00]")])
def test_an_end_that_is_rounded_to_zero_keeps_its_sign(low, high, text):
    entry = {"difference_low": low, "difference_high": high, "difference_sd": 0.01}
    assert format_interval(entry, Measure(path="a", form="percent"), "difference") == text
    assert format_interval(entry | {"difference_low": 4e-5}, Measure(path="a", form="percent"), "difference")[1] == "+"


def test_holm_takes_a_verdict_back():
    """Three arms at p = 0.03 each: alone better, together nothing shown."""
    draw = np.random.default_rng(3)
    noise = draw.normal(size=6)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    target = stats.t.ppf(1 - 0.03 / 2, 5) / 6**0.5
    base = dict.fromkeys(range(6), 0.0)
    arm = {seed: float(target + noise[seed]) for seed in range(6)}
    alone = compare_arms(ACCURACY, {"base": base, "a": arm}, base="base", min_seeds=3)
    assert alone[1]["p"] == pytest.approx(0.03) and alone[1]["verdict"] == "better"
    crowd = compare_arms(ACCURACY, {"base": base, "a": arm, "b": arm, "c": arm}, base="base", min_seeds=3)
    assert [entry["verdict"] for entry in crowd] == ["baseline"] + ["no difference shown"] * 3
    assert crowd[1]["p_holm"] == pytest.approx(0.09)
