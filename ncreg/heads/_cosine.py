"""What heads share: logits of unit features, their default scale, and the checks at the door."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ncreg.theory import scale_for_loss

DEFAULT_LOSS = 0.01  # the smallest cross-entropy that the default scale can reach
EPS = 1e-6  # F.normalize's own 1e-12 would give a zero feature a gradient near 1e12


def checked_scale(scale: float | None, default: float) -> float:
    """The scale, or its default where it is None."""
    if scale is None:
        return default
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale={scale} must be finite and positive; None takes the default, {default:.4g}")
    return float(scale)


def default_scale(num_classes: int) -> float:
    """The scale at which a simplex of that many classes reaches a cross-entropy of 0.01 and no less."""
    return scale_for_loss(num_classes, DEFAULT_LOSS)


def check_features(features: Tensor, in_features: int) -> None:
    """Refuse whatever is not (batch, in_features)."""
    if features.ndim != 2 or features.shape[1] != in_features:
        shape = tuple(features.shape)
        raise ValueError(f"features of shape {shape}: the head takes pooled features (batch, {in_features})")


def lengths(features: Tensor) -> Tensor:
    """Lengths of the rows (batch, 1), at least EPS, in float32 where features are coarser."""
    wide = torch.promote_types(features.dtype, torch.float32)
    return torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=wide).clamp_min(EPS)


def head_logits(features: Tensor, weight: Tensor, scale: float, normalize: bool) -> Tensor:
    """Scale · W h, or scale · W h/‖h‖."""
    if normalize:
        return cosine_logits(features, weight, scale)
    logits = F.linear(features, weight)
    return logits if scale == 1 else scale * logits


def cosine_logits(features: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Scale · W h/‖h‖, the length divided out of the (smaller) product."""
    device = features.device.type
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        features, weight = features.to(low), weight.to(low)
    if features.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _CosineLogits.apply(features, weight, scale)[0]
    return plain_cosine_logits(features, weight, scale)


def plain_cosine_logits(features: Tensor, weight: Tensor, scale: float) -> Tensor:
    """The formula as it stands, for inference and for compilers, which fuse it themselves."""
    logits = F.linear(features, weight)
    return logits * (scale / lengths(features)).to(logits.dtype)


class _CosineLogits(torch.autograd.Function):
    """The same with a backward in two passes over the features, where autograd takes five.

    With c = scale/‖h‖ and upstream g: dL/dh = c·Wᵀg − h·(g·logits)/‖h‖², the second term only above EPS.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(features: Tensor, weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        length = lengths(features)
        logits = torch.mm(features, weight.T)
        return logits.mul_((scale / length).to(logits.dtype)), length

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
        features, weight, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(features, weight, *output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        features, weight, logits, length = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted, and the saved length has none
            length = lengths(features)
        scaled = gradient * (ctx.scale / length).to(gradient.dtype)
        by_features = by_weight = None
        if ctx.needs_input_grad[0]:
            along = (gradient * logits).sum(1, keepdim=True) / -length.square() * (length > EPS)
            by_features = (features * along.to(features.dtype)).add_(scaled @ weight)
        if ctx.needs_input_grad[1]:
            by_weight = scaled.T @ features
        return by_features, by_weight, None
