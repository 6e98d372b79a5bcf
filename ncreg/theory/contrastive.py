"""Optima of losses on unit features (SupCon, NTCE, NONL) and of losses that shape the logits themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ncreg._checks import Number, check_class_counts, check_integer, check_num_classes, check_positive
from ncreg._readable import readable
from ncreg.theory.scale import loss_at_margin


def supcon_optimum(num_classes: int, samples_per_class: int, temperature: Number) -> float:
    """Smallest supervised contrastive loss of a balanced batch: ln((n−1) + n(C−1)·e^(−C/((C−1)τ))).

    The mean over anchors of the mean over their positives, the anchor left out of its own denominator; reached
    by unit features on a simplex, d ≥ C−1. It does not approach 0: ln(n−1) is its floor at any temperature.

    Args:
        num_classes: C, at least 2.
        samples_per_class: n in the batch, at least 2 (an anchor needs a positive).
        temperature: τ.

    Returns:
        The loss in nats.

    Raises:
        ValueError: for counts or a temperature out of range.

    Source: Graf et al. 2021, "Dissecting Supervised Contrastive Learning" (arXiv 2102.08817).

    Example:
        >>> round(supcon_optimum(10, 8, temperature=0.5), 4)
        2.6948
    """
    num_classes = check_num_classes(num_classes)
    samples_per_class = check_integer("samples_per_class", samples_per_class, 2)
    temperature = check_positive("temperature", temperature)
    positives = samples_per_class - 1
    negatives = samples_per_class * (num_classes - 1) * math.exp(-_gap(num_classes) / temperature)
    return math.log(positives) + math.log1p(negatives / positives)


def supcon_relu_optimum(class_counts: Sequence[int] | Tensor, temperature: Number) -> float:
    """Smallest SupCon loss of features that are nowhere negative: Σ(n_c/N)·ln((n_c−1) + (N−n_c)e^(−1/τ)).

    Behind a ReLU no cosine is below 0. The least loss has 1 within and 0 between classes: an orthogonal frame, d ≥ C,
    whatever the class counts, where features of any sign have no such form off balance. Proof: by Jensen's inequality
    an anchor's loss is at least ln((n_c−1) + Σ_negatives e^((s − s̄)/τ)), s̄ the mean cosine with its positives, and
    s ≥ 0, s̄ ≤ 1.

    Args:
        class_counts: n_c in the batch, at least 2 each (an anchor needs a positive).
        temperature: τ.

    Returns:
        The loss in nats, the mean over the N anchors.

    Raises:
        ValueError: fewer than two classes, a class with fewer than two samples, or a temperature out of range.

    Source: Kini, Vakilian, Behnia, Gill & Thrampoulidis 2023, "Symmetric Neural-Collapse Representations with
    Supervised Contrastive Loss: The Impact of ReLU and Batching" (arXiv 2306.07960).

    Example:
        >>> round(supcon_relu_optimum([5, 3, 2], temperature=0.5), 4)
        1.2423
    """
    counts = check_class_counts(class_counts)
    if min(counts) < 2:
        raise ValueError(f"class_counts={list(counts)}: each class needs two samples, an anchor and its positive")
    temperature = check_positive("temperature", temperature)
    total, apart = sum(counts), math.exp(-1 / temperature)
    return math.fsum(count / total * math.log(count - 1 + (total - count) * apart) for count in counts)


def ntce_optimum(num_classes: int, samples_per_class: int, temperature: Number) -> float:
    """Smallest NTCE of a balanced batch: ln n + ln(1 + (C−1)·e^(−C/((C−1)τ))).

    Args:
        num_classes: C, at least 2.
        samples_per_class: n in the batch.
        temperature: τ.

    Returns:
        The loss in nats, reached by unit features on unit class vectors on a simplex; ln n is its floor.

    Raises:
        ValueError: for counts or a temperature out of range.

    Source: the loss is from Koromilas et al., "Neural Collapse by Design" (arXiv 2605.20302).

    Example:
        >>> round(ntce_optimum(10, 1, temperature=1.0), 3)  # one sample a class: cross-entropy's own floor
        1.377
    """
    num_classes = check_num_classes(num_classes)
    samples_per_class = check_integer("samples_per_class", samples_per_class, 1)
    temperature = check_positive("temperature", temperature)
    return math.log(samples_per_class) + loss_at_margin(_gap(num_classes) / temperature, num_classes)


def nonl_optimum(num_classes: int, samples_per_class: int, temperature: Number) -> float:
    """Smallest NONL of a balanced batch: ln(n(C−1)) − C/((C−1)τ); it may be negative.

    Args:
        num_classes: C, at least 2.
        samples_per_class: n in the batch.
        temperature: τ.

    Returns:
        The loss in nats, reached by unit features on unit class vectors on a simplex.

    Raises:
        ValueError: for counts or a temperature out of range.

    Source: the loss is from Koromilas et al., "Neural Collapse by Design" (arXiv 2605.20302).

    Example:
        >>> round(nonl_optimum(10, 8, temperature=0.1), 4)
        -6.8344
    """
    num_classes = check_num_classes(num_classes)
    samples_per_class = check_integer("samples_per_class", samples_per_class, 1)
    temperature = check_positive("temperature", temperature)
    return math.log(samples_per_class * (num_classes - 1)) - _gap(num_classes) / temperature


@dataclass(frozen=True, slots=True)
class SpectralDecouplingOptimum:
    """Cross-entropy with a penalty on the logits, at its minimum over free logits.

    Attributes:
        loss: cross-entropy plus penalty, in nats.
        cross_entropy: the data term alone, in nats.
        margin: own logit minus any other; for a single logit, the logit signed by its label.
        own_logit: logit of the right class.
        other_logit: logit of every other class (for a single logit: of the other label, its negative).
    """

    loss: float
    cross_entropy: float
    margin: float
    own_logit: float
    other_logit: float

    __str__ = readable


def spectral_decoupling_optimum(num_classes: int, coefficient: Number) -> SpectralDecouplingOptimum:
    """Optimum of mean CE + (λ/2)·mean‖z‖² over free logits: z_y = q/λ, x(C−1)λ/C = q = (C−1)/(eˣ + C−1).

    x is the margin and q the wrong-class mass. However long one trains, no logit grows beyond q/λ.

    Args:
        num_classes: C, at least 2.
        coefficient: λ.

    Returns:
        Loss, margin and logits.

    Raises:
        ValueError: for fewer than two classes or a coefficient not above 0.

    Source: the penalty is from Pezeshki et al. 2021, "Gradient Starvation" (arXiv 2011.09468).

    Example:
        >>> best = spectral_decoupling_optimum(10, 0.01)
        >>> round(best.margin, 4), round(best.own_logit, 4)
        (5.2093, 4.6884)
    """
    num_classes, coefficient = check_num_classes(num_classes), check_positive("coefficient", coefficient)
    margin = _logit_root(num_classes - 1, math.log(num_classes) - math.log(coefficient))
    own, other = margin * (num_classes - 1) / num_classes, -margin / num_classes
    cross_entropy = loss_at_margin(margin, num_classes)
    penalty = 0.5 * coefficient * margin * own  # ‖z‖² = x²(C−1)/C
    return SpectralDecouplingOptimum(cross_entropy + penalty, cross_entropy, margin, own, other)


def binary_spectral_decoupling_optimum(coefficient: Number) -> SpectralDecouplingOptimum:
    """Optimum of mean ln(1 + e^(−yz)) + (λ/2)·mean z² over a single free logit z: m(1 + e^m) = 1/λ.

    Args:
        coefficient: λ.

    Returns:
        Loss, margin m = yz and the two logits ±m.

    Raises:
        ValueError: for a coefficient not above 0.

    Source: Pezeshki et al. 2021, "Gradient Starvation" (arXiv 2011.09468).

    Example:
        >>> margin = binary_spectral_decoupling_optimum(0.1).margin
        >>> round(margin * (1 + 2.718281828459045**margin), 9)
        10.0
    """
    coefficient = check_positive("coefficient", coefficient)
    margin = _logit_root(1, -math.log(coefficient))
    cross_entropy = loss_at_margin(margin, 2)
    return SpectralDecouplingOptimum(
        cross_entropy + 0.5 * coefficient * margin * margin, cross_entropy, margin, margin, -margin
    )


def _gap(num_classes: int) -> float:
    """Cosine of the own class minus cosine of any other, on a simplex."""
    return num_classes / (num_classes - 1)


def _logit_root(excess: int, log_right: float) -> float:
    """The x > 0 with x(eˣ + excess) = e^log_right, by bisection on logarithms: Newton diverges at C = 1000."""
    # x ≤ right/(excess + 1), since eˣ ≥ 1; and eˣ ≤ right once x ≥ 1
    low, high = 0.0, min(math.exp(min(log_right - math.log(excess + 1), 700.0)), max(1.0, log_right))
    offset = math.log(excess)
    while low < (middle := 0.5 * (low + high)) < high:
        grown = max(middle, offset) + math.log1p(math.exp(-abs(middle - offset)))
        if math.log(middle) + grown < log_right:
            low = middle
        else:
            high = middle
    return high
