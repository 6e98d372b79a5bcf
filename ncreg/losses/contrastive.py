"""Contrastive losses: a class vector or a sample against all features of the batch."""

from typing import Any, ClassVar

from torch import Tensor, nn

from ncreg import functional
from ncreg._checks import check_flag, check_positive
from ncreg.distributed import gather_batch
from ncreg.functional.contrastive import OneClass, check_one_class
from ncreg.losses._inputs import Reduction, check_reduction
from ncreg.losses._targets import Target
from ncreg.losses._types import ClassVectors, ClassWeight, Features, Labels, Losses, show_hyperparameters


class NTCELoss(nn.Module):
    """Each class vector against all features of the batch; cross-entropy with the roles swapped."""

    consumes: ClassVar[tuple[str, ...]] = ("features", "target", "weight")
    class_weight: Tensor | None
    extra_repr = show_hyperparameters

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        class_weight: ClassWeight | None = None,
        reduction: Reduction = "mean",
        gather: bool = True,
    ) -> None:
        super().__init__()
        self.temperature = check_positive("temperature", temperature)
        self.register_buffer("class_weight", class_weight)
        self.reduction = check_reduction(reduction)
        self.gather = check_flag("gather", gather)

    def forward(self, features: Features, target: Target, weight: ClassVectors) -> Losses:
        """The loss of the batch."""
        if self.gather:
            features, target = gather_batch(features, target)
        return self._function(
            features,
            target,
            weight,
            temperature=self.temperature,
            class_weight=self.class_weight,
            reduction=self.reduction,
        )

    def _function(self, *batch: Tensor, **hyperparameters: Any) -> Losses:
        return functional.ntce_loss(*batch, **hyperparameters)


class NONLLoss(NTCELoss):
    """NTCE without the other samples of the class in the denominator; a batch needs two classes.

    Where a batch (of all ranks, under gather) has one, `one_class` "raise" refuses it; "skip" makes its loss 0.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        class_weight: ClassWeight | None = None,
        reduction: Reduction = "mean",
        gather: bool = True,
        one_class: OneClass = "raise",
    ) -> None:
        super().__init__(temperature=temperature, class_weight=class_weight, reduction=reduction, gather=gather)
        self.one_class = check_one_class(one_class)

    def _function(self, *batch: Tensor, **hyperparameters: Any) -> Losses:
        return functional.nonl_loss(*batch, **hyperparameters, one_class=self.one_class)


class SupConLoss(nn.Module):
    """Supervised contrastive loss; of features alone, the head trains apart or stays fixed."""

    consumes: ClassVar[tuple[str, ...]] = ("features", "target")
    extra_repr = show_hyperparameters

    def __init__(self, *, temperature: float = 0.1, reduction: Reduction = "mean", gather: bool = True) -> None:
        super().__init__()
        self.temperature = check_positive("temperature", temperature)
        self.reduction = check_reduction(reduction)
        self.gather = check_flag("gather", gather)

    def forward(self, features: Features, target: Labels) -> Losses:
        """The loss of the batch."""
        if self.gather:
            features, target = gather_batch(features, target)
        return functional.supcon_loss(features, target, temperature=self.temperature, reduction=self.reduction)
