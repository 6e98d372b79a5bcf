"""What must cross ranks: a sum with a gradient, and the batch of all ranks.

Every function is the identity in a single process, so code reads the same with one rank or many.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ncreg._transforms import bare, batched


def world_size() -> int:
    """The number of ranks; 1 when torch.distributed is not set up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _AllReduceSum(torch.autograd.Function):
    """Linear and its own transpose, whatever the axes: gradients, tangents and vmap's batches are summed alike."""

    @staticmethod
    def forward(local: Tensor) -> Tensor:
        total = local.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _AllReduceSum.apply(grad)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return _AllReduceSum.apply(tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None], local: Tensor) -> tuple[Tensor, int | None]:
        return _AllReduceSum.apply(local), in_dims[0]


def all_reduce_sum(local: Tensor) -> Tensor:
    """The sum over ranks of a tensor of the same shape on each, differentiable (twice, too).

    Backward sums the ranks' gradients: each rank gets the derivative of the *sum of all ranks' losses*, which
    DDP's averaging then turns into the derivative of their mean.

    >>> import torch
    >>> all_reduce_sum(torch.tensor([1.0, 2.0]))
    tensor([1., 2.])
    """
    return local if world_size() == 1 else _AllReduceSum.apply(local)


class _TimesWorldSize(torch.autograd.Function):
    """The rows as they are; gradients and tangents are multiplied by the world size."""

    generate_vmap_rule = True

    @staticmethod
    def forward(own: Tensor) -> Tensor:
        return own.view_as(own)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * world_size()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent * world_size()


def gather_batch(*batch: Tensor) -> tuple[Tensor, ...]:
    """Concatenate each tensor's rows over ranks, in rank order; the own rows stay live, the others are constants.

    Every rank then computes the same loss of the global batch. Its gradient in the own rows is multiplied by the
    world size, which undoes DDP's averaging: the averaged parameter gradient is the global batch's exactly. Ranks
    may hold different numbers of rows, zero included (an uneven last batch), but each must make the call.

    >>> import torch
    >>> gather_batch(torch.ones(2, 3), torch.tensor([0, 1]))[1]
    tensor([0, 1])
    """
    if world_size() == 1:
        return batch
    if any(batched(tensor) for tensor in batch):
        raise RuntimeError("the batch of all ranks cannot be gathered under torch.vmap: give the loss gather=False")
    rows = _row_counts(batch)
    return tuple(_gather_rows(tensor, rows) for tensor in batch)


def _row_counts(batch: tuple[Tensor, ...]) -> list[int]:
    """How many rows each rank holds."""
    own = len(batch[0])
    if any(len(tensor) != own for tensor in batch):
        raise ValueError(f"the tensors of a batch must have the same length, got {[len(t) for t in batch]}")
    counts = torch.zeros(world_size(), dtype=torch.int64, device=batch[0].device)
    counts[dist.get_rank()] = own
    dist.all_reduce(counts)
    return counts.tolist()


def _gather_rows(own: Tensor, rows: list[int]) -> Tensor:
    """All ranks' rows; padded to the longest rank on the way, since backends need equal shapes."""
    longest, values = max(rows), bare(own.detach())
    padded = values.new_zeros(longest, *values.shape[1:])
    padded[: len(values)] = values
    slots = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(slots, padded)
    parts = [slot[:count] for slot, count in zip(slots, rows, strict=True)]
    if own.is_floating_point():  # labels have no derivative
        parts[dist.get_rank()] = _TimesWorldSize.apply(own)
    return torch.cat(parts)
