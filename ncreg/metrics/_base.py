"""The ground both metrics stand on: float64 states on a device that has float64, and a quiet empty shard."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ncreg.numerics import float64_device


class Float64Metric(Metric):
    """A torchmetrics.Metric whose states are float64 sums, and whose result is read anew at every compute()."""

    is_differentiable = False
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        # The classifier is read at compute time: a cached result would be stale after a training step.
        kwargs.setdefault("compute_with_cache", False)
        super().__init__(**kwargs)

    @property
    def home(self) -> torch.device:
        """Where the states live: the metric's device, or the CPU where that has no float64."""
        return float64_device(self.device)

    def _wrap_compute(self, compute: Callable) -> Callable:
        wrapped = super()._wrap_compute(compute)

        @functools.wraps(compute)
        def quiet(*args: Any, **kwargs: Any) -> Any:
            # A rank with an empty shard has nothing to update; without any sample at all compute() raises.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The ``compute`` method of metric", category=UserWarning)
                return wrapped(*args, **kwargs)

        return quiet

    def _apply(self, fn: Callable, exclude_state: Any = "") -> nn.Module:
        def keep_float64(tensor: Tensor) -> Tensor:  # and integers: labels and counts
            if tensor.is_floating_point() and tensor.dtype != torch.float64:
                return fn(tensor)
            device = fn(torch.empty(0, device=tensor.device)).device
            if not tensor.is_floating_point():
                return tensor.to(device)
            moved = fn(tensor) if float64_device(device) == device else tensor.cpu()
            return moved if moved.dtype == torch.float64 else tensor.to(moved.device)

        keep_float64.__qualname__ = str(fn)  # torchmetrics tells .half() from .to() by the function's name
        return super()._apply(keep_float64, exclude_state)
