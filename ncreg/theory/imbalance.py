"""Unbalanced classes: when minority classes merge, and what squared error leaves of each class."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ncreg._checks import Number, check_class_counts, check_integer, check_positive


def minority_collapse_threshold(num_samples: int, weight_decay: Number, feature_decay: Number) -> float:
    """Class size below which classes can no longer be told apart: n_B ≤ N²λ_Wλ_H merges minority classes.

    For free W and H under mean loss + (λ_W/2)‖W‖² + (λ_H/2)‖H‖², with cross-entropy (with or without a bias) and
    squared error alike. Equal minority classes of n_B samples each, d at least C. Merged classes share one class
    vector and one feature: no classifier on top can separate them. A fixed frame cannot merge.

    Args:
        num_samples: N, all samples of all classes.
        weight_decay: λ_W, the coefficient of ‖W‖_F²/2.
        feature_decay: λ_H, the coefficient of ‖H‖_F²/2, the sum over all features.

    Returns:
        N²λ_Wλ_H in samples a class; compare a minority class's size with it.

    Raises:
        ValueError: for counts or decays out of range.

    Source: the phenomenon is Fang et al. 2021, "Exploring Deep Neural Networks via Layer-Peeled Model"
    (arXiv 2101.12699); the threshold is derived here: the merged point is stable against splitting iff
    n_B/N ≤ √(n_Bλ_Wλ_H).

    Example:
        >>> minority_collapse_threshold(1000, weight_decay=5e-3, feature_decay=5e-4)
        2.5
    """
    num_samples = check_integer("num_samples", num_samples, 1)
    weight_decay = check_positive("weight_decay", weight_decay)
    feature_decay = check_positive("feature_decay", feature_decay)
    return (num_samples * weight_decay) * (num_samples * feature_decay)


def imbalanced_mse_logits(
    class_counts: Sequence[int], weight_decay: Number, feature_decay: Number
) -> tuple[float, ...]:
    """Own logit of each class under squared error without a bias: (1 − N√(λ_Wλ_H/n_k))₊, all others 0.

    Args:
        class_counts: n_k, samples of each class, at least 1 each.
        weight_decay: λ_W, the coefficient of ‖W‖_F²/2.
        feature_decay: λ_H, the coefficient of ‖H‖_F²/2.

    Returns:
        One logit a class; 0 for a class too small to be learned at all.

    Raises:
        ValueError: for no class, an empty class or decays out of range.

    Source: Dang et al. 2023, "Neural Collapse in Deep Linear Networks: From Balanced to Imbalanced Data"
    (arXiv 2301.00437); here from the spectrum of the one-hot targets. Equal counts give `mse_optimum`.

    Example:
        >>> [round(logit, 3) for logit in imbalanced_mse_logits([100, 10, 1], 1e-4, 1e-3)]
        [0.996, 0.989, 0.965]
    """
    counts = check_class_counts(class_counts, min_classes=1)
    weight_decay = check_positive("weight_decay", weight_decay)
    feature_decay = check_positive("feature_decay", feature_decay)
    root = sum(counts) * math.sqrt(weight_decay) * math.sqrt(feature_decay)
    return tuple(max(0.0, 1 - root / math.sqrt(count)) for count in counts)
