"""Boundary checks shared by the closed forms: plain numbers in, plain numbers out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral
from typing import Any

Number = int | float


def number(**named: Number) -> None:
    """Raise unless every named value is a single number (zero-dimensional arrays and tensors pass)."""
    for name, value in named.items():
        if not hasattr(value, "__float__") or getattr(value, "ndim", 0) != 0:
            raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}")


def sequence(**named: Iterable[Any]) -> None:
    """Raise unless every named value can be iterated over and is no string."""
    for name, value in named.items():
        if isinstance(value, str) or getattr(value, "ndim", 1) != 1 or not isinstance(value, Iterable):
            raise TypeError(f"{name}={value!r} must be a sequence of numbers, not {type(value).__name__}")


def positive(**named: Number) -> None:
    """Raise unless every named number is finite and above zero."""
    for name, value in named.items():
        number(**{name: value})
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value!r}: must be finite and above 0")


def non_negative(**named: Number) -> None:
    """Raise unless every named number is finite and not below zero."""
    for name, value in named.items():
        number(**{name: value})
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value!r}: must be finite and not below 0")


def flag(**named: bool) -> None:
    """Raise unless every named value is True or False."""
    for name, value in named.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r} must be True or False, not {type(value).__name__}")


def count(least: int = 1, **named: int) -> None:
    """Raise unless every named number is whole and at least `least`."""
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")
