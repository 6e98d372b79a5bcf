"""Unit vectors from a centre to each feature, of which the cosine losses are made."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from ncreg._checks import described
from ncreg._transforms import jit_tracing
from ncreg.losses._inputs import least_length, unit_rows
from ncreg.losses._row_blocks import UnitRowSums, blocks_pay
from ncreg.losses._targets import class_counts, class_means
from ncreg.numerics import at_least_float32

Center = Literal["batch"] | Float[Tensor, " dim"] | None


def check_center(center: Center) -> Center:
    """None, "batch" or a tensor."""
    if isinstance(center, Tensor | str | None):
        if isinstance(center, str) and center != "batch":
            raise ValueError(f"center must be None, 'batch' or a tensor of shape (dim,), got {center!r}")
        return center
    raise TypeError(f"center must be None, 'batch' or a tensor of shape (dim,), got {described(center)}")


def directions(
    features: Float[Tensor, "batch dim"], center: Center, unit: Callable[[Tensor], Tensor] = unit_rows
) -> Float[Tensor, "batch dim"]:
    """U, the unit vectors from the centre to each feature."""
    return unit(_from_center(features, center))


def mean_directions(
    features: Float[Tensor, "batch dim"], center: Center, label: Integer[Tensor, " batch"], slots: int
) -> tuple[Float[Tensor, "slots dim"], Float[Tensor, " slots"]]:
    """T, the mean unit vector from the centre to the features of each label, and the number of these."""
    rows = _from_center(features, center)
    wide = at_least_float32(rows)
    if not blocks_pay(wide):
        return class_means(unit_rows(rows), label, slots)
    counts = class_counts(wide, label, slots)
    return UnitRowSums.apply(wide, label, slots, least_length(rows)) / counts.clamp(min=1)[:, None], counts


def _from_center(features: Float[Tensor, "batch dim"], center: Center) -> Float[Tensor, "batch dim"]:
    check_center(center)
    if center is None:
        return features
    if isinstance(center, Tensor):
        if center.ndim != 1 or (not jit_tracing() and center.shape != features.shape[1:]):
            raise ValueError(f"center must have shape ({features.shape[1]},), got {tuple(center.shape)}")
        return at_least_float32(features) - center.to(features.device)
    lifted = at_least_float32(features)
    return lifted - lifted.mean(0)


def exact_unit_rows(rows: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
    """Rows over their lengths, however small or large; a zero row stays zero."""
    largest = rows.detach().abs().amax(1, keepdim=True)
    rows = rows / torch.where(largest > 0, largest, 1)  # the squares of what is left stay within range
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(length > 0, length, 1)  # clamp_min has no gradient at its bound, where axes are
