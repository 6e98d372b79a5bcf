"""Dot regression on the head's class vectors, and centre loss on centres of its own."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ncreg import functional
from ncreg._checks import check_flag, check_fraction, check_integer, check_num_classes, check_positive
from ncreg.distributed import gather_batch
from ncreg.losses._inputs import Reduction, check_reduction
from ncreg.losses._targets import Target
from ncreg.losses._types import ClassVectors, ClassWeight, Features, Labels, Losses, show_hyperparameters


class DotRegressionLoss(nn.Module):
    """(ℓ/2)(cos θ − 1)², θ between a feature and its own class vector."""

    consumes: ClassVar[tuple[str, ...]] = ("features", "target", "weight")
    class_weight: Tensor | None
    extra_repr = show_hyperparameters

    def __init__(
        self,
        *,
        normalize: bool = True,
        length: float = 1.0,
        class_weight: ClassWeight | None = None,
        reduction: Reduction = "mean",
        gather: bool = False,
    ) -> None:
        super().__init__()
        self.normalize = check_flag("normalize", normalize)
        self.length = check_positive("length", length)
        self.register_buffer("class_weight", class_weight)
        self.reduction = check_reduction(reduction)
        self.gather = check_flag("gather", gather)

    def forward(self, features: Features, target: Target, weight: ClassVectors) -> Losses:
        """The loss of the batch."""
        if self.gather:
            features, target = gather_batch(features, target)
        return functional.dot_regression_loss(
            features,
            target,
            weight,
            normalize=self.normalize,
            length=self.length,
            class_weight=self.class_weight,
            reduction=self.reduction,
        )


class CenterLoss(nn.Module):
    """½‖h − c_y‖² to the running centre of the class, a buffer that each batch in training mode moves after the loss.

    Example:
        >>> loss = CenterLoss(2, 2, rate=0.5)
        >>> loss(torch.tensor([[4.0, 0.0]]), torch.tensor([1])), loss.centers[1]
        (tensor(8.), tensor([1., 0.]))
    """

    consumes: ClassVar[tuple[str, ...]] = ("features", "target")
    centers: Tensor
    extra_repr = show_hyperparameters

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        *,
        rate: float = 0.5,
        reduction: Reduction = "mean",
        gather: bool = True,
    ) -> None:
        super().__init__()
        self.rate = check_fraction("rate", rate)
        self.reduction = check_reduction(reduction)
        # On by default: the centres must stay the same on every rank.
        self.gather = check_flag("gather", gather)
        self.register_buffer(
            "centers", torch.zeros(check_num_classes(num_classes), check_integer("num_features", num_features, 1))
        )

    def forward(self, features: Features, target: Labels) -> Losses:
        """The loss of the batch."""
        if self.gather:
            features, target = gather_batch(features, target)
        loss = functional.center_loss(features, target, self.centers, reduction=self.reduction)
        if self.training:
            self.centers = functional.update_centers(self.centers, features, target, rate=self.rate)
        return loss
