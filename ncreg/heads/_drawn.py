"""Fixed heads by the name of their frame."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ncreg.frames import hypercube, orthoplex, softmax_code, tammes
from ncreg.heads._fixed import FixedHead
from ncreg.numerics import seeded


def _drawn_head(
    frame: Callable[..., Tensor], in_features: int, num_classes: int, seed: int, normalize: bool, scale: float | None
) -> FixedHead:
    """FixedHead on a frame that it can draw again."""
    draw = partial(_frame, frame, num_classes, in_features, seed)
    head = FixedHead(draw(), normalize=normalize, scale=scale)
    head._draw = partial(draw, dtype=head.weight.dtype, device="cpu")
    return head


def _frame(frame: Callable[..., Tensor], num_classes: int, dim: int, seed: int, **place: Any) -> Tensor:
    source = {"seed": seed} if frame in (tammes, softmax_code) else {"generator": seeded(seed)}
    return frame(num_classes, dim, **source, **place)


def orthoplex_head(
    in_features: int, num_classes: int, *, seed: int = 0, normalize: bool = True, scale: float | None = None
) -> FixedHead:
    """FixedHead on an orthoplex, for in_features ≥ num_classes/2."""
    return _drawn_head(orthoplex, in_features, num_classes, seed, normalize, scale)


def hypercube_head(
    in_features: int, num_classes: int, *, seed: int = 0, normalize: bool = True, scale: float | None = None
) -> FixedHead:
    """FixedHead on corners of a cube, for in_features ≥ log₂ num_classes."""
    return _drawn_head(hypercube, in_features, num_classes, seed, normalize, scale)


def tammes_head(
    in_features: int, num_classes: int, *, seed: int = 0, normalize: bool = True, scale: float | None = None
) -> FixedHead:
    """FixedHead on a Tammes packing."""
    return _drawn_head(tammes, in_features, num_classes, seed, normalize, scale)


def softmax_code_head(
    in_features: int, num_classes: int, *, seed: int = 0, normalize: bool = True, scale: float | None = None
) -> FixedHead:
    """FixedHead on a softmax code."""
    return _drawn_head(softmax_code, in_features, num_classes, seed, normalize, scale)
