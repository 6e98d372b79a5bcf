"""Tests against a margin and their power: scipy and statistics written another way, simulation, committed results."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from recipes import compare
from recipes.core.errors import UserError
from recipes.study.margin_tests import margin_p, one_sided_p
from recipes.study.paired_tests import compare_arms, compare_contrasts, holm
from recipes.study.power import (
    Spread,
    detectable_difference,
    pairs_for_difference,
    pairs_for_equality,
    power_of_difference,
    power_of_equality,
    spread_of,
    verdict_from,
)
from recipes.study.report_rows import measure_table
from recipes.study.spec import Contrast, Measure

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"
MARGIN = 0.003
ACCURACY = Measure("at_end.test.accuracy", margin=MARGIN)


def drawn(means, n=8, sd=0.002, seed=0):
    """Values of arms over seeds; the first is the baseline, at zero."""
    draw = np.random.default_rng(seed)
    names = ["base", *(f"arm{index}" for index in range(len(means)))]
    return {
        name: {seed: float(draw.normal(0.9 + mean, sd)) for seed in range(n)}
        for name, mean in zip(names, (0, *means), strict=True)
    }


def within_by_interval(differences, alpha):
    """Schuirmann's rule in its other form: the 1 − 2α interval of the mean lies within the margin."""
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    low, high = stats.t.interval(1 - 2 * alpha, len(differences) - 1, mean, error)
    return low > -MARGIN and high < MARGIN


def test_each_p_against_the_margin_is_that_of_shifted_samples():
    values = drawn([0.001])
    ours, theirs = (np.array(list(values[name].values())) for name in ("arm0", "base"))
    found = margin_p(ours - theirs, ACCURACY)
    over = stats.ttest_rel(ours + MARGIN, theirs, alternative="greater").pvalue
    under = stats.ttest_rel(ours - MARGIN, theirs, alternative="less").pvalue
    assert found["not_worse"] == pytest.approx(over, rel=1e-9)
    assert found["equivalent"] == pytest.approx(max(over, under), rel=1e-9)
    two_sided = min(1.0, 2 * min(1 - under, 1 - over))  # beyond the nearer end of the margin
    assert found["beyond"] == pytest.approx(two_sided, rel=1e-6)
    smaller = margin_p(ours - theirs, Measure("x", better="smaller", margin=MARGIN))
    assert smaller["not_worse"] == pytest.approx(under, rel=1e-9) and smaller["equivalent"] == found["equivalent"]
    assert "not_worse" not in margin_p(ours - theirs, Measure("x", better="neither", margin=MARGIN))
    assert margin_p(ours - theirs, Measure("x")) == {} == margin_p(np.array([0.1]), ACCURACY)


@pytest.mark.parametrize("seed", range(4))
def test_equivalence_is_the_ninety_per_cent_interval_within_the_margin(seed):
    values = drawn([0.0], n=6, seed=seed)
    differences = [values["arm0"][s] - values["base"][s] for s in range(6)]
    for alpha in (0.01, 0.05, 0.2):
        assert (margin_p(np.array(differences), ACCURACY)["equivalent"] < alpha) == within_by_interval(
            differences, alpha
        )


def test_the_interval_beyond_the_margin_is_not_enough_among_several_arms():
    """What the first rule called better, since its 95 % interval lies beyond the margin, Holm takes back."""
    noise = np.random.default_rng(1).normal(size=8)
    noise = (noise - noise.mean()) / noise.std(ddof=1) * 0.002
    mean = MARGIN + 1.1 * stats.t.ppf(0.975, 7) * 0.002 / 8**0.5
    arm = {seed: 0.9 + mean + float(noise[seed]) for seed in range(8)}
    values = {"base": dict.fromkeys(range(8), 0.9), "a": arm}
    (_, alone) = compare_arms(ACCURACY, values, base="base", min_seeds=3)
    assert alone["difference_low"] > MARGIN and alone["verdict"] == "better"
    crowd = compare_arms(ACCURACY, values | {"b": arm, "c": arm}, base="base", min_seeds=3)
    assert [entry["verdict"] for entry in crowd[1:]] == ["not worse"] * 3
    assert all(entry["p_holm"] < 0.05 and entry["difference_low"] > MARGIN for entry in crowd[1:])


def test_arms_whose_runs_are_still_to_come_belong_to_the_family():
    """A word that is told while a study goes on is corrected for all the arms that its rules name."""
    values = drawn([0.001], sd=0.001)
    (_, alone) = compare_arms(ACCURACY, values, base="base", min_seeds=3)
    _, early, *others = compare_arms(ACCURACY, values | {"b": {}, "c": {}}, base="base", min_seeds=3)
    assert early["p_holm"] == pytest.approx(min(1, 3 * alone["p"]))
    assert early["margin_p_holm"] == pytest.approx({name: min(1, 3 * p) for name, p in alone["margin_p"].items()})
    assert all(entry["p_holm"] is None and entry["verdict"] == "too few seeds" for entry in others)
    begun = {0: 0.9}, {99: 0.9}  # one seed, and one that the baseline lacks
    _, early, *_ = compare_arms(ACCURACY, values | dict(zip("bc", begun, strict=True)), base="base", min_seeds=3)
    assert early["p_holm"] == pytest.approx(min(1, 3 * alone["p"]))


def test_every_p_goes_through_holm_over_the_arms():
    values = drawn([0.0, 0.001, 0.004, -0.006, 0.012], sd=0.0008)
    entries = compare_arms(ACCURACY, values, base="base", min_seeds=3)[1:]
    for name in ("beyond", "equivalent", "not_worse"):
        raw = {entry["arm"]: entry["margin_p"][name] for entry in entries}
        assert {entry["arm"]: entry["margin_p_holm"][name] for entry in entries} == holm(raw)
    assert entries[-1]["verdict"] == "better" and entries[0]["verdict"] == "equivalent"
    (contrast,) = compare_contrasts(ACCURACY, values, [Contrast("arm0", "base")], min_seeds=3)
    assert contrast["margin_p_holm"] == contrast["margin_p"] == entries[0]["margin_p"]


def test_equal_differences_against_a_margin_are_judged_by_the_sign_test():
    assert one_sided_p(np.full(6, 0.004), MARGIN) == 2**-6 and one_sided_p(np.full(6, 0.002), MARGIN) == 1.0
    assert one_sided_p(np.full(6, MARGIN), MARGIN) == 1.0  # on the margin is not beyond it
    assert one_sided_p(np.array([0.1]), 0.0) is None
    values = {"base": dict.fromkeys(range(6), 0.5), "same": dict.fromkeys(range(6), 0.5)}
    (_, entry) = compare_arms(ACCURACY, values, base="base", min_seeds=3)
    assert entry["verdict"] == "equivalent" and entry["margin_p_holm"]["equivalent"] == 2**-6


@pytest.mark.parametrize(
    ("difference", "pairs", "level"), [(1.5, 5, 0.05), (0.6, 20, 0.01), (4.0, 3, 0.05), (0, 7, 0.1)]
)
def test_power_is_the_share_of_simulated_studies_that_show_the_difference(difference, pairs, level):
    draw = np.random.default_rng(2)
    differences = draw.normal(difference, 1, (40_000, pairs))
    shown = np.mean(stats.ttest_1samp(differences, 0, axis=1).pvalue < level)
    assert power_of_difference(difference, 1.0, pairs, level) == pytest.approx(shown, abs=0.01)


def test_power_is_that_of_the_noncentral_t():
    critical, centre = stats.t.isf(0.025, 9), 10**0.5
    oracle = stats.nct.sf(critical, 9, centre) + stats.nct.cdf(-critical, 9, centre)
    assert power_of_difference(2.0, 2.0, 10, 0.05) == pytest.approx(oracle, abs=1e-5)


@pytest.mark.parametrize(("margin", "pairs", "level"), [(1.0, 12, 0.05), (0.8, 20, 0.01), (0.3, 5, 0.05)])
def test_power_of_equality_is_the_share_of_simulated_equal_arms_called_equivalent(margin, pairs, level):
    draw = np.random.default_rng(3)
    differences = draw.normal(0, 1, (40_000, pairs))
    tests = [
        stats.ttest_1samp(sign * differences, -margin, axis=1, alternative="greater").pvalue < level for sign in (1, -1)
    ]
    assert power_of_equality(margin, 1.0, pairs, level) == pytest.approx(np.mean(np.logical_and(*tests)), abs=0.01)


def test_the_plans_invert_the_power():
    for sd, pairs, level in ((0.3, 5, 0.05 / 11), (2.0, 3, 0.05 / 17), (0.01, 20, 0.01)):
        found = detectable_difference(sd, pairs, level)
        assert power_of_difference(found, sd, pairs, level) == pytest.approx(0.8, abs=1e-4)
    needed = pairs_for_difference(0.3, 0.4, 0.01)
    assert power_of_difference(0.3, 0.4, needed, 0.01) >= 0.8 > power_of_difference(0.3, 0.4, needed - 1, 0.01)
    needed = pairs_for_equality(0.3, 0.4, 0.01)
    assert power_of_equality(0.3, 0.4, needed, 0.01) >= 0.8 > power_of_equality(0.3, 0.4, needed - 1, 0.01)
    assert pairs_for_difference(1e-6, 1.0, 0.05) is None  # a million pairs are no plan
    for plan, quantiles in ((pairs_for_difference, (0.975, 0.8)), (pairs_for_equality, (0.95, 0.9))):
        for pairs in (9_900, 10_100, 15_000):  # ((z + z)/effect)², the normal approximation
            effect = sum(map(stats.norm.ppf, quantiles)) / pairs**0.5
            assert plan(effect, 1.0, 0.05) == (None if pairs > 10_000 else pytest.approx(pairs, rel=1e-3))


def test_the_spread_is_pooled_over_the_tested_arms():
    values = drawn([0.0, 0.002])
    entries = compare_arms(ACCURACY, values, base="base", min_seeds=3)
    rows = [[values[arm][s] - values["base"][s] for s in range(8)] for arm in ("arm0", "arm1")]
    pooled = statistics.fmean(statistics.variance(row) for row in rows) ** 0.5
    spread = spread_of(entries)
    assert spread.sd == pytest.approx(pooled) and (spread.pairs, spread.tests, spread.level) == (8, 2, 0.025)
    assert verdict_from(entries, ACCURACY) == pytest.approx(MARGIN + detectable_difference(pooled, 8, 0.025))
    assert spread_of(entries[:1]) is None is verdict_from(entries[:1], ACCURACY)
    same = compare_arms(ACCURACY, {"base": values["base"], "a": values["base"]}, base="base", min_seeds=3)
    assert spread_of(same) is None  # nothing varies: nothing to plan with


def test_power_counts_arms_that_wait_for_runs_as_the_verdicts_do():
    """One arm of four has run, as in a pilot: Holm's first step is that of the whole family."""
    values = drawn([0.0, 0.002, 0.0, 0.0, 0.0])
    values |= {"arm1": {}, "arm2": {0: values["arm2"][0]}, "arm3": {0: None, 1: None, 2: values["arm3"][2]}}
    entries = compare_arms(ACCURACY, values, base="base", min_seeds=3)
    by_arm = {entry["arm"]: entry for entry in entries}
    holm_first = by_arm["arm0"]["p_holm"] / by_arm["arm0"]["p"]
    assert spread_of(entries).tests == 4
    assert holm_first <= 4 and by_arm["arm3"]["p"] is None  # it has ended and is not tested


def test_power_of_a_committed_study(capsys):
    """Eleven arms and five seeds of heads_and_losses, by the committed deviations and scipy's noncentral t."""
    assert compare.main([str(STUDIES / "bn_decay.yaml"), "--power", "--wanted", "0.01"]) == 0
    content = json.loads((STUDIES / "bn_decay" / "results.json").read_text())
    table = next(table for table in content["statistics"] if table["data"] == "fashion_mnist")
    sds = [entry["difference_sd"] for entry in table["arms"] if entry["verdict"] != "baseline"]
    sd = statistics.fmean(value**2 for value in sds) ** 0.5
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("fashion_mnist  val"))
    tests, pairs, shown_sd, shown, wanted, needed, _ = line.split()[-7:]
    assert (int(tests), int(pairs), float(shown_sd), float(wanted)) == (3, 3, round(100 * sd, 2), 1.0)

    def power(difference, n):
        critical = stats.t.isf(0.05 / 6, n - 1)
        return stats.nct.sf(critical, n - 1, difference / sd * n**0.5)

    assert power(float(shown) / 100, 3) == pytest.approx(0.8, abs=0.01)
    assert power(0.01, int(needed)) >= 0.799 and power(0.01, int(needed) - 1) < 0.801


@pytest.mark.parametrize("words", [["--wanted", "0.01"], ["--power", "--wanted", "-1"], ["--power", "--plan"]])
def test_what_power_cannot_do_is_refused(words):
    with pytest.raises(UserError, match="--power|--wanted"):
        compare.parse_options([str(STUDIES / "bn_decay.yaml"), *words])


@pytest.mark.parametrize(
    ("study", "arm", "column"),
    [("heads_and_losses", "default", (0.056, 0.042, 0.069)), ("heads_and_losses", "etf", (0.072, 0.061, 0.083)),
     ("wider_decay", "default", (0.038, None, None)), ("wider_decay", "etf", (0.055, None, None)),
     ("wider_decay", "bn_wd", (0.015, 0.001, 0.029))],
)  # fmt: skip
def test_cross_entropy_after_the_temperature_is_what_was_recomputed_by_others(study, arm, column):
    """Differences to the baseline that a reader of the committed files found, to three digits."""
    content = json.loads((STUDIES / study / "results.json").read_text())
    values = {name: {} for name in (arm, content["study"]["baseline"] or next(iter(content["study"]["arms"])))}
    for cell in content["cells"]:
        if cell["arm"] in values:
            parts = content["runs"][cell["key"]]["robustness"]["last"]["parts"]
            values[cell["arm"]][cell["seed"]] = parts["calibration"]["after"]["nll"]
    ours, theirs = ([values[name][seed] for seed in range(5)] for name in values)
    test = stats.ttest_rel(ours, theirs)
    interval = test.confidence_interval(0.95)
    found = [statistics.mean(ours) - statistics.mean(theirs), interval.low, interval.high]
    assert [round(number, 3) for number, told in zip(found, column, strict=True) if told is not None] == [
        told for told in column if told is not None
    ]
    table = next(t for t in content["statistics"] if t["measure"] == "robustness.calibration.after.nll")
    (entry,) = (entry for entry in table["arms"] if entry["arm"] == arm)
    assert entry["difference"] == pytest.approx(found[0]) and entry["verdict"] == "worse"


def test_all_eleven_heads_and_losses_are_worse_after_the_temperature():
    content = json.loads((STUDIES / "heads_and_losses" / "results.json").read_text())
    table = next(t for t in content["statistics"] if t["measure"] == "robustness.calibration.after.nll")
    assert [entry["verdict"] for entry in table["arms"]] == ["baseline"] + ["worse"] * 11
    assert round(table["arms"][0]["mean"], 3) == 0.420


def test_half_of_the_margin_verdicts_of_the_long_tail_survived_the_correction():
    """By numpy alone: 28 intervals lie beyond the margin where p is small, of which Holm leaves 14."""
    content = json.loads((STUDIES / "long_tail" / "results.json").read_text())
    margins = {item["path"]: item["margin"] for item in content["study"]["measures"]}
    before = after = words = 0
    for table in content["statistics"]:
        margin = margins[table["measure"]]
        for entries in (table["arms"][1:], table["contrasts"]):
            if margin is None or not entries or not table["arms"][0]["n"]:  # ratio 10 has no few-shot class
                continue
            mean, error = (np.array([entry[key] for entry in entries]) for key in ("difference", "difference_sd"))
            error = error / 5**0.5
            p, zero = (np.minimum(1, 2 * stats.t.sf((abs(mean) - m) / error, 4)) for m in (margin, 0.0))
            adjusted = [stepped(p), stepped(zero)]
            before += int(np.sum((abs(mean) - stats.t.ppf(0.975, 4) * error > margin) & (adjusted[1] < 0.05)))
            after += int(np.sum(adjusted[0] < 0.05))
            words += sum(entry["verdict"] in ("better", "worse") for entry in entries)
    assert (before, after, words) == (28, 14, 14)


def stepped(p):
    """Holm's correction by sorting."""
    order = np.argsort(p)
    adjusted = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted[np.argsort(order)]


def test_a_report_shows_the_corrected_p_of_every_test_against_the_margin():
    """The row of the report that is committed, from the differences by seed and scipy."""
    content = json.loads((STUDIES / "wider_decay" / "results.json").read_text())
    table = next(t for t in content["statistics"] if t["measure"] == "at_end.test.accuracy")
    base = np.array(list(table["arms"][0]["by_seed"].values()))
    differences = [np.array(list(entry["by_seed"].values())) - base for entry in table["arms"][1:]]
    over, under = (
        np.array([stats.ttest_1samp(sign * d, -MARGIN, alternative="greater").pvalue for d in differences])
        for sign in (1, -1)
    )
    beyond = np.minimum(1, 2 * np.minimum(1 - over, 1 - under))
    texts = [[f"{p:.3f}" for p in stepped(values)] for values in (beyond, np.maximum(over, under), over)]
    arms = {entry["arm"]: entry["arm"] for entry in table["arms"]}
    shown = measure_table(table, ACCURACY, arms, None, None)["rows"][1:]
    assert [[row[name] for row in shown] for name in ("beyond", "equivalent", "not_worse")] == texts
    lines = (STUDIES / "wider_decay" / "report.md").read_text().split("### ")[1].splitlines()
    cells = [[cell.strip() for cell in line.split("|")[8:11]] for line in lines if line.startswith("| ")][2:]
    assert cells == [list(row) for row in zip(*texts, strict=True)]


def test_a_spread_names_its_level():
    assert Spread(1.0, 5, 10).level == pytest.approx(0.005)
