"""What heads share: logits of unit features, their default scale, and checks of scale and features."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ncreg._checks import check_constant, check_number
from ncreg._features import check_pooled
from ncreg._transforms import own_backward_pays
from ncreg.theory import scale_for_loss

DEFAULT_LOSS = 0.01  # the smallest cross-entropy that the default scale can reach
EPS = 1e-6  # F.normalize's own 1e-12 would give a zero feature a gradient near 1e12
HALF_FACTOR = 2.0**14  # the most a float16 gradient is multiplied by: twice that, a zero feature's, still fits


def checked_scale(scale: float | None, default: float) -> float:
    """The scale, or its default where it is None."""
    if scale is None:
        return default
    number = check_number("scale", check_constant("scale", scale, "head"))
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"scale={scale} must be finite and above 0; None takes the default, {default:.4g}")
    return number


def shown(scale: float | Tensor) -> str:
    """A scale in a head's repr."""
    if isinstance(scale, Tensor):
        return "…" if scale.is_meta else f"{scale.item():.4g}"
    return f"{scale:.4g}"


def default_scale(num_classes: int) -> float:
    """The scale at which a simplex of that many classes reaches a cross-entropy of 0.01 and no less."""
    return scale_for_loss(num_classes, DEFAULT_LOSS)


def check_features(features: Tensor, in_features: int, dtype: torch.dtype | None = None) -> None:
    """Refuse whatever is not floating-point (batch, in_features), of the dtype given unless autocast is on."""
    check_pooled(features, in_features, "head")
    if dtype not in (None, features.dtype) and not autocast_on(features):
        raise TypeError(
            f"features of {features.dtype} into a head of {dtype}: bring both to one dtype (features.to({dtype}) or "
            f"head.to({features.dtype})), or call the head under torch.autocast"
        )


def frame_for(features: Tensor, frame: Tensor) -> Tensor:
    """Fixed class vectors for these features: rounded to their dtype where that is the coarser one."""
    if frame.dtype == features.dtype or autocast_on(features):
        return frame
    coarser = torch.finfo(features.dtype).eps > torch.finfo(frame.dtype).eps
    return frame.to(features.dtype) if coarser else frame


def autocast_on(features: Tensor) -> bool:
    """Whether autocast is on for the features' device."""
    device = features.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def over_length(features: Tensor, scale: float | Tensor) -> Tensor:
    """Scale/‖h‖ a row (batch, 1), in float32 where features are coarser; the scale may be a learned one.

    ‖h‖ is at least EPS, in float16 also at least scale/HALF_FACTOR: the factor is a zero feature's gradient.
    """
    length = lengths(features).clamp_min(EPS)
    if features.dtype == torch.float16:
        length = length.clamp_min((scale.detach() if isinstance(scale, Tensor) else scale) / HALF_FACTOR)
    return scale / length


def wide_dtype(features: Tensor) -> torch.dtype:
    """The dtype of sums over a row: float64 stays, coarser ones become float32."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def lengths(features: Tensor) -> Tensor:
    """‖h‖ a row (batch, 1); NaN where its squares overflow (float32: beyond 1.8e19), or h/inf would pass as 0."""
    length = torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=wide_dtype(features))
    return length.masked_fill(length == torch.inf, torch.nan)


def fixed_logits(features: Tensor, frame: Tensor, scale: float | Tensor, normalize: bool) -> Tensor:
    """Logits of a head whose frame follows the features' dtype: scale · W h, or scale · W h/‖h‖."""
    check_pooled(features, frame.shape[1], "head")
    frame = frame_for(features, frame)
    check_features(features, frame.shape[1], frame.dtype)
    if normalize:
        return cosine_logits(features, frame, scale)
    logits = F.linear(features, frame)
    return scale * logits if isinstance(scale, Tensor) or scale != 1 else logits


def cosine_logits(features: Tensor, weight: Tensor, scale: float | Tensor) -> Tensor:
    """Scale · W h/‖h‖, the length divided out of the (smaller) product."""
    if autocast_on(features):
        low = torch.get_autocast_dtype(features.device.type)
        features, weight = features.to(low), weight.to(low)
    if eager(features, scale):
        return _CosineLogits.apply(features, weight, scale)
    return plain_cosine_logits(features, weight, scale)


def eager(features: Tensor, scale: float | Tensor) -> bool:
    """Whether a backward of our own pays: it has none for a learned scale, and float16 would overflow there."""
    return not isinstance(scale, Tensor) and features.dtype != torch.float16 and own_backward_pays(features)


def plain_cosine_logits(features: Tensor, weight: Tensor, scale: float | Tensor) -> Tensor:
    """The formula as it stands.

    In float16 a product with long features overflows, so a row beyond 2 is first divided by a power of two, which is a
    constant: unit features do not hang on it, and bits get lost only where they are next to nothing in the row.
    """
    factor = over_length(features, scale)
    if features.dtype == torch.float16:
        largest = features.detach().abs().amax(1, keepdim=True).float()
        shrink = torch.exp2(-largest.clamp_min(1).log2().floor())
        features, factor = features * shrink.half(), factor / shrink
    logits = F.linear(features, weight)
    return logits * factor.to(logits.dtype)


class Kept:
    """An output for the backward pass, as long as nobody changes it in place, as margins do."""

    def __init__(self, output: Tensor) -> None:
        self.output, self.version = output.detach(), output._version  # an alias: it shares values and version

    def unchanged(self) -> Tensor | None:
        """The output; None where it was changed."""
        return self.output if self.output._version == self.version else None


class _CosineLogits(torch.autograd.Function):
    """The same with a backward in two passes over the features, where autograd takes five.

    With f = scale/‖h‖ and upstream g: dL/dh = Wᵀ(f·g) − h·(f·g·logits)/(scale·‖h‖), the second term only above EPS.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, scale: float) -> Tensor:
        length = lengths(features)
        factor = scale / length.clamp_min(EPS)
        logits = torch.mm(features, weight.T)
        logits.mul_(factor)
        ctx.scale, ctx.kept = scale, Kept(logits)
        ctx.save_for_backward(features, weight, length, factor)
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        features, weight, length, factor = ctx.saved_tensors
        logits = ctx.kept.unchanged()
        if torch.is_grad_enabled():  # a second derivative is wanted, and what is kept has none
            length, factor, logits = lengths(features), over_length(features, ctx.scale), None
        if logits is None:
            logits = torch.mm(features, weight.T) * factor.to(features.dtype)
        scaled = (gradient * factor).to(gradient.dtype)
        by_features = by_weight = None
        if ctx.needs_input_grad[0]:
            along = (scaled * logits).sum(1, keepdim=True) / torch.threshold(length, EPS, torch.inf)
            by_features = torch.addcmul(scaled @ weight, features, along.to(features.dtype), value=-1 / ctx.scale)
        if ctx.needs_input_grad[1]:
            by_weight = scaled.T @ features
        return by_features, by_weight, None
