"""What training tools put around a model or its parts: wrappers, the names they lengthen, weights that are computed."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_model.model")
"""Where DistributedDataParallel (and most others), torch.compile, FSDP, activation checkpointing and PEFT keep it."""

_IN_A_NAME = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(map(re.escape, _WRAPPERS))})\.")
_MARK = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARAMETRIZED = re.compile(r"(?:^|(?<=\.))parametrizations\.([^.]+)\..+")


def plain_name(name: str) -> str:
    """The name of a parameter without wrappers, wherever they stand in it.

    Example:
        >>> plain_name("module.backbone._orig_mod.blocks.0._checkpoint_wrapped_module.norm1.weight")
        'backbone.blocks.0.norm1.weight'
    """
    return _IN_A_NAME.sub("", name)


def without_marks(name: str) -> str:
    """The name of a tensor without those wrappers' names that no model gives to a part of its own.

    Example:
        >>> without_marks("module.blocks.0._orig_mod.norm1.weight")
        'module.blocks.0.norm1.weight'
    """
    return _MARK.sub("", name)


def weight_names(model: nn.Module) -> dict[str, str]:
    """Name of each parameter → plain name of the weight that it is, or that a parametrization or hook makes of it.

    Example:
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3), "bias")
        >>> weight_names(layer)
        {'weight': 'weight', 'parametrizations.bias.original0': 'bias', 'parametrizations.bias.original1': 'bias'}
    """
    names = {name: _PARAMETRIZED.sub(r"\1", plain_name(name)) for name, _ in model.named_parameters()}
    for path, module in model.named_modules():
        made = [_made_by(hook) for hook in module._forward_pre_hooks.values() if computes(hook)]
        for weight in made:
            for own in (f"{path}.{weight}{end}".lstrip(".") for end in ("_orig", "_g", "_v")):
                if own in names:
                    names[own] = plain_name(f"{path}.{weight}".lstrip("."))
    return names


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside all of its wrappers, or itself; of PEFT's `modules_to_save` the copy that is called.

    Example:
        >>> unwrapped(nn.DataParallel(nn.Linear(2, 3)))
        Linear(in_features=2, out_features=3, bias=True)
    """
    copies: Any = module._modules.get("modules_to_save")
    if copies is not None and "original_module" in module._modules:
        peft: Any = module
        active = [] if peft.disable_adapters else [name for name in peft.active_adapters if name in copies]
        return unwrapped(copies[active[0]] if active else peft.original_module)
    for path in _WRAPPERS:
        inner = module
        for step in path.split("."):
            # A wrapper holds one module; a model may have a part of that name among others.
            inner = inner._modules.get(step) if len(inner._modules) == 1 else None  # type: ignore[assignment]
            if inner is None:
                break
        else:
            return unwrapped(inner)
    return module


def computes(hook: Any) -> bool:
    """Whether a forward pre-hook computes a weight from others: torch's pruning, its older weight and spectral norm."""
    return isinstance(hook, WeightNorm | SpectralNorm) or _prunes(hook)


def _prunes(hook: Any) -> bool:
    pruning = sys.modules.get("torch.nn.utils.prune")  # torch does not import it by itself
    return pruning is not None and isinstance(hook, pruning.BasePruningMethod)


def _made_by(hook: Any) -> str:
    """The name of the weight that a hook computes."""
    name: str = hook._tensor_name if _prunes(hook) else hook.name
    return name


def fresh_weights(module: nn.Module) -> dict[str, Tensor]:
    """Such weights as the module's next forward pass would compute them: after a training step it holds older ones.

    Example:
        >>> from torch.nn.utils import prune
        >>> layer = prune.l1_unstructured(nn.Linear(1, 2), "weight", amount=0)
        >>> layer.weight_orig.data.fill_(4.0)
        tensor([[4.],
                [4.]])
        >>> fresh_weights(layer)["weight"].tolist()
        [[4.0], [4.0]]
    """
    if not any(computes(hook) for hook in module._forward_pre_hooks.values()):
        return {}
    with as_next_forward(module) as found:
        return found


@contextmanager
def as_next_forward(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The module with the weights of `fresh_weights`, which are given; afterwards it holds its own again."""
    found: dict[str, Tensor] = {}
    before: dict[str, Any] = {}
    try:
        for hook in [hook for hook in module._forward_pre_hooks.values() if computes(hook)]:
            name = _made_by(hook)
            before.setdefault(name, getattr(module, name))
            found[name] = _computed(hook, module)  # perhaps from what another hook did
            setattr(module, name, found[name])
        yield found
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _computed(hook: Any, module: nn.Module) -> Tensor:
    weight: Tensor
    if _prunes(hook):
        weight = hook.apply_mask(module)
    elif isinstance(hook, SpectralNorm):  # its estimate of the largest singular value stays
        weight = hook.compute_weight(module, do_power_iteration=False)
    else:
        weight = hook.compute_weight(module)
    return weight
