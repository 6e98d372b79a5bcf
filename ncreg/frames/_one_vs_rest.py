"""The class vector nearest to the convex hull of the others, with a proof.

Dual bound used throughout: for any point q of the hull and the way x = w_k − q, the hyperplane across x puts
dist(w_k, hull) between min_j (w_k − w_j)·x/‖x‖ and ‖x‖.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 300  # of projected gradient, before the exact method takes over
SPECK = 1e-12  # a convex coefficient below this counts as 0


def nearest_to_others(weight: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """The class (a 0-d index) nearest to the others' hull, and the convex coefficients (C,) of its nearest point there.

    Projected gradient for all classes at once drops those that cannot be the nearest; Wolfe's method then ends
    the few left exactly. `tolerance` is in units of the longest class vector.
    """
    slack = tolerance * torch.linalg.vector_norm(weight, dim=1).max()
    classes, coefficients, upper, lower = _all_together(weight, slack)
    best = upper.argmin()
    nearest, best_coefficients, best_upper = classes[best], coefficients[best], upper[best]
    proven = [best_upper]
    for k, start, bound in zip(classes, coefficients, lower, strict=True):
        if best_upper - bound.clamp_min(0) > slack:
            bound, own_upper, own_coefficients = _exactly(weight, k, start, best_upper, slack)
            if own_upper < best_upper:
                nearest, best_coefficients, best_upper = k, own_coefficients, own_upper
        proven.append(bound)
    gap = best_upper - torch.stack(proven).min().clamp_min(0)
    if gap > slack:
        raise RuntimeError(
            f"one_vs_rest_distance is {best_upper:.9g}, but proven only to within {gap:.1e}: "
            f"raise tolerance={tolerance}"
        )
    return nearest, best_coefficients


def _all_together(weight: Tensor, slack: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Accelerated projected gradient with restarts: the classes left, their coefficients and bounds."""
    step = 1 / torch.linalg.matrix_norm(weight, 2).square().clamp_min(torch.finfo(weight.dtype).tiny)
    classes = torch.arange(len(weight), device=weight.device)
    own = torch.eye(len(weight), dtype=torch.bool, device=weight.device)
    coefficients = torch.full_like(own, 1 / (len(weight) - 1), dtype=weight.dtype).masked_fill(own, 0.0)
    ahead, pace = coefficients, torch.ones_like(coefficients[:, :1])
    for iteration in range(ROUNDS + 1):
        if iteration % 20 == 0:
            upper, lower = _bracket(weight, classes, own, coefficients)
            kept = torch.minimum(lower, upper) <= upper.min()  # rounding may lift lower above upper
            state = classes, own, coefficients, ahead, pace, upper, lower
            classes, own, coefficients, ahead, pace, upper, lower = (x[kept] for x in state)
            if iteration == ROUNDS or upper.min() - lower.min().clamp_min(0) <= slack:
                break
        uphill = (ahead @ weight - weight[classes]) @ weight.T
        moved = _onto_simplex((ahead - step * uphill).masked_fill(own, -torch.inf))
        back = ((ahead - moved) * (moved - coefficients)).sum(1, keepdim=True) > 0
        faster = torch.where(back, 1.0, (1 + (1 + 4 * pace.square()).sqrt()) / 2)
        ahead = moved + torch.where(back, 0.0, (pace - 1) / faster) * (moved - coefficients)
        coefficients, pace = moved, faster
    return classes, coefficients, upper, lower


def _bracket(weight: Tensor, classes: Tensor, own: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower bound of each class's distance, from its present point of the hull."""
    across = weight[classes] - coefficients @ weight
    upper = torch.linalg.vector_norm(across, dim=1)
    heights = across @ weight.T
    others = heights.masked_fill(own, -torch.inf).amax(1)
    return upper, (heights[own] - others) / upper.clamp_min(torch.finfo(upper.dtype).tiny)


def _onto_simplex(point: Tensor) -> Tensor:
    """Each row's nearest point on the probability simplex (Held, Wolfe & Crowder 1974, by sorting)."""
    falling = point.sort(dim=1, descending=True).values
    excess = falling.cumsum(1) - 1
    rank = torch.arange(1, point.shape[1] + 1, dtype=point.dtype, device=point.device)
    count = (falling * rank > excess).sum(1, keepdim=True)
    return (point - excess.gather(1, count - 1) / count).clamp_min(0)


def _exactly(weight: Tensor, k: Tensor, start: Tensor, best: Tensor, slack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Wolfe's finite method ("Finding the nearest point in a polytope", 1976): lower and upper bound, coefficients.

    Walks from face to face of the hull, each time to the face's own nearest point, until the hyperplane there
    proves it, or proves that class k is farther than `best`.
    """
    points = (weight[k] - weight).cpu()
    face = (start.cpu() > 1e-6).nonzero()[:, 0]
    parts = start.cpu()[face] / start.cpu()[face].sum()
    lower = points.new_tensor(-torch.inf)
    for _ in range(10 * sum(points.shape)):  # never reached but by rounding, which may walk in circles
        face, parts = _settle(points, face, parts)
        across = parts @ points[face]
        upper = torch.linalg.vector_norm(across)
        heights = points @ across
        heights[k] = torch.inf
        lowest = heights.argmin()
        lower = torch.maximum(lower, heights[lowest] / upper.clamp_min(torch.finfo(upper.dtype).tiny))
        coefficients = torch.zeros_like(heights).index_put((face,), parts)
        if upper - lower.clamp_min(0) <= slack or lower > best:
            break
        face, parts = torch.cat([face, lowest[None]]), torch.cat([parts, parts.new_zeros(1)])
    return lower.to(weight.device), upper.to(weight.device), coefficients.to(weight.device)


def _settle(points: Tensor, face: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
    """From a convex combination to the nearest point of a face that has it inside, dropping corners on the way."""
    size = torch.linalg.vector_norm(points[face], dim=1).max().clamp_min(torch.finfo(points.dtype).tiny)
    while True:
        system = torch.cat([points[face].T, size.expand(1, len(face))])
        wanted = torch.zeros(len(system), 1, dtype=points.dtype, device=points.device)
        wanted[-1] = size
        target = torch.linalg.lstsq(system, wanted, driver="gelsy").solution[:, 0]
        target = target / target.sum()
        outside = target <= SPECK
        if not outside.any():
            return face, target
        reach = torch.where(outside, parts / (parts - target).clamp_min(SPECK), torch.inf)
        parts = parts + reach.min() * (target - parts)
        kept = (parts > SPECK) & (torch.arange(len(parts), device=parts.device) != reach.argmin())
        if not kept.any():
            return face[:1], torch.ones_like(parts[:1])
        face, parts = face[kept], parts[kept] / parts[kept].sum()
