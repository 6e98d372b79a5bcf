"""What a TPTScheduler is told, checked at the door: hyperparameters, epochs, metrics."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from contextlib import suppress
from numbers import Real
from typing import Any

from ncreg._checks import check_word

_ROUNDING = 1e-6  # a share summed up in float32 may miss [0, 1] by so much

_LEAST = {
    "max_epochs": 1,
    "patience": 1,
    "min_terminal": 0,
    "ramp_epochs": 0,
    "max_terminal": 0,
    "stop_patience": 1,
}
_MAY_BE_NONE = ("max_terminal", "stop_patience", "extend", "terminal_lr")


def checked_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters as plain numbers and words.

    Raises:
        ValueError: one out of range.
        TypeError: no number where one belongs.
    """
    given = dict(settings)
    known = {name for name, value in given.items() if not (value is None and name in _MAY_BE_NONE)}
    for name in known & _LEAST.keys():
        given[name] = whole(name, given[name], _LEAST[name])
    for name in known & {"threshold", "extend", "terminal_lr"}:
        given[name] = number(name, given[name])
    check_word("terminal", given["terminal"], ("cosine", "constant", "step"))
    check_word("interval", given["interval"], ("epoch", "update"))
    if not 0 < given["threshold"] <= 1:
        raise ValueError(f"threshold={given['threshold']}: a training accuracy in (0, 1], e.g. 0.999")
    if given["extend"] is not None and not 0 <= given["extend"] < math.inf:
        raise ValueError(f"extend={given['extend']}: a finite factor >= 0, or None to record the onset only")
    if given["terminal_lr"] is not None and not 0 < given["terminal_lr"] < math.inf:
        raise ValueError(
            f"terminal_lr={given['terminal_lr']}: a positive learning rate, or None for the rate at the onset"
        )
    longest, least = given["max_terminal"], given["min_terminal"]
    if longest is not None and longest < least:
        raise ValueError(f"max_terminal={longest} is below min_terminal={least}")
    return given


def checked_progress(progress: Mapping[str, Any]) -> dict[str, Any]:
    """How far a run has come, as a state tells it; copies.

    Raises:
        ValueError: a count that is none.
        TypeError: no list, or no number, where one belongs.
    """
    found = dict(progress)
    for name in ("epoch", "_streak", "_still", "onset_epoch", "last_epoch"):
        if found[name] is not None or name not in ("onset_epoch", "last_epoch"):
            found[name] = whole(name, found[name], 0)
    found["_least"] = number("_least", found["_least"])
    for name in ("regressions", "_peaks", "_starts", "lr"):
        if not isinstance(found[name], list | tuple):
            raise TypeError(f"{name}={found[name]!r} must be a list of numbers, not {type(found[name]).__name__}")
        check = number if name != "regressions" else whole
        found[name] = [check(f"{name}[{place}]", value) for place, value in enumerate(found[name])]
    return found


def whole(name: str, value: int, least: int = 0) -> int:
    """`value` as an int of at least `least`; numpy's and torch's integers are some, True and 1.0 are none."""
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or found < least:
        raise ValueError(f"{name}={value!r}: a whole number of epochs, at least {least}")
    return found


def number(name: str, value: float) -> float:
    """`value` as a float; numpy's and torch's single numbers are some, True, strings and lists are none."""
    single: Any = value
    if hasattr(value, "item"):
        with suppress(ValueError, RuntimeError):  # more than one number, or none there (meta)
            single = value.item()
    if isinstance(single, bool) or not isinstance(single, Real):
        raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}")
    return float(single)


def share(metric: float) -> float:
    """The training accuracy, in [0, 1] but for rounding.

    Raises:
        ValueError: it is out of range, or NaN.
        TypeError: it is no number.
    """
    value = number("metric", metric)
    if not -_ROUNDING <= value <= 1 + _ROUNDING:  # also refuses nan
        raise ValueError(
            f"metric={value!r} is not a share in [0, 1]: pass the accuracy on clean training data, "
            "divided by 100 where it is in per cent"
        )
    return min(max(value, 0.0), 1.0)
