"""Checks of plain arguments that every part of the library shares; it imports nothing of ncreg."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from math import isfinite
from numbers import Integral, Real

import torch
from torch import Tensor


def check_flag(name: str, value: bool) -> bool:
    """True or False, and nothing that merely counts as one of them."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True or False, not {type(value).__name__}")
    return value


def _check_real(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_number(name: str, value: float) -> float:
    """A finite number."""
    _check_real(name, value)
    if not isfinite(value):
        raise ValueError(f"{name}={value} must be finite")
    return float(value)


def check_positive(name: str, value: float) -> float:
    """A finite number above zero."""
    _check_real(name, value)
    if not (isfinite(value) and value > 0):
        raise ValueError(f"{name}={value} must be finite and above 0")
    return float(value)


def check_share(name: str, value: float) -> float:
    """A number in [0, 1]."""
    _check_real(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} must be in [0, 1]")
    return float(value)


def check_word(name: str, value: str, known: Iterable[str]) -> str:
    """One of the words."""
    words = list(known)
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, words))}")
    return value


def tracing() -> bool:
    """Whether torch.jit.trace is looking on, which takes sizes for tensors and warns where one is compared."""
    return bool(torch._C._get_tracing_state())


def as_size(name: str, value: int, minimum: int) -> int:
    """`value` as an int of at least `minimum`; TypeError for a non-integer, ValueError below."""
    size = _as_integer(name, value)
    if size < minimum:
        raise ValueError(f"{name}={size} must be at least {minimum}")
    return size


def _as_integer(name: str, value: int) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:  # tensors and arrays have an __index__ that fails
        pass
    raise TypeError(f"{name}={value!r} must be an integer, not {type(value).__name__}")


def check_count(name: str, value: int, least: int = 1) -> int:
    """An int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")
    return int(value)


def check_class_counts(class_counts: Sequence[int] | Tensor) -> list[int]:
    """Training images of each class, at least one each, of two classes or more.

    Raises:
        TypeError: no integers.
        ValueError: fewer than two classes, or one without an image.
    """
    try:
        counts = list(class_counts.tolist() if isinstance(class_counts, Tensor) else class_counts)
    except TypeError:
        raise TypeError(f"class_counts must hold a whole number a class, got {class_counts!r}") from None
    if len(counts) < 2:
        raise ValueError(f"class_counts has {len(counts)} entries: a classifier needs at least 2 classes")
    return [check_count(f"class_counts[{index}]", count) for index, count in enumerate(counts)]
