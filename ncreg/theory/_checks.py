"""Boundary checks shared by the closed forms: plain numbers in, plain numbers out."""

from __future__ import annotations

import math
from numbers import Integral

Number = int | float


def classes(num_classes: int, least: int = 2) -> int:
    """Return `num_classes` when it is a whole number of at least `least`."""
    if isinstance(num_classes, bool) or not isinstance(num_classes, Integral):
        raise TypeError(f"num_classes must be an int, got {type(num_classes).__name__}")
    if num_classes < least:
        raise ValueError(f"num_classes={num_classes}: at least {least} classes are needed")
    return int(num_classes)


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
