"""Second pass: what needs the final class means (cosines, nearest centres, margins, NC1 without a d×d matrix)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._geometry import Geometry, tiles
from ._moments import add_gram

_LARGEST_TABLE = 2**26  # entries of a C×C table that is kept; beyond, its rows are made as they are needed


class SecondPass(NamedTuple):
    """Sums of the second pass; views of one flat tensor, all of them additive over batches and shards.

    Per class: count (C,), shift Σ(h − μ_y) (C, d), zero but for rounding, trace Σ‖h − μ_y‖² (C,), units Σu_i (C, d)
    with u_i the unit vector from the centre to the sample, and the number of samples whose nearest class mean is
    their own (nearest), whose logits choose their class (correct), whose two choices differ (disagree), all (C,).
    Over all classes: spread Σ(v_k·(h − μ_y))² along each basis vector, in the first r of (C,) entries.
    """

    count: Tensor
    trace: Tensor
    shift: Tensor
    units: Tensor
    nearest: Tensor
    correct: Tensor
    disagree: Tensor
    spread: Tensor


def new_second(num_classes: int, dim: int, device: torch.device) -> Tensor:
    """A flat tensor of zero sums."""
    return torch.zeros(num_classes * (6 + 2 * dim), dtype=torch.float64, device=device)


def view_second(flat: Tensor, num_classes: int, dim: int) -> SecondPass:
    """The sums as views of `flat`."""
    wide = num_classes * dim
    count, trace, shift, units, *rest = flat.split([num_classes, num_classes, wide, wide] + [num_classes] * 4)
    return SecondPass(count, trace, shift.view(-1, dim), units.view(-1, dim), *rest)


class Frame:
    """The tables of one second pass, made once from the final means and the classifier.

    Deviations from the class means are taken in float64. The products with them run in `dtype`, and their error is
    relative to the deviation's own length: neither an offset nor collapse costs digits.
    """

    def __init__(
        self,
        shape: Geometry,
        centre: Tensor,
        classifier: tuple[Tensor, Tensor] | None,
        dtype: torch.dtype,
    ) -> None:
        self.shape, self.centre, self.dtype = shape, centre, dtype
        self.offset = shape.mean - centre
        self.basis = shape.basis.T.to(dtype)
        self.coordinates = shape.centred @ shape.basis.T
        self.absent = ~shape.present
        self.safe = self._half_way()
        self.classifier, self.table = classifier, None
        if classifier is not None:
            self.weight = classifier[0].T.to(dtype)
            self.weight_norm = classifier[0].square().sum(1).mean().sqrt()
            if len(shape.mean) ** 2 <= _LARGEST_TABLE:
                self.table = self._leads(torch.arange(len(shape.mean), device=centre.device))

    def add(self, sums: SecondPass, features: Tensor, target: Tensor, scatter: Tensor | None = None) -> Tensor | None:
        """Add a batch in place; the margins (n, 2), raw and normalised, come back where there is a classifier."""
        outward = features.to(torch.float64).sub(self.centre)
        offset = self.offset[target]
        deviation = torch.sub(outward, offset, out=offset)
        length = torch.linalg.vector_norm(outward, dim=1, keepdim=True)
        outward /= length.clamp_min(torch.finfo(torch.float64).tiny)
        sums.count.index_add_(0, target, torch.ones_like(length[:, 0]))
        sums.trace.index_add_(0, target, torch.linalg.vector_norm(deviation, dim=1).square())
        sums.shift.index_add_(0, target, deviation)
        sums.units.index_add_(0, target, outward)
        if scatter is not None:
            add_gram(scatter, deviation)
        deviation = deviation.to(self.dtype)
        nearest = self._nearest(sums, deviation, target)
        sums.nearest.index_add_(0, target, (nearest == target).double())
        if self.classifier is None:
            return None
        margin, chosen = self._decide(deviation, target)
        sums.correct.index_add_(0, target, (chosen == target).double())
        sums.disagree.index_add_(0, target, (chosen != nearest).double())
        norm = torch.linalg.vector_norm(features.to(self.dtype), dim=1) * self.weight_norm
        return torch.stack([margin, margin / norm], dim=1)

    def _half_way(self) -> Tensor:
        """Per class the square of half the way to the nearest other mean: samples closer need no comparison."""
        points = self.coordinates[~self.absent]
        norms = points.square().sum(1)
        safe = self.coordinates.new_zeros(len(self.absent))
        nearest = []
        for tile in tiles(len(points)):
            squared = norms[tile, None] + norms - 2 * points[tile] @ points.T
            own = torch.arange(tile.start, tile.stop, device=points.device)
            squared[own - tile.start, own] = torch.inf
            nearest.append(squared.amin(1) / 4)
        safe[~self.absent] = torch.cat(nearest)
        return safe

    def _nearest(self, sums: SecondPass, deviation: Tensor, target: Tensor) -> Tensor:
        """Nearest class mean, from coordinates in the span of the means: the rest is common to all distances."""
        inside = deviation @ self.basis
        squared = inside.square()
        sums.spread[: inside.shape[1]] += squared.sum(0, dtype=torch.float64)
        nearest = target.clone()
        unsure = (squared.sum(1) >= 0.999 * self.safe[target]).nonzero().squeeze(1)
        if len(unsure):
            points = inside[unsure].double() + self.coordinates[target[unsure]]
            score = self.coordinates.square().sum(1) - 2 * points @ self.coordinates.T
            nearest[unsure] = score.masked_fill_(self.absent, torch.inf).argmin(1)
        return nearest

    def _leads(self, labels: Tensor) -> Tensor:
        """z_k − z_y of the class means themselves (n, C): how far each logit is ahead at the mean of class y."""
        assert self.classifier is not None
        weight, bias = self.classifier
        logits = self.shape.mean[labels] @ weight.T + bias
        return (logits - logits.gather(1, labels[:, None])).to(self.dtype)

    def _decide(self, deviation: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Margin z_y − max_{k≠y} z_k (n,) and the class of the largest logit (n,)."""
        if self.table is not None:
            leads = self.table[target]
        else:
            labels, place = target.unique(return_inverse=True)
            leads = self._leads(labels)[place]
        leads.addmm_(deviation, self.weight)
        own = leads.gather(1, target[:, None])
        best, rival = leads.scatter_(1, target[:, None], -torch.inf).max(1)
        margin = own[:, 0] - best
        chosen = torch.where((margin > 0) | ((margin == 0) & (target < rival)), target, rival)
        return margin.double(), chosen
