"""What every loss does to its inputs first: check them, lift them to full precision, scale rows to unit length."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor


def check_rows(name: str, rows: Tensor, dim: int | None = None) -> None:
    """A matrix of floating numbers with at least one row, and `dim` columns where that is known."""
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(rows).__name__}")
    if not rows.is_floating_point():
        raise TypeError(f"{name} must hold floating-point numbers, got {rows.dtype}")
    if rows.ndim != 2:
        raise ValueError(f"{name} must have shape (rows, dim), got {tuple(rows.shape)}: pool or flatten it first")
    if 0 in rows.shape:
        raise ValueError(f"{name} is empty, shape {tuple(rows.shape)}: skip empty batches")
    if dim is not None and rows.shape[1] != dim:
        raise ValueError(f"{name} has {rows.shape[1]} columns where {dim} are needed, the other argument's number")


def check_num_classes(num_classes: int) -> None:
    """A number of classes that has pairs of classes."""
    if isinstance(num_classes, bool) or not isinstance(num_classes, int):
        raise TypeError(f"num_classes must be an int, got {num_classes!r}")
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: a classifier needs at least 2 classes")


def check_labels(target: Tensor, rows: Tensor, num_classes: int | None = None) -> Tensor:
    """Class indices, one a row, as int64; in [0, num_classes), or just not negative where that is None.

    On an accelerator the range is asserted without waiting for the device.
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    if target.is_floating_point() and target.ndim == 2:
        raise ValueError(
            f"target holds soft labels, shape {tuple(target.shape)}: this loss compares members of classes "
            "and needs class indices (batch,); use one that takes soft labels, or switch mixup and smoothing off"
        )
    if target.is_floating_point() or target.is_complex() or target.dtype is torch.bool:
        raise TypeError(f"target must hold integer class indices, got {target.dtype}: use target.long()")
    if target.shape != rows.shape[:1]:
        raise ValueError(f"target must have shape ({len(rows)},), one index a row, got {tuple(target.shape)}")
    if target.device != rows.device:
        raise ValueError(f"target is on {target.device}, the batch on {rows.device}: move one")
    target = target.long()
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        allowed = target >= 0 if num_classes is None else (target >= 0) & (target < num_classes)
        torch._assert_async(allowed.all(), "target holds an index outside [0, num_classes)")
        return target
    low, high = (int(end) for end in target.aminmax())
    if low < 0 or (num_classes is not None and high >= num_classes):
        allowed_range = "≥ 0" if num_classes is None else f"in [0, {num_classes})"
        raise ValueError(
            f"target must be {allowed_range}, got indices from {low} to {high}: "
            "relabel the classes 0, 1, …, and drop rows to be ignored before the loss"
        )
    return target


def full_precision(rows: Tensor) -> Tensor:
    """At least float32: half-precision sums and exponentials are worthless near collapse."""
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows


def no_autocast(rows: Tensor) -> torch.autocast:
    """Matrix products in the precision their factors have."""
    return torch.autocast(rows.device.type, enabled=False)


def unit_rows(rows: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
    """Rows over their lengths, in full precision; a zero row stays zero.

    The smallest length that counts is 1e-6, or the smallest normal number of the incoming type: below it a
    direction is rounding noise, and the gradient 1/length overflows (a zero row under float16 would give inf).
    """
    return F.normalize(full_precision(rows), dim=1, eps=max(1e-6, torch.finfo(rows.dtype).tiny))


def compact(target: Integer[Tensor, " batch"], num_classes: int | None = None) -> tuple[Tensor, int]:
    """Labels (batch,) for use as row numbers of a table, and the table's length, at most the batch's.

    Where classes outnumber samples (or their number is unknown) the present ones are renumbered 0, 1, … in
    ascending order; by a sort, since `unique` would have to wait for the device.
    """
    if num_classes is not None and num_classes <= len(target):
        return target, num_classes
    ordered, order = target.sort()
    rank = torch.zeros_like(target)
    rank[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    return torch.empty_like(target).scatter_(0, order, rank), len(target)


def class_sums(rows: Float[Tensor, "batch dim"], label: Integer[Tensor, " batch"], slots: int) -> tuple[Tensor, Tensor]:
    """Sum of each label's rows (slots, dim) and their number (slots,)."""
    sums = rows.new_zeros(slots, rows.shape[1]).index_add(0, label, rows)
    counts = rows.new_zeros(slots).index_add(0, label, rows.new_ones(len(rows)))
    return sums, counts
