"""What a logit scale can reach: unit features on unit simplex class vectors, logits = scale · cosine.

At collapse the own class has cosine 1 and every other class −1/(C−1), so the logit gap is scale · C/(C−1).
"""

from __future__ import annotations

import math

from ncreg._checks import Number, check_non_negative, check_num_classes, check_number


def loss_at_margin(margin: Number, num_classes: int) -> float:
    """Cross-entropy in nats when every wrong logit lies `margin` below the own: ln(1 + (C−1)·e^(−margin))."""
    return math.log1p((num_classes - 1) * math.exp(-margin))


def margin_at_loss(loss: Number, num_classes: int) -> float:
    """The logit margin whose cross-entropy is `loss`: ln((C−1)/(e^loss − 1)), inverse of `loss_at_margin`.

    Written so that both ends keep their digits: ln(C−1) − ln(expm1 loss) for a small loss, and
    log1p((C − e^loss)/(e^loss − 1)) near ln C, where the ratio approaches 1.
    """
    loss = check_number("loss", loss)
    if not 0 < loss < math.log(num_classes):
        raise ValueError(
            f"loss={loss!r}: with {num_classes} classes a cross-entropy with a positive margin lies strictly "
            f"between 0 and ln {num_classes} = {math.log(num_classes):.6g} nats"
        )
    excess = math.expm1(loss)
    below_chance = -math.expm1(loss - math.log(num_classes))
    if below_chance < 0.5:
        return math.log1p(num_classes * below_chance / excess)
    return math.log(num_classes - 1) - math.log(excess)


def minimal_cross_entropy(scale: Number, num_classes: int) -> float:
    """Smallest cross-entropy of unit features on a unit simplex: ln(1 + (C−1)·e^(−scale·C/(C−1))).

    Args:
        scale: factor on the cosines (1/temperature), not below 0.
        num_classes: number of classes C, at least 2.

    Returns:
        The loss in nats, between 0 and ln C: no features, however collapsed, go below it at this scale.

    Raises:
        ValueError: for a negative or non-finite scale, or fewer than two classes.

    Example:
        >>> round(minimal_cross_entropy(1.0, 10), 3)  # unit logits cannot be confident
        1.377
    """
    num_classes, scale = check_num_classes(num_classes), check_non_negative("scale", scale)
    return loss_at_margin(scale * num_classes / (num_classes - 1), num_classes)


def scale_for_loss(num_classes: int, loss: Number) -> float:
    """The scale at which the smallest reachable cross-entropy is `loss`: ((C−1)/C)·ln((C−1)/(e^loss − 1)).

    Args:
        num_classes: number of classes C, at least 2.
        loss: the smallest cross-entropy to allow, in nats, strictly between 0 and ln C.

    Returns:
        The factor on the cosines (1/temperature); the inverse of `minimal_cross_entropy`.

    Raises:
        ValueError: for a loss outside (0, ln C), or fewer than two classes.

    Example:
        >>> scale = scale_for_loss(10, 0.01)
        >>> round(scale, 3), round(minimal_cross_entropy(scale, 10), 12)
        (6.118, 0.01)
    """
    num_classes = check_num_classes(num_classes)
    return (num_classes - 1) / num_classes * margin_at_loss(loss, num_classes)
