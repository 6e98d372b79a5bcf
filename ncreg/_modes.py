"""Training and eval mode for a while: afterwards every submodule is in its own again."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def modes_kept(*modules: nn.Module) -> Iterator[None]:
    """Whatever mode the modules are set to within, afterwards every submodule has its own.

    The way back leads through `train()`, where some backbones (timm's LeViT and TinyViT) drop what they keep from one
    pass in eval mode to the next: weights that are loaded or trained later would not reach it.

    Example:
        >>> pair = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with modes_kept(pair):
        ...     pair = pair.eval()
        >>> pair.training, pair[0].training, pair[1].training
        (True, True, False)
    """
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        yield
    finally:
        for module in modules:
            module.train()
        for part, training in modes:
            if not training and part.training:
                part.eval()
        for part, training in modes:
            part.training = training


def set_own_mode(module: nn.Module, training: bool) -> None:
    """Set the mode of a module that holds finished parts, and of the empty places between them, but of no part."""
    for part in [module, *module.children()]:
        if part is module or type(part) is nn.Identity:
            part.training = training


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients and a fork of the random generators; every submodule's own mode comes back."""
    devices = {p.device for module in modules for p in module.parameters() if p.device.type == "cuda"}
    with modes_kept(*modules), torch.no_grad(), torch.random.fork_rng(devices=sorted(devices, key=str)):
        for module in modules:
            module.eval()
        yield
