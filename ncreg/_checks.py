"""Checks of plain arguments, shared by the whole library; it imports nothing of ncreg.

Each check returns the value as a plain Python one. Numbers may also be numpy's or zero-dimensional tensors; True and
False are no numbers. A value of another kind is a TypeError, a value out of range a ValueError; both name the argument.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from math import isfinite
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

Number = int | float


def check_flag(name: str, value: Any) -> bool:
    """True or False, and nothing that merely counts as one of them."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True or False, not {type(value).__name__}")
    return value


def check_choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """One of the given words."""
    words = list(choices)
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, words))}")
    return value


def check_integer(name: str, value: Any, minimum: int | None = None, maximum: int | None = None) -> int:
    """A whole number, from `minimum` to `maximum` where these are given."""
    given = _scalar(value)
    if isinstance(given, bool) or not isinstance(given, Integral):
        raise TypeError(f"{name}={value!r} must be an integer, not {type(value).__name__}")
    number = int(given)
    if minimum is not None and maximum is not None and not minimum <= number <= maximum:
        raise ValueError(f"{name}={number} must be in {minimum}..{maximum}")
    if minimum is not None and number < minimum:
        raise ValueError(f"{name}={number} must be at least {minimum}")
    return number


def check_seed(seed: Any) -> int:
    """An integer that seeds a torch generator."""
    seed = check_integer("seed", seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed={seed} must have at most 64 bits: from -2**63 to 2**64 - 1")
    return seed


def check_num_classes(num_classes: Any) -> int:
    """A number of classes: at least 2."""
    return check_integer("num_classes", num_classes, 2)


def check_class_counts(class_counts: Any, min_classes: int = 2) -> list[int]:
    """The number of samples of each class, at least 1 each, of at least `min_classes` classes."""
    counts = [
        check_integer(f"class_counts[{c}]", n, 1) for c, n in enumerate(check_items("class_counts", class_counts))
    ]
    if len(counts) < min_classes:
        found = f"has {len(counts)} entries" if counts else "is empty"
        raise ValueError(f"class_counts {found}: give the number of samples of at least {min_classes} classes")
    return counts


def check_keywords(
    name: str, given: Mapping[str, Any], function: Callable[..., Any], besides: Iterable[str] = ()
) -> None:
    """Keyword arguments that a function has, `besides` those that its caller fills in; all where it takes any."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    known = [p.name for p in parameters if p.kind not in positional and p.name not in set(besides)]
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{name}[{key!r}]={value!r} is unknown; known: {', '.join(known) or 'none'}")


def described(value: Any) -> str:
    """The type of a value, for errors that refuse it, and the value itself where that is a word or a number."""
    kind = type(value).__name__
    return f"{kind} {value!r}" if isinstance(value, str | bytes | Number) else kind


def check_number(name: str, value: Any) -> float:
    """A single number, perhaps NaN or infinite."""
    given = _scalar(value)
    if isinstance(given, bool) or not isinstance(given, Real):
        raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}")
    return float(given)


def check_constant(name: str, value: Any, owner: str) -> Any:
    """The value as it is, where it is no tensor that is to be learned: its number alone would be kept."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(
            f"{name} requires a gradient, and is a constant here: to learn it, set it on the {owner} that was built, "
            f"{owner}.{name} = torch.nn.Parameter(torch.tensor(…))"
        )
    return value


def check_finite(name: str, value: Any) -> float:
    """A finite number."""
    number = check_number(name, value)
    if not isfinite(number):
        raise ValueError(f"{name}={value} must be finite")
    return number


def check_positive(name: str, value: Any) -> float:
    """A finite number above 0."""
    number = check_number(name, value)
    if not (isfinite(number) and number > 0):
        raise ValueError(f"{name}={value} must be finite and above 0")
    return number


def check_non_negative(name: str, value: Any) -> float:
    """A finite number, 0 or above."""
    number = check_number(name, value)
    if not (isfinite(number) and number >= 0):
        raise ValueError(f"{name}={value} must be finite and at least 0")
    return number


def check_fraction(name: str, value: Any) -> float:
    """A number in [0, 1]."""
    number = check_number(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name}={value} must be in [0, 1]")
    return number


def check_numbers(name: str, values: Any) -> list[float]:
    """The numbers of a list, a tuple, or an array or tensor of one axis."""
    return [check_number(f"{name}[{place}]", value) for place, value in enumerate(check_items(name, values))]


def plain_values(value: Any) -> Any:
    """A nested value with Python's own numbers, strings and lists in place of numpy's and torch's, as files hold them.

    Example:
        >>> plain_values({"scale": torch.tensor(2.5), "permutation": torch.tensor([1, 0])})
        {'scale': 2.5, 'permutation': [1, 0]}
    """
    if isinstance(value, Mapping):
        return {key: plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple)(map(plain_values, value))
    return value.tolist() if hasattr(value, "tolist") else value


def _scalar(value: Any) -> Any:
    """The number that a numpy scalar or a tensor of one element holds; any other value as it is."""
    if hasattr(value, "item"):
        with suppress(ValueError, RuntimeError):  # it holds several numbers, or none (on the meta device)
            return value.item()
    return value


def check_items(name: str, values: Any) -> list[Any]:
    """The items of a sequence of one axis."""
    if isinstance(values, str) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) != 1:
        raise TypeError(f"{name}={values!r} must be a sequence of numbers, not {type(values).__name__}")
    return values.tolist() if hasattr(values, "tolist") else list(values)


def check_indices(classes: Tensor, num_classes: int | None = None) -> None:
    """Refuse what are no indices of classes; values are looked at where that costs no wait and no trace is made.

    Raises:
        TypeError: not integers.
        ValueError: another shape than (rows,), or an index below 0 or beyond the last class.
    """
    if not isinstance(classes, Tensor) or classes.is_floating_point() or classes.dtype == torch.bool:
        raise TypeError(f"classes must be a tensor of integers, indices of classes, not {described(classes)}")
    if classes.ndim != 1:
        raise ValueError(f"classes of shape {tuple(classes.shape)}: indices stand in one row, (rows,)")
    if torch.jit._trace.is_tracing() or torch.compiler.is_compiling():
        return
    if classes.device.type != "cpu" or not classes.shape[0]:
        return
    lowest, highest = (int(end) for end in classes.long().aminmax())  # torch knows no minimum of uint16
    if lowest < 0 or (num_classes is not None and highest >= num_classes):
        bound = "not negative" if num_classes is None else f"in 0 to {num_classes - 1}"
        raise ValueError(f"classes go from {lowest} to {highest}: indices must be {bound}")
