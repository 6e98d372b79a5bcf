"""The statistics that the measures are computed from, over the states of all ranks; only sums and margins are sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ncreg.metrics import _first_pass
from ncreg.metrics._geometry import Geometry, class_geometry
from ncreg.metrics._second_pass import SecondPass, SecondPassTables, new_second, view_second
from ncreg.numerics import products_rounded

_BLOCK = 2**17  # entries of a block on a CPU: its float64 copies are to stay in the cache

Gather = Callable[[Tensor], list[Tensor]]


class Statistics(NamedTuple):
    """Over all samples: class geometry, within-class trace (C,) and scatter (d, d), second pass, margins (N, 2)."""

    geometry: Geometry
    trace: Tensor
    scatter: Tensor | None
    second: SecondPass | None
    margins: Tensor | None


def only_this_rank(tensor: Tensor) -> list[Tensor]:
    """The gather function of a single process."""
    return [tensor]


def sum_over_ranks(tensor: Tensor, gather: Gather) -> Tensor:
    """Sum over ranks."""
    return torch.stack(gather(tensor)).sum(0)


def blocks(features: Sequence[Tensor], target: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut long batches and join short ones: a block's float64 copies are to stay in a CPU's cache, or fill a GPU."""
    first = 0
    while first < len(features):
        rows, dim = features[first].shape
        size = max(128, (_BLOCK if features[first].device.type == "cpu" else 2**25) // dim)
        last = first + 1
        while last < len(features) and rows + len(features[last]) <= size:
            rows, last = rows + len(features[last]), last + 1
        joined = [torch.cat(list(part[first:last])) if last > first + 1 else part[first] for part in (features, target)]
        yield from zip(*(part.split(size) for part in joined), strict=True)
        first = last


def product_dtype(features: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the second pass's matrix products: float32, but float64 for such features or where TF32 rounds."""
    wide = any(rows.dtype == torch.float64 for rows in features) or products_rounded()
    return torch.float64 if wide else torch.float32


def geometry_of(packed: Tensor) -> Geometry:
    """Class geometry from counts and means side by side (C, 1 + d).

    Raises:
        ValueError: all counts are zero.
    """
    if not packed[:, 0].any():
        raise ValueError("no samples seen: call update(features, target) before compute()")
    return class_geometry(packed[:, 0], packed[:, 1:])


def cached_geometry(
    features: Sequence[Tensor],
    target: Sequence[Tensor],
    num_classes: int,
    dim: int,
    device: torch.device,
    gather: Gather,
) -> Geometry:
    """First pass over cached features."""
    count = torch.zeros(num_classes, dtype=torch.float64, device=device)
    total = torch.zeros(num_classes, dim, dtype=torch.float64, device=device)
    for rows, labels in blocks(features, target):
        count += torch.bincount(labels, minlength=num_classes)
        total.index_add_(0, labels, rows.double())
    packed = sum_over_ranks(torch.cat([count[:, None], total], dim=1), gather)
    packed[:, 1:] /= packed[:, :1].clamp_min(1)
    return geometry_of(packed)


def cached_statistics(
    features: Sequence[Tensor], target: Sequence[Tensor], tables: SecondPassTables, gather: Gather, *, scatter: bool
) -> Statistics:
    """Second pass over cached features."""
    geometry = tables.geometry
    classes, dim = geometry.mean.shape
    flat = new_second(classes, dim, geometry.mean.device)
    sums = view_second(flat, classes, dim)
    sums = sums._replace(shift=sums.shift[:0])
    gram = geometry.mean.new_zeros(dim, dim) if scatter else None
    margins = tables.add(sums, blocks(features, target), gram)
    second = view_second(sum_over_ranks(flat, gather), classes, dim)
    gram = _first_pass.symmetric(sum_over_ranks(gram, gather)) if gram is not None else None
    decided = None if tables.classifier is None else _all_margins([margins], geometry.mean, gather)
    return Statistics(geometry, second.trace, gram, second, decided)


def merged_moments(flat: Tensor, num_classes: int, dim: int, gather: Gather) -> _first_pass.Moments:
    """First pass, streamed: central moments of all ranks."""
    return _first_pass.view(_first_pass.merge(torch.stack(gather(flat)), num_classes, dim), num_classes, dim)


def pack(moments: _first_pass.Moments) -> Tensor:
    """Counts and means side by side, (C, 1 + d), of central moments."""
    return torch.cat([moments.counts[:, None], moments.anchor], dim=1)


def streamed_statistics(
    flat: Tensor,
    second: Sequence[Tensor],
    margins: Sequence[Tensor],
    num_classes: int,
    dim: int,
    gather: Gather,
    *,
    decides: bool,
) -> Statistics:
    """Statistics of a stream after one pass or two.

    Raises:
        ValueError: no samples, or a second pass over other samples than the first.
    """
    moments = merged_moments(flat, num_classes, dim, gather)
    geometry = geometry_of(pack(moments))
    scatter = _first_pass.symmetric(moments.scatter) if moments.scatter.numel() else None
    if not second:
        return Statistics(geometry, moments.trace, scatter, None, None)
    sums = view_second(sum_over_ranks(torch.stack(list(second)).sum(0), gather), num_classes, dim)
    _check_same_samples(geometry, moments, sums)
    decided = _all_margins(margins, geometry.mean, gather) if decides else None
    return Statistics(geometry, moments.trace, scatter, sums, decided)


def same_pass(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether two metrics are both in the first pass, or in the second around the same class means."""
    if mine and theirs:
        return torch.equal(mine[0], theirs[0])
    return not mine and not theirs


def _all_margins(margins: Sequence[Tensor | None], like: Tensor, gather: Gather) -> Tensor:
    own = [like.new_empty(0, 2), *(margin for margin in margins if margin is not None)]
    return torch.cat(gather(torch.cat(own)))


def _check_same_samples(geometry: Geometry, moments: _first_pass.Moments, sums: SecondPass) -> None:
    """The second pass's class means must be the first's, but for the rounding of a repeated forward pass."""
    if not torch.equal(sums.counts, geometry.counts):
        raise ValueError(
            f"the second pass saw {int(sums.counts.sum())} samples and the first {int(geometry.counts.sum())}, "
            "or other labels: feed the same samples in both, and call reset() or passes() before new ones"
        )
    moved = (sums.shift.square().sum(1) / geometry.counts.clamp_min(1)).sum()
    rounding = torch.finfo(torch.float32).eps ** 2 * geometry.mean.square().sum()
    if moved > 1e-6 * moments.trace.sum() + 100 * rounding:
        raise ValueError(
            "the second pass's features are not those of the first, their class means differ: feed the same samples "
            "in eval mode, without augmentation or dropout, and leave the model as it is between the passes"
        )
