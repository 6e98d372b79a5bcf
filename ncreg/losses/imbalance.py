"""Losses for classes of unequal size."""

from typing import ClassVar

from torch import Tensor, nn

from ncreg import functional
from ncreg._checks import check_finite, check_flag, check_fraction
from ncreg.distributed import gather_batch
from ncreg.functional.imbalance import Counts, check_counts
from ncreg.losses._inputs import Reduction, check_reduction
from ncreg.losses._targets import Target
from ncreg.losses._types import ClassWeight, Logits, Losses, show_hyperparameters


class LogitAdjustedLoss(nn.Module):
    """Cross-entropy of z + τ·ln π, π the shares of the classes in the training set; τ = 1 is balanced softmax.

    `label_smoothing` goes to the classes by π^τ, see `ncreg.functional.logit_adjusted_cross_entropy`.

    Example:
        >>> import torch
        >>> loss = LogitAdjustedLoss([3, 1])
        >>> loss(torch.zeros(1, 2), torch.tensor([1]))  # -ln(1/4)
        tensor(1.3863)
    """

    consumes: ClassVar[tuple[str, ...]] = ("logits", "target")
    class_counts: Tensor
    class_weight: Tensor | None
    extra_repr = show_hyperparameters

    def __init__(
        self,
        class_counts: Counts,
        *,
        tau: float = 1.0,
        label_smoothing: float = 0.0,
        class_weight: ClassWeight | None = None,
        reduction: Reduction = "mean",
        gather: bool = False,
    ) -> None:
        super().__init__()
        # Whole numbers stay exact where .half() rounds a module's floating-point buffers.
        counts = check_counts(class_counts)
        self.register_buffer("class_counts", counts.long() if bool((counts == counts.round()).all()) else counts)
        self.tau = check_finite("tau", tau)
        self.label_smoothing = check_fraction("label_smoothing", label_smoothing)
        self.register_buffer("class_weight", class_weight)
        self.reduction = check_reduction(reduction)
        self.gather = check_flag("gather", gather)

    def forward(self, logits: Logits, target: Target) -> Losses:
        """The loss of the batch."""
        if self.gather:
            logits, target = gather_batch(logits, target)
        return functional.logit_adjusted_cross_entropy(
            logits,
            target,
            self.class_counts,
            tau=self.tau,
            label_smoothing=self.label_smoothing,
            class_weight=self.class_weight,
            reduction=self.reduction,
        )
