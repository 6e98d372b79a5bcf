"""What a frame is judged by: its largest cosine (Tammes) and its one-vs-rest distance (softmax code)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ncreg._checks import check_positive, described
from ncreg.frames._one_vs_rest import nearest_to_others
from ncreg.numerics import in_float64

ROWS = 1024  # of a Gram matrix at a time


def check_weight(weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor of class vectors, not {described(weight)}")
    if weight.ndim != 2 or weight.shape[0] < 2 or weight.shape[1] < 1 or not weight.is_floating_point():
        got = f"{tuple(weight.shape)} of {weight.dtype}"
        raise ValueError(f"weight is {got}: class vectors are a floating-point (num_classes >= 2, dim >= 1) matrix")
    if weight.is_meta:
        raise ValueError("weight has no values, being on device meta: move it to a real device first")
    if not weight.isfinite().all():
        raise ValueError("weight must be finite")


def max_cosine(weight: Float[Tensor, "num_classes dim"]) -> Float[Tensor, ""]:
    """Largest cosine between two class vectors: max over c ≠ k of w_c·w_k/(‖w_c‖‖w_k‖).

    Rankin (1955): at least −1/(C−1); at least 0 for C > dim + 1. Differentiable; computed in float64.

    Raises:
        ValueError: for a weight that is not a finite (C ≥ 2, dim) matrix, or a class vector of length 0.

    Example:
        >>> max_cosine(torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
        tensor(0.)
    """
    check_weight(weight)
    sizes = in_float64(weight.detach()).abs().amax(1, keepdim=True)
    if not sizes.all():
        raise ValueError("weight has a class vector of length 0, which has no cosine")
    wide = in_float64(weight) / sizes  # squares of the very long and the very short would leave float64
    unit, largest = wide / torch.linalg.vector_norm(wide, dim=1, keepdim=True), []
    for first in range(0, len(unit), ROWS):
        cosines = unit[first : first + ROWS] @ unit[first:].T  # the pairs before are in earlier rows
        own = torch.eye(*cosines.shape, dtype=torch.bool, device=unit.device)
        largest.append(cosines.masked_fill(own, -torch.inf).max())
    return torch.stack(largest).max().to(weight)


def one_vs_rest_distance(weight: Float[Tensor, "num_classes dim"], *, tolerance: float = 1e-9) -> Float[Tensor, ""]:
    """Smallest distance of a class vector to the convex hull of the others: min_k dist(w_k, conv{w_j, j ≠ k}).

    Rows count as they are, lengths included. Simplex ETF: C/(C−1); orthoplex: 1. The measure of Jiang et al.,
    "Generalized Neural Collapse for a Large Number of Classes", arXiv 2310.05351. Each of the C
    quadratic programs is bounded from below by a separating hyperplane, which proves the result to within
    `tolerance`. Differentiable (at the optimal convex coefficients, by Danskin's theorem); computed in float64.

    Args:
        weight: class vectors.
        tolerance: largest proven error allowed, as a fraction of the longest class vector.

    Raises:
        ValueError: for a weight that is not a finite (C ≥ 2, dim) matrix, or a tolerance not above 0.
        RuntimeError: where the tolerance is not reached.

    Example:
        >>> one_vs_rest_distance(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]))
        tensor(1.)
    """
    check_weight(weight)
    check_positive("tolerance", tolerance)
    size = in_float64(weight.detach()).abs().max()
    # A power of two, so that nothing is rounded; without it squares of the very long and short leave float64.
    unit = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent - 1) if size > 0 else size + 1
    wide = in_float64(weight) / unit
    with torch.no_grad():
        nearest, coefficients = nearest_to_others(wide, tolerance)
    return (unit * torch.linalg.vector_norm(wide[nearest] - coefficients @ wide)).to(weight)
