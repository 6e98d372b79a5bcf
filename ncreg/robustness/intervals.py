"""Confidence intervals: Wilson's of a proportion, and the quantiles that others are made of."""

from __future__ import annotations

from math import cos, pi, sin, sqrt, tan

from ncreg._checks import check_integer

Z95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal distribution: half the width of a 95 % interval, in deviations."""


def binomial_interval(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the proportion of `correct` among `n` independent trials.

    (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n), z = 1.96 (Wilson, JASA 1927).

    Raises:
        TypeError: counts that are no ints.
        ValueError: n < 1, or correct outside [0, n].

    Example:
        >>> [round(end, 3) for end in binomial_interval(90, 100)]
        [0.826, 0.945]
    """
    n, correct = check_integer("n", n, 1), check_integer("correct", correct, 0)
    if correct > n:
        raise ValueError(f"correct={correct} must be at most n={n}")
    p, z2 = correct / n, Z95**2 / n
    centre, half = p + z2 / 2, sqrt(z2 * p * (1 - p) + z2**2 / 4)
    low = 0.0 if correct == 0 else (centre - half) / (1 + z2)  # exact at the ends, where rounding shows
    high = 1.0 if correct == n else (centre + half) / (1 + z2)
    return low, high


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t: √ν·tan φ, where 95 % of its mass lies within ±φ.

    Example:
        >>> round(t_quantile(9), 4)
        2.2622
    """
    low, high = 0.0, pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _within(middle, degrees) < 0.95 else (low, middle)
    return sqrt(degrees) * tan(high)


def _within(angle: float, degrees: int) -> float:
    """P(|t| < √ν·tan φ), a finite sum of powers of cos φ (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    odd = degrees % 2
    term, total = (cos(angle) if odd else 1.0), 0.0
    for k in range(1, degrees // 2 + 1):
        total += term
        term *= cos(angle) ** 2 * ((2 * k) / (2 * k + 1) if odd else (2 * k - 1) / (2 * k))
    return (angle + sin(angle) * total) * 2 / pi if odd else sin(angle) * total
