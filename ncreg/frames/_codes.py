"""More classes than a simplex holds: the Tammes packing and the softmax code, by one annealed descent."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from ncreg._checks import check_integer, check_num_classes
from ncreg.frames._simplex import finish, on_meta, orthoplex, simplex_etf
from ncreg.numerics import as_float, seeded

LEVELS = 14  # β = 5, 10, 20, … : from a smooth view of all pairs to the few closest
STEPS = 250  # a level


def tammes(
    num_classes: int,
    dim: int,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "num_classes dim"]:
    """Tammes packing: unit class vectors whose largest pairwise cosine is as small as can be found.

    Exact where theory is: a simplex for C ≤ d + 1, an orthoplex for C ≤ 2d (Rankin 1955), a regular polygon for
    d = 2. Beyond, the best of several annealed descents: a good local optimum, judged by `max_cosine`. Results
    are kept in memory for (C, d, seed).

    Args:
        num_classes: C, at least 2.
        dim: d, at least 2 for C > 2.
        seed: of starts and rotation.
        dtype: of the result; by default torch's default dtype.
        device: of the result; by default torch's default device.

    Raises:
        ValueError: for C < 2 or d < 1, or d = 1 with C > 2.

    Example:
        >>> from ncreg.frames import max_cosine
        >>> round(max_cosine(tammes(12, 3)).item(), 3)  # the icosahedron, 1/√5
        0.447
    """
    return _code(num_classes, dim, seed, True, dtype, device)


def softmax_code(
    num_classes: int,
    dim: int,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "num_classes dim"]:
    """Softmax code: unit class vectors whose smallest one-vs-rest distance is as large as can be found.

    The geometry cross-entropy collapses to, temperature falling, when classes outnumber dimensions (Jiang et al.,
    "Generalized Neural Collapse for a Large Number of Classes", arXiv 2310.05351). Exact where theory is: a simplex
    for C ≤ d + 1, an orthoplex for C ≤ 2d, a regular polygon for d = 2. Beyond, the best of several annealed
    descents: a good local optimum, judged by `one_vs_rest_distance`. Results are kept in memory for (C, d, seed).

    Args:
        num_classes: C, at least 2.
        dim: d, at least 2 for C > 2.
        seed: of starts and rotation.
        dtype: of the result; by default torch's default dtype.
        device: of the result; by default torch's default device.

    Raises:
        ValueError: for C < 2 or d < 1, or d = 1 with C > 2.

    Example:
        >>> from ncreg.frames import one_vs_rest_distance
        >>> round(one_vs_rest_distance(softmax_code(12, 3)).item(), 3)
        0.553
    """
    return _code(num_classes, dim, seed, False, dtype, device)


def _code(
    num_classes: int,
    dim: int,
    seed: int,
    tied: bool,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Tensor:
    num_classes, dim, dtype = check_num_classes(num_classes), check_integer("dim", dim, 1), as_float(dtype)
    if dim == 1 and num_classes > 2:
        raise ValueError(f"dim=1 has two directions, too few for {num_classes} classes: take dim >= 2")
    if on_meta(device):
        return finish(torch.empty(num_classes, dim, device="meta"), dtype, device)
    generator = seeded(seed)
    if num_classes <= dim + 1:
        return simplex_etf(num_classes, dim, generator=generator, dtype=dtype, device=device)
    if num_classes <= 2 * dim:
        return orthoplex(num_classes, dim, generator=generator, dtype=dtype, device=device)
    code = _polygon(num_classes, generator) if dim == 2 else _solved(num_classes, dim, seed, tied)
    return finish(code.clone(), dtype, device)


def _polygon(num_classes: int, generator: torch.Generator) -> Tensor:
    """The regular polygon, turned at random."""
    corners = torch.arange(num_classes, dtype=torch.float64, device="cpu") / num_classes
    start = torch.rand((), dtype=torch.float64, device="cpu", generator=generator)
    angles = 2 * math.pi * (corners + start)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


@lru_cache(maxsize=32)
def _solved(num_classes: int, dim: int, seed: int, tied: bool) -> Tensor:
    """Minimise the largest gap h_k·w_j − h_k·w_k, j ≠ k, over unit w (and unit h, unless tied: h = w).

    Tied, the largest gap is the largest cosine − 1. Free, h_k ends as the normal of class k's best separating
    hyperplane, so that the largest gap is minus the one-vs-rest distance. Adam on the sphere minimises
    log Σ exp(β·gap)/β with one step size for a whole start, β doubling and steps shrinking as β^(−0.9).
    """
    starts = max(1, min(16, 80_000 // num_classes**2))
    generator = seeded(seed)
    shape = starts, num_classes, dim
    drawn = torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator)
    points = [normalize(drawn, dim=2)] * (1 if tied else 2)
    with torch.no_grad():
        for level in range(LEVELS):
            points = _descend(points, beta=5.0 * 2**level, rate=0.1 * 2 ** (-0.9 * level))
        best = _gaps(points).amax((1, 2)).argmin()
    return points[0][best]


def _gaps(points: list[Tensor]) -> Tensor:
    """The gaps h_k·w_j − h_k·w_k of each start, −inf at j = k."""
    logits = points[-1] @ points[0].mT
    own = logits.diagonal(dim1=1, dim2=2)
    gaps = logits - own[..., None]
    gaps.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    return gaps


def _slopes(points: list[Tensor], beta: float) -> list[Tensor]:
    """Gradient of log Σ exp(β·gap)/β along the sphere, for w (and h)."""
    weight, features = points[0], points[-1]
    probability = (beta * _gaps(points)).flatten(1).softmax(1).view(*weight.shape[:2], -1)
    probability.diagonal(dim1=1, dim2=2).sub_(probability.sum(2))
    by_weight, by_features = probability.mT @ features, probability @ weight
    raw = [by_weight + by_features] if len(points) == 1 else [by_weight, by_features]
    return [s - (s * p).sum(2, keepdim=True) * p for s, p in zip(raw, points, strict=True)]


def _descend(points: list[Tensor], beta: float, rate: float) -> list[Tensor]:
    """One level of the annealing: Adam along the sphere, its step size falling to 0."""
    drifts, size = [torch.zeros_like(point) for point in points], 0.0 * points[0][:, :1, :1]
    for step in range(1, STEPS + 1):
        slopes = _slopes(points, beta)
        size = 0.99 * size + 0.01 * torch.cat(slopes, dim=1).square().mean((1, 2), keepdim=True)
        drifts = [0.9 * d + 0.1 * s for d, s in zip(drifts, slopes, strict=True)]
        falling = rate * (1 - (step - 1) / STEPS) / (1 - 0.9**step)
        length = falling / ((size / (1 - 0.99**step)).sqrt() + 1e-12)
        points = [normalize(p - length * d, dim=2) for p, d in zip(points, drifts, strict=True)]
    return points
