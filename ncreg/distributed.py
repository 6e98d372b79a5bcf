"""What must cross ranks: a sum with a gradient, the batch of all ranks, and values of rank 0.

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


def broadcast(tensor: Tensor) -> None:
    """Give every rank the values of rank 0, in place, however they lie in memory (NCCL takes contiguous tensors alone).

    Example:
        >>> buffer = torch.ones(2)
        >>> broadcast(buffer)  # of one rank: its own
    """
    if world_size() == 1:
        return
    values = tensor.contiguous()
    dist.broadcast(values, 0)
    if values is not tensor:
        tensor.copy_(values)


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
    Labels may be of any integer type on each; what differs otherwise is refused on every rank.

    Raises:
        ValueError: tensors of different lengths, or ranks that hold different dtypes or rows of different shapes.
        RuntimeError: under torch.vmap.

    >>> import torch
    >>> gather_batch(torch.ones(2, 3), torch.tensor([0, 1]))[1]
    tensor([0, 1])
    """
    if world_size() == 1:
        return batch
    if any(batched(tensor) for tensor in batch):
        raise RuntimeError("the batch of all ranks cannot be gathered under torch.vmap: give the loss gather=False")
    batch = tuple(tensor if tensor.is_floating_point() else tensor.long() for tensor in batch)  # labels of any type
    rows = _row_counts(batch)
    return tuple(_gather_rows(tensor, rows) for tensor in batch)


def _row_counts(batch: tuple[Tensor, ...]) -> list[int]:
    """How many rows each rank holds.

    Raises:
        ValueError: the tensors differ in length, or the ranks' in dtype or in the shape of a row; on every rank.
    """
    own = len(batch[0])
    if any(len(tensor) != own for tensor in batch):
        raise ValueError(f"the tensors of a batch must have the same length, got {[len(t) for t in batch]}")
    said = [own, *(number for tensor in batch for number in _layout(tensor))]
    table = torch.zeros(world_size(), len(said), dtype=torch.int64, device=batch[0].device)
    table[dist.get_rank()] = torch.tensor(said)
    dist.all_reduce(table)
    rows = table.tolist()
    for rank, row in enumerate(rows):
        if row[1:] != rows[0][1:]:
            mine = ", ".join(f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}" for tensor in batch)
            raise ValueError(
                f"rank {rank} holds a batch of another dtype, or of rows of another shape, than rank 0, and the "
                f"batches of all ranks are to become one; rank {dist.get_rank()}, this one, holds {mine}"
            )
    return [row[0] for row in rows]


_DTYPES = sorted((value for value in vars(torch).values() if isinstance(value, torch.dtype)), key=str)


def _layout(tensor: Tensor) -> tuple[int, ...]:
    """Dtype and shape of a row as numbers, as many of them whatever the shape."""
    shape = tuple(tensor.shape[1:])
    return _DTYPES.index(tensor.dtype), len(shape), sum(side * 31**place for place, side in enumerate(shape, 1))


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
