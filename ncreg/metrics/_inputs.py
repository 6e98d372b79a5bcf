"""Checks of the batches of features and labels that a metric is given."""

from __future__ import annotations

import torch
from torch import Tensor

from ncreg._checks import described
from ncreg.metrics._geometry import LARGEST

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_batch(features: Tensor, target: Tensor, num_classes: int, num_features: int) -> None:
    """Check a batch of features (B, d) and labels (B,); the error names the argument and the way out.

    Raises:
        TypeError: features are not floating point, or target is not integer.
        ValueError: wrong shape, a length that differs, a label out of range, NaN or infinite features.
    """
    for name, value in (("features", features), ("target", target)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {described(value)}")
        check_not_meta(name, value)
    if not features.is_floating_point():
        raise TypeError(f"features must be floating point, got {features.dtype}")
    if features.ndim != 2:
        raise ValueError(
            f"features must have shape (batch, {num_features}), got {tuple(features.shape)}: "
            "pool them first, e.g. features.mean((2, 3)) for (batch, channels, height, width)"
        )
    if features.shape[1] != num_features:
        raise ValueError(
            f"features have {features.shape[1]} columns, but the metric was made with num_features={num_features}"
        )
    if target.dtype not in _INTEGERS:
        raise TypeError(f"target must hold integer class labels, got {target.dtype}: use target.long()")
    if target.shape != features.shape[:1]:
        raise ValueError(
            f"target must have shape ({features.shape[0]},) to go with the features, got {tuple(target.shape)}"
        )
    if len(target):
        _check_values(features, target, num_classes)


def _check_values(features: Tensor, target: Tensor, num_classes: int) -> None:
    low, high = (end.long() for end in target.aminmax())  # in uint8, 256 classes are 0
    # A sum is finite only if every entry is; the reverse is checked where the cheap test fails.
    suspicious = torch.stack([(low < 0) | (high >= num_classes), ~features.sum(dtype=torch.float32).isfinite()])
    if not suspicious.any():
        return
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"target must lie in 0..{num_classes - 1} for num_classes={num_classes}, "
            f"got values from {int(low)} to {int(high)}"
        )
    bad = ~features.isfinite().all(dim=1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"features hold NaN or infinite values in {int(bad.sum())} of {len(bad)} rows "
            f"(the first is row {first}): collapse cannot be measured on a diverged model"
        )
    if (largest := float(features.abs().amax())) > LARGEST:
        raise ValueError(f"features hold entries up to {largest:.3g}, whose squares overflow: rescale them first")


def check_not_meta(name: str, tensor: Tensor) -> None:
    """Check that a tensor is not on the meta device, where it has no values."""
    if tensor.is_meta:
        raise ValueError(f"{name} has no values, being on device meta: move it to a real device first")
