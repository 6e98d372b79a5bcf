"""Unit rows by blocks that stay in a processor's cache: the same values to the last bit, no temporary of batch × dim.

On a CPU each pass over fresh memory of the batch's size costs several times the arithmetic: the kernel hands out every
page anew. Here each operation runs on some rows at a time, in the order of the plain formula, and writes into memory
at hand. Devices with many threads of their own gain nothing: they take the plain formula.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ncreg._transforms import own_backward_pays, wrapped

ENTRIES = 2**18  # numbers of a block: 1 MiB in float32


def blocks_pay(rows: Tensor) -> bool:
    """Whether rows are plain memory of the CPU, and their gradient is taken in plain reverse mode."""
    plain = type(rows) in (Tensor, nn.Parameter) and rows.device.type == "cpu" and rows.is_contiguous()
    return plain and own_backward_pays(rows)


def lengths(rows: Tensor, eps: float) -> Tensor:
    """Lengths (rows, 1), at least eps; NaN where the squares overflow (float32: beyond 1.8e19): h/inf would be 0."""
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(eps)
    return length.masked_fill(length == torch.inf, torch.nan)


def through_lengths(grad: Tensor, rows: Tensor, eps: float) -> Tensor:
    """From the gradient in u = h/‖h‖ to that in h: (g − (g·u)u)/‖h‖; below eps the divisor is constant."""
    length = lengths(rows, eps)
    along = (grad * rows).sum(1, keepdim=True) / length.square()  # vecdot is rounded by autocast
    along = along * (length > eps)
    return torch.addcmul(grad, rows, along, value=-1).div_(length)


def through_lengths_by_blocks(rows: Tensor, eps: float, gradient_of: Callable[[slice, Tensor], Any]) -> Tensor:
    """`through_lengths` of a gradient that `gradient_of` writes for a block of rows; not differentiable."""
    found, spare = torch.empty_like(rows), _spare(rows)
    for block in _blocks(rows):
        own, grad = rows[block], found[block]
        gradient_of(block, grad)
        length = lengths(own, eps)
        along = torch.mul(grad, own, out=spare[: len(own)]).sum(1, keepdim=True) / length.square()
        torch.addcmul(grad, own, along * (length > eps), value=-1, out=grad).div_(length)
    return found


class UnitRows(torch.autograd.Function):
    """F.normalize with a backward of its own, a third of the time: half a loss's cost is there.

    Backward is made of differentiable operations on h where a graph of it is wanted, so that second derivatives hold.
    """

    @staticmethod
    def forward(rows: Tensor, eps: float) -> Tensor:
        return rows / lengths(rows, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        rows, ctx.eps = inputs
        ctx.save_for_backward(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        if _once(rows, grad):
            return through_lengths_by_blocks(rows, ctx.eps, lambda block, out: out.copy_(grad[block])), None
        return through_lengths(grad, rows, ctx.eps), None


class UnitRowSums(torch.autograd.Function):
    """Sum of the unit rows of each label, (slots, dim)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, label: Tensor, slots: int, eps: float) -> Tensor:
        ctx.save_for_backward(rows, label)
        ctx.eps = eps
        sums, spare = rows.new_zeros(slots, rows.shape[1]), _spare(rows)
        for block in _blocks(rows):
            own = rows[block]
            sums.index_add_(0, label[block], torch.div(own, lengths(own, eps), out=spare[: len(own)]))
        return sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, label = ctx.saved_tensors
        if not _once(rows, grad):
            return through_lengths(grad.index_select(0, label), rows, ctx.eps), None, None, None

        def of_labels(block: slice, out: Tensor) -> Tensor:
            return torch.index_select(grad, 0, label[block], out=out)

        return through_lengths_by_blocks(rows, ctx.eps, of_labels), None, None, None


class UnitRowDots(torch.autograd.Function):
    """Dot product of each unit row with the row of a fixed table that its label names, (rows,)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, table: Tensor, label: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(rows, table, label)
        ctx.eps = eps
        dots, unit, named = rows.new_empty(len(rows)), _spare(rows), _spare(rows)
        for block in _blocks(rows):
            own, length = rows[block], lengths(rows[block], eps)
            theirs = torch.index_select(table, 0, label[block], out=named[: len(own)])
            torch.sum(torch.div(own, length, out=unit[: len(own)]).mul_(theirs), 1, out=dots[block])
        return dots

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, table, label = ctx.saved_tensors
        column = grad[:, None]
        if not _once(rows, grad):
            return through_lengths(column * table.index_select(0, label), rows, ctx.eps), None, None, None

        def of_labels(block: slice, out: Tensor) -> Tensor:
            return torch.index_select(table, 0, label[block], out=out).mul_(column[block])

        return through_lengths_by_blocks(rows, ctx.eps, of_labels), None, None, None


def _once(rows: Tensor, grad: Tensor) -> bool:
    """Whether this backward needs no graph of its own, on plain memory of the CPU."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or wrapped(grad) or wrapped(rows):
        return False
    if torch._C._functorch.is_legacy_batchedtensor(grad):  # is_grads_batched of torch.autograd.grad
        return False
    return type(grad) is Tensor and rows.device.type == "cpu" and rows.is_contiguous()


def _blocks(rows: Tensor) -> Iterator[slice]:
    count = max(1, ENTRIES // rows.shape[1])
    return (slice(first, first + count) for first in range(0, len(rows), count))


def _spare(rows: Tensor) -> Tensor:
    """Memory for one block."""
    return rows.new_empty(min(len(rows), max(1, ENTRIES // rows.shape[1])), rows.shape[1])
