"""Cosine losses, and the memory of class means that they may keep."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ncreg import functional
from ncreg._checks import check_flag, check_fraction, check_integer, check_num_classes
from ncreg.distributed import gather_batch
from ncreg.functional.cosine import Center, check_center
from ncreg.losses._types import Features, Labels, Loss, show_hyperparameters


class ClassMeanMemory(nn.Module):
    """Running mean direction of each class, for cosine losses where classes outnumber a batch's samples.

    `momentum` is the share of the old mean that stays each time the class is met.

    Example:
        >>> loss = InterClassCosineLoss(1000, memory=ClassMeanMemory(1000, 64, momentum=0.9))
        >>> list(loss.state_dict())
        ['memory.means']
    """

    means: Tensor
    extra_repr = show_hyperparameters

    def __init__(self, num_classes: int, num_features: int, *, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = check_fraction("momentum", momentum)
        self.register_buffer(
            "means", torch.zeros(check_num_classes(num_classes), check_integer("num_features", num_features, 1))
        )

    def update(self, features: Features, target: Labels, center: Center = None) -> None:
        """Take a batch in: `ncreg.functional.update_class_means`."""
        # A new tensor instead of a write in place: backward still needs the old means.
        self.means = functional.update_class_means(self.means, features, target, momentum=self.momentum, center=center)


class IntraClassCosineLoss(nn.Module):
    """1 − mean intra-class cosine; 0 when classes have collapsed."""

    consumes: ClassVar[tuple[str, ...]] = ("features", "target")
    center: Center
    extra_repr = show_hyperparameters

    def __init__(self, *, center: Center = None, memory: ClassMeanMemory | None = None, gather: bool = True) -> None:
        super().__init__()
        _hold_center(self, center)
        self.memory = _checked_memory(memory)
        self.gather = check_flag("gather", gather)

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
    extra_repr = show_hyperparameters

    def __init__(
        self, num_classes: int, *, center: Center = None, memory: ClassMeanMemory | None = None, gather: bool = True
    ) -> None:
        super().__init__()
        self.num_classes = check_num_classes(num_classes)
        _hold_center(self, center)
        self.memory = _checked_memory(memory)
        self.gather = check_flag("gather", gather)

    def forward(self, features: Features, target: Labels) -> Loss:
        """The loss of the batch."""
        if self.gather:
            features, target = gather_batch(features, target)
        past = None if self.memory is None else self.memory.means
        loss = functional.inter_class_cosine_loss(features, target, self.num_classes, center=self.center, memory=past)
        if self.memory is not None and self.training:
            self.memory.update(features, target, self.center)
        return loss


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
