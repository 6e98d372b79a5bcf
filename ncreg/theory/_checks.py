"""Boundary checks shared by the closed forms: plain numbers in, plain numbers out."""

from __future__ import annotations

import math
from numbers import Integral

Number = int | float


def positive(**named: Number) -> None:
    """Raise unless every named number is finite and above zero."""
    for name, value in named.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value!r}: must be finite and above 0")


def non_negative(**named: Number) -> None:
    """Raise unless every named number is finite and not below zero."""
    for name, value in named.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value!r}: must be finite and not below 0")


def count(least: int = 1, **named: int) -> None:
    """Raise unless every named number is whole and at least `least`."""
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")
