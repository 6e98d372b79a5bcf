"""Cross-entropy of deep linear networks whose logits have a given shape: when lower rank beats the simplex."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ncreg._checks import Number, check_integer
from ncreg._readable import readable
from ncreg.numerics import in_float64
from ncreg.theory.squared_error import checked_decays

POINTS, FINER_POINTS, ZOOMS = 257, 17, 14
"""Scales that are tried at first, around the best of them, and how often."""


@dataclass(frozen=True, slots=True)
class DeepCrossEntropyOptimum:
    """The minimum over the scale of logits of a given shape.

    Attributes:
        loss: cross-entropy plus the decay of all factors, in nats.
        cross_entropy: the data term alone, in nats.
        scale: s, the factor of the shape; 0 where decay is so strong that nothing is learned.
        rank: of the shape; of every factor too, unless the scale is 0.
    """

    loss: float
    cross_entropy: float
    scale: float
    rank: int

    __str__ = readable


def deep_cross_entropy_optimum(
    shape: Float[Tensor, "classes classes"],
    samples_per_class: int,
    weight_decays: Sequence[Number],
    feature_decay: Number,
) -> DeepCrossEntropyOptimum:
    """Optimum of mean CE(Z) + Σ(λ_m/2)‖W_m‖² + (λ_H/2)‖H‖² over factors whose product Z = W_M…W_1H is s·G.

    It is min over s ≥ 0 of CE(sG) + (K/2)·κ·s^(2/K)·Σσ_i(G)^(2/K) with K = M + 1 factors and
    κ = (n·λ_1…λ_M·λ_H)^(1/K): the decay of a product is a Schatten quasi-norm of order 2/K. For K = 2 and the simplex
    it is `cross_entropy_optimum`. As K grows the sum tends to the rank of G, so that a code of lower rank beats the
    simplex from some depth on: compare two shapes at the same decays. From K = 3 on s = 0 is always a local minimum,
    and beyond some decay the global one.

    Args:
        shape: G, the logits (C, C) of the C class means up to a factor, row c those of class c; `W @ W.T` for a code W
            whose class means are its own class vectors.
        samples_per_class: n, at least 1; the cross-entropy is a mean over N = nC samples.
        weight_decays: λ_1 … λ_M, first layer to last; every width must be at least the rank of G.
        feature_decay: λ_H, the coefficient of ‖H‖_F²/2.

    Raises:
        ValueError: a shape that is not square, not finite or 0; counts or decays out of range; no layer at all.

    Source: Súkeník, Lampert & Mondelli 2024, "Neural Collapse vs. Low-Rank Bias: Is Deep Neural Collapse Really
    Optimal?" (arXiv 2405.14468), for squared error; the form for cross-entropy is derived here.

    Example:
        >>> from ncreg.frames import orthoplex, simplex_etf
        >>> simplex, code = simplex_etf(10, 9, dtype=torch.float64), orthoplex(10, 5, dtype=torch.float64)
        >>> for layers in (1, 2, 3):  # rank 9 against rank 5
        ...     found = [deep_cross_entropy_optimum(w @ w.T, 1, [1e-3] * layers, 1e-3) for w in (simplex, code)]
        ...     print(layers, [round(best.loss, 4) for best in found])
        1 [0.0711, 0.0768]
        2 [0.0567, 0.05]
        3 [0.0539, 0.0427]
    """
    rows = _checked_shape(shape)
    samples_per_class = check_integer("samples_per_class", samples_per_class, 1)
    decays = checked_decays(weight_decays, feature_decay)
    factors = len(decays)
    singular = torch.linalg.svdvals(rows)
    kept = singular[singular > len(rows) * torch.finfo(rows.dtype).eps * singular[0]]
    kappa = math.exp((math.fsum(map(math.log, decays)) + math.log(samples_per_class)) / factors)
    penalty = 0.5 * factors * kappa * float((kept ** (2 / factors)).sum())
    scale, loss = _best_scale(rows, penalty, 2 / factors)
    fit = float(_cross_entropies(rows, torch.tensor([scale], dtype=torch.float64, device="cpu"))[0])
    return DeepCrossEntropyOptimum(loss=loss, cross_entropy=fit, scale=scale, rank=len(kept))


def _checked_shape(shape: Tensor) -> Tensor:
    """The shape in float64 on the CPU."""
    if not isinstance(shape, Tensor):
        raise TypeError(f"shape must be a tensor (C, C) of logits, not {type(shape).__name__}")
    if shape.ndim != 2 or shape.shape[0] != shape.shape[1] or len(shape) < 2:
        raise ValueError(f"shape of size {tuple(shape.shape)} must be (C, C) with C at least 2: logits of class means")
    rows = in_float64(shape.detach()).cpu()
    if not rows.isfinite().all() or not rows.any():
        raise ValueError("shape must be finite and not all 0")
    return rows


def _cross_entropies(rows: Tensor, scales: Float[Tensor, " scales"]) -> Float[Tensor, " scales"]:
    """Mean cross-entropy of the logits s·G for each scale s."""
    classes = torch.arange(len(rows), device="cpu")
    return torch.stack([F.cross_entropy(scale * rows, classes) for scale in scales])


def _best_scale(rows: Tensor, penalty: float, power: float) -> tuple[float, float]:
    """Scale and value of the global minimum of CE(sG) + penalty·s^power over s ≥ 0.

    On a logarithmic grid from where the loss is still ln C to where cross-entropy no longer changes in float64; then on
    ever finer grids around the best point.
    """
    spread = float((rows.amax(1) - rows.amin(1)).max())
    if spread == 0:  # no scale tells classes apart, and all cost
        return 0.0, math.log(len(rows))
    others = ~torch.eye(len(rows), dtype=torch.bool, device="cpu")
    smallest = float((rows.diagonal()[:, None] - rows)[others].abs().min())
    low, high = math.log(1e-9 / spread), math.log(1e3 / max(smallest, 1e-6 * spread))
    best = (0.0, math.log(len(rows)))
    for points in [POINTS] + [FINER_POINTS] * ZOOMS:
        exponents = torch.linspace(low, high, points, dtype=torch.float64, device="cpu")
        values = _cross_entropies(rows, exponents.exp()) + penalty * (exponents * power).exp()
        place = int(values.argmin())
        if float(values[place]) < best[1]:
            best = (float(exponents[place].exp()), float(values[place]))
        low, high = float(exponents[max(place - 1, 0)]), float(exponents[min(place + 1, points - 1)])
    return best
