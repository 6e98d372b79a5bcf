"""A copy of a sharded model with whole parameters: FSDP2 refuses copy.deepcopy, and DTensors hold one rank's part."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ncreg.numerics import whole


def is_sharded(module: nn.Module) -> bool:
    """Whether a parameter or buffer is spread over ranks, or a part is FSDP's."""
    return bool(_sharded(module)) or any(isinstance(part, FSDPModule) for part in module.modules())


def whole_copy(module: nn.Module) -> nn.Module:
    """A copy without FSDP whose parameters and buffers are whole tensors; every rank of the mesh must call."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # what a forward pass left gathered is in the precision of that pass
    memo: dict[int, Any] = {id(tensor): _gathered(tensor) for tensor in _sharded(module)}
    managed = [part for part in module.modules() if hasattr(part, "_is_fsdp_managed_module")]
    for part in managed:
        plain = next(kind for kind in type(part).__mro__ if not issubclass(kind, FSDPModule))
        memo[id(part)] = plain.__new__(plain)
    for part in managed:
        memo[id(part)].__dict__.update(copy.deepcopy(_without_fsdp(vars(part)), memo))
    return copy.deepcopy(module, memo)


def _without_fsdp(attributes: dict[str, Any]) -> dict[str, Any]:
    """A module's attributes without FSDP's marks, states and hooks."""
    kept = {
        name: value
        for name, value in attributes.items()
        if not name.startswith(("__composable_api", "_is_fsdp", "_fsdp"))
    }
    hooks = {name: type(value)(_others(value)) for name, value in kept.items() if name.endswith("_hooks") and value}
    return kept | hooks


def _others(hooks: dict[int, Any]) -> dict[int, Any]:
    return {key: hook for key, hook in hooks.items() if not str(hook.__module__).startswith("torch.distributed")}


def _sharded(module: nn.Module) -> list[Tensor]:
    return [tensor for tensor in (*module.parameters(), *module.buffers()) if isinstance(tensor, DTensor)]


def _gathered(tensor: Tensor) -> Tensor:
    values = whole(tensor.detach()).clone()
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
