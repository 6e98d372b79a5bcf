"""Checks of what a metric is given: batches of features and labels, and the classifier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        check_real(name, value)
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
    low, high = target.aminmax()
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


def check_real(name: str, tensor: Tensor) -> None:
    """Refuse a tensor on the meta device, which has no values."""
    if tensor.is_meta:
        raise ValueError(f"{name} has no values, being on device meta: move it to a real device first")


class Reference:
    """A pointer to the classifier: copies of the metric share it, and it is no part of the metric's state."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> Reference:
        return Reference(memo.get(id(self.module), self.module))


def check_classifier(classifier: Any) -> None:
    """Check that a classifier has a tensor `.weight`.

    Raises:
        TypeError: there is no tensor `.weight`.
    """
    if not isinstance(getattr(classifier, "weight", None), Tensor):
        raise TypeError(
            f"classifier must have a tensor .weight of shape (num_classes, num_features), "
            f"got {type(classifier).__name__}: pass the last layer, e.g. model.head or model.get_classifier()"
        )


def read_classifier(
    classifier: Any, num_classes: int, num_features: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Weight (C, d) and bias (C,) in float64, as they are now.

    A head that brings its weight's rows to unit length in its forward pass says so by `class_vectors` (C, d): those
    decide, so those are measured.

    Raises:
        TypeError: the weight or the bias is no tensor.
        ValueError: the weight or the bias has another shape, or no values (on the meta device).
    """
    weight, bias = getattr(classifier, "class_vectors", classifier.weight), getattr(classifier, "bias", None)
    for name, value in {"weight": weight, "bias": bias}.items():
        if isinstance(value, Tensor):
            check_real(f"classifier.{name}", value)
        elif name == "weight" or not (value is None or value is False):
            raise TypeError(f"classifier.{name} must be a torch.Tensor, got {type(value).__name__}")
    weight = weight.detach()
    if tuple(weight.shape) != (num_classes, num_features):
        raise ValueError(
            f"classifier.weight must have shape ({num_classes}, {num_features}), got {tuple(weight.shape)}"
        )
    weight = weight.to(device=device, dtype=torch.float64)
    if bias is None or bias is False:
        return weight, weight.new_zeros(num_classes)
    if tuple(bias.shape) != (num_classes,):
        raise ValueError(f"classifier.bias must have shape ({num_classes},), got {tuple(bias.shape)}")
    return weight, bias.detach().to(device=device, dtype=torch.float64)


def read_finite_classifier(
    classifier: Any, num_classes: int, num_features: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`read_classifier`, and a check that all entries are finite.

    Raises:
        ValueError: the weight or the bias has another shape, or entries that are NaN, infinite or beyond 1e100.
    """
    weight, bias = read_classifier(classifier, num_classes, num_features, device)
    largest = torch.stack([weight.abs().amax(), bias.abs().amax()])  # NaN is passed on
    if not (largest <= LARGEST).all():
        name, value = ("bias", largest[1]) if largest[0] <= LARGEST else ("weight", largest[0])
        raise ValueError(
            f"classifier.{name} holds NaN, infinite or huge values (the largest is {float(value):.3g}): "
            "collapse cannot be measured on a diverged model"
        )
    return weight, bias
