"""The shapes of a batch, and what every loss does with its matrices: check, widen, scale to unit length, average."""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from ncreg._checks import check_choice, described
from ncreg._transforms import jit_tracing, own_backward_pays, recorded, wrapped
from ncreg.losses._row_blocks import UnitRowDots, UnitRows, blocks_pay, lengths
from ncreg.numerics import at_least_float32

Features = Float[Tensor, "batch dim"]
Logits = Float[Tensor, "batch classes"]
Labels = Integer[Tensor, " batch"]
ClassVectors = Float[Tensor, "classes dim"]
ClassWeight = Float[Tensor, " classes"]
Loss = Float[Tensor, ""]
Losses = Float[Tensor, ""] | Float[Tensor, " batch"]  # the latter with reduction="none"
GatheredLosses = Float[Tensor, ""] | Float[Tensor, " all_ranks_batch"]
Reduction = Literal["mean", "sum", "none"]


def check_rows(name: str, rows: Tensor, dim: int | None = None) -> None:
    """A matrix of floating numbers with at least one row, and `dim` columns where that is known."""
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name} must be a tensor, got {described(rows)}")
    if not rows.is_floating_point():
        raise TypeError(f"{name} must hold floating-point numbers, got {rows.dtype}")
    if rows.ndim != 2:
        raise ValueError(f"{name} must be a matrix, got shape {tuple(rows.shape)}: pool or flatten each row")
    if jit_tracing():
        return  # sizes are not known there
    if 0 in rows.shape:
        raise ValueError(f"{name} is empty, shape {tuple(rows.shape)}: skip empty batches")
    if dim is not None and rows.shape[1] != dim:
        raise ValueError(f"{name} has {rows.shape[1]} columns where the features have {dim}")


def check_reduction(reduction: Reduction) -> Reduction:
    """One of torch's three words."""
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    return reduction


def unit_rows(rows: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
    """Rows over their lengths, in full precision; a zero row stays zero.

    The divisor is at least 1e-6, in float16 1e-3: its inverse is a zero row's gradient, which must not overflow.
    Shorter rows thus come out shorter than 1; rows whose squares overflow come out as NaN.
    """
    eps, rows = least_length(rows), at_least_float32(rows)
    return UnitRows.apply(rows, eps) if own_backward_pays(rows) else rows / lengths(rows, eps)


def least_length(rows: Tensor) -> float:
    """What a row's length is at least taken for."""
    return 1e-3 if rows.dtype == torch.float16 else 1e-6


def dot_products(left: Float[Tensor, "m dim"], right: Float[Tensor, "n dim"]) -> Float[Tensor, "m n"]:
    """All dot products of two sets of rows, in the wider of their two precisions; autocast would round them."""
    dtype = torch.promote_types(left.dtype, right.dtype)
    with torch.autocast(left.device.type, enabled=False):
        return left.to(dtype) @ right.to(dtype).T


def unit_row_dots(
    rows: Float[Tensor, "batch dim"], table: ClassVectors, label: Integer[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Cosine of each row with the row of a table that its label names."""
    wide = at_least_float32(rows)
    if table.requires_grad or table.dtype != wide.dtype or not blocks_pay(wide):
        return (unit_rows(rows) * unit_rows(table.index_select(0, label))).sum(1)
    if len(label) < len(table):  # many classes: the rows that are named, no others
        table, label = table.index_select(0, label), torch.arange(len(label), device=label.device)
    return UnitRowDots.apply(wide, unit_rows(table), label, least_length(rows))


def row_dots(
    rows: Float[Tensor, "batch dim"], table: ClassVectors, label: Integer[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Dot product of each row with the row of a table that its label names."""
    return (at_least_float32(rows) * at_least_float32(table.index_select(0, label))).sum(1)


def without_diagonal(scores: Float[Tensor, "m m"]) -> Float[Tensor, "m m"]:
    """The smallest number on the diagonal, not −inf: a batch of one sample would get NaN gradients."""
    smallest = torch.finfo(scores.dtype).min
    if recorded(scores) or wrapped(scores):  # neither vmap nor graphs of any batch size know fill_diagonal_
        rows = torch.arange(scores.shape[0], device=scores.device)
        return scores.masked_fill(rows[:, None] == rows, smallest)
    return scores.fill_diagonal_(smallest)


def average(
    losses: Float[Tensor, " batch"],
    reduction: Reduction,
    sample_weight: Float[Tensor, " batch"] | None = None,
    mean_weight: Float[Tensor, " batch"] | None = None,
) -> Tensor:
    """Reduce per-sample losses as torch does; the mean with weights is weighted, and 0 if all weights are 0.

    `mean_weight` are the weights that a mean is divided by the sum of, where they are others.
    """
    check_reduction(reduction)
    if sample_weight is not None:
        sample_weight = sample_weight.to(losses)
        losses = losses * sample_weight
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if sample_weight is None:
        return losses.mean()
    total = (sample_weight if mean_weight is None else mean_weight.to(losses)).sum()
    return losses.sum() / torch.where(total > 0, total, 1)


def show_hyperparameters(module: nn.Module) -> str:
    """The hyperparameters a module holds."""
    return ", ".join(
        f"{name}={value!r}" for name, value in vars(module).items() if name[0] != "_" and name != "training"
    )


class LossModule(nn.Module):
    """What all losses are, so that type checkers know `consumes` of any of them; `forward` takes these, in order."""

    consumes: ClassVar[tuple[str, ...]]
    extra_repr = show_hyperparameters
