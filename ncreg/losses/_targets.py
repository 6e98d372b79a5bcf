"""Targets: class indices or soft labels, checked; and sums over the members of each class."""

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from ncreg._checks import described
from ncreg._transforms import bare, jit_tracing, recorded, row_count, wrapped

# One class index a row, or one distribution over the classes a row (label smoothing, mixup).
Target = Integer[Tensor, " batch"] | Float[Tensor, "batch classes"]


def is_soft(target: Tensor) -> bool:
    """Whether the target holds a distribution a row."""
    return isinstance(target, Tensor) and target.ndim == 2 and target.is_floating_point()


def check_labels(target: Tensor, rows: Tensor, num_classes: int | None = None) -> Integer[Tensor, " batch"]:
    """Class indices, one a row, as int64; in [0, num_classes), or just not negative where that is None.

    On an accelerator the range is asserted without waiting for the device.
    """
    if is_soft(target):
        raise ValueError(
            f"target holds soft labels, shape {tuple(target.shape)}: this loss compares members of classes and needs "
            "class indices (batch,); switch mixup and label smoothing off, or use a loss that takes soft labels"
        )
    check_integers(target)
    count = row_count(rows)
    if target.ndim != 1 or row_count(target) != count:
        raise ValueError(f"target must have shape ({count},), one class index a row, got {tuple(target.shape)}")
    _check_device("target", target, rows)
    target = target.long()
    seen = bare(target)
    if not reads_are_free(seen):
        inside = seen >= 0 if num_classes is None else (seen >= 0) & (seen < num_classes)
        torch._assert_async(inside.all(), "target holds a class index out of range")
    elif seen.numel():
        low, high = (int(end) for end in seen.aminmax())
        if low < 0 or (num_classes is not None and high >= num_classes):
            allowed = "not negative" if num_classes is None else f"in [0, {num_classes})"
            raise ValueError(
                f"target must be {allowed}, got indices from {low} to {high}: "
                "number the classes 0, 1, …, and drop rows to be ignored before the loss"
            )
    return target


def check_integers(target: Tensor) -> None:
    """Refuse whatever is not a tensor of integers."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {described(target)}")
    if target.is_floating_point() or target.is_complex() or target.dtype is torch.bool:
        raise TypeError(f"target must hold integer class indices, got {target.dtype}: use target.long()")


def check_soft(target: Tensor, rows: Tensor, num_classes: int) -> Float[Tensor, "batch classes"]:
    """A distribution over num_classes a row, in the rows' precision."""
    if not jit_tracing() and target.shape != (len(rows), num_classes):
        raise ValueError(f"soft target must have shape {(len(rows), num_classes)}, got {tuple(target.shape)}")
    _check_device("target", target, rows)
    near = 0.01 if target.dtype in (torch.float16, torch.bfloat16) else 1e-4  # bfloat16 holds three digits
    target = target.to(torch.promote_types(rows.dtype, torch.float32))
    sums = target.sum(1)
    valid = bare((target >= 0).all(1) & ((sums - 1).abs() < near)).all()
    if not reads_are_free(valid):
        torch._assert_async(valid, "soft target rows must be distributions")
    elif not valid:
        raise ValueError(
            "soft target rows must be distributions: not negative, sum 1; "
            f"got values from {float(bare(target).min()):.4g} and sums from {float(bare(sums).min()):.4g} "
            f"to {float(bare(sums).max()):.4g}"
        )
    return target


def _check_device(name: str, tensor: Tensor, other: Tensor) -> None:
    """Refuse a tensor that stands elsewhere than the batch: some of torch's indexing would read what is not there."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} is on {tensor.device}, the batch on {other.device}: move it, {name}.to({str(other.device)!r})"
        )


def check_target(target: Target, rows: Tensor, num_classes: int) -> Target:
    """Class indices or soft labels, whichever it is."""
    return check_soft(target, rows, num_classes) if is_soft(target) else check_labels(target, rows, num_classes)


def weighed(
    target: Target, class_weight: Tensor | None, num_classes: int
) -> tuple[Target, Float[Tensor, " batch"] | None]:
    """The target, and the weight w_i of each sample: its class's, or Σ_c t_c w_c under its soft label t.

    That label comes back as t_c w_c/w_i, so that w_i times a loss that is linear in the label, Σ_c t_c ℓ_c, is
    Σ_c t_c w_c ℓ_c: each class's part of a mixture has the weight of its class.
    """
    weight = sample_weights(class_weight, target, num_classes)
    if weight is None or not is_soft(target):
        return target, weight
    mixed = target * class_weight.to(target)  # type: ignore[union-attr]
    total = mixed.sum(1, keepdim=True)
    return torch.where(total > 0, mixed / torch.where(total > 0, total, 1), target), weight


def sample_weights(class_weight: Tensor | None, target: Target, num_classes: int) -> Float[Tensor, " batch"] | None:
    """The weight of each sample: its class's, or the mean under its soft label."""
    if class_weight is None:
        return None
    check_class_weight(class_weight, target, num_classes)
    if is_soft(target):
        return (target * class_weight).sum(1)
    return class_weight.index_select(0, target)


def check_class_weight(class_weight: Tensor, target: Target, num_classes: int) -> None:
    """One finite weight a class, on the target's device, none below 0."""
    fits = isinstance(class_weight, Tensor) and (jit_tracing() or class_weight.shape == (num_classes,))
    if not fits:
        got = tuple(class_weight.shape) if isinstance(class_weight, Tensor) else repr(class_weight)
        raise ValueError(f"class_weight must be a tensor of shape ({num_classes},), got {got}")
    _check_device("class_weight", class_weight, target)
    seen = bare(class_weight)
    valid = ((seen >= 0) & (seen < torch.inf)).all()
    if not reads_are_free(seen):
        torch._assert_async(valid, "class_weight must be finite and not negative")
    elif not valid:
        raise ValueError(f"class_weight must be finite and not negative, got {seen.tolist()}")


def compact(target: Integer[Tensor, " batch"], num_classes: int | None = None) -> tuple[Tensor, int]:
    """Labels (batch,) that number the rows of a table, and the table's length: never longer than batch or classes.

    Where classes outnumber samples, or their number is unknown, the classes present are renumbered 0, 1, … in
    ascending order; by a sort, since `unique` would make an accelerator wait. How many they are is read on the CPU
    alone; elsewhere the table has a row for each sample.
    """
    if num_classes is not None and (jit_tracing() or num_classes <= target.shape[0]):  # a trace serves any batch
        return target, num_classes
    ordered, order = target.sort()
    rank = torch.zeros_like(target)
    rank[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    slots = int(rank[-1]) + 1 if reads_are_free(target) else target.shape[0]
    return torch.empty_like(target).scatter(0, order, rank), slots


def one_hot(target: Integer[Tensor, " batch"], num_classes: int, dtype: torch.dtype) -> Float[Tensor, "batch classes"]:
    """1 at each row's class, 0 elsewhere; F.one_hot reads the labels, which vmap cannot, and gives integers."""
    zeros = torch.zeros(target.shape[0], num_classes, dtype=dtype, device=target.device)
    place = target[:, None]
    return zeros.scatter(1, place, 1) if wrapped(target) else zeros.scatter_(1, place, 1)


def class_of_slot(
    target: Integer[Tensor, " batch"], label: Integer[Tensor, " batch"], slots: int
) -> Integer[Tensor, " slots"]:
    """The class that each row of a compact table stands for; 0 for rows that stand for none."""
    return target.new_zeros(slots).scatter(0, label, target)


def class_sums(
    rows: Float[Tensor, "batch dim"], label: Integer[Tensor, " batch"], slots: int
) -> tuple[Float[Tensor, "slots dim"], Float[Tensor, " slots"]]:
    """Sum of each label's rows, and their number."""
    return rows.new_zeros(slots, rows.shape[1]).index_add(0, label, rows), class_counts(rows, label, slots)


def class_counts(
    rows: Float[Tensor, "batch dim"], label: Integer[Tensor, " batch"], slots: int
) -> Float[Tensor, " slots"]:
    """Number of each label's rows, in their precision."""
    return rows.new_zeros(slots).index_add(0, label, rows.new_ones(rows.shape[0]))


def class_means(
    rows: Float[Tensor, "batch dim"], label: Integer[Tensor, " batch"], slots: int
) -> tuple[Float[Tensor, "slots dim"], Float[Tensor, " slots"]]:
    """Mean of each label's rows (zero where it has none), and their number."""
    sums, counts = class_sums(rows, label, slots)
    return sums / counts.clamp(min=1)[:, None], counts


def reads_are_free(tensor: Tensor) -> bool:
    """Whether a value can be read, and at no cost: on the CPU, outside of graphs, traces and torch.func's wrappers."""
    return tensor.device.type == "cpu" and not recorded(tensor) and not wrapped(tensor)
