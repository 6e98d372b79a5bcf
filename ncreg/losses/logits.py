"""Losses of logits, and label smoothing."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ncreg._checks import check_constant, check_flag, check_fraction, check_num_classes, check_positive
from ncreg._transforms import fx_leaf
from ncreg.distributed import gather_batch
from ncreg.losses._inputs import (
    ClassWeight,
    GatheredLosses,
    Labels,
    Logits,
    Losses,
    LossModule,
    Reduction,
    average,
    check_reduction,
    check_rows,
)
from ncreg.losses._targets import Target, check_labels, check_target, is_soft, one_hot, sample_weights, weighed
from ncreg.numerics import at_least_float32


def mse_one_hot_loss(
    logits: Logits,
    target: Target,
    *,
    class_weight: ClassWeight | None = None,
    reduction: Reduction = "mean",
) -> Losses:
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
    target = check_target(target, logits, classes)
    lifted = at_least_float32(logits)
    labels = target if is_soft(target) else one_hot(target, classes, lifted.dtype)
    losses = (lifted - labels).square().sum(1) / 2
    return average(losses, reduction, sample_weights(class_weight, target, classes))


class OneHotMSELoss(LossModule):
    """`mse_one_hot_loss` as a module.

    Args:
        class_weight: weight of a class's samples (C,); the mean is then the weighted mean.
        reduction: "mean", "sum" or "none" (one value a sample).
        gather: take the batches of all ranks together; `ncreg.losses` says what for.

    Example:
        >>> OneHotMSELoss()(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([1]))  # logits, target
        tensor(1.)
    """

    consumes = ("logits", "target")
    class_weight: Tensor | None

    def __init__(
        self, *, class_weight: ClassWeight | None = None, reduction: Reduction = "mean", gather: bool = False
    ) -> None:
        super().__init__()
        self.register_buffer("class_weight", class_weight)
        self.reduction = check_reduction(reduction)
        self.gather = check_flag("gather", gather)

    @fx_leaf
    def forward(self, logits: Logits, target: Target) -> GatheredLosses:
        """The loss of the batch."""
        if self.gather:
            logits, target = gather_batch(logits, target)
        return mse_one_hot_loss(logits, target, class_weight=self.class_weight, reduction=self.reduction)


def spectral_decoupling_loss(
    logits: Logits,
    target: Target,
    *,
    coefficient: float = 0.1,
    class_weight: ClassWeight | None = None,
    reduction: Reduction = "mean",
) -> Losses:
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
    target = check_target(target, logits, classes)
    lifted = at_least_float32(logits)
    target, weight = weighed(target, class_weight, classes)
    entropy = F.cross_entropy(lifted, target.to(lifted) if is_soft(target) else target, reduction="none")
    losses = entropy + coefficient / 2 * lifted.square().sum(1)
    return average(losses, reduction, weight)


class SpectralDecouplingLoss(LossModule):
    """`spectral_decoupling_loss` as a module.

    Args:
        coefficient: λ.
        class_weight: weight of a class's samples (C,); the mean is then the weighted mean.
        reduction: "mean", "sum" or "none" (one value a sample).
        gather: take the batches of all ranks together; `ncreg.losses` says what for.

    Example:
        >>> SpectralDecouplingLoss(coefficient=1.0)(torch.tensor([[1.0, -1.0]]), torch.tensor([0]))  # logits, target
        tensor(1.1269)
    """

    consumes = ("logits", "target")
    class_weight: Tensor | None

    def __init__(
        self,
        *,
        coefficient: float = 0.1,
        class_weight: ClassWeight | None = None,
        reduction: Reduction = "mean",
        gather: bool = False,
    ) -> None:
        super().__init__()
        self.coefficient = check_positive("coefficient", check_constant("coefficient", coefficient, "loss"))
        self.register_buffer("class_weight", class_weight)
        self.reduction = check_reduction(reduction)
        self.gather = check_flag("gather", gather)

    @fx_leaf
    def forward(self, logits: Logits, target: Target) -> GatheredLosses:
        """The loss of the batch."""
        if self.gather:
            logits, target = gather_batch(logits, target)
        return spectral_decoupling_loss(
            logits, target, coefficient=self.coefficient, class_weight=self.class_weight, reduction=self.reduction
        )


def smooth_labels(
    target: Labels,
    num_classes: int,
    smoothing: float = 0.1,
    *,
    dtype: torch.dtype | None = None,
) -> Logits:
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
    hot = one_hot(check_labels(target, target, num_classes), num_classes, dtype or torch.get_default_dtype())
    return (1 - smoothing) * hot + smoothing / num_classes
