"""Checks of what a TPTScheduler is given: hyperparameters, epochs, metrics and saved states."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from ncreg._checks import check_choice, check_integer, check_number

MIN_TERMINAL = 10
"""Least length of the terminal phase in epochs where none is given."""

_ROUNDING = 1e-6  # a fraction summed up in float32 may leave [0, 1] by this much

_MINIMUM = {
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
    checked = dict(settings)
    given = {name for name, value in checked.items() if not (value is None and name in _MAY_BE_NONE)}
    for name in given & _MINIMUM.keys():
        checked[name] = check_integer(name, checked[name], _MINIMUM[name])
    for name in given & {"threshold", "extend", "terminal_lr"}:
        checked[name] = check_number(name, checked[name])
    check_choice("terminal", checked["terminal"], ("cosine", "constant", "step"))
    check_choice("interval", checked["interval"], ("epoch", "update"))
    if not 0 < checked["threshold"] <= 1:
        raise ValueError(f"threshold={checked['threshold']}: a training accuracy in (0, 1], e.g. 0.999")
    if checked["extend"] is not None and not 0 <= checked["extend"] < math.inf:
        raise ValueError(f"extend={checked['extend']}: a finite factor >= 0, or None to record the onset only")
    if checked["terminal_lr"] is not None and not 0 < checked["terminal_lr"] < math.inf:
        raise ValueError(
            f"terminal_lr={checked['terminal_lr']}: a positive learning rate, or None for the rate at the onset"
        )
    longest, shortest = checked["max_terminal"], checked["min_terminal"]
    if longest is not None and longest < shortest:
        raise ValueError(f"max_terminal={longest} is below min_terminal={shortest}")
    return checked


def with_min_terminal(min_terminal: int | None, max_epochs: int) -> int:
    """The least length of the terminal phase: 10 where none is given; one that no run of `max_epochs` has is warned of.

    Example:
        >>> with_min_terminal(None, 5), with_min_terminal(20, 100)
        (10, 20)
    """
    if min_terminal is None:
        return MIN_TERMINAL
    if check_integer("min_terminal", min_terminal, 0) > check_integer("max_epochs", max_epochs, 1):
        warnings.warn(
            f"min_terminal={min_terminal} is above max_epochs={max_epochs}, the end of the run: the terminal phase "
            "will be shorter than it asks for; raise max_epochs, or lower min_terminal",
            UserWarning,
            stacklevel=3,
        )
    return min_terminal


def checked_progress(progress: Mapping[str, Any]) -> dict[str, Any]:
    """How far a run has come, from a saved state; its lists are copied.

    Raises:
        ValueError: a number of epochs below 0.
        TypeError: no list, or no number, where one belongs.
    """
    checked = dict(progress)
    for name in ("epoch", "_streak", "_still", "onset_epoch", "last_epoch"):
        if checked[name] is not None or name not in ("onset_epoch", "last_epoch"):
            checked[name] = check_integer(name, checked[name], 0)
    checked["_least"] = check_number("_least", checked["_least"])
    for name in ("regressions", "_peaks", "_starts", "lr"):
        values = checked[name]
        if not isinstance(values, list | tuple):
            raise TypeError(f"{name}={values!r} must be a list of numbers, not {type(values).__name__}")
        if name == "regressions":
            checked[name] = [check_integer(f"{name}[{place}]", epoch, 0) for place, epoch in enumerate(values)]
        else:
            checked[name] = [check_number(f"{name}[{place}]", rate) for place, rate in enumerate(values)]
    return checked


def checked_accuracy(metric: float) -> float:
    """The training accuracy in [0, 1]; a value outside by rounding alone is moved to the nearer end.

    Raises:
        ValueError: it is out of range, or NaN.
        TypeError: it is no number.
    """
    value = check_number("metric", metric)
    if not -_ROUNDING <= value <= 1 + _ROUNDING:  # also refuses nan
        raise ValueError(
            f"metric={value!r} is not a fraction in [0, 1]: pass the accuracy on clean training data, "
            "divided by 100 where it is in per cent"
        )
    return min(max(value, 0.0), 1.0)
