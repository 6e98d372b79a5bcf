"""Which arguments a model by name takes, where its builder says no more than that it does not take one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


def unknown_argument(error: TypeError, args: Mapping[str, Any], build: Callable[[], nn.Module]) -> str | None:
    """The unknown key of `model_args` that an error speaks of, its value, and the keys there are.

    Args:
        error: what the builder raised.
        args: `model_args`.
        build: builds the model without them, to see of which class it is.

    Returns:
        The words for an error; None where the error is about something else.
    """
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if found is None or found[1] not in args:
        return None
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        kind = type(build())
    return f"model_args[{found[1]!r}]={args[found[1]]!r} is unknown; {kind.__name__} takes {', '.join(_keywords(kind))}"


def _keywords(kind: type) -> list[str]:
    """The names of a constructor's arguments; where it hands further ones on, those of its base class too."""
    names: dict[str, None] = {}
    for base in kind.__mro__:
        if base is nn.Module:
            break
        parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        names |= {p.name: None for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return [name for name in names if name not in ("self", "num_classes")]
