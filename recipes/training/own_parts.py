"""Heads and last norms of the user's own: model.head=my_head.py:MyHead, known to swap_head under this name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ncreg.heads import HEADS
from ncreg.norms import NORMS
from recipes.core.config import ModelConfig
from recipes.core.errors import UserError
from recipes.core.own_code import in_a_line, is_own, load_own
from recipes.core.suggestions import a_kind


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

    def make(width: int, num_classes: int | None = None, *, seed: int | None = None, **args: Any) -> nn.Module:
        sizes = (width,) if num_classes is None else (width, num_classes)
        drawn = {} if seed is None else {"seed": seed}
        try:
            part = factory(*sizes, **given_what_it_takes(factory, drawn), **args)
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise ValueError(f"{name}: {in_a_line(error)}") from None
        if not isinstance(part, nn.Module):
            raise ValueError(f"{name} gives {a_kind(part)}, not an nn.Module")
        return part

    return make


def check_own_head(name: str, head: nn.Module, num_classes: int, num_features: int) -> None:
    """Refuse a head of the user's own without class vectors, which the measures of collapse read.

    Raises:
        UserError: its weight is not (num_classes, num_features).
    """
    weight = getattr(head, "weight", None)
    if is_own(name) and not (isinstance(weight, Tensor) and weight.shape == (num_classes, num_features)):
        found = "none" if weight is None else f"{type(weight).__name__} {tuple(getattr(weight, 'shape', ()))}"
        raise UserError(
            f"model.head={name}: the measures of collapse read its .weight, a tensor ({num_classes}, {num_features}) "
            f"with a row for each class as in nn.Linear; it has {found}"
        )
