"""Separation of two sets by a score: AUROC and the false positive rate at 95 % true positives, with intervals."""

from dataclasses import dataclass
from math import exp, log, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from ncreg._readable import readable
from ncreg.numerics import exact
from ncreg.robustness.intervals import Z95, binomial_interval


@dataclass(frozen=True)
class Detection:
    """How well a score separates in-distribution (ID) images, which should score higher, from OOD images.

    Attributes:
        auroc: probability that an ID image scores higher than an OOD image, a tie counting half; 0.5 is chance.
        auroc_interval: its 95 % interval.
        fpr95: share of OOD images that are taken for ID where at least 95 % of ID images are accepted.
        fpr95_interval: its Wilson 95 % interval, the threshold taken as given.
        threshold: the highest score that accepts 95 % of ID images; images at or above it are accepted.
        num_id: ID images.
        num_ood: OOD images.
    """

    auroc: float
    auroc_interval: tuple[float, float]
    fpr95: float
    fpr95_interval: tuple[float, float]
    threshold: float
    num_id: int
    num_ood: int

    __str__ = readable


def evaluate_detection(id_scores: Float[Tensor, " id"], ood_scores: Float[Tensor, " ood"]) -> Detection:
    """AUROC = P(s_ID > s_OOD) + ½P(s_ID = s_OOD), and FPR95 = P(s_OOD ≥ τ), τ the ⌈0.95·n⌉-th highest ID score.

    Ties count half in the one, exactly; in the other they are accepted with the threshold, ID and OOD alike. The
    interval of the AUROC comes from DeLong's variance (DeLong, DeLong & Clarke-Pearson, Biometrics 1988) on the logit
    scale, so that it stays in (0, 1); where that variance is 0, as at perfect separation, it is Newcombe's
    (Statistics in Medicine 2006, method 5), which like Wilson's takes the variance at the interval's end.

    Args:
        id_scores: scores of in-distribution images, higher = more in-distribution.
        ood_scores: scores of the others.

    Raises:
        TypeError: no floating-point tensors.
        ValueError: an empty set, more than one axis, or NaN.

    Example:
        >>> found = evaluate_detection(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([2.0, 0.0]))
        >>> round(found.auroc, 4), found.fpr95, found.threshold
        (0.75, 0.5, 1.0)
    """
    inside, outside = _sorted("id_scores", id_scores), _sorted("ood_scores", ood_scores)
    accepted = -(-95 * len(inside) // 100)  # the ceiling, in whole numbers
    threshold = inside[len(inside) - accepted]
    taken = int((outside >= threshold).sum())
    auroc, interval = _auroc(inside, outside)
    return Detection(
        auroc=auroc,
        auroc_interval=interval,
        fpr95=taken / len(outside),
        fpr95_interval=binomial_interval(taken, len(outside)),
        threshold=float(threshold),
        num_id=len(inside),
        num_ood=len(outside),
    )


def _sorted(name: str, scores: Tensor) -> Float[Tensor, " scores"]:
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise TypeError(
            f"{name} must be a floating-point tensor, got {getattr(scores, 'dtype', type(scores).__name__)}"
        )
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"{name} must hold one score an image, got shape {tuple(scores.shape)}")
    if bool(scores.isnan().any()):
        raise ValueError(f"{name} holds NaN in {int(scores.isnan().sum())} of {len(scores)} images")
    return exact(scores).sort().values


def _auroc(inside: Tensor, outside: Tensor) -> tuple[float, tuple[float, float]]:
    """AUROC and its interval, from sorted scores."""
    m, n = len(inside), len(outside)
    # Placements, in halves: how many scores of the other set a score exceeds, an equal one counting half.
    beaten = torch.searchsorted(outside, inside) + torch.searchsorted(outside, inside, right=True)
    beating = 2 * m - torch.searchsorted(inside, outside) - torch.searchsorted(inside, outside, right=True)
    auroc = int(beaten.sum()) / (2 * m * n)
    if min(m, n) > 1:
        variance = float((beaten.double() / (2 * n)).var() / m + (beating.double() / (2 * m)).var() / n)
        if variance > 0 and 0 < auroc < 1:
            centre, half = log(auroc / (1 - auroc)), Z95 * sqrt(variance) / (auroc * (1 - auroc))
            low, high = (1 / (1 + exp(-max(-700.0, end))) for end in (centre - half, centre + half))
            return auroc, (low, high)
    low = _newcombe(auroc, m, n)
    return auroc, (low, 1 - _newcombe(1 - auroc, m, n))


def _newcombe(auroc: float, m: int, n: int) -> float:
    """The lower end: the smallest θ with (auroc − θ)² ≤ z²·V(θ), V Hanley and McNeil's variance, by bisection."""
    low, high = 0.0, auroc
    for _ in range(60):
        theta = (low + high) / 2
        spread = 1 + ((m + n) / 2 - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        outside = auroc - theta > Z95 * sqrt(theta * (1 - theta) * spread / (m * n))
        low, high = (theta, high) if outside else (low, theta)
    return low
