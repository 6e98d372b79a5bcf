"""Wrappers that training tools put around a model, or around parts of it, and the names they lengthen."""

import re

from torch import nn

_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_model.model")
"""Where DistributedDataParallel (and most others), torch.compile, FSDP, activation checkpointing and PEFT keep it."""

_IN_A_NAME = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(map(re.escape, _WRAPPERS))})\.")


def plain_name(name: str) -> str:
    """The name of a parameter without wrappers, wherever they stand in it.

    Example:
        >>> plain_name("module.backbone._orig_mod.blocks.0._checkpoint_wrapped_module.norm1.weight")
        'backbone.blocks.0.norm1.weight'
    """
    return _IN_A_NAME.sub("", name)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside all of its wrappers, or itself.

    Example:
        >>> unwrapped(nn.DataParallel(nn.Linear(2, 3)))
        Linear(in_features=2, out_features=3, bias=True)
    """
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
