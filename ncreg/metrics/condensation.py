"""How alike the images of a batch are to each BatchNorm."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ncreg._checks import described
from ncreg._modes import in_eval_mode, uncompiled
from ncreg.norms import LastBatchNorm
from ncreg.numerics import in_float64


@torch.no_grad()
def batch_norm_condensation(model: nn.Module, images: Float[Tensor, "batch ..."]) -> dict[str, float]:
    """Mean cosine between two images of a batch at the input of each BatchNorm: (B·‖mean_i u_i‖² − 1)/(B − 1).

    u_i is the input of image i, all positions side by side, over its length (0 where that is 0). 1: the images are the
    same to this layer but for scale; 0: no direction in common. O(Bd), by the mean in place of all pairs.

    Args:
        model: in eval mode, with BatchNorm layers, `LastBatchNorm` among them.
        images: at least two.

    Raises:
        TypeError: no module.
        ValueError: fewer than two images, a model with a part in training mode (its statistics would change) or without
            a BatchNorm that runs.

    Source: Wang et al., "Unified Batch Normalization: Identifying and Alleviating the Feature Condensation in Batch
    Normalization and a Unified Framework" (arXiv 2311.15993); the measure alone, not their rule of training.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(2)).eval()
        >>> batch_norm_condensation(net, torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0]]))  # cosines 1, 0, 0
        {'0': 0.333...}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {described(model)}")
    in_eval_mode(model)
    if len(images) < 2:
        raise ValueError(f"images holds {len(images)}: at least 2 can be compared")
    found: dict[str, float] = {}
    kinds = (nn.modules.batchnorm._BatchNorm, LastBatchNorm)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: found.__setitem__(name, _mean_cosine(inputs[0])))
        for name, module in norms.items()
    ]
    try:
        with uncompiled():
            model(images.clone())  # it may change its input in place
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError("no BatchNorm runs in this model")
    return found


def _mean_cosine(inputs: Tensor) -> float:
    rows = in_float64(inputs.detach().flatten(1))
    unit = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    number = len(rows)
    own = float(unit.square().sum())  # B, but for rows of length 0
    return (number**2 * float(unit.mean(0).square().sum()) - own) / (number * (number - 1))
