"""Tests of paired differences against a margin: beyond it, within it on both sides, not below it."""

from __future__ import annotations

import numpy as np
from scipy import stats

from recipes.study.spec import Measure


def one_sided_p(differences: np.ndarray, bound: float) -> float | None:
    """The p of "the mean is above `bound`": one-sided paired t test; none for fewer than two differences.

    Where all differences are equal, t has no meaning; the sign test's 2⁻ⁿ is taken, or 1 if they are not above.

    Example:
        >>> one_sided_p(np.array([0.2, 0.2, 0.2]), 0.1), one_sided_p(np.array([0.2, 0.2, 0.2]), 0.3)
        (0.125, 1.0)
    """
    n = len(differences)
    if n < 2:
        return None
    if np.ptp(differences) == 0:
        above = differences[0] > bound and not np.isclose(differences[0], bound, rtol=1e-9, atol=0)
        return 0.5**n if above else 1.0
    return float(stats.ttest_1samp(differences, bound, alternative="greater").pvalue)


def margin_p(differences: np.ndarray, measure: Measure) -> dict[str, float]:
    """The p of each test against the measure's margin m; empty where it has none, or for fewer than two differences.

    beyond: two-sided, |mean| > m; equivalent: |mean| < m, the larger p of two one-sided tests (Schuirmann 1987);
    not_worse: mean > −m (< m where smaller is better), one-sided; absent for what is described, not judged.
    """
    if measure.margin is None:
        return {}
    m = measure.margin
    above, below = one_sided_p(differences, m), one_sided_p(-differences, m)
    over, under = one_sided_p(differences, -m), one_sided_p(-differences, -m)
    if above is None or below is None or over is None or under is None:
        return {}
    found = {"beyond": min(1.0, 2 * min(above, below)), "equivalent": max(over, under)}
    if measure.better != "neither":
        found["not_worse"] = over if measure.better == "larger" else under
    return found
