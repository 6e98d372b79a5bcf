"""Checks of features, labels and class predictions, and statistics of features."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ncreg._checks import described
from ncreg._transforms import jit_tracing
from ncreg.numerics import exact

ENTRIES = 2**22  # of a temporary of distances: 32 MiB in float64


class NotDefined(ValueError):
    """A score or measure has no meaning for these features, this head or this data."""


def check_pooled(features: Tensor, dim: int, taker: str) -> None:
    """Floating-point features (batch, dim), as the last norm and the head take them.

    Raises:
        TypeError: no floating-point tensor.
        ValueError: another shape.
    """
    if not isinstance(features, Tensor):
        raise TypeError(f"features must be a tensor (batch, {dim}), not {described(features)}")
    if features.ndim != 2 or (not jit_tracing() and features.shape[1] != dim):
        shape = tuple(features.shape)
        raise ValueError(f"features of shape {shape}: the {taker} takes pooled features (batch, {dim})")
    if not features.is_floating_point():
        raise TypeError(
            f"features of {features.dtype}: the {taker} takes floating-point features; call .float() on them"
        )


def check_features(name: str, features: Tensor, dim: int | None = None) -> Float[Tensor, "rows dim"]:
    """A non-empty matrix of finite numbers with `dim` columns, as float64 on the CPU, without a gradient.

    Raises:
        TypeError: no floating-point tensor.
        ValueError: another shape, no row, NaN or infinite entries.
    """
    if not isinstance(features, Tensor):
        raise TypeError(f"{name} must be a tensor, got {described(features)}")
    if not features.is_floating_point():
        raise TypeError(f"{name} must hold floating-point numbers, got {features.dtype}")
    if features.ndim != 2:
        raise ValueError(f"{name} must have shape (samples, features), got {tuple(features.shape)}: pool or flatten")
    if 0 in features.shape:
        raise ValueError(f"{name} is empty, shape {tuple(features.shape)}")
    if dim is not None and features.shape[1] != dim:
        raise ValueError(f"{name} has {features.shape[1]} columns where the training features have {dim}")
    bad = ~features.isfinite().all(1)
    if bad.any():
        raise ValueError(f"{name} holds NaN or infinite values in {int(bad.sum())} of {len(bad)} rows")
    return exact(features)


def check_varied(name: str, features: Float[Tensor, "rows dim"]) -> None:
    """Check that the rows are not all the same.

    Raises:
        ValueError: they are all the same.
    """
    if bool((features == features[0]).all()):
        raise ValueError(f"{name} are the same vector in all {len(features)} rows: the model tells nothing apart")


def check_mask(name: str, mask: Tensor, rows: int) -> Bool[Tensor, " rows"]:
    """One truth value a row, on its own device.

    Raises:
        TypeError: no tensor.
        ValueError: other values, or another shape than (rows,).
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor of bool, got {described(mask)}: torch.as_tensor(...)")
    if mask.dtype != torch.bool or mask.shape != (rows,):
        raise ValueError(f"{name} must be bool of shape ({rows},), got {mask.dtype} {tuple(mask.shape)}")
    return mask


def check_labels(name: str, indices: Tensor, num_classes: int | None = None) -> Int[Tensor, " rows"]:
    """`check_indices` of however many rows there are.

    Raises:
        TypeError: no integer tensor.
        ValueError: another shape than (rows,), none, or an index out of range.
    """
    rows = len(indices) if isinstance(indices, Tensor) and indices.ndim else 1
    return check_indices(name, indices, rows, num_classes)


def check_indices(name: str, indices: Tensor, rows: int, num_classes: int | None = None) -> Int[Tensor, " rows"]:
    """Class indices (rows,) in [0, num_classes), as int64 on the CPU.

    Raises:
        TypeError: no integer tensor.
        ValueError: another shape, or an index out of range.
    """
    if not isinstance(indices, Tensor):
        raise TypeError(f"{name} must be a tensor, got {described(indices)}")
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        way_out = "of logits take argmax(1)" if indices.ndim == 2 else "use .long()"
        raise TypeError(f"{name} must hold integer class indices, got {indices.dtype}: {way_out}")
    if indices.shape != (rows,):
        raise ValueError(f"{name} must have shape ({rows},), one class a sample, got {tuple(indices.shape)}")
    if rows == 0:
        raise ValueError(f"{name} is empty")
    found = indices.detach().to("cpu", torch.int64)  # torch knows no minimum of uint16, numpy's labels of many classes
    low, high = (int(end) for end in torch.aminmax(found))
    if low < 0 or (num_classes is not None and high >= num_classes):
        allowed = "not be negative" if num_classes is None else f"lie in [0, {num_classes})"
        raise ValueError(f"{name} must {allowed}, got classes from {low} to {high}")
    return found


def check_all_present(name: str, target: Int[Tensor, " rows"], num_classes: int) -> Int[Tensor, " classes"]:
    """The number of samples of each class, none of them zero.

    Raises:
        ValueError: a class has no sample.
    """
    counts = torch.bincount(target, minlength=num_classes)
    absent = (counts == 0).nonzero().flatten().tolist()
    if absent:
        shown = ", ".join(map(str, absent[:5])) + (", ..." if len(absent) > 5 else "")
        raise ValueError(f"{name} has no sample of class {shown} ({num_classes} classes): draw a subset that keeps all")
    return counts


def check_cost(cost: Tensor, num_classes: int | None = None) -> None:
    """What it costs to take class y for class j, in row y and column j; values are looked at in place.

    Raises:
        TypeError: no tensor of numbers.
        ValueError: another shape, a number that is negative or not finite, or a cost of being right.
    """
    if not isinstance(cost, Tensor) or cost.is_complex() or cost.dtype == torch.bool:
        raise TypeError(f"cost must be a tensor of numbers, got {getattr(cost, 'dtype', type(cost).__name__)}")
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or cost.shape[0] < 2:
        raise ValueError(f"cost must be a square matrix with a row a class, got shape {tuple(cost.shape)}")
    if num_classes is not None and len(cost) != num_classes:
        raise ValueError(f"cost is for {len(cost)} classes where there are {num_classes}")
    seen = cost.detach()
    low, high = (float(end) for end in torch.aminmax(seen if seen.is_floating_point() else seen.double()))
    if not (low >= 0 and high < torch.inf):  # NaN fails both
        raise ValueError("cost must be finite and not negative in every entry")
    if bool(seen.diagonal().any()):
        raise ValueError(f"cost of the right class must be 0, got the diagonal {seen.diagonal().tolist()}")


def exact_cost(cost: Tensor, num_classes: int | None = None) -> Float[Tensor, "classes classes"]:
    """`check_cost`, and the costs as float64 on the CPU."""
    check_cost(cost, num_classes)
    return exact(cost)


def class_means(
    features: Float[Tensor, "rows dim"], target: Int[Tensor, " rows"], counts: Int[Tensor, " classes"]
) -> Float[Tensor, "classes dim"]:
    """Mean of each class's rows, around the mean of all, so that an offset costs no digits."""
    anchor = features.mean(0)
    sums = features.new_zeros(len(counts), features.shape[1]).index_add(0, target, features - anchor)
    return anchor + sums / counts[:, None]


def least_distances(
    rows: Float[Tensor, "rows dim"], points: Float[Tensor, "points dim"], besides: Int[Tensor, " rows"] | None = None
) -> Float[Tensor, " rows"]:
    """Distance of each float64 row to the nearest of several points, `besides` the one that is named for it.

    Products find the points that may be the nearest, a tenth of the time of differences; by their rounding, which is
    coarse where lengths are far above distances, these may be several. Differences give the distance.
    """
    squares, found = points.square().sum(1), []
    longest = squares.max().sqrt()
    places = torch.arange(len(rows), device=rows.device)
    for block in places.split(max(1, ENTRIES // len(points))):
        own = rows[block]
        nearness = squares / 2 - own @ points.T  # (‖x − p‖² − ‖x‖²)/2
        if besides is not None:
            nearness.scatter_(1, besides[block, None], torch.inf)
        rounding = points.shape[1] * torch.finfo(points.dtype).eps * longest * (longest + own.norm(dim=1))
        near = nearness <= (nearness.amin(1) + 2 * rounding)[:, None]
        least = torch.full_like(rounding, torch.inf)
        for pairs in near.nonzero().split(max(1, ENTRIES // points.shape[1])):
            first, second = pairs.unbind(1)
            least.scatter_reduce_(0, first, (own[first] - points[second]).norm(dim=1), "amin")
        found.append(least)
    return torch.cat(found)


def feature_scale(features: Float[Tensor, "rows dim"]) -> Float[Tensor, " dim"]:
    """Standard deviation of each feature; 1 where it is constant but for float32's rounding."""
    deviation = features.std(0, correction=0)
    rounding = torch.finfo(torch.float32).eps * features.abs().amax(0)
    return torch.where(deviation > rounding, deviation, 1.0)
