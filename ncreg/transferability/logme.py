"""LogME: how likely labels are under Bayesian linear regression on frozen features."""

from math import inf, log, pi

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from ncreg.transferability._inputs import labelled, one_hot

STEPS = 10_000
TOLERANCE = 1e-12  # relative change of a/b
EXACT = 1e-14  # a/b below this fraction of the σ that hold the labels: nothing but rounding is left of the error
STARTS = 200


def logme(features: Float[Tensor, "samples dim"], target: Integer[Tensor, " samples"]) -> float:
    """Largest log evidence of Bayesian linear regression of each class's indicator on F, a sample, mean over classes.

    Prior w ~ N(0, I/a), noise N(0, 1/b), no intercept; a and b at the largest evidence, by MacKay's fixed point from
    the best of 200 ratios a/b: where one direction is far longer than the others, as an offset is, there are several
    maxima. With F = USVᵀ, σ = s², x = Uᵀy and t = a/b the evidence is ½(N ln b − Σ ln(1 + σ/t) − b·e² − a·m² −
    N ln 2π)/N, e² the squared error and m² = ‖w‖². The scale of the features does not matter, an offset does, for there
    is no intercept.
    Infinite where fewer directions than samples fit the indicator of a class exactly, as collapsed features do.

    Args:
        features: of labelled images, from one pass in eval mode.
        target: their classes, each of 0 … C−1 present.

    Raises:
        TypeError: no tensors of the right kind.
        ValueError: shapes that do not fit, features not finite or all 0, a class without a sample.

    Source: You, Liu, Wang & Long, "LogME: Practical Assessment of Pre-trained Models for Transfer Learning", ICML 2021
    (arXiv 2102.11005). Directions beyond the rank count nothing in this form, with fewer samples than features too.

    Example:
        >>> target = torch.arange(100) % 2
        >>> noise = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> helpful = noise + 3 * target[:, None]
        >>> logme(helpful, target) > logme(noise, target)
        True
    """
    rows, labels, counts = labelled(features, target)
    largest = rows.abs().max()
    if not largest > 0:
        raise ValueError("features are all 0: the model tells nothing apart")
    left, singular, _ = torch.linalg.svd(rows / largest, full_matrices=False)
    kept = singular > singular[0] * max(rows.shape) * torch.finfo(torch.float64).eps
    sigma, indicators = singular[kept].square(), one_hot(labels, len(counts))
    inside = left[:, kept].T @ indicators  # x, a column a class
    outside = (indicators - left[:, kept] @ inside).square().sum(0)  # r
    evidence = [_evidence(sigma, x, float(r), len(rows)) for x, r in zip(inside.T, outside, strict=True)]
    return sum(evidence) / len(evidence)


def _evidence(sigma: Float[Tensor, " rank"], inside: Float[Tensor, " rank"], outside: float, samples: int) -> float:
    """The largest log evidence a sample of one indicator."""
    squares, spare = inside.square(), samples - len(sigma)
    held, outside = float(squares.sum()), outside if spare else 0.0  # beyond all directions there is rounding alone
    if not held:
        return _gaussian(samples, samples / outside, 0.0)
    flat = held / float((squares / sigma).sum())  # the σ of the directions that hold the labels
    low, high = EXACT * (flat if spare else float(sigma[-1])), float(sigma[0]) / EXACT
    ratio = _start(sigma, squares, outside, samples, low, high)
    for _ in range(STEPS):
        # γ directions are determined by the data; a = γ/m², b = (N − γ)/e²
        used, free = float((sigma / (sigma + ratio)).sum()), spare + float((ratio / (sigma + ratio)).sum())
        length = float((sigma * squares / (ratio + sigma).square()).sum())
        error = float((squares * (ratio / (ratio + sigma)).square()).sum()) + outside
        before, ratio = ratio, used * error / (length * free) if length * free > 0 else inf
        if abs(ratio - before) <= TOLERANCE * before or not low <= ratio <= high:
            break
    if ratio > high:  # nothing to learn: w = 0
        return _gaussian(samples, samples / (held + outside), 0.0)
    if ratio < low:  # no noise is left: a Gaussian of covariance FFᵀ/a, if that is regular
        return inf if spare else _gaussian(samples, samples * flat / held, float(sigma.log().sum()))
    return _gaussian(samples, free / error, float(torch.log1p(sigma / ratio).sum()))


def _start(sigma: Tensor, squares: Tensor, outside: float, samples: int, low: float, high: float) -> float:
    """The ratio of largest evidence among some from `low` to `high`, each with the best b."""
    ratios = torch.linspace(log(low), log(high), STARTS, dtype=torch.float64, device="cpu").exp()[:, None]
    exponent = (squares * (ratios / (ratios + sigma))).sum(1) + outside
    evidence = -samples * exponent.log() - torch.log1p(sigma / ratios).sum(1)
    return float(ratios[evidence.argmax()])


def _gaussian(samples: int, precision: float, log_determinant: float) -> float:
    """Log density a sample at the best precision, where the exponent is −N/2."""
    return 0.5 * (samples * log(precision) - log_determinant - samples - samples * log(2 * pi)) / samples
