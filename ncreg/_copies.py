"""Copies of modules, whatever their parts keep from the last forward pass."""

import copy
from collections import deque
from collections.abc import Iterator
from types import ModuleType
from typing import Any, TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def copied(module: Module) -> Module:
    """copy.deepcopy, also of modules that keep a computed tensor: those come along without their history.

    Pruning and torch.nn.utils.weight_norm keep the weight that they compute, anew in each forward pass; a layer may
    keep its last output. deepcopy alone refuses such tensors. A view of a parameter, such as a tied `weight.t()`, is
    still refused: a copy would be tied no more.

    Example:
        >>> import torch
        >>> from torch.nn.utils import prune
        >>> layer = prune.l1_unstructured(nn.Linear(3, 2), "weight", amount=4)
        >>> again = copied(layer)
        >>> torch.equal(again(torch.ones(1, 3)), layer(torch.ones(1, 3)))
        True
    """
    kept = [tensor for part in module.modules() for tensor in _tensors([vars(part), part._buffers], set())]
    computed = [tensor for tensor in kept if not (tensor.is_leaf or isinstance(tensor._base, nn.Parameter))]
    return copy.deepcopy(module, {id(tensor): tensor.detach().clone() for tensor in computed})


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Tensors in nested containers and plain objects, such as dataclasses, which may hold each other; no modules."""
    if isinstance(value, Tensor):
        yield value
    elif not isinstance(value, nn.Module | type | ModuleType) and id(value) not in seen:
        seen.add(id(value))
        for item in _items(value):
            yield from _tensors(item, seen)


def _items(value: Any) -> Iterator[Any]:
    """What an object holds, as far as copy.deepcopy would copy it."""
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from value
    elif not callable(value):
        yield from getattr(value, "__dict__", {}).values()
        yield from (getattr(value, name) for name in _slots(type(value)) if hasattr(value, name))


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        names = vars(base).get("__slots__", ())
        yield from (names,) if isinstance(names, str) else names
