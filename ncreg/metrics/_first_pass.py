"""First pass as a stream: counts, class means and within-class scatter in float64, around an anchor per class."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Sums over the samples seen, around one anchor a_c per class; views of one flat tensor, which merges as a whole.

    counts n_c (C,), trace Σ‖h − a_c‖² per class (C,), anchor a_c (C, d), shift Σ(h − a_c) per class (C, d), scatter
    Σ(h − a_y)(h − a_y)ᵀ over all classes (d, d), upper triangle only, or (0, 0) where it isn't kept.
    """

    counts: Tensor
    trace: Tensor
    anchor: Tensor
    shift: Tensor
    scatter: Tensor


def new(num_classes: int, dim: int, *, scatter: bool, device: torch.device) -> Tensor:
    """A flat tensor of zero moments."""
    size = 2 * num_classes * (1 + dim) + (dim * dim if scatter else 0)
    return torch.zeros(size, dtype=torch.float64, device=device)


def view(flat: Tensor, num_classes: int, dim: int) -> Moments:
    """The moments as views of `flat`: writing to one writes to the other."""
    wide = num_classes * dim
    sizes = [num_classes, num_classes, wide, wide, flat.numel() - 2 * (num_classes + wide)]
    count, trace, anchor, shift, scatter = flat.split(sizes)
    side = dim if scatter.numel() else 0
    return Moments(count, trace, anchor.view(-1, dim), shift.view(-1, dim), scatter.view(side, side))


def add(moments: Moments, features: Tensor, target: Tensor) -> None:
    """Add float64 features (n, d) in place; a class met for the first time is anchored at its mean in this batch."""
    unseen = moments.counts[target] == 0
    if unseen.any():
        fresh, place, size = target[unseen].unique(return_inverse=True, return_counts=True)
        total = features.new_zeros(len(fresh), features.shape[1]).index_add_(0, place, features[unseen])
        moments.anchor.index_copy_(0, fresh, total / size[:, None])
    deviation = features - moments.anchor[target]
    moments.counts.index_add_(0, target, torch.ones_like(target, dtype=torch.float64))
    moments.trace.index_add_(0, target, torch.linalg.vector_norm(deviation, dim=1).square())
    moments.shift.index_add_(0, target, deviation)
    if moments.scatter.numel():
        add_gram(moments.scatter, deviation)


def add_gram(gram: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ rows to a float64 matrix in place, upper block triangle only: five eighths of the work."""
    width = -(-rows.shape[1] // 4)
    for start in range(0, rows.shape[1], width):
        upper, left, right = gram[start : start + width, start:], rows[:, start : start + width].T, rows[:, start:]
        if rows.dtype == gram.dtype:
            upper.addmm_(left, right)
        else:
            upper += left @ right


def symmetric(upper: Tensor) -> Tensor:
    """The symmetric matrix with this upper triangle."""
    upper = upper.triu()
    return upper + upper.triu(1).T


def central(moments: Moments) -> Moments:
    """The same moments around the class means: anchors are the means, shifts zero."""
    offset = moments.shift / moments.counts.clamp_min(1)[:, None]
    weighted = offset * moments.counts.sqrt()[:, None]
    scatter = moments.scatter
    return Moments(
        counts=moments.counts,
        trace=(moments.trace - weighted.square().sum(1)).clamp_min(0),
        anchor=moments.anchor + offset,
        shift=torch.zeros_like(moments.shift),
        scatter=scatter - weighted.T @ weighted if scatter.numel() else scatter,
    )


def merge(stacked: Tensor, num_classes: int, dim: int) -> Tensor:
    """Moments of all shards together, from the shards' own stacked in the first dimension (Chan et al. 1983)."""
    total = central(view(stacked[0], num_classes, dim))
    for flat in stacked[1:]:
        other = central(view(flat, num_classes, dim))
        count = total.counts + other.counts
        fraction = (other.counts / count.clamp_min(1))[:, None]
        delta = other.anchor - total.anchor
        weighted = delta * (total.counts[:, None] * fraction).sqrt()
        scatter = total.scatter + other.scatter
        total = Moments(
            counts=count,
            trace=total.trace + other.trace + weighted.square().sum(1),
            anchor=total.anchor + delta * fraction,
            shift=total.shift,
            scatter=scatter + weighted.T @ weighted if scatter.numel() else scatter,
        )
    return torch.cat([part.reshape(-1) for part in total])
