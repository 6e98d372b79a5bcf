"""The grouped simplex: sums of features in place of a matrix, with a backward that keeps to them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ncreg.heads._cosine import EPS, Kept, lengths, over_length, wide_dtype


def group_sums(features: Tensor, dim: int, num_classes: int) -> Tensor:
    """Sums over the features j ≡ c mod C of each class c, divided by the root of their number.

    Of float16 and bfloat16 the result is float32: what classes share is taken off it next, and may be most of it.
    """
    whole, rest = divmod(dim, num_classes)  # of a plain integer: a trace would take features.shape[1] for a tensor
    rounds, remainder = features.split([whole * num_classes, rest], dim=1)
    sums = rearrange(rounds, "batch (group classes) -> batch group classes", classes=num_classes)
    sums = sums.sum(1, dtype=wide_dtype(features))
    if rest:
        sums = sums + F.pad(remainder, (0, num_classes - rest))
    return sums * _roots(dim, num_classes, sums)


def _roots(dim: int, num_classes: int, rows: Tensor) -> Tensor:
    """One over the root of each class's number of features."""
    whole, rest = divmod(dim, num_classes)
    sizes = [rows.new_full((rest,), whole + 1), rows.new_full((num_classes - rest,), whole)]
    return torch.cat(sizes).rsqrt()


def grouped_cosine(features: Tensor, num_classes: int, scale: float) -> Tensor:
    """The formula as it stands: scale · a(g − mean g)/‖h‖ with a = √(C/(C−1)), g the group sums."""
    groups = group_sums(features, features.shape[1], num_classes)
    logits = groups - groups.mean(1, keepdim=True)
    return (logits * over_length(features, _stretch(num_classes, scale))).to(features.dtype)


def _stretch(num_classes: int, scale: float) -> float:
    return (num_classes / (num_classes - 1)) ** 0.5 * scale


class GroupedCosine(torch.autograd.Function):
    """`grouped_cosine` in half the passes over the features that autograd takes.

    With L the centred group sums, f = scale·a/‖h‖ and upstream g: dL/dh = Lᵀ(f·g) − h·Σ(f·g·logits)/(scale·a·‖h‖).
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, num_classes: int, scale: float) -> Tensor:
        """Logits of a batch of features."""
        length = lengths(features)
        factor = _stretch(num_classes, scale) / length.clamp_min(EPS)
        groups = group_sums(features, features.shape[1], num_classes)
        logits = groups.sub_(groups.mean(1, keepdim=True)).mul_(factor).to(features.dtype)
        ctx.num_classes, ctx.scale, ctx.kept = num_classes, scale, Kept(logits)
        ctx.save_for_backward(features, length, factor)
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Gradient in the features; where it is to be differentiated again, that of the plain formula."""
        features, length, factor = ctx.saved_tensors
        if torch.is_grad_enabled():
            plain = grouped_cosine(features, ctx.num_classes, ctx.scale)
            return torch.autograd.grad(plain, features, gradient, create_graph=True)[0], None, None
        logits = ctx.kept.unchanged()
        if logits is None:
            logits = grouped_cosine(features, ctx.num_classes, ctx.scale)
        pulled = gradient * factor
        along = (pulled * logits).sum(1, keepdim=True) / torch.threshold(length, EPS, torch.inf)
        pulled.sub_(pulled.mean(1, keepdim=True)).mul_(_roots(features.shape[1], ctx.num_classes, pulled))
        pulled = pulled.to(features.dtype)
        whole, rest = divmod(features.shape[1], ctx.num_classes)
        spread = torch.cat([pulled] * whole + [pulled[:, :rest]] * (rest > 0), dim=1)
        along = (along / -_stretch(ctx.num_classes, ctx.scale)).to(features.dtype)
        return spread.addcmul_(features, along), None, None
