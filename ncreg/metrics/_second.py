"""Second pass: what needs the final class means (cosines, nearest centres, margins, NC1 without a d×d matrix)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_LARGEST_TILE = 2**24  # entries of a temporary that is quadratic in the number of classes


class Geometry(NamedTuple):
    """Class means and what follows from them, float64: the fixed frame of the second pass.

    count (C,), mean (C, d), present (C,) bool, global_mean (d,): the unweighted mean of the present class means,
    basis (r, d): orthonormal rows that span the centred means within their numerical rank, values: all singular
    values of the present centred means, coordinates (C, r): the centred means in that basis.
    """

    count: Tensor
    mean: Tensor
    present: Tensor
    global_mean: Tensor
    basis: Tensor
    values: Tensor
    coordinates: Tensor

    @property
    def centred(self) -> Tensor:
        """Class means minus the global mean (C, d); zero for absent classes."""
        return (self.mean - self.global_mean) * self.present[:, None]


def geometry(count: Tensor, mean: Tensor) -> Geometry:
    """Centre the present class means and find the span that their between-class covariance really has."""
    present = count > 0
    global_mean = mean[present].mean(0)
    centred = (mean - global_mean) * present[:, None]
    left, values, right = torch.linalg.svd(centred[present], full_matrices=False)
    # the numerical rank of Σ_B, whose eigenvalues are the squares of these singular values
    floor = values.square().amax() * max(centred.shape) * torch.finfo(torch.float64).eps
    rank = int((values.square() > floor).sum())
    coordinates = centred.new_zeros(len(count), rank)
    coordinates[present] = left[:, :rank] * values[:rank]
    return Geometry(count, mean, present, global_mean, right[:rank], values, coordinates)


def squared_distances(points: Tensor) -> Tensor:
    """‖p_i − p_j‖² for all pairs of rows, (C, C); pairs far closer than their distance to zero are redone exactly."""
    norms = points.square().sum(1)
    scale = norms[:, None] + norms
    squared = (scale - 2 * points @ points.T).clamp_min(0)
    near = (squared < 1e-4 * scale).triu(1).nonzero()
    for pair in near.split(max(1, _LARGEST_TILE // points.shape[1])):
        first, second = pair.unbind(1)
        exact = (points[first] - points[second]).square().sum(1)
        squared[first, second] = exact
        squared[second, first] = exact
    return squared.fill_diagonal_(0)


class SecondPass(NamedTuple):
    """Sums of the second pass; all of them add up over batches and shards.

    count (C,), shift Σ(h − μ_y) per class (C, d): must come out near zero, units Σu_i per class (C, d) with u_i the
    unit vector from the centre to the sample, spread Σ(v_k·(h − μ_y))² for every basis vector (C,), and per class
    the number of samples whose nearest centre is their own (nearest), whose classifier's choice is their own
    (correct), and for which the two choices differ (disagree).
    """

    count: Tensor
    shift: Tensor
    units: Tensor
    spread: Tensor
    nearest: Tensor
    correct: Tensor
    disagree: Tensor


def view_second(flat: Tensor, num_classes: int, dim: int) -> SecondPass:
    """The sums as views of one flat tensor."""
    sizes = [num_classes, num_classes * dim, num_classes * dim] + [num_classes] * 4
    count, shift, units, *rest = flat.split(sizes)
    return SecondPass(count, shift.view(-1, dim), units.view(-1, dim), *rest)


def new_second(num_classes: int, dim: int, device: torch.device) -> Tensor:
    """A flat tensor of zero sums."""
    return torch.zeros(num_classes * (5 + 2 * dim), dtype=torch.float64, device=device)


class Frame:
    """The tables one second pass needs, made once from the final means and the classifier.

    Deviations from the class means are exact in float64; the products with them run in float32 unless the features
    are float64, and are relative to the deviation's own length, so that offset and collapse cost no digits.
    """

    def __init__(self, shape: Geometry, centre: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        self.shape, self.centre = shape, centre
        self.offset = shape.mean - centre
        self.distance = squared_distances(shape.coordinates)
        self.distance[:, ~shape.present] = torch.inf
        off_diagonal = self.distance.clone().fill_diagonal_(torch.inf)
        self.safe = off_diagonal.amin(1) / 4  # ‖h − μ_y‖ below half the way to the nearest other mean
        self.weight = weight
        if weight is not None and bias is not None:
            self.table = shape.mean @ weight.T + bias
            self.norm = weight.square().sum(1).mean().sqrt()

    def add(self, sums: SecondPass, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor] | None:
        """Add a batch in place; returns the margins (n, 2), raw and normalised, where there is a classifier."""
        exact = features.to(torch.float64)
        outward = exact - self.centre
        deviation = outward - self.offset[target]
        outward /= outward.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        sums.count.index_add_(0, target, torch.ones_like(target, dtype=torch.float64))
        sums.shift.index_add_(0, target, deviation)
        sums.units.index_add_(0, target, outward)
        low = deviation if features.dtype == torch.float64 else deviation.float()
        nearest = self._nearest(sums, low, target)
        sums.nearest.index_add_(0, target, (nearest == target).double())
        if self.weight is None:
            return None
        logits = (low @ self.weight.T.to(low.dtype)).double() + self.table[target]
        chosen = logits.argmax(1)
        sums.correct.index_add_(0, target, (chosen == target).double())
        sums.disagree.index_add_(0, target, (chosen != nearest).double())
        own = logits.gather(1, target[:, None])
        margin = own.squeeze(1) - logits.scatter(1, target[:, None], -torch.inf).amax(1)
        return torch.stack([margin, margin / (exact.norm(dim=1) * self.norm)], dim=1)

    def _nearest(self, sums: SecondPass, low: Tensor, target: Tensor) -> Tensor:
        """Nearest class mean, from coordinates in the span of the means: the rest is common to all distances."""
        inside = (low @ self.shape.basis.T.to(low.dtype)).double()
        sums.spread[: inside.shape[1]] += inside.square().sum(0)
        nearest = target.clone()
        unsure = (inside.square().sum(1) >= self.safe[target]).nonzero().squeeze(1)
        if len(unsure):
            own = target[unsure]
            score = self.distance[own] - 2 * inside[unsure] @ self.shape.coordinates.T
            nearest[unsure] = score.argmin(1)
        return nearest
