"""One temperature for all logits, fitted on validation data."""

import warnings
from math import exp, log

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ncreg.robustness.calibration._measures import check_logits_and_target

# How far from the logits' own size 1/T may go: softmax of logits with root mean square 1e3 is one-hot or a tie.
SHARPEST = 1e3
LARGEST = 690.0  # exp of more leaves float64
ENTRIES = 2**16  # logits at a time: their temporaries stay in a processor's cache


def temperature_scaling(logits: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"]) -> float:
    """The T that minimises the mean of −log softmax(z/T)_y, in units of the logits; fit it on validation data.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (arXiv 1706.04599). The likelihood is
    convex in 1/T, so the minimum is unique; safeguarded Newton steps in log T find it in float64. T is sought within
    a factor `SHARPEST` = 1000 of the logits' own size (the root mean square about each row's mean), so that
    temperature_scaling(k·z) = k·temperature_scaling(z); and below that where a sample is wrong, so that there is a
    minimum. Classes that are no sample's label and no row's largest logit do not count for the size: a class that a
    mask rules out by −1e9 would make it large.

    Args:
        logits: z, before softmax.
        target: class indices.

    Returns:
        T > 0. Where there is no minimum (all samples right: T → 0; logits worse than none: T → ∞) the bound comes back,
        with a UserWarning; where all logits of every row are equal, 1.

    Raises:
        ValueError: probabilities, C = 1, no samples, NaN, classes out of range.
        TypeError: no tensors, or of another kind.

    Example:
        >>> import torch
        >>> z = torch.tensor([[2.0, 0.0]] * 4)
        >>> round(temperature_scaling(z, torch.tensor([0, 0, 0, 1])), 4)    # 2 / log 3
        1.8205
    """
    temperature, at_bound = fit_temperature(*check_logits_and_target(logits, target))
    if at_bound is not None:
        why = {
            "lower": "every sample is right, so that the likelihood only grows as T falls",
            "upper": "the logits tell the classes apart no better than chance",
            "flat": "all logits are equal",
        }[at_bound]
        warnings.warn(f"the data do not determine a temperature ({why}): T={temperature:.4g}", stacklevel=2)
    return temperature


def _size(z: Tensor) -> float:
    return float((z - z.mean(1, keepdim=True)).square().mean().sqrt())


def _moments(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (rows, 1) and variance (rows,) of each row under its own softmax."""
    p = scaled.softmax(1)
    mean = (p * scaled).sum(1, keepdim=True)
    return mean, (p * (scaled - mean).square()).sum(1)


def fit_temperature(z: Tensor, target: Tensor) -> tuple[float, str | None]:
    """The best T and, where there is none, the bound it ran into."""
    z = z - z.amax(1, keepdim=True)  # not the mean: a class that is ruled out would take the digits of the others
    largest = float(z.abs().max())
    if largest == 0:
        return 1.0, "flat"
    z = z / largest  # squares of huge logits overflow
    size = _size(z[:, torch.cat([target, z.argmax(1)]).unique()]) or _size(z)
    z, unit = (z / size).clamp_min(-(SHARPEST**2)), size * largest  # below, no T that is looked at gives more than 0
    labelled = z.gather(1, target[:, None])
    own = labelled.mean()
    parts = z.split(max(1, ENTRIES // z.shape[1]))

    def slope(u: float) -> tuple[float, float]:
        """First and second derivative of the mean loss in u = log(1/T)."""
        mean, spread = (torch.cat(part) for part in zip(*(_moments(exp(u) * rows) for rows in parts), strict=True))
        first = float(mean.mean() - exp(u) * own)
        return first, first + float(spread.mean())

    low, high = -log(SHARPEST), log(SHARPEST)
    if slope(low)[0] >= 0:
        return unit * SHARPEST, "upper"
    if not bool(labelled.any()) and slope(high)[0] <= 0:
        return unit / SHARPEST, "lower"
    while slope(high)[0] <= 0 and high < LARGEST:
        low, high = high, high + log(SHARPEST)
    u = max(0.0, low)
    for _ in range(200):
        first, second = slope(u)
        low, high = (u, high) if first < 0 else (low, u)
        step = first / second if second > 0 else high - low
        if abs(step) < 1e-13:
            break
        u = u - step if low < u - step < high else (low + high) / 2
    return unit * exp(-u), None
