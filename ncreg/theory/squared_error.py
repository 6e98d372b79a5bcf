"""Squared error on one-hot targets at its optimum: one layer, many linear layers, unbalanced classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ncreg._checks import (
    Number,
    check_flag,
    check_integer,
    check_non_negative,
    check_num_classes,
    check_numbers,
    check_positive,
)
from ncreg._readable import readable


@dataclass(frozen=True, slots=True)
class SquaredErrorOptimum:
    """The minimum over balanced classes.

    Attributes:
        loss: the whole objective, (1/2N)‖logits − Y‖² plus decay terms.
        squared_error: its data term alone.
        shrinkage: how far the logits fall short of the one-hot targets, 1 − u; 1 when nothing is learned.
        own_logit: logit of the right class, bias included.
        other_logit: logit of every other class, bias included.
        bias: each entry of the head's bias, 1/C with a bias and 0 without.
        weight_norm: length of each class vector (row of the last layer).
        feature_norm: length of each feature.
        layer_norms: Frobenius norm of every linear layer, first to last.
    """

    loss: float
    squared_error: float
    shrinkage: float
    own_logit: float
    other_logit: float
    bias: float
    weight_norm: float
    feature_norm: float
    layer_norms: tuple[float, ...]

    __str__ = readable

    @property
    def margin(self) -> float:
        """Own logit minus any other."""
        return self.own_logit - self.other_logit

    @property
    def collapsed_to_zero(self) -> bool:
        """Whether the decay is so strong that all features and layers are 0."""
        return self.shrinkage == 1.0


def mse_optimum(
    num_classes: int,
    samples_per_class: int,
    weight_decay: Number,
    feature_decay: Number,
    *,
    bias: bool = False,
) -> SquaredErrorOptimum:
    """Optimum of (1/2N)‖WH + b − Y‖² + (λ_W/2)‖W‖² + (λ_H/2)‖H‖², balanced classes, Y one-hot.

    With c = C√(nλ_Wλ_H) < 1: WH̄ = (1−c)·I and L* = c(1 − c/2) without a bias; with a bias that is not decayed
    WH̄ = (1−c)(I − 11ᵀ/C), b = 1/C and L* is (C−1)/C times as large. From c ≥ 1 on everything but b is 0.

    Args:
        num_classes: C, at least 2; the feature dimension must be at least C, or C−1 with a bias.
        samples_per_class: n, at least 1.
        weight_decay: λ_W, the coefficient of ‖W‖_F²/2.
        feature_decay: λ_H, the coefficient of ‖H‖_F²/2, the sum over all nC features.
        bias: whether the head has a bias.

    Returns:
        Loss, logits, bias and lengths.

    Raises:
        ValueError: for counts or decays out of range.

    Source: Tirer & Bruna 2022, "Extended Unconstrained Features Model for Exploring Deep Neural Collapse"
    (arXiv 2202.08087).

    Example:
        >>> best = mse_optimum(10, 100, weight_decay=1e-4, feature_decay=1e-6)
        >>> round(best.loss, 6), round(best.own_logit, 6)
        (0.001, 0.999)
    """
    check_positive("weight_decay", weight_decay)
    return deep_linear_optimum(num_classes, samples_per_class, [weight_decay], feature_decay, bias=bias)


def deep_linear_optimum(
    num_classes: int,
    samples_per_class: int,
    weight_decays: Sequence[Number],
    feature_decay: Number,
    *,
    bias: bool = False,
) -> SquaredErrorOptimum:
    """Optimum of (1/2N)‖W_M…W_1H + b − Y‖² + Σ(λ_m/2)‖W_m‖² + (λ_H/2)‖H‖²: min_u ½(1−u)² + (K/2)κu^(2/K).

    K = M + 1 factors, κ = C·n^(1/K)·(λ_1…λ_M·λ_H)^(1/K), and the product of all factors is u·I on class means.
    Every factor has the same C equal singular values up to its decay. Nothing is learned beyond
    κ = ((K−2)/(K−1))^(1−2/K)/(K−1), where u jumps from (K−2)/(K−1) to 0.

    Args:
        num_classes: C, at least 2; every width must be at least C, or C−1 with a bias.
        samples_per_class: n, at least 1.
        weight_decays: λ_1 … λ_M, first layer to last.
        feature_decay: λ_H, the coefficient of ‖H‖_F²/2.
        bias: whether the last layer has a bias, not decayed.

    Returns:
        Loss, logits, bias and lengths.

    Raises:
        ValueError: for counts or decays out of range, or no layer at all.

    Source: Tirer & Bruna 2022 (arXiv 2202.08087) and Dang et al. 2023, "Neural Collapse in Deep Linear
    Networks: From Balanced to Imbalanced Data" (arXiv 2301.00437).

    Example:
        >>> best = deep_linear_optimum(4, 5, [1e-3, 1e-3], 1e-3)
        >>> round(best.loss, 5), round(best.own_logit, 5)
        (0.01024, 0.99314)
    """
    num_classes = check_num_classes(num_classes)
    samples_per_class = check_integer("samples_per_class", samples_per_class, 1)
    decays = checked_decays(weight_decays, feature_decay)
    check_flag("bias", bias)
    factors = len(decays)
    unit = math.exp((math.fsum(map(math.log, decays)) + math.log(samples_per_class)) / factors)
    kappa = num_classes * unit
    lost = _lost(kappa, factors)
    kept = 1 - lost
    # every factor carries the same decay energy per direction, e = (Πλ)^(1/K)·(√n·u)^(2/K) = λ_k·s_k²
    energy = unit * kept ** (2 / factors)
    singular = [math.sqrt(energy / decay) for decay in decays]
    fraction = (num_classes - 1) / num_classes if bias else 1.0
    offset = 1 / num_classes if bias else 0.0
    frobenius = [value * math.sqrt(num_classes * fraction) for value in singular]
    return SquaredErrorOptimum(
        loss=fraction * (0.5 * lost**2 + 0.5 * factors * num_classes * energy),
        squared_error=fraction * 0.5 * lost**2,
        shrinkage=lost,
        own_logit=kept * fraction + offset,
        other_logit=-kept * offset + offset,
        bias=offset,
        weight_norm=singular[-2] * math.sqrt(fraction),
        feature_norm=singular[-1] * math.sqrt(fraction / samples_per_class),
        layer_norms=tuple(frobenius[:-1]),
    )


def relu_mse_optimum(
    num_classes: int, samples_per_class: int, weight_decays: Sequence[Number], feature_decay: Number
) -> SquaredErrorOptimum:
    """Optimum of (1/2N)‖W_2·ReLU(W_1H) − Y‖² + Σ(λ_m/2)‖W_m‖² + (λ_H/2)‖H‖²: that of the same network without ReLU.

    The ReLU costs nothing because without a bias the optimum is an orthogonal frame, not a simplex: W_1H̄ = c·R with
    the columns of R orthonormal and nowhere negative, one hidden direction (or group of units) a class, W_2 along it.
    So the hidden class means have cosine 0 with each other, as behind a ReLU they must have at least.

    Args:
        num_classes: C, at least 2; both widths must be at least C.
        samples_per_class: n, at least 1.
        weight_decays: λ_1 and λ_2.
        feature_decay: λ_H, the coefficient of ‖H‖_F²/2.

    Returns:
        Loss, logits and lengths, as of `deep_linear_optimum`.

    Raises:
        ValueError: for counts or decays out of range, or other than two layers: deeper networks with ReLU prefer
            lower rank.

    Source: Tirer & Bruna 2022, "Extended Unconstrained Features Model for Exploring Deep Neural Collapse"
    (arXiv 2202.08087).

    Example:
        >>> best = relu_mse_optimum(4, 5, [1e-3, 1e-3], 1e-3)
        >>> round(best.loss, 5), round(best.own_logit, 5), best.other_logit
        (0.01024, 0.99314, 0.0)
    """
    if len(decays := check_numbers("weight_decays", weight_decays)) != 2:
        raise ValueError(f"weight_decays={decays}: one before the ReLU and one behind it, two in all")
    return deep_linear_optimum(num_classes, samples_per_class, decays, feature_decay)


def checked_decays(weight_decays: Sequence[Number], feature_decay: Number) -> list[float]:
    """The decays of all factors of a deep linear network, that of the features last."""
    decays = check_numbers("weight_decays", weight_decays)
    if not decays:
        raise ValueError("weight_decays is empty: a linear network has at least one layer")
    for index, decay in enumerate(decays):
        check_positive(f"weight_decays[{index}]", decay)
    return [*decays, check_positive("feature_decay", feature_decay)]


def _lost(kappa: float, factors: int) -> float:
    """1 − u for the global minimiser u of ½(1−u)² + (K/2)κu^(2/K) over u ≥ 0."""
    if factors == 2:
        return min(1.0, kappa)
    jump = (factors - 2) / (factors - 1)
    power = 1 - 2 / factors
    if kappa >= (1 - jump) * jump**power:
        return 1.0
    # (1−u)·u^(1−2/K) falls from above κ at the jump to 0 at u = 1; solved for 1−u, so that a tiny κ keeps its digits
    low, high = 0.0, 1 - jump
    while low < (middle := 0.5 * (low + high)) < high:
        if middle * (1 - middle) ** power > kappa:
            high = middle
        else:
            low = middle
    return low


@dataclass(frozen=True, slots=True)
class DotRegressionOptimum:
    """The minimum of dot regression with decayed features, every feature along its own class vector.

    Attributes:
        loss: dot regression plus decay, the units of the length ℓ.
        own_logit: dot product of a feature with its own class vector.
        feature_norm: length of each feature.
    """

    loss: float
    own_logit: float
    feature_norm: float

    __str__ = readable


def dot_regression_optimum(
    num_samples: int, length: Number, weight_norm: Number, feature_decay: Number
) -> DotRegressionOptimum:
    """Optimum of mean (w_yᵀh − ℓ)²/(2ℓ) + (λ_H/2)‖H‖² over free features: (ℓ/2)·k/(1+k), k = Nλ_Hℓ/‖w‖².

    Decay shortens features to 1/(1+k) of the length aimed at and leaves their directions alone, for any frame and
    any imbalance. (On unit features, normalize=True, the optimum is 0.)

    Args:
        num_samples: N.
        length: ℓ = √(E_W·E_H), the dot product aimed at.
        weight_norm: ‖w‖ = √E_W, the length of the fixed class vectors.
        feature_decay: λ_H, the coefficient of ‖H‖_F²/2; 0 for none.

    Returns:
        Loss, dot product and feature length.

    Raises:
        ValueError: for a count, length or decay out of range.

    Source: the loss is from Yang et al. 2022, "Inducing Neural Collapse in Imbalanced Learning" (arXiv 2203.09081).

    Example:
        >>> dot_regression_optimum(100, length=2.0, weight_norm=1.0, feature_decay=5e-3)
        DotRegressionOptimum(loss=0.5, own_logit=1.0, feature_norm=1.0)
    """
    num_samples, length = check_integer("num_samples", num_samples, 1), check_positive("length", length)
    weight_norm = check_positive("weight_norm", weight_norm)
    feature_decay = check_non_negative("feature_decay", feature_decay)
    pull = num_samples * feature_decay * length / weight_norm**2
    own = length / (1 + pull)
    return DotRegressionOptimum(loss=0.5 * own * pull, own_logit=own, feature_norm=own / weight_norm)
