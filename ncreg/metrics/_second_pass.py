"""Second pass: sums that need the final class means (cosines, nearest centres, margins, NC1 without a d×d matrix)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ncreg.metrics._first_pass import add_gram
from ncreg.metrics._geometry import Geometry

_TINY = 1e-150  # the square of a shorter length leaves float64: its direction counts as none
_LARGEST_TABLE = 2**26  # entries of a C×C table that is kept; beyond, its rows are made as they are needed
_ROWS = 512  # of such a table at a time: they are made in float64


class SecondPass(NamedTuple):
    """Sums of the second pass; views of one flat tensor, all of them additive over batches and shards.

    Per class: tally (C, 5) of counts, trace Σ‖h − μ_y‖², and the number of samples whose nearest class mean is their
    own (nearest), whose logits choose their class (correct), whose two choices differ (disagree); shift Σ(h − μ_y)
    (C, d), zero but for rounding; units Σu_i (C, d) with u_i the unit vector from the centre to the sample; either of
    the two is (0, d) where it isn't wanted.
    Over all classes: spread Σ(v_k·(h − μ_y))² along each basis vector, in the first r of (C,) entries.
    """

    tally: Tensor
    spread: Tensor
    shift: Tensor
    units: Tensor

    @property
    def counts(self) -> Tensor:
        """Samples per class (C,)."""
        return self.tally[:, 0]

    @property
    def trace(self) -> Tensor:
        """Σ‖h − μ_y‖² per class (C,)."""
        return self.tally[:, 1]

    @property
    def nearest(self) -> Tensor:
        """Samples per class whose nearest class mean is their own (C,)."""
        return self.tally[:, 2]

    @property
    def correct(self) -> Tensor:
        """Samples per class whose logits choose their class (C,)."""
        return self.tally[:, 3]

    @property
    def disagree(self) -> Tensor:
        """Samples per class for which classifier and nearest class mean predict different classes (C,)."""
        return self.tally[:, 4]


def new_second(num_classes: int, dim: int, device: torch.device) -> Tensor:
    """A flat tensor of zero sums."""
    return torch.zeros(num_classes * (6 + 2 * dim), dtype=torch.float64, device=device)


def decisions_alone(num_classes: int, dim: int, device: torch.device) -> SecondPass:
    """Zero sums without those of vectors, for what was decided alone."""
    sums = torch.zeros(num_classes, 6, dtype=torch.float64, device=device)
    return SecondPass(sums[:, :5], sums[:, 5], sums.new_zeros(0, dim), sums.new_zeros(0, dim))


def view_second(flat: Tensor, num_classes: int, dim: int) -> SecondPass:
    """The sums as views of `flat`."""
    wide = num_classes * dim
    tally, spread, shift, units = flat.split([5 * num_classes, num_classes, wide, wide])
    return SecondPass(tally.view(-1, 5), spread, shift.view(-1, dim), units.view(-1, dim))


class LinearRule:
    """A linear decision rule argmax_k (w_k·h + b_k), evaluated from a sample's deviation from its class mean.

    The lead of class k over the sample's own class y is (w_k − w_y)·(h − μ_y) plus the lead at the mean μ_y, which a
    table made in float64 holds: neither an offset of the features nor collapse costs digits.
    """

    def __init__(self, points: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        self.points, self.weight, self.bias, self.dtype = points, weight, bias, dtype
        self.weight_t = weight.T.to(dtype)
        self.table = None
        if len(points) ** 2 <= _LARGEST_TABLE:
            self.table = points.new_empty(len(points), len(weight), dtype=dtype)
            for rows in torch.arange(len(points), device=points.device).split(_ROWS):
                self.table[rows] = self._leads(rows)

    def _leads(self, labels: Tensor) -> Tensor:
        value = torch.addmm(self.bias, self.points[labels], self.weight.T)
        own = value.gather(1, labels[:, None])
        return (value - own.masked_fill(own.isinf(), 0)).to(self.dtype)  # −inf: a class that cannot be chosen

    def decide(self, leads: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Lead of the own class over the best other one (n,), and the class chosen (n,).

        `leads` (n, C) comes as w_k·(h − μ_y) and is overwritten.
        """
        if self.table is not None:
            leads += self.table.index_select(0, target)
        else:
            labels, place = target.unique(return_inverse=True)
            leads += self._leads(labels).index_select(0, place)
        own = leads.gather(1, target[:, None])
        margin = own[:, 0] - leads.scatter_(1, target[:, None], -torch.inf).amax(1)
        chosen, lost = target, (margin <= 0).nonzero().squeeze(1)
        if len(lost):
            label, rival = target[lost], leads[lost].argmax(1)
            tied = (margin[lost] == 0) & (label < rival)  # argmax over all classes would find the own one first
            chosen = target.index_copy(0, lost, torch.where(tied, label, rival))
        return margin, chosen


class SecondPassTables:
    """Means, basis vectors and decision rules that a second pass compares every sample with, made once.

    Deviations from the class means and the products with them are taken in `dtype`, under autocast too, unit vectors in
    float64: these stay apart from 1 by less than float32 holds.
    """

    def __init__(
        self,
        geometry: Geometry,
        centre: Tensor,
        classifier: tuple[Tensor, Tensor] | None,
        dtype: torch.dtype,
    ) -> None:
        self.geometry, self.centre, self.requested_dtype = geometry, centre, dtype
        # the squares of very small or large features do not fit into float32
        self.dtype = dtype = dtype if 1e-9 < float(geometry.values.amax()) < 1e9 else torch.float64
        # Rounded means, and what rounding took from them: a float32 difference to both is right to its last digit.
        self.means = [geometry.mean.to(dtype)]
        if dtype != torch.float64:
            self.means.append((geometry.mean - self.means[0]).to(dtype))
        vectors = [geometry.basis] if classifier is None else [geometry.basis, classifier[0]]
        self.vectors = torch.cat(vectors).T.to(dtype).contiguous()
        # The nearest of the means is the largest of μ_c·h − ‖μ_c‖²/2, in coordinates of the span of the means: the
        # part of h outside of it is common to all distances.
        points = geometry.centred @ geometry.basis.T
        absent = ~geometry.present
        half = (points.square().sum(1) / 2).masked_fill(absent, torch.inf)
        self.nearest = LinearRule(points, points, -half, dtype)
        # Samples less than half way to any other mean, in that span, need no comparison: the squared lengths.
        self.safe = torch.zeros_like(half, dtype=dtype)
        if self.nearest.table is not None:
            leads = self.nearest.table.clone().fill_diagonal_(-torch.inf)
            self.safe = (-0.4999 * leads.amax(1)).masked_fill_(absent, 0)
        self.classifier = None
        if classifier is not None:
            self.classifier = LinearRule(geometry.mean, *classifier, dtype)
            self.weight_norm = classifier[0].square().sum(1).mean().sqrt()

    def add(
        self,
        sums: SecondPass,
        blocks: Iterable[tuple[Tensor, Tensor]],
        scatter: Tensor | None = None,
    ) -> Tensor | None:
        """Add features with their labels in place; the margins (n, 2), raw and normalised, where there are any."""
        with torch.autocast(sums.tally.device.type, enabled=False):  # a loop over data is often under it as a whole
            seen = [self._compare(sums, features, target, scatter) for features, target in blocks]
        if not seen:
            return None
        target, distance, nearest, *decided = (torch.cat(part) for part in zip(*seen, strict=True))
        found, margins = [torch.ones_like(distance), distance.square(), nearest == target], None
        if decided:
            margin, chosen, length = decided
            found += [chosen == target, chosen != nearest]
            # a feature of length 0 has no direction, and its margin is rounding over 0
            scaled = torch.where(length > 0, margin / (length * self.weight_norm), 0)
            margins = torch.stack([margin, scaled], dim=1)
        sums.tally[:, : len(found)].index_add_(0, target, torch.stack(found, dim=1))
        return margins

    def _compare(
        self, sums: SecondPass, features: Tensor, target: Tensor, scatter: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Of each sample: label, distance to its mean, nearest class; margin, class chosen and length if decided."""
        rows = features.to(self.dtype)
        deviation = self._deviation(rows, target)
        if sums.units.numel():
            self._add_units(sums.units, rows, target)
        if sums.shift.numel():
            sums.shift.index_add_(0, target, deviation.double())
        if scatter is not None:
            add_gram(scatter, deviation)
        inside, leads = (deviation @ self.vectors).tensor_split([len(self.geometry.basis)], dim=1)
        squares = inside.square()
        sums.spread[: inside.shape[1]] += squares.sum(0)
        nearest = self._nearest(inside, squares.sum(1), target)
        distance = torch.linalg.vector_norm(deviation, dim=1).double()
        if self.classifier is None:
            return target, distance, nearest
        margin, chosen = self.classifier.decide(leads, target)
        return target, distance, nearest, margin.double(), chosen, torch.linalg.vector_norm(rows, dim=1).double()

    def _deviation(self, rows: Tensor, target: Tensor) -> Tensor:
        """Differences to the own class means."""
        mean, *rest = self.means
        own = mean.index_select(0, target)
        deviation = torch.sub(rows, own, out=own)
        for part in rest:
            deviation -= part.index_select(0, target)
        return deviation

    def _add_units(self, units: Tensor, rows: Tensor, target: Tensor) -> None:
        exact = rows.dtype == torch.float64
        outward = rows - self.centre if exact else rows.to(torch.float64).sub_(self.centre)
        outward *= torch.linalg.vector_norm(outward, dim=1, keepdim=True).clamp_min(_TINY).reciprocal()
        units.index_add_(0, target, outward)

    def _nearest(self, inside: Tensor, squared: Tensor, target: Tensor) -> Tensor:
        """Nearest class mean of samples whose deviation has these coordinates (n, r) in the span of the means."""
        unsure = (squared >= self.safe.index_select(0, target)).nonzero().squeeze(1)
        if not len(unsure):
            return target
        label = target[unsure]
        return target.index_copy(0, unsure, self.nearest.decide(inside[unsure] @ self.nearest.weight_t, label)[1])
