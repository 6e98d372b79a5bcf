"""Fixed heads by the name of their frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ncreg.frames import hypercube, orthoplex, similar_permutation, softmax_code, tammes
from ncreg.heads._fixed import FixedHead
from ncreg.heads._permuted import checked_permutation
from ncreg.numerics import seeded

Permutation = Sequence[int] | Tensor | Literal["similar"] | None
Similarity = Tensor | Sequence[Sequence[float]] | None


def _drawn_head(
    frame: Callable[..., Tensor],
    in_features: int,
    num_classes: int,
    seed: int,
    normalize: bool,
    scale: float | None,
    permutation: Permutation,
    similarity: Similarity,
) -> FixedHead:
    """FixedHead on a frame that it can draw again, class c on vertex permutation[c]."""
    draw = partial(_frame, frame, num_classes, in_features, seed)
    seats = _seats(draw, num_classes, permutation, similarity)
    if seats is not None:
        draw = partial(_seated, draw, seats)
    head = FixedHead(draw(), normalize=normalize, scale=scale)
    head._draw = partial(draw, dtype=head.weight.dtype, device="cpu")
    return head


def _frame(frame: Callable[..., Tensor], num_classes: int, dim: int, seed: int, **place: Any) -> Tensor:
    source = {"seed": seed} if frame in (tammes, softmax_code) else {"generator": seeded(seed)}
    return frame(num_classes, dim, **source, **place)


def _seated(draw: Callable[..., Tensor], seats: Tensor, **place: Any) -> Tensor:
    rows = draw(**place)
    return rows if rows.is_meta else rows[seats.to(rows.device)]


def _seats(
    draw: Callable[..., Tensor], num_classes: int, permutation: Permutation, similarity: Similarity
) -> Tensor | None:
    """The vertex of each class; None where class c sits on vertex c.

    Raises:
        ValueError: "similar" without a similarity or a similarity without "similar", a simplex, no permutation.
    """
    similar = isinstance(permutation, str)
    if similar and permutation != "similar":
        raise ValueError(f"permutation={permutation!r} must be 'similar', a list of vertices, or None")
    if similar != (similarity is not None):
        raise ValueError(
            "permutation='similar' and similarity=, a matrix (C, C) such as the cosines of class means "
            "(ncreg.functional.inter_class_cosine), go together: one of them was given alone"
        )
    if similarity is not None:
        return similar_permutation(draw(dtype=torch.float64, device="cpu"), similarity)
    return None if permutation is None else checked_permutation(permutation, num_classes)  # type: ignore[arg-type]


def orthoplex_head(
    in_features: int,
    num_classes: int,
    *,
    seed: int = 0,
    normalize: bool = True,
    scale: float | None = None,
    permutation: Permutation = None,
    similarity: Similarity = None,
) -> FixedHead:
    """FixedHead on an orthoplex, for in_features ≥ num_classes/2.

    Args:
        in_features: d.
        num_classes: C.
        seed: of the frame's rotation.
        normalize: as in `FixedHead`.
        scale: as in `FixedHead`.
        permutation: class c sits on vertex permutation[c]; "similar" seats classes that are alike near to each other
            (`ncreg.frames.similar_permutation`). By default class c sits on vertex c.
        similarity: with "similar", how alike two classes are, (C, C): a matrix given, as a tensor or nested lists, or
            the cosines of class means of features at hand, `ncreg.functional.inter_class_cosine`.

    Raises:
        ValueError: too few features; a permutation that is none, or "similar" and a similarity one without the other.

    Example:
        >>> alike = [[0, 9, 1, 1], [9, 0, 1, 1], [1, 1, 0, 5], [1, 1, 5, 0]]
        >>> rows = orthoplex_head(2, 4, permutation="similar", similarity=alike).weight
        >>> (rows @ rows.T)[[0, 2], [1, 3]].abs().max() < 1e-6  # classes 0 and 1, 2 and 3 do not oppose each other
        tensor(True)
    """
    return _drawn_head(orthoplex, in_features, num_classes, seed, normalize, scale, permutation, similarity)


def hypercube_head(
    in_features: int,
    num_classes: int,
    *,
    seed: int = 0,
    normalize: bool = True,
    scale: float | None = None,
    permutation: Permutation = None,
    similarity: Similarity = None,
) -> FixedHead:
    """FixedHead on corners of a cube, for in_features ≥ log₂ num_classes; arguments as of the orthoplex's."""
    return _drawn_head(hypercube, in_features, num_classes, seed, normalize, scale, permutation, similarity)


def tammes_head(
    in_features: int,
    num_classes: int,
    *,
    seed: int = 0,
    normalize: bool = True,
    scale: float | None = None,
    permutation: Permutation = None,
    similarity: Similarity = None,
) -> FixedHead:
    """FixedHead on a Tammes packing; arguments as of the orthoplex's."""
    return _drawn_head(tammes, in_features, num_classes, seed, normalize, scale, permutation, similarity)


def softmax_code_head(
    in_features: int,
    num_classes: int,
    *,
    seed: int = 0,
    normalize: bool = True,
    scale: float | None = None,
    permutation: Permutation = None,
    similarity: Similarity = None,
) -> FixedHead:
    """FixedHead on a softmax code; arguments as of the orthoplex's."""
    return _drawn_head(softmax_code, in_features, num_classes, seed, normalize, scale, permutation, similarity)
