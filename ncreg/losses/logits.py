"""Losses of logits."""

from typing import ClassVar

from torch import Tensor, nn

from ncreg import functional
from ncreg._checks import check_flag, check_positive
from ncreg.distributed import gather_batch
from ncreg.losses._inputs import Reduction, check_reduction
from ncreg.losses._targets import Target
from ncreg.losses._types import ClassWeight, Logits, Losses, show_hyperparameters


class OneHotMSELoss(nn.Module):
    """½‖z − y‖² of logits and one-hot or soft labels."""

    consumes: ClassVar[tuple[str, ...]] = ("logits", "target")
    class_weight: Tensor | None
    extra_repr = show_hyperparameters

    def __init__(
        self, *, class_weight: ClassWeight | None = None, reduction: Reduction = "mean", gather: bool = False
    ) -> None:
        super().__init__()
        self.register_buffer("class_weight", class_weight)
        self.reduction = check_reduction(reduction)
        self.gather = check_flag("gather", gather)

    def forward(self, logits: Logits, target: Target) -> Losses:
        """The loss of the batch."""
        if self.gather:
            logits, target = gather_batch(logits, target)
        return functional.mse_one_hot_loss(logits, target, class_weight=self.class_weight, reduction=self.reduction)


class SpectralDecouplingLoss(nn.Module):
    """Cross-entropy + (λ/2)‖z‖², λ the coefficient."""

    consumes: ClassVar[tuple[str, ...]] = ("logits", "target")
    class_weight: Tensor | None
    extra_repr = show_hyperparameters

    def __init__(
        self,
        *,
        coefficient: float = 0.1,
        class_weight: ClassWeight | None = None,
        reduction: Reduction = "mean",
        gather: bool = False,
    ) -> None:
        super().__init__()
        self.coefficient = check_positive("coefficient", coefficient)
        self.register_buffer("class_weight", class_weight)
        self.reduction = check_reduction(reduction)
        self.gather = check_flag("gather", gather)

    def forward(self, logits: Logits, target: Target) -> Losses:
        """The loss of the batch."""
        if self.gather:
            logits, target = gather_batch(logits, target)
        return functional.spectral_decoupling_loss(
            logits, target, coefficient=self.coefficient, class_weight=self.class_weight, reduction=self.reduction
        )
