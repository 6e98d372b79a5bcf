"""Cross-entropy at its optimum: unconstrained features, layer-peeled, last-layer BatchNorm with weight decay.

All three put features and class vectors on one simplex. They differ in what bounds the lengths: weight decay on
both, a budget for both, or weight decay on the class vectors and on BatchNorm's γ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ncreg._checks import Number, check_choice, check_integer, check_num_classes, check_positive
from ncreg._readable import readable
from ncreg.theory.scale import loss_at_margin


@dataclass(frozen=True, slots=True)
class CrossEntropyOptimum:
    """The minimum over balanced classes, where every sample of every class looks the same.

    Attributes:
        loss: the whole objective, cross-entropy plus decay terms, in nats.
        cross_entropy: its data term alone, in nats.
        wrong_mass: softmax probability that all wrong classes share, q.
        margin: own logit minus any other, ρ.
        own_logit: logit of the right class, ρ(C−1)/C.
        other_logit: logit of every other class, −ρ/C.
        weight_norm: length of each class vector; ‖W‖_F is √C times it.
        feature_norm: length of each feature; ‖H‖_F is √N times it.
    """

    loss: float
    cross_entropy: float
    wrong_mass: float
    margin: float
    own_logit: float
    other_logit: float
    weight_norm: float
    feature_norm: float

    __str__ = readable

    @property
    def collapsed_to_zero(self) -> bool:
        """Whether the decay is so strong that nothing is learned: all features and class vectors are 0."""
        return self.margin == 0.0


def cross_entropy_optimum(
    num_classes: int, samples_per_class: int, weight_decay: Number, feature_decay: Number
) -> CrossEntropyOptimum:
    """Optimum of mean CE + (λ_W/2)‖W‖² + (λ_H/2)‖H‖² over free W and H, balanced classes, d ≥ C−1.

    The wrong classes share q = (C−1)√(nλ_Wλ_H); L* = h(q) + q·ln(C−1) with h the binary entropy; the margin is
    ρ = ln((C−1)(1−q)/q) and ‖W‖_F² = ρ(C−1)√(nλ_H/λ_W). From √(nλ_Wλ_H) ≥ 1/C on everything is 0.
    A decoupled decay (AdamW) minimises another objective, to which this does not apply.

    Args:
        num_classes: C, at least 2.
        samples_per_class: n, at least 1; the cross-entropy is a mean over N = nC samples.
        weight_decay: λ_W, the coefficient of ‖W‖_F²/2 (coupled decay).
        feature_decay: λ_H, the coefficient of ‖H‖_F²/2, the sum over all N features.

    Returns:
        Loss, margin, logits and lengths.

    Raises:
        ValueError: for counts or decays out of range; without decay the infimum is 0 and is not reached.

    Source: Zhu et al. 2021, "A Geometric Analysis of Neural Collapse with Unconstrained Features"
    (arXiv 2105.02375) for the model; the closed form follows from its balance of norms.

    Example:
        >>> best = cross_entropy_optimum(10, 100, weight_decay=5e-4, feature_decay=1e-5)
        >>> round(best.loss, 5), round(best.margin, 3), best.collapsed_to_zero
        (0.05251, 7.248, False)
    """
    num_classes = check_num_classes(num_classes)
    samples_per_class = check_integer("samples_per_class", samples_per_class, 1)
    weight_decay = check_positive("weight_decay", weight_decay)
    feature_decay = check_positive("feature_decay", feature_decay)
    # roots one by one: the product of two tiny decays would underflow
    root = math.sqrt(samples_per_class) * math.sqrt(weight_decay) * math.sqrt(feature_decay)
    ratio = math.sqrt(samples_per_class) * math.sqrt(feature_decay) / math.sqrt(weight_decay)
    margin = _margin(root, num_classes)
    weight_norm = math.sqrt(margin * (num_classes - 1) / num_classes * ratio)
    feature_norm = math.sqrt(margin * (num_classes - 1) / num_classes / ratio)
    return _at_margin(margin, num_classes, root, weight_norm, feature_norm)


def layer_peeled_optimum(num_classes: int, weight_energy: Number, feature_energy: Number) -> CrossEntropyOptimum:
    """Smallest mean CE with mean‖w‖² ≤ E_W and mean‖h‖² ≤ E_H: ln(1 + (C−1)·exp(−(C/(C−1))√(E_W·E_H))).

    Args:
        num_classes: C, at least 2; classes balanced, d ≥ C−1.
        weight_energy: E_W, the mean squared length of the class vectors.
        feature_energy: E_H, the mean over classes of the mean squared length of the features.

    Returns:
        Loss (here the cross-entropy itself), margin, logits and lengths √E_W and √E_H.

    Raises:
        ValueError: for fewer than two classes or energies not above 0.

    Source: Fang, He, Long & Su 2021, "Exploring Deep Neural Networks via Layer-Peeled Model"
    (arXiv 2101.12699).

    Example:
        >>> best = layer_peeled_optimum(10, weight_energy=4.0, feature_energy=9.0)
        >>> round(best.loss, 6), round(best.own_logit, 6)
        (0.011389, 6.0)
    """
    num_classes = check_num_classes(num_classes)
    weight_norm = math.sqrt(check_positive("weight_energy", weight_energy))
    feature_norm = math.sqrt(check_positive("feature_energy", feature_energy))
    margin = num_classes / (num_classes - 1) * weight_norm * feature_norm
    return _at_margin(margin, num_classes, 0.0, weight_norm, feature_norm)


def last_batch_norm_optimum(
    num_classes: int,
    weight_decay: Number,
    gamma_decay: Number,
    *,
    gamma: Literal["vector", "scalar"] = "vector",
    num_features: int | None = None,
) -> CrossEntropyOptimum:
    """m_reg, the optimum of mean CE + (λ_γ/2)‖γ‖² + (λ_W/2)‖W‖_F² behind a last BatchNorm without bias.

    On the batch the norm was computed on, mean‖h‖² = ‖γ‖², so this is `cross_entropy_optimum` with
    nλ_H = λ_γ/C: q = (C−1)√(λ_Wλ_γ/C), m_reg = h(q) + q·ln(C−1); nothing is learned from √(λ_Wλ_γ) ≥ 1/√C on.
    It holds for coupled decay that reaches γ, and only if γ is in the decay group.

    Args:
        num_classes: C, at least 2; classes balanced, a head without normalisation, d ≥ C−1.
        weight_decay: λ_W on the head.
        gamma_decay: λ_γ on the norm's γ.
        gamma: "scalar" when one number scales all features: its decay then counts as λ_γ/d.
        num_features: d, needed for the scalar γ alone.

    Returns:
        m_reg as `loss`; `feature_norm` is ‖γ‖ (for a scalar γ, √d·|γ|), the root mean square feature length.

    Raises:
        ValueError: for values out of range, an unknown `gamma`, or a scalar γ without `num_features`.

    Source: Pan & Cao 2023, "Towards Understanding Neural Collapse: The Effects of Batch Normalization and
    Weight Decay" (arXiv 2309.04644); different decays and the scalar γ are derived here.

    Example:
        >>> round(last_batch_norm_optimum(10, 5e-4, 5e-4).loss, 5)
        0.01388
    """
    num_classes = check_num_classes(num_classes)
    check_positive("weight_decay", weight_decay)
    gamma_decay = check_positive("gamma_decay", gamma_decay)
    check_choice("gamma", gamma, ("vector", "scalar"))  # without γ there is nothing to decay
    if num_features is not None:
        num_features = check_integer("num_features", num_features, 1)
    if gamma == "scalar":
        if num_features is None:
            raise ValueError("gamma='scalar' needs num_features: one number's decay counts as λ_γ/d")
        gamma_decay = gamma_decay / num_features
    return cross_entropy_optimum(num_classes, 1, weight_decay, gamma_decay / num_classes)


def _margin(root: float, num_classes: int) -> float:
    """ρ = ln((1−q)/r), q = (C−1)r, exact for r near 0 and near the threshold 1/C."""
    if root * num_classes >= 1:
        return 0.0
    if root * num_classes < 0.5:
        return math.log1p(-(num_classes - 1) * root) - math.log(root)
    return math.log1p((1 - num_classes * root) / root)


def _at_margin(
    margin: float, num_classes: int, root: float, weight_norm: float, feature_norm: float
) -> CrossEntropyOptimum:
    """Everything that follows from the margin; both decay terms together are ρq = ρ(C−1)·root."""
    cross_entropy = loss_at_margin(margin, num_classes)
    return CrossEntropyOptimum(
        loss=cross_entropy + margin * (num_classes - 1) * root,
        cross_entropy=cross_entropy,
        wrong_mass=-math.expm1(-cross_entropy),
        margin=margin,
        own_logit=margin * (num_classes - 1) / num_classes,
        other_logit=-margin / num_classes,
        weight_norm=weight_norm,
        feature_norm=feature_norm,
    )
