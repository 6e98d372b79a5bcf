"""Precision and random numbers: float64 wherever a tensor lives (Apple's MPS has none), seeded generators, dtypes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from ncreg._checks import check_seed

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@functools.cache
def float64_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU where the device has no float64."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return torch.device("cpu")
    return device


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs: told by name, since compiled code and gradients cannot go to the CPU."""
    return torch.float32 if device.type == "mps" else torch.float64


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, on its own device, or on the CPU where that has no float64; differentiable."""
    place = float64_device(tensor.device)
    return tensor.double() if place == tensor.device else tensor.to(place).double()


def exact(tensor: Tensor) -> Tensor:
    """The tensor in float64 on the CPU, without a gradient.

    Moved before it is cast: of an Apple GPU torch 2.14 gives zeros where one call does both, other versions an error.
    """
    return tensor.detach().cpu().double()


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32 if it is in half precision: too coarse for sums, exponentials and differences of logits."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def products_rounded() -> bool:
    """Whether torch may round the factors of float32 matrix products, to TF32 or bfloat16.

    `torch.set_float32_matmul_precision`, `allow_tf32` (timm's train.py) and the backends' `fp32_precision` allow it.
    """
    modules = torch.backends.cuda, torch.backends.mkldnn
    words = [getattr(getattr(module, "matmul", None), "fp32_precision", None) for module in modules]
    if None in words:  # torch 2.8 has the first two switches alone, which later versions cannot always read
        return torch.get_float32_matmul_precision() != "highest"
    return not {"tf32", "bf16"}.isdisjoint(words)


def seeded(seed: int) -> torch.Generator:
    """A generator of one's own, on the CPU whatever the default device.

    Raises:
        TypeError: for a seed that is no integer.
        ValueError: for one that 64 bits do not hold.
    """
    return torch.Generator(device="cpu").manual_seed(check_seed(seed))


@contextmanager
def drawn_for(tensor: Tensor) -> Iterator[None]:
    """What is drawn within has the tensor's dtype, float32 at least, whatever torch's default is.

    Example:
        >>> with drawn_for(torch.zeros(1, dtype=torch.float64)):
        ...     drawn = torch.rand(1)
        >>> drawn.dtype, torch.get_default_dtype()
        (torch.float64, torch.float32)
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.promote_types(tensor.dtype, torch.float32))
    try:
        yield
    finally:
        torch.set_default_dtype(default)


@torch.no_grad()
def fill(tensor: Tensor, values: Tensor) -> None:
    """Write values into a parameter or buffer, on whatever device, in whatever dtype, sharded or whole."""
    if is_dtensor(tensor):
        from torch.distributed.tensor import distribute_tensor  # half a second, for sharded models alone

        values = values.to(tensor.device, tensor.dtype)
        values = distribute_tensor(values, tensor.device_mesh, tensor.placements)
    tensor.copy_(values)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of one that is spread over ranks, every one of which must then call."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def is_dtensor(tensor: Tensor | None) -> TypeGuard[DTensor]:
    """Whether a tensor is spread over ranks; none is where torch.distributed.tensor has not been imported."""
    kinds = sys.modules.get("torch.distributed.tensor")
    return kinds is not None and isinstance(tensor, kinds.DTensor)


def is_composed(value: object) -> bool:
    """Whether it is a tensor that is made of others, as torch's subclasses are: quantized, or spread over ranks."""
    return isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__")


def check_plain(module: nn.Module, advice: str, prefix: str = "") -> None:
    """Refuse tensors that do not hold their numbers plainly: quantized ones (torchao), or those spread over ranks.

    Raises:
        ValueError: one is there; the message ends with the advice, or says how to gather it.
    """
    gather = (
        "load its whole state (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True) "
        "into one that is not sharded, and take that"
    )
    for name, value in module.state_dict(prefix=prefix).items():
        if is_composed(value):
            way_out = gather if is_dtensor(value) else advice
            raise ValueError(f"{name} is of class {type(value).__name__}, not a plain tensor: {way_out}")


def as_float(dtype: torch.dtype | None) -> torch.dtype | None:
    """`dtype` where it is floating-point or None; others would round class vectors to zeros."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype={dtype} must be a floating-point dtype, such as torch.float32")
    return dtype
