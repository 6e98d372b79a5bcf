"""A certificate of collapse from numbers every training run has: its loss, its head and its features' spread."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, SupportsFloat

from jaxtyping import Float
from torch import Tensor

from ncreg._checks import check_number, check_positive, described
from ncreg._readable import readable
from ncreg.numerics import in_float64
from ncreg.theory.scale import margin_at_loss

ROUNDING = 1e-3  # relative slack for a loss and a variance that were measured in single precision


@dataclass(frozen=True, slots=True)
class CollapseCertificate:
    """What a measured cross-entropy proves about the features that gave it.

    Attributes:
        mean_margin: the mean logit margin, over samples and wrong classes, is at least this.
        between_variance: tr Σ_B is at least this, in squared feature units.
        within_share: tr Σ_W / tr Σ_T is at most this; 0 means exact collapse.
    """

    mean_margin: float
    between_variance: float
    within_share: float

    __str__ = readable


def collapse_certificate(
    loss: SupportsFloat,
    weight: Float[Tensor, "classes dim"],
    total_variance: SupportsFloat,
    class_counts: Iterable[Any],
) -> CollapseCertificate:
    """Bound the within-class variance: tr Σ_W/tr Σ_T ≤ 1 − (x(C−1)/(Cβ̃))²/tr Σ_T, x = ln((C−1)/(e^L − 1)).

    β̃ = ‖W − w̄‖_F/√C, the head's spread. By Jensen a mean cross-entropy L needs a mean margin of at least x, and
    by Cauchy–Schwarz a head of spread β̃ makes that margin only from means that lie √(tr Σ_B) ≥ x(C−1)/(Cβ̃)
    apart. Explicit, for any bias, any depth, any training; tight when the features sit on the head's simplex.

    Args:
        loss: mean cross-entropy L in nats, without label smoothing or decay terms, below ln C.
        weight: the head W (C, d) that maps features to logits: logits = W h + b, its scale included.
        total_variance: tr Σ_T = mean ‖h − μ_G‖² of the features the loss was measured on, in the same pass;
            with a last BatchNorm and batch statistics it is ‖γ‖².
        class_counts: samples of each class in that pass; all equal.

    Returns:
        The mean margin, a floor for tr Σ_B and a ceiling for tr Σ_W/tr Σ_T.

    Raises:
        ValueError: for unbalanced classes, a loss outside (0, ln C), a head that is constant over classes or not
            finite, or a variance that such a loss contradicts (by more than 0.1 %, the rounding of single
            precision): then loss, head and features are not of one pass.

    Source: derived here.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> certificate = collapse_certificate(loss=0.05, weight=weight, total_variance=2.5, class_counts=[50, 50])
        >>> round(certificate.within_share, 3)  # at most this fraction of the variance lies within classes
        0.118
    """
    num_classes = _balanced_classes(weight, class_counts)
    value, total = check_number("loss", loss), check_positive("total_variance", total_variance)
    margin = margin_at_loss(value, num_classes)
    rows = in_float64(weight.detach())
    spread = float((rows - rows.mean(0)).norm()) / math.sqrt(num_classes)
    if not (spread > 0 and math.isfinite(spread)):
        raise ValueError(f"weight has a spread of {spread} over classes: a certificate needs a finite, varied head")
    between = (margin * (num_classes - 1) / (num_classes * spread)) ** 2
    if between > total * (1 + ROUNDING):
        raise ValueError(
            f"loss={value:.6g} with this weight needs a between-class variance of {between:.6g}, more than "
            f"total_variance={total:.6g}: take loss, features and head from one pass, and put the head's scale "
            "into weight"
        )
    return CollapseCertificate(margin, between, max(0.0, 1 - between / total))


def _balanced_classes(weight: Tensor, class_counts: Iterable[Any]) -> int:
    """The number of classes, when each has the same number of samples."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor (C, d), not {described(weight)}")
    try:
        given = list(class_counts)
        counts = [int(count) for count in given]
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"class_counts={class_counts!r}: must hold a whole number of samples a class") from None
    if counts != given:
        raise ValueError(f"class_counts={given}: must be whole numbers of samples")
    if weight.ndim != 2 or weight.shape[0] < 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected (C, d) with C ≥ 2")
    if len(counts) != weight.shape[0]:
        raise ValueError(f"class_counts has {len(counts)} entries for a weight of {weight.shape[0]} classes")
    if min(counts) < 1 or min(counts) != max(counts):
        raise ValueError(
            f"class_counts range from {min(counts)} to {max(counts)}: the certificate holds for balanced classes "
            "alone; measure loss and variance on a subset with the same number of samples of each class"
        )
    return len(counts)
