"""Heads and last norms of the user's own: model.head=my_head.py:MyHead, known to swap_head under this name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ncreg.heads import HEADS
from ncreg.norms import NORMS
from recipes.core.config import ModelConfig
from recipes.core.own_code import in_a_line, is_own, load_own


def register_own_parts(model: ModelConfig) -> None:
    """Make the head and norm of a configuration known to `swap_head`, and so to `ncreg.load_classifier`.

    Raises:
        UserError: their code cannot be loaded.
    """
    for key, name, known in (("model.head", model.head, HEADS), ("model.norm", model.norm, NORMS)):
        if is_own(name):
            known[name] = _maker(load_own(name, key), name)


def given_what_it_takes(factory: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Those of the offered arguments that a function or class has parameters for.

    Example:
        >>> given_what_it_takes(lambda features, num_classes: None, {"num_classes": 3, "seed": 0})
        {'num_classes': 3}
    """
    parameters = inspect.signature(factory).parameters
    return {name: value for name, value in offered.items() if name in parameters}


def _maker(factory: Callable[..., nn.Module], name: str) -> Callable[..., nn.Module]:
    """The class of the user's, without the seed where it takes none; what goes wrong in it is a ValueError."""

    def make(*sizes: int, seed: int | None = None, **args: Any) -> nn.Module:
        try:
            part = factory(*sizes, **given_what_it_takes(factory, {} if seed is None else {"seed": seed}), **args)
        except Exception as error:  # the user's code may raise anything
            raise ValueError(f"{name}: {in_a_line(error)}") from None
        if not isinstance(part, nn.Module):
            raise ValueError(f"{name} gives a {type(part).__name__}, not an nn.Module")
        return part

    return make
