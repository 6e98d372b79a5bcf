"""float64 wherever a tensor lives: Apple's MPS, and some others, have none."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def float64_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU where the device has no float64."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return torch.device("cpu")
    return device


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, on its own device, or on the CPU where that has no float64; differentiable."""
    place = float64_device(tensor.device)
    return tensor.double() if place == tensor.device else tensor.to(place).double()
