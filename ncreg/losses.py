"""One thin module per loss: the constructor holds hyperparameters, forward takes the batch.

Every module names what its `forward` takes in `consumes`, in order, out of "features" (batch, dim), "logits"
(batch, classes), "target" (batch,) and "weight" (classes, dim), the head's class vectors. A loop that has all four
can hold any list of losses (torch's own take "logits", "target"):

    >>> available = {"features": torch.eye(2), "target": torch.tensor([0, 1]), "weight": torch.eye(2)}
    >>> terms = [(1.0, NTCELoss(temperature=1.0)), (0.5, InterClassCosineLoss(2))]
    >>> sum(share * term(*(available[name] for name in term.consumes)) for share, term in terms)
    tensor(0.8133)

Formula, source and arguments are at the function of the same name in `ncreg.functional`. Two belong to the modules:

    gather   the loss is that of all ranks' batches together, and DistributedDataParallel's averaged gradient exactly
             the global batch's; every rank must make the call. On where samples are compared with each other, off
             where the loss is a mean over samples: equal batches then need none.
    memory   a ClassMeanMemory, one for each loss, which every batch updates in training mode, after the loss.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from ncreg import functional
from ncreg.distributed import gather_batch
from ncreg.frames import as_size
from ncreg.functional._inputs import Reduction, check_num_classes, check_positive, check_reduction, check_share
from ncreg.functional._targets import Target
from ncreg.functional.contrastive import OneClass, check_one_class
from ncreg.functional.cosine import Center, check_center

Features = Float[Tensor, "batch dim"]
Logits = Float[Tensor, "batch classes"]
Labels = Integer[Tensor, " batch"]
ClassVectors = Float[Tensor, "classes dim"]
ClassWeight = Float[Tensor, " classes"]
Loss = Float[Tensor, ""]
Losses = Float[Tensor, ""] | Float[Tensor, " all_ranks_batch"]  # the latter with reduction="none"


def _extra_repr(module: nn.Module) -> str:
    """The hyperparameters a module holds."""
    return ", ".join(
        f"{name}={value!r}" for name, value in vars(module).items() if name[0] != "_" and name != "training"
    )


class ClassMeanMemory(nn.Module):
    """Running mean direction of each class, for cosine losses where classes outnumber a batch's samples.

    `momentum` is the share of the old mean that stays each time the class is met.

    Example:
        >>> loss = InterClassCosineLoss(1000, memory=ClassMeanMemory(1000, 64, momentum=0.9))
        >>> list(loss.state_dict())
        ['memory.means']
    """

    means: Tensor
    extra_repr = _extra_repr

    def __init__(self, num_classes: int, num_features: int, *, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = check_share("momentum", momentum)
        self.register_buffer(
            "means", torch.zeros(check_num_classes(num_classes), as_size("num_features", num_features, 1))
        )

    def update(self, features: Features, target: Labels, center: Center = None) -> None:
        """Take a batch in: `ncreg.functional.update_class_means`."""
        # A new tensor instead of a write in place: backward still needs the old means.
        self.means = functional.update_class_means(self.means, features, target, momentum=self.momentum, center=center)


class IntraClassCosineLoss(nn.Module):
    """1 − mean intra-class cosine; 0 when classes have collapsed."""

    consumes: ClassVar[tuple[str, ...]] = ("features", "target")
    center: Center
    extra_repr = _extra_repr

    def __init__(self, *, center: Center = None, memory: ClassMeanMemory | None = None, gather: bool = True) -> None:
        super().__init__()
        _hold_center(self, center)
        self.memory = _checked_memory(memory)
        self.gather = gather

    def forward(self, features: Features, target: Labels) -> Loss:
        """The loss of the batch."""
        if self.gather:
            features, target = gather_batch(features, target)
        past = None if self.memory is None else self.memory.means
        loss = functional.intra_class_cosine_loss(features, target, center=self.center, memory=past)
        if self.memory is not None and self.training:
            self.memory.update(features, target, self.center)
        return loss


class InterClassCosineLoss(nn.Module):
    """Mean of (inter-class cosine + 1/(C−1))²; 0 when class means form a simplex."""

    consumes: ClassVar[tuple[str, ...]] = ("features", "target")
    center: Center
    extra_repr = _extra_repr

    def __init__(
        self, num_classes: int, *, center: Center = None, memory: ClassMeanMemory | None = None, gather: bool = True
    ) -> None:
        super().__init__()
        self.num_classes = check_num_classes(num_classes)
        _hold_center(self, center)
        self.memory = _checked_memory(memory)
        self.gather = gather

    def forward(self, features: Features, target: Labels) -> Loss:
        """The loss of the batch."""
        if self.gather:
            features, target = gather_batch(features, target)
        past = None if self.memory is None else self.memory.means
        loss = functional.inter_class_cosine_loss(features, target, self.num_classes, center=self.center, memory=past)
        if self.memory is not None and self.training:
            self.memory.update(features, target, self.center)
        return loss


class DotRegressionLoss(nn.Module):
    """(ℓ/2)(cos θ − 1)², θ between a feature and its own class vector."""

    consumes: ClassVar[tuple[str, ...]] = ("features", "target", "weight")
    class_weight: Tensor | None
    extra_repr = _extra_repr

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
        if not isinstance(normalize, bool):
            raise TypeError(f"normalize must be True or False, got {normalize!r}")
        self.normalize = normalize
        self.length = check_positive("length", length)
        self.register_buffer("class_weight", class_weight)
        self.reduction = check_reduction(reduction)
        self.gather = gather

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
    extra_repr = _extra_repr

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
        self.rate = check_share("rate", rate)
        self.reduction = check_reduction(reduction)
        self.gather = gather  # on by default: the centres must stay the same on every rank
        self.register_buffer(
            "centers", torch.zeros(check_num_classes(num_classes), as_size("num_features", num_features, 1))
        )

    def forward(self, features: Features, target: Labels) -> Losses:
        """The loss of the batch."""
        if self.gather:
            features, target = gather_batch(features, target)
        loss = functional.center_loss(features, target, self.centers, reduction=self.reduction)
        if self.training:
            self.centers = functional.update_centers(self.centers, features, target, rate=self.rate)
        return loss


class NTCELoss(nn.Module):
    """Each class vector against all features of the batch; cross-entropy with the roles swapped."""

    consumes: ClassVar[tuple[str, ...]] = ("features", "target", "weight")
    class_weight: Tensor | None
    extra_repr = _extra_repr

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
        self.gather = gather

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
    extra_repr = _extra_repr

    def __init__(self, *, temperature: float = 0.1, reduction: Reduction = "mean", gather: bool = True) -> None:
        super().__init__()
        self.temperature = check_positive("temperature", temperature)
        self.reduction = check_reduction(reduction)
        self.gather = gather

    def forward(self, features: Features, target: Labels) -> Losses:
        """The loss of the batch."""
        if self.gather:
            features, target = gather_batch(features, target)
        return functional.supcon_loss(features, target, temperature=self.temperature, reduction=self.reduction)


class OneHotMSELoss(nn.Module):
    """½‖z − y‖² of logits and one-hot or soft labels."""

    consumes: ClassVar[tuple[str, ...]] = ("logits", "target")
    class_weight: Tensor | None
    extra_repr = _extra_repr

    def __init__(
        self, *, class_weight: ClassWeight | None = None, reduction: Reduction = "mean", gather: bool = False
    ) -> None:
        super().__init__()
        self.register_buffer("class_weight", class_weight)
        self.reduction = check_reduction(reduction)
        self.gather = gather

    def forward(self, logits: Logits, target: Target) -> Losses:
        """The loss of the batch."""
        if self.gather:
            logits, target = gather_batch(logits, target)
        return functional.mse_one_hot_loss(logits, target, class_weight=self.class_weight, reduction=self.reduction)


class SpectralDecouplingLoss(nn.Module):
    """Cross-entropy + (λ/2)‖z‖², λ the coefficient."""

    consumes: ClassVar[tuple[str, ...]] = ("logits", "target")
    class_weight: Tensor | None
    extra_repr = _extra_repr

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
        self.gather = gather

    def forward(self, logits: Logits, target: Target) -> Losses:
        """The loss of the batch."""
        if self.gather:
            logits, target = gather_batch(logits, target)
        return functional.spectral_decoupling_loss(
            logits, target, coefficient=self.coefficient, class_weight=self.class_weight, reduction=self.reduction
        )


def _hold_center(module: nn.Module, center: Center) -> None:
    """Keep a vector as a buffer, so that it follows the module's device; a word as an attribute."""
    check_center(center)
    if isinstance(center, Tensor):
        module.register_buffer("center", center)
    else:
        module.center = center  # type: ignore[assignment]


def _checked_memory(memory: ClassMeanMemory | None) -> ClassMeanMemory | None:
    """A memory that the module can update, or None."""
    if memory is None or isinstance(memory, ClassMeanMemory):
        return memory
    raise TypeError(f"memory must be a ClassMeanMemory or None, got {type(memory).__name__}")
