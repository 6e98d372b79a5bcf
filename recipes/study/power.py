"""Power of the paired tests: the difference that n pairs can show, and the pairs that a difference or equality needs.

Everything is about the first step of Holm's correction, where a difference has to stand out most: level 0.05 divided by
the number of tests. Later steps need less.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats

from recipes.study.paired_tests import ALPHA
from recipes.study.spec import Measure

POWER = 0.8
MOST = 10_000
"""Pairs beyond which no number is sought."""


@dataclass(frozen=True)
class Spread:
    """What power depends on: the differences at hand and how many of them are tested together.

    Attributes:
        sd: of the paired differences, pooled over the arms, in the measure's unit.
        pairs: the most that an arm has.
        tests: arms or contrasts that Holm's correction takes together.
    """

    sd: float
    pairs: int
    tests: int

    @property
    def level(self) -> float:
        """Of the first step of Holm's correction."""
        return ALPHA / self.tests


def spread_of(entries: Sequence[Mapping[str, Any]]) -> Spread | None:
    """The spread of the tested entries of a table; None where no arm has two pairs or none of them varies.

    Example:
        >>> spread_of([{"verdict": "baseline"}, {"verdict": "better", "pairs": 5, "difference_sd": 0.2}])
        Spread(sd=0.2, pairs=5, tests=1)
    """
    rivals = [entry for entry in entries if entry["verdict"] != "baseline"]
    tested = [entry for entry in rivals if entry["pairs"] > 1]
    weight = sum(entry["pairs"] - 1 for entry in tested)
    squares = sum((entry["pairs"] - 1) * entry["difference_sd"] ** 2 for entry in tested)
    if not squares:
        return None
    return Spread((squares / weight) ** 0.5, max(entry["pairs"] for entry in tested), sum(map(_counts, rivals)))


def _counts(entry: Mapping[str, Any]) -> bool:
    """Whether Holm's correction counts an entry: it is tested, or waits for runs."""
    return entry["pairs"] > 1 or (entry["verdict"] == "too few seeds" and entry.get("runs", 0) < 2)


@functools.cache
def _scales(degrees: int) -> np.ndarray:
    """Equally likely values of s/σ, the measured standard deviation over the true one: √(χ²/degrees)."""
    return np.sqrt(stats.chi2.ppf((np.arange(4000) + 0.5) / 4000, degrees) / degrees)


def power_of_difference(difference: float, sd: float, pairs: int, level: float) -> float:
    """Probability that the two-sided paired t test shows a true difference: P(|T| > t), T noncentral with δ√n/σ.

    T = (Z + δ√n/σ) / (s/σ) is averaged over s/σ, which stays finite where scipy.stats.nct does not.

    Example:
        >>> round(power_of_difference(1.0, 1.0, 10, 0.05), 3)     # G*Power: 0.803
        0.803
    """
    critical = stats.t.isf(level / 2, pairs - 1) * _scales(pairs - 1)
    centre = difference / sd * pairs**0.5
    return float(np.mean(stats.norm.sf(critical - centre) + stats.norm.cdf(-critical - centre)))


def power_of_equality(margin: float, sd: float, pairs: int, level: float) -> float:
    """Probability that two one-sided tests show arms without any difference to be equivalent within the margin."""
    room = margin / sd * pairs**0.5 - stats.t.isf(level, pairs - 1) * _scales(pairs - 1)
    return float(np.mean(np.clip(2 * stats.norm.cdf(room) - 1, 0, None)))


def detectable_difference(sd: float, pairs: int, level: float) -> float:
    """The true difference that the paired test shows with 80 %, in the unit of `sd`."""

    def missing(difference: float) -> float:
        return power_of_difference(difference, sd, pairs, level) - POWER

    high = sd
    while missing(high) < 0:
        high *= 2
    return float(optimize.brentq(missing, 0.0, high, rtol=1e-6))


def pairs_for_difference(difference: float, sd: float, level: float) -> int | None:
    """The fewest pairs with which the paired test shows a true difference with 80 %; None beyond `MOST`."""
    return _fewest(lambda pairs: power_of_difference(difference, sd, pairs, level))


def pairs_for_equality(margin: float, sd: float, level: float) -> int | None:
    """The fewest pairs with which equal arms are shown to be equivalent with 80 %; None beyond `MOST`."""
    return _fewest(lambda pairs: power_of_equality(margin, sd, pairs, level))


def _fewest(power: Any) -> int | None:
    """Bisection: power rises with the number of pairs."""
    low, high = 1, 2
    while power(high) < POWER:
        low, high = high, 2 * high
        if low >= MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high if high <= MOST else None


def verdict_from(entries: Sequence[Mapping[str, Any]], measure: Measure) -> float | None:
    """The true difference from which on a verdict is given with 80 %, beyond the margin where the measure has one.

    None where no arm has two pairs yet, or none of them varies.
    """
    spread = spread_of(entries)
    if spread is None:
        return None
    return (measure.margin or 0.0) + detectable_difference(spread.sd, spread.pairs, spread.level)
