"""Training and eval mode for a while: afterwards every submodule is in its own again."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from ncreg._checks import described

Runs = TypeVar("Runs", bound=Callable[..., Any])
Loader = TypeVar("Loader")


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


@contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled modules run as they are written: code that was compiled earlier calls no hook that is set since."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and its import takes long
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def set_own_mode(module: nn.Module, training: bool) -> None:
    """Set the mode of a module that holds finished parts, and of the empty places between them, but of no part."""
    for part in [module, *module.children()]:
        if part is module or type(part) is nn.Identity:
            part.training = training


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients and a fork of the random generators; every submodule's own mode comes back."""
    with modes_kept(*modules), torch.no_grad(), drawing_apart(*modules):
        for module in modules:
            module.eval()
        yield


@contextmanager
def drawing_apart(*modules: nn.Module, seed: int | None = None) -> Iterator[None]:
    """A fork of the random generators: torch's on the CPU and on the modules' devices, Python's and numpy's.

    Within, torch's begin at `seed`, or where they stand.

    Example:
        >>> with drawing_apart(seed=0):
        ...     first = torch.rand(2)
        >>> with drawing_apart(seed=0):
        ...     torch.equal(torch.rand(2), first)
        True
    """
    devices = sorted({p.device for module in modules for p in module.parameters() if p.device.type == "cuda"}, key=str)
    with torch.random.fork_rng(devices=devices):
        python, numpy = random.getstate(), np.random.get_state()
        if seed is not None:  # not by torch.manual_seed, which reaches every device
            for generator in (torch.default_generator, *(torch.cuda.default_generators[d.index] for d in devices)):
                generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def generators_kept(loader: Loader) -> Iterator[Loader]:
    """Whatever is read of a loader within, afterwards its own generators and those of its samplers are as before.

    A DataLoader draws from its generator whenever it is read, also without a shuffle: a seed for its workers. Another
    loader may have the same one.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> with generators_kept(torch.utils.data.DataLoader(range(4), shuffle=True, generator=draw)) as loader:
        ...     order = list(loader)
        >>> draw.get_state().equal(torch.Generator().manual_seed(0).get_state())
        True
    """
    states = [(generator, generator.get_state()) for generator in own_generators(loader)]
    try:
        yield loader
    finally:
        for generator, state in states:
            generator.set_state(state)


_HOLDERS = ("loader", "base_dataloader", "sampler", "batch_sampler", "dataset", "generator", "synchronized_generator")
"""Where loaders (timm's and Accelerate's hold one inside), samplers and data sets keep what draws."""


def own_generators(loader: Any) -> list[torch.Generator]:
    """The generators of a loader and of what it holds, each once."""
    seen: dict[int, Any] = {}
    waiting = [loader]
    while waiting:
        part = waiting.pop()
        if part is not None and id(part) not in seen:
            seen[id(part)] = part
            waiting += [getattr(part, name, None) for name in _HOLDERS]
    return [part for part in seen.values() if isinstance(part, torch.Generator)]


def in_eval_mode(model: Runs) -> Runs:
    """The model, after a check that none of its submodules is in training mode.

    Raises:
        TypeError: it cannot be called.
        ValueError: it is a module, or the bound method of one, with a submodule in training mode.
    """
    if not callable(model):
        raise TypeError(f"model must be callable, images to logits, got {described(model)}")
    owner = getattr(model, "__self__", model)  # a bound method's module
    if isinstance(owner, nn.Module):
        training = [name or type(owner).__name__ for name, module in owner.named_modules() if module.training]
        if training:
            shown = ", ".join(training[:3]) + (", ..." if len(training) > 3 else "")
            raise ValueError(f"model is in training mode ({shown}): call model.eval() first")
    return model
