"""First pass: counts, class means and within-class scatter, in float64 around an anchor per class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Sums over the samples seen, around one anchor per class; views of one flat tensor, so that they merge together.

    count n_c (C,), trace Σ‖h − a_c‖² per class (C,), anchor a_c (C, d), shift Σ(h − a_c) per class (C, d),
    scatter Σ(h − a_y)(h − a_y)ᵀ over all classes (d, d), or (0, 0) where it isn't kept.
    """

    count: Tensor
    trace: Tensor
    anchor: Tensor
    shift: Tensor
    scatter: Tensor

    @property
    def mean(self) -> Tensor:
        """Class means (C, d); zero for a class without samples."""
        return self.anchor + self.shift / self.count.clamp_min(1)[:, None]


def numel(num_classes: int, dim: int, scatter: bool) -> int:
    """Length of the flat tensor that holds the moments."""
    return 2 * num_classes * (1 + dim) + (dim * dim if scatter else 0)


def view(flat: Tensor, num_classes: int, dim: int) -> Moments:
    """The moments as views of `flat`: writing to one writes to the other."""
    small, wide = num_classes, num_classes * dim
    count, trace, anchor, shift, scatter = flat.split([small, small, wide, wide, flat.numel() - 2 * (small + wide)])
    side = dim if scatter.numel() else 0
    return Moments(count, trace, anchor.view(-1, dim), shift.view(-1, dim), scatter.view(side, side))


def new(num_classes: int, dim: int, *, scatter: bool, device: torch.device) -> Tensor:
    """A flat tensor of zero moments."""
    return torch.zeros(numel(num_classes, dim, scatter), dtype=torch.float64, device=device)


def blocks(features: Tensor, target: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a batch into pieces whose float64 copies stay in the processor's cache."""
    yield from zip(features.split(rows), target.split(rows), strict=True)


def add(moments: Moments, deviation: Tensor, target: Tensor) -> None:
    """Add samples, given as float64 deviations h − a_y from their class's anchor (n, d), in place."""
    moments.shift.index_add_(0, target, deviation)
    moments.trace.index_add_(0, target, deviation.square().sum(1))
    moments.count.index_add_(0, target, torch.ones_like(target, dtype=torch.float64))
    if moments.scatter.numel():
        add_gram(moments.scatter, deviation)


def add_gram(gram: Tensor, rows: Tensor, *, tiles: int = 4) -> None:
    """gram += rowsᵀ rows in place, for the upper block triangle only; `fill_lower` mirrors it at the end."""
    width = -(-rows.shape[1] // tiles)
    for start in range(0, rows.shape[1], width):
        stop = start + width
        gram[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])


def fill_lower(gram: Tensor) -> Tensor:
    """The symmetric matrix whose upper triangle is given."""
    upper = gram.triu()
    return upper + upper.triu(1).T


def anchored(moments: Moments, features: Tensor, target: Tensor) -> Tensor:
    """Deviations from the anchors; classes without samples so far are anchored at their mean in this batch."""
    unseen = moments.count[target] == 0
    if unseen.any():
        fresh, labels = features[unseen], target[unseen]
        size = torch.bincount(labels, minlength=len(moments.count))
        total = torch.zeros_like(moments.anchor).index_add_(0, labels, fresh)
        moments.anchor[size > 0] = (total / size.clamp_min(1)[:, None])[size > 0]
    return features - moments.anchor[target]


def centred(moments: Moments) -> Moments:
    """The same moments around the class means: shift is zero, trace and scatter are central."""
    offset = moments.shift / moments.count.clamp_min(1)[:, None]
    weighted = offset * moments.count.sqrt()[:, None]
    scatter = moments.scatter
    if scatter.numel():
        scatter = fill_lower(scatter)
        scatter = scatter - weighted.T @ weighted
    return Moments(
        count=moments.count,
        trace=(moments.trace - weighted.square().sum(1)).clamp_min(0),
        anchor=moments.anchor + offset,
        shift=torch.zeros_like(moments.shift),
        scatter=scatter,
    )


def merge(stacked: Tensor, num_classes: int, dim: int) -> Tensor:
    """Moments of all shards together from the shards' own, stacked in the first dimension (Chan's formula)."""
    total = centred(view(stacked[0], num_classes, dim))
    for flat in stacked[1:]:
        other = centred(view(flat, num_classes, dim))
        count = total.count + other.count
        share = (other.count / count.clamp_min(1))[:, None]
        delta = other.anchor - total.anchor
        weighted = delta * (total.count[:, None] * share).sqrt()
        total = Moments(
            count=count,
            trace=total.trace + other.trace + weighted.square().sum(1),
            anchor=torch.where(total.count[:, None] > 0, total.anchor + delta * share, other.anchor),
            shift=total.shift,
            scatter=total.scatter + other.scatter + (weighted.T @ weighted if total.scatter.numel() else 0),
        )
    return torch.cat([part.reshape(-1) for part in total])
