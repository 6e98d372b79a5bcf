"""After averaging weights: the running statistics that belong to them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ncreg.norms import LastBatchNorm


@torch.no_grad()
def update_bn(loader: Iterable[Any], model: nn.Module, device: torch.device | str | int | None = None) -> None:
    """Running statistics of every batch norm, `LastBatchNorm` included, anew from one pass over the data.

    Averaged weights (SWA, moving averages) need it: the statistics that they inherit are of other weights. As
    torch.optim.swa_utils.update_bn, which passes LastBatchNorm by: mean over all batches of their mean and variance,
    the whole model in training mode. Afterwards every module is in the mode in which it was.

    Args:
        loader: batches: a tensor, or a tuple or list whose first item is one. On several ranks each reads its own.
        model: whose norms are to be brought up to date.
        device: where batches go first; None leaves them where they are.

    Raises:
        TypeError: a batch that is neither a tensor nor begins with one.
        ValueError: a loader without batches, or a batch of one sample.

    Example:
        >>> import ncreg
        >>> norm = ncreg.LastBatchNorm(2)
        >>> update_bn([torch.tensor([[1.0, 2.0], [3.0, 2.0]])], norm)
        >>> norm.running_mean
        tensor([2., 2.])
    """
    norms = [m for m in model.modules() if isinstance(m, LastBatchNorm | nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    batches = iter(loader)
    first = next(batches, None)
    if first is None:
        raise ValueError("loader gave no batch: the running statistics stay as they were")
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    try:
        model.train()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # all batches count alike
        for batch in chain([first], batches):
            model(_images(batch) if device is None else _images(batch).to(device))
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


def _images(batch: Any) -> Tensor:
    """The first tensor of a batch."""
    images = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(images, Tensor):
        raise TypeError(f"a batch must be a tensor or begin with one, got {type(images).__name__}")
    return images
