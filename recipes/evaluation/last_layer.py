"""What kind of last layer a model has, as far as it changes what NC3 means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ncreg.heads import CodeHead, ETFHead, FixedHead, NearestETFHead
from recipes.evaluation.collapse import Collapse

MOST_ENTRIES = 2**22
"""Of class vectors whose span is looked for: seconds, and a code of a million classes holds none."""


@dataclass(frozen=True)
class LastLayer:
    """What a sentence on the last layer must know of it.

    Attributes:
        fixed: its class vectors never move.
        follows: they are the simplex nearest to running class means.
        normalizes: it divides features by their length.
        has_bias: whether it adds a bias.
        along: share of the variance of the class means that lies in the span of fixed class vectors; else None.
        nc3_along: NC3 of that part of the means.
    """

    fixed: bool = False
    follows: bool = False
    normalizes: bool = False
    has_bias: bool = True
    along: float | None = None
    nc3_along: float | None = None


def last_layer_of(head: Any, found: Collapse) -> LastLayer:
    """What is known of a head, and where the class means stand to it if its class vectors are fixed.

    Args:
        head: the last layer; None where nothing is known of it.
        found: the collapse of the features that enter it.

    Example:
        >>> corners, none = torch.eye(3) - 1 / 3, torch.zeros(0)
        >>> head = FixedHead(torch.cat([corners, 0 * corners], 1))  # looks at three of six dimensions
        >>> layer = last_layer_of(head, Collapse({}, torch.cat([corners, corners], 1), torch.ones(3), none, none))
        >>> layer.fixed, layer.normalizes, layer.has_bias, round(layer.along, 3), round(layer.nc3_along, 3)
        (True, True, False, 0.5, 0.0)
    """
    fixed = isinstance(head, FixedHead | ETFHead | CodeHead)
    few = fixed and head.num_classes * head.in_features <= MOST_ENTRIES
    along, nc3_along = _along(head.weight, found) if few else (None, None)
    return LastLayer(
        fixed=fixed,
        follows=isinstance(head, NearestETFHead),
        normalizes=getattr(head, "normalize", False) is True,
        has_bias=isinstance(getattr(head, "bias", None), Tensor),
        along=along,
        nc3_along=nc3_along,
    )


def _along(weight: Tensor, found: Collapse) -> tuple[float | None, float | None]:
    """Share of the squared lengths of the centred class means within the span of the class vectors, and NC3 there.

    None where that says nothing: class means that coincide, or of another shape than the vectors.
    """
    here, means = (found.counts > 0).cpu(), found.centred.cpu().double()
    if weight.shape != means.shape:
        return None, None
    vectors, means = weight.detach().cpu().double(), means[here]
    _, sizes, axes = torch.linalg.svd(vectors, full_matrices=False)
    # a simplex has C − 1 directions and one of rounding, that of float32 where a frame was made finer later
    rounding = 4 * max(torch.finfo(dtype).eps for dtype in (weight.dtype, torch.float32))
    seen = means @ axes[sizes > rounding * sizes[0]].T
    if not seen.norm() > 0:
        return None, None
    cosine = float((vectors[here] * means).sum() / (vectors[here].norm() * seen.norm()))
    return float(seen.square().sum() / means.square().sum()), max(0.0, 2 - 2 * cosine) ** 0.5
