"""Paired tests: differences of arms over seeds, their intervals, Holm's correction, and the words of the verdict.

The rules are those of docs/compare.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from recipes.study.margin_tests import margin_p
from recipes.study.spec import Contrast, Measure

LEVEL = 0.95
ALPHA = 0.05
RESAMPLES = 9_999
MARGIN_TESTS = ("beyond", "equivalent", "not_worse")


def spread(values: Sequence[float]) -> dict[str, Any]:
    """n, mean, sd (n − 1 in the denominator) and the t interval of the mean; null where too few values are there."""
    n = len(values)
    data = np.asarray(values, dtype=np.float64)
    low, high = t_interval(data)
    return {
        "n": n,
        "mean": float(data.mean()) if n else None,
        "sd": float(data.std(ddof=1)) if n > 1 else None,
        "low": low,
        "high": high,
    }


def t_interval(data: np.ndarray) -> tuple[float | None, float | None]:
    """Mean ± t_{n−1, 0.975} · sd/√n; none for fewer than two values."""
    n = len(data)
    if n < 2:
        return None, None
    half = float(stats.t.ppf(0.5 + LEVEL / 2, n - 1)) * float(data.std(ddof=1)) / n**0.5
    return float(data.mean()) - half, float(data.mean()) + half


def bootstrap_interval(data: np.ndarray) -> tuple[float | None, float | None]:
    """BCa bootstrap interval of the mean, drawn with a fixed seed; the percentile interval where BCa is not defined."""
    if len(data) < 2:
        return None, None
    if np.ptp(data) == 0:
        return float(data[0]), float(data[0])
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            found = stats.bootstrap(
                (data,),
                np.mean,
                confidence_level=LEVEL,
                n_resamples=RESAMPLES,
                method=method,
                rng=np.random.default_rng(0),
                vectorized=True,
            ).confidence_interval
        if np.isfinite([found.low, found.high]).all():
            break
    return float(found.low), float(found.high)


def subtract(ours: Sequence[float], theirs: Sequence[float]) -> np.ndarray:
    """Differences rounded to twelve digits of the largest value, so that rounding errors do not look like a spread."""
    pairs = np.array([ours, theirs], dtype=np.float64)
    scale = np.abs(pairs).max(initial=0.0) or 1.0
    return np.round((pairs[0] - pairs[1]) / scale, 12) * scale


def paired_p(differences: np.ndarray) -> float | None:
    """Two-sided p of the paired t test; of the sign test where all differences are equal and t is not defined."""
    n = len(differences)
    if n < 2:
        return None
    if np.ptp(differences) == 0:
        return 1.0 if differences[0] == 0 else min(1.0, 2.0 * 0.5**n)
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment: p_(k) becomes the running maximum of (m − k + 1)·p_(k), at most 1.

    Example:
        >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
        {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(values, key=lambda name: values[name])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[name]))
        adjusted[name] = largest
    return adjusted


def verdict(measure: Measure, entry: Mapping[str, Any], *, min_seeds: int) -> str:
    """The verdict on one paired difference, from p after Holm's correction; the first that applies.

    "too few seeds" below `min_seeds` pairs. "better" or "worse" ("higher" or "lower" for a measure that is described,
    not judged) if the difference is shown not to be zero, or with a margin to lie beyond it. "equivalent" if it is
    shown to lie within the margin, "not worse" if it is shown not to be worse by the margin. Else "no difference
    shown".
    """
    if entry["pairs"] < min_seeds:
        return "too few seeds"
    against_margin = entry["margin_p_holm"]
    if (entry["p_holm"] if measure.margin is None else against_margin["beyond"]) < ALPHA:
        rises = entry["difference"] > 0
        if measure.better == "neither":
            return "higher" if rises else "lower"
        return "better" if rises == (measure.better == "larger") else "worse"
    if against_margin.get("equivalent", 1.0) < ALPHA:
        return "equivalent"
    return "not worse" if against_margin.get("not_worse", 1.0) < ALPHA else "no difference shown"


def never_reached(of_seed: Mapping[int, float | None]) -> bool:
    """Whether runs have ended and none of them reached the measure."""
    return bool(of_seed) and all(value is None for value in of_seed.values())


def paired_difference(
    measure: Measure, ours: Mapping[int, float | None], theirs: Mapping[int, float | None]
) -> dict[str, Any]:
    """The difference of two arms over the seeds that both have: pairs, mean, sd, both intervals, p's uncorrected."""
    both = {seed: (value, theirs.get(seed)) for seed, value in sorted(ours.items())}
    shared = [(one, other) for one, other in both.values() if one is not None and other is not None]
    differences = subtract([one for one, _ in shared], [other for _, other in shared])
    low, high = t_interval(differences)
    boot_low, boot_high = bootstrap_interval(differences)
    return {
        "pairs": len(shared),
        "difference": float(differences.mean()) if shared else None,
        "difference_sd": float(differences.std(ddof=1)) if len(shared) > 1 else None,
        "difference_low": low,
        "difference_high": high,
        "bootstrap_low": boot_low,
        "bootstrap_high": boot_high,
        "p": paired_p(differences),
        "margin_p": margin_p(differences, measure),
    }


def judge_pairs(
    measure: Measure,
    values: Mapping[str, Mapping[int, float | None]],
    pairs: Sequence[tuple[str, str]],
    *,
    min_seeds: int,
) -> list[dict[str, Any]]:
    """For each pair: the difference (first minus second), each p after Holm's correction over the pairs, the verdict.

    A pair of which fewer than two seeds have ended on both sides counts in the correction with a p of 1: what is told
    of a study that goes on keeps to the family that its rules name. The verdict is "not reached" where runs of the
    first arm have ended and none has the measure, "baseline not reached" where that holds for the second arm, else that
    of `verdict`.
    """
    entries = [paired_difference(measure, values[ours], values.get(theirs, {})) for ours, theirs in pairs]
    waiting = [len(values[ours].keys() & values.get(theirs, {}).keys()) < 2 for ours, theirs in pairs]
    adjusted = _corrected([entry["p"] for entry in entries], waiting)
    tests = {name: _corrected([entry["margin_p"].get(name) for entry in entries], waiting) for name in MARGIN_TESTS}
    for index, (entry, (ours, theirs)) in enumerate(zip(entries, pairs, strict=True)):
        entry["p_holm"] = adjusted.get(index)
        entry["margin_p_holm"] = {name: found[index] for name, found in tests.items() if index in found}
        if never_reached(values[ours]):
            entry["verdict"] = "not reached"
        elif never_reached(values.get(theirs, {})):
            entry["verdict"] = "baseline not reached"
        else:
            entry["verdict"] = verdict(measure, entry, min_seeds=min_seeds)
    return entries


def _corrected(values: Sequence[float | None], waiting: Sequence[bool]) -> dict[int, float]:
    """Each p after Holm's correction, by its place; those that wait for runs only make the family larger."""
    if all(value is None for value in values):
        return {}
    known = {str(index): 1.0 if wait else p for index, (p, wait) in enumerate(zip(values, waiting, strict=True))}
    adjusted = holm({index: value for index, value in known.items() if value is not None})
    return {int(index): value for index, value in adjusted.items() if values[int(index)] is not None}


def compare_arms(
    measure: Measure, values: Mapping[str, Mapping[int, float | None]], *, base: str, min_seeds: int
) -> list[dict[str, Any]]:
    """An entry for each arm: its spread in one measure, and its paired difference to the baseline.

    Args:
        measure: which way is better, and by how much.
        values: by arm, then by seed of the finished runs; None where a run did not reach the measure.
        base: the baseline arm.
        min_seeds: pairs below which the verdict is "too few seeds".
    """
    rivals = [arm for arm in values if arm != base]
    found = judge_pairs(measure, values, [(arm, base) for arm in rivals], min_seeds=min_seeds)
    against = dict(zip(rivals, found, strict=True))
    none: dict[str, Any] = {"p_holm": None, "margin_p_holm": {}, "verdict": "baseline"}
    entries = []
    for arm, of_seed in values.items():
        had = {seed: value for seed, value in sorted(of_seed.items()) if value is not None}
        pairs = against.get(arm) or paired_difference(measure, had, had) | none
        by_seed = {str(seed): value for seed, value in had.items()}
        entries.append({"arm": arm, "runs": len(of_seed), **spread(list(had.values())), **pairs, "by_seed": by_seed})
    return entries


def compare_contrasts(
    measure: Measure,
    values: Mapping[str, Mapping[int, float | None]],
    contrasts: Sequence[Contrast],
    *,
    min_seeds: int,
) -> list[dict[str, Any]]:
    """An entry for each contrast: the paired difference of its two arms in one measure, corrected over contrasts."""
    found = judge_pairs(measure, values, [(item.arm, item.against) for item in contrasts], min_seeds=min_seeds)
    return [{"arm": item.arm, "against": item.against, **entry} for item, entry in zip(contrasts, found, strict=True)]
