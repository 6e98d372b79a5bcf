"""Exact cross-entropy of a head whose classes are divided over ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ncreg._transforms import fx_leaf
from ncreg.distributed import gather_batch, world_size
from ncreg.losses._class_sums import ClassSums, class_sums
from ncreg.losses._factors import classes_of, kind_of
from ncreg.losses._inputs import (
    ClassWeight,
    Features,
    GatheredLosses,
    Labels,
    Reduction,
    check_rows,
)
from ncreg.losses.chunked import ChunkedCrossEntropyLoss, chunked_max, cross_entropy_of


def sharded_cross_entropy(
    features: Features,
    head: nn.Module,
    target: Labels,
    *,
    class_weight: ClassWeight | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    chunk: int | None = None,
) -> GatheredLosses:
    """Cross-entropy of all ranks' samples over all ranks' classes, each rank holding the class vectors of its own.

    The ranks' features and labels are gathered; each rank sums over its classes in chunks, as `chunked_cross_entropy`
    does; ln Σ_c e^{z_c} comes from the ranks' largest logit and the sum of their shares, the label's logit from the
    rank that has it. Three numbers a sample cross the ranks in forward, the features' gradient (samples × dim) in
    backward.

    Every rank gets the same loss, the gradient of it in its own class vectors and in a learned scale (not to be
    averaged: keep the head out of DistributedDataParallel), and in its own features the gradient times the number of
    ranks, which DistributedDataParallel's averaging around the backbone undoes. Every rank must call, with a batch of
    any length.

    Args:
        features: h, this rank's batch.
        head: this rank's share of the classes, nn.Linear, LinearHead or CosineHead: `ncreg.heads.shard_head`. The
            shares follow each other in the order of the ranks and may differ in size.
        target: this rank's class indices in [0, C), C the classes of all ranks, or ignore_index.
        class_weight: weight of a class's samples, of all C classes, the same on each rank.
        ignore_index: label of the samples that count for nothing.
        label_smoothing: s in [0, 1].
        reduction: "mean", "sum" or "none" (one value a sample, of all ranks).
        chunk: classes at a time; None takes about 2²¹ logits.

    Raises:
        ValueError: a rank without classes; shapes, labels or numbers that do not fit.
        TypeError: a head of another kind.

    Example:
        >>> head, features, target = nn.Linear(4, 1000), torch.randn(8, 4), torch.arange(8)
        >>> whole = nn.functional.cross_entropy(head(features), target)
        >>> torch.allclose(sharded_cross_entropy(features, head, target), whole)  # a single process has all classes
        True
    """
    _check_share(features, head)
    features, target = gather_batch(features, target)
    places = _places(head, features.device)
    check_rows("features", features)

    def sums_of(labels: Tensor, spread: Tensor | None) -> ClassSums:
        own = None if spread is None else spread[places.start : places.stop]
        if world_size() == 1:
            return class_sums(features, head, labels, spread=own, chunk=chunk)
        sums = class_sums(features, head, labels - places.start, spread=own, chunk=chunk, wrap=_SumOfGradients.apply)
        return ClassSums(*_OverShares.apply(*sums))

    return cross_entropy_of(
        sums_of,
        features,
        target,
        places.of,
        class_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


class ShardedCrossEntropyLoss(ChunkedCrossEntropyLoss):
    """`sharded_cross_entropy` as a module; `class_weight` is of all ranks' classes.

    Args:
        class_weight: weight of the samples of every class (C,), those of other ranks too.
        ignore_index: label of the samples that count for nothing.
        label_smoothing: s in [0, 1].
        reduction: "mean", "sum" or "none" (one value a sample).
        chunk: classes at a time; None takes about 2²¹ logits.

    Example:
        >>> loss, head = ShardedCrossEntropyLoss(label_smoothing=0.1), nn.Linear(4, 1000)
        >>> features, target = torch.randn(8, 4), torch.arange(8)
        >>> whole = nn.functional.cross_entropy(head(features), target, label_smoothing=0.1)
        >>> torch.allclose(loss(features, head, target), whole)
        True
    """

    def __init__(
        self,
        *,
        class_weight: ClassWeight | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        chunk: int | None = None,
    ) -> None:
        super().__init__(
            class_weight=class_weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            chunk=chunk,
            gather=True,
        )

    @fx_leaf
    def forward(self, features: Features, head: nn.Module, target: Labels) -> GatheredLosses:
        """The loss of all ranks' batches."""
        return sharded_cross_entropy(features, head, target, **self._options())


@torch.no_grad()
def sharded_argmax(features: Features, head: nn.Module, *, chunk: int | None = None) -> Labels:
    """The class of the largest logit of each of this rank's rows, among all ranks' classes; every rank must call.

    Raises:
        ValueError: a rank without classes.
        TypeError: a head of another kind.

    Example:
        >>> head, features = nn.Linear(4, 1000), torch.randn(8, 4)
        >>> torch.equal(sharded_argmax(features, head), head(features).argmax(1))
        True
    """
    _check_share(features, head)
    mine = len(features)
    features, rank = gather_batch(features, torch.full((mine,), _rank(), device=features.device))
    places = _places(head, features.device)
    value, place = chunked_max(features, head, chunk)
    if world_size() == 1:
        return place
    values, classes = _of_all_ranks(value), _of_all_ranks(place + places.start)
    return classes.gather(0, values.max(0).indices[None])[0][rank == _rank()]


class _Places(NamedTuple):
    """The classes of this rank, start to stop (exclusive), of so many in all."""

    start: int
    stop: int
    of: int


def _rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def _check_share(features: Tensor, head: nn.Module) -> None:
    """What can be told without the other ranks."""
    kind = kind_of(head)
    if kind not in ("weight", "unit weight"):
        raise TypeError(
            f"head={type(head).__name__} learns no class vectors: chunked_cross_entropy needs no shares of it"
        )
    if not isinstance(features, Tensor) or features.ndim != 2 or not features.is_floating_point():
        check_rows("features", features)


def _places(head: nn.Module, device: torch.device) -> _Places:
    """Where this rank's classes lie among those of all ranks."""
    counts = torch.zeros(world_size(), dtype=torch.int64, device=device)
    counts[_rank()] = classes_of(head)
    if world_size() > 1:
        dist.all_reduce(counts)
    shares = counts.tolist()
    if 0 in shares:
        empty = [rank for rank, share in enumerate(shares) if not share]
        raise ValueError(f"ranks {empty} hold no class of head: use fewer ranks, or keep the head whole on each")
    start = sum(shares[: _rank()])
    return _Places(start, start + shares[_rank()], sum(shares))


def _of_all_ranks(values: Tensor) -> Tensor:
    """Values of the same shape on each rank, stacked."""
    slots = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(slots, values.contiguous())
    return torch.stack(slots)


class _SumOfGradients(torch.autograd.Function):
    """The same inputs on every rank; their gradient is the sum of what the ranks' classes give.

    It stands behind the scale, so that a learned one has the whole gradient on every rank too.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class _OverShares(torch.autograd.Function):
    """The sums over all classes from those over each rank's, one per sample.

    Each rank has the same gradient in them, so none need cross ranks in backward: a share's part of it is its part of
    Σ_c e^{z_c}, and the whole of the other two.
    """

    @staticmethod
    def forward(ctx: Any, lse: Tensor, own: Tensor, spread: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        peak = lse.clone()
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        peak = peak.masked_fill(peak == -torch.inf, 0.0)  # all logits are -inf: their powers are 0
        sums = torch.stack([(lse - peak).exp(), own, spread])
        dist.all_reduce(sums)
        total = peak + sums[0].log()
        ctx.save_for_backward(lse, total)
        return total, sums[1].clone(), sums[2].clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
        lse, total = ctx.saved_tensors
        by_lse, by_own, by_spread = upstream
        return by_lse * (lse - total).exp(), by_own, by_spread
