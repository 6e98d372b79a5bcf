"""Losses of logits, and label smoothing."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from ncreg._checks import check_fraction, check_num_classes, check_positive
from ncreg.losses._inputs import Reduction, average, check_rows, full_precision
from ncreg.losses._targets import Target, check_labels, check_soft, is_soft, sample_weights, weighed


def mse_one_hot_loss(
    logits: Float[Tensor, "batch classes"],
    target: Target,
    *,
    class_weight: Float[Tensor, " classes"] | None = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, " batch"]:
    """½‖z − y‖², y the one-hot (or soft) label; the mean over samples is (1/2N)‖WH − Y‖².

    Source: Tirer & Bruna, "Extended Unconstrained Features Model for Exploring Deep Neural Collapse", ICML 2022
    (arXiv 2202.08087), whose scaling this is: torch's mse_loss divides by the number of classes too.

    Args:
        logits: z.
        target: class indices in [0, C), or soft labels.
        class_weight: weight of a class's samples (of a soft label the mean of its classes'); the mean is then the
            weighted mean.
        reduction: "mean", "sum" or "none" (one value a sample).

    Raises:
        ValueError: shapes, labels or reduction that do not fit.
        TypeError: logits that are not floating-point, labels that are not integers.

    Example:
        >>> mse_one_hot_loss(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([1]))
        tensor(1.)
    """
    check_rows("logits", logits)
    classes = logits.shape[1]
    target = check_soft(target, logits, classes) if is_soft(target) else check_labels(target, logits, classes)
    wanted = target if is_soft(target) else F.one_hot(target, classes)
    losses = (full_precision(logits) - wanted).square().sum(1) / 2
    return average(losses, reduction, sample_weights(class_weight, target, classes))


def spectral_decoupling_loss(
    logits: Float[Tensor, "batch classes"],
    target: Target,
    *,
    coefficient: float = 0.1,
    class_weight: Float[Tensor, " classes"] | None = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, " batch"]:
    """Cross-entropy + (λ/2)‖z‖²: a cost on logits in place of weight decay, so that no feature starves the others.

    Source: Pezeshki et al., "Gradient Starvation: A Learning Proclivity in Neural Networks", NeurIPS 2021
    (arXiv 2011.09468).

    Args:
        logits: z.
        target: class indices in [0, C), or soft labels.
        coefficient: λ.
        class_weight: weight of a class's samples, both terms; the mean is then the weighted mean.
        reduction: "mean", "sum" or "none" (one value a sample).

    Raises:
        ValueError: shapes, labels, coefficient or reduction that do not fit.
        TypeError: logits that are not floating-point, labels that are not integers.

    Example:
        >>> spectral_decoupling_loss(torch.tensor([[1.0, -1.0]]), torch.tensor([0]), coefficient=1.0)
        tensor(1.1269)
    """
    check_rows("logits", logits)
    check_positive("coefficient", coefficient)
    classes = logits.shape[1]
    target = check_soft(target, logits, classes) if is_soft(target) else check_labels(target, logits, classes)
    lifted = full_precision(logits)
    target, weight = weighed(target, class_weight, classes)
    entropy = F.cross_entropy(lifted, target.to(lifted) if is_soft(target) else target, reduction="none")
    losses = entropy + coefficient / 2 * lifted.square().sum(1)
    return average(losses, reduction, weight)


def smooth_labels(
    target: Integer[Tensor, " batch"],
    num_classes: int,
    smoothing: float = 0.1,
    *,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "batch classes"]:
    """Soft labels (1 − s)·one-hot + s/C for the losses that take them.

    Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016 (arXiv 1512.00567).

    Args:
        target: class indices in [0, num_classes).
        num_classes: C.
        smoothing: s in [0, 1].
        dtype: of the result; torch's default dtype where it is None.

    Raises:
        ValueError: smoothing outside [0, 1], labels out of range.
        TypeError: labels that are not integers.

    Example:
        >>> smooth_labels(torch.tensor([1]), 4, 0.2)
        tensor([[0.0500, 0.8500, 0.0500, 0.0500]])
    """
    check_num_classes(num_classes)
    check_fraction("smoothing", smoothing)
    hot = F.one_hot(check_labels(target, target, num_classes), num_classes).to(dtype or torch.get_default_dtype())
    return (1 - smoothing) * hot + smoothing / num_classes
