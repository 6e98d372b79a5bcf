"""Second pass: what needs the final class means (cosines, nearest centres, margins, NC1 without a d×d matrix)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ncreg.metrics._geometry import Geometry
from ncreg.metrics._moments import add_gram

_TINY = 1e-150  # the square of a shorter length leaves float64: its direction counts as none
_LARGEST_TABLE = 2**26  # entries of a C×C table that is kept; beyond, its rows are made as they are needed


class SecondPass(NamedTuple):
    """Sums of the second pass; views of one flat tensor, all of them additive over batches and shards.

    Per class: counts (C,), shift Σ(h − μ_y) (C, d), zero but for rounding, trace Σ‖h − μ_y‖² (C,), units Σu_i (C, d)
    with u_i the unit vector from the centre to the sample, and the number of samples whose nearest class mean is
    their own (nearest), whose logits choose their class (correct), whose two choices differ (disagree), all (C,).
    Over all classes: spread Σ(v_k·(h − μ_y))² along each basis vector, in the first r of (C,) entries.
    """

    counts: Tensor
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


class Rule:
    """A linear decision rule argmax_k (w_k·h + b_k), read off from a sample's deviation from its class mean.

    The lead of class k over the sample's own class y is (w_k − w_y)·(h − μ_y) plus the lead at the mean μ_y, which a
    table made in float64 holds: neither an offset of the features nor collapse costs digits.
    """

    def __init__(self, points: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        self.points, self.weight, self.bias, self.dtype = points, weight, bias, dtype
        self.weight_t = weight.T.to(dtype)
        every = torch.arange(len(points), device=points.device)
        self.table = self._leads(every) if len(points) ** 2 <= _LARGEST_TABLE else None

    def _leads(self, labels: Tensor) -> Tensor:
        value = torch.addmm(self.bias, self.points[labels], self.weight.T)
        own = value.gather(1, labels[:, None])
        return (value - own.masked_fill(own.isinf(), 0)).to(self.dtype)  # −inf: a class that cannot be chosen

    def decide(self, deviation: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Lead of the own class over the best other one (n,), and the class chosen (n,)."""
        if self.table is not None:
            leads = self.table[target]
        else:
            labels, place = target.unique(return_inverse=True)
            leads = self._leads(labels)[place]
        leads.addmm_(deviation, self.weight_t)
        own = leads.gather(1, target[:, None])
        best, rival = leads.scatter_(1, target[:, None], -torch.inf).max(1)
        margin = own[:, 0] - best
        return margin, torch.where((margin > 0) | ((margin == 0) & (target < rival)), target, rival)


class Frame:
    """The tables of one second pass, made once from the final means and the classifier.

    Deviations from the class means are taken in float64; the products with them run in the `dtype` asked for.
    """

    def __init__(
        self,
        shape: Geometry,
        centre: Tensor,
        classifier: tuple[Tensor, Tensor] | None,
        dtype: torch.dtype,
    ) -> None:
        self.shape, self.centre, self.asked = shape, centre, dtype
        # the squares of very small or large features do not fit into float32
        self.dtype = dtype = dtype if 1e-9 < float(shape.values.amax()) < 1e9 else torch.float64
        self.offset = shape.mean - centre
        self.basis = shape.basis.T.to(dtype)
        self.ones = torch.ones(1, 1, dtype=dtype, device=centre.device)
        # The nearest of the means is the largest of μ_c·h − ‖μ_c‖²/2, in coordinates of the span of the means: the
        # part of h outside of it is common to all distances.
        points = shape.centred @ shape.basis.T
        absent = ~shape.present
        half = (points.square().sum(1) / 2).masked_fill(absent, torch.inf)
        self.nearest = Rule(points, points, -half, dtype)
        # Samples less than half way to any other mean, in that span, need no comparison.
        self.safe = torch.zeros_like(half, dtype=dtype)
        if self.nearest.table is not None:
            leads = self.nearest.table.clone().fill_diagonal_(-torch.inf)
            self.safe = (-0.4999 * leads.amax(1)).sqrt().masked_fill_(absent, 0)
        self.classifier = None
        if classifier is not None:
            self.classifier = Rule(shape.mean, *classifier, dtype)
            self.weight_norm = classifier[0].square().sum(1).mean().sqrt()

    def add(
        self,
        sums: SecondPass,
        features: Tensor,
        target: Tensor,
        scatter: Tensor | None = None,
        *,
        shift: bool = True,
    ) -> Tensor | None:
        """Add a batch in place; the margins (n, 2), raw and normalised, come back where there is a classifier."""
        exact = features.dtype == torch.float64
        outward = features - self.centre if exact else features.to(torch.float64).sub_(self.centre)
        offset = self.offset[target]
        deviation = torch.sub(outward, offset, out=offset)
        outward *= torch.linalg.vector_norm(outward, dim=1, keepdim=True).clamp_min(_TINY).reciprocal()
        sums.counts.index_add_(0, target, torch.ones_like(target, dtype=torch.float64))
        sums.trace.index_add_(0, target, torch.linalg.vector_norm(deviation, dim=1).square())
        sums.units.index_add_(0, target, outward)
        if shift:
            sums.shift.index_add_(0, target, deviation)
        deviation = deviation.to(self.dtype)
        if scatter is not None:
            add_gram(scatter, deviation)
        nearest = self._nearest(sums, deviation @ self.basis, target)
        sums.nearest.index_add_(0, target, (nearest == target).double())
        if self.classifier is None:
            return None
        margin, chosen = self.classifier.decide(deviation, target)
        sums.correct.index_add_(0, target, (chosen == target).double())
        sums.disagree.index_add_(0, target, (chosen != nearest).double())
        norm = torch.linalg.vector_norm(features.to(self.dtype), dim=1) * self.weight_norm
        return torch.stack([margin.double(), margin / norm], dim=1)

    def _nearest(self, sums: SecondPass, inside: Tensor, target: Tensor) -> Tensor:
        """Nearest class mean of samples whose deviation has these coordinates (n, r) in the span of the means."""
        sums.spread[: inside.shape[1]] += (self.ones.expand(1, len(inside)) @ inside.square())[0]
        unsure = (torch.linalg.vector_norm(inside, dim=1) >= self.safe[target]).nonzero().squeeze(1)
        nearest = target.clone()
        nearest[unsure] = self.nearest.decide(inside[unsure], target[unsure])[1]
        return nearest
