"""One thin module per loss: the constructor holds hyperparameters, forward takes the batch.

Every module names the arguments of its `forward` in `consumes`, in order, out of "features" (batch, dim),
"logits" (batch, classes), "target" (batch,) and "weight" (classes, dim), the head's class vectors. A loop that
has all four can therefore hold any list of losses:

    available = {"features": features, "logits": logits, "target": target, "weight": model.head.weight}
    loss = sum(w * term(*(available[name] for name in term.consumes)) for term, w in terms)

(torch's own losses take ("logits", "target").)

Losses that compare samples with each other gather the batches of all ranks (`gather=True`), so that under
DistributedDataParallel the gradient is that of the global batch.
"""

from typing import ClassVar

from jaxtyping import Float, Integer
from torch import Tensor, nn

from ncreg import functional
from ncreg.distributed import gather_batch
from ncreg.functional.cosine import Center


class IntraClassCosineLoss(nn.Module):
    """1 − mean intra-class cosine; see `ncreg.functional.intra_class_cosine_loss`."""

    consumes: ClassVar[tuple[str, ...]] = ("features", "target")

    def __init__(self, *, center: Center = None, gather: bool = True) -> None:
        super().__init__()
        self.center = center
        self.gather = gather

    def forward(self, features: Float[Tensor, "batch dim"], target: Integer[Tensor, " batch"]) -> Float[Tensor, ""]:
        """The loss of the (global) batch."""
        if self.gather:
            features, target = gather_batch(features, target)
        return functional.intra_class_cosine_loss(features, target, center=self.center)


class InterClassCosineLoss(nn.Module):
    """Mean squared distance of the inter-class cosines from −1/(C−1); see `ncreg.functional`."""

    consumes: ClassVar[tuple[str, ...]] = ("features", "target")

    def __init__(self, num_classes: int, *, center: Center = None, gather: bool = True) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.center = center
        self.gather = gather

    def forward(self, features: Float[Tensor, "batch dim"], target: Integer[Tensor, " batch"]) -> Float[Tensor, ""]:
        """The loss of the (global) batch."""
        if self.gather:
            features, target = gather_batch(features, target)
        return functional.inter_class_cosine_loss(features, target, self.num_classes, center=self.center)


class DotRegressionLoss(nn.Module):
    """½(cos θ − 1)² to the own class vector; see `ncreg.functional.dot_regression_loss`."""

    consumes: ClassVar[tuple[str, ...]] = ("features", "target", "weight")

    def __init__(self, *, normalize: bool = True, length: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self.normalize = normalize
        self.length = length
        self.reduction = reduction

    def forward(
        self,
        features: Float[Tensor, "batch dim"],
        target: Integer[Tensor, " batch"],
        weight: Float[Tensor, "classes dim"],
    ) -> Float[Tensor, ""] | Float[Tensor, " batch"]:
        """The loss of the batch."""
        return functional.dot_regression_loss(
            features,
            target,
            weight,
            normalize=self.normalize,
            length=self.length,
            reduction=self.reduction,
        )
