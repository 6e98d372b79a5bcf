"""A memory of class means, for cosine losses where classes outnumber a batch's samples."""

import torch
from torch import Tensor, nn

from ncreg._checks import check_fraction, check_integer, check_num_classes
from ncreg._transforms import for_state, row_count
from ncreg.losses._directions import Center, directions
from ncreg.losses._inputs import ClassVectors, Features, Labels, check_rows, show_hyperparameters
from ncreg.losses._targets import check_labels, class_means, class_of_slot, compact


def update_class_means(
    memory: ClassVectors,
    features: Features,
    target: Labels,
    *,
    momentum: float = 0.9,
    center: Center = None,
) -> ClassVectors:
    """m_c ← momentum · m_c + (1 − momentum) · t_c for the classes present, t_c itself the first time the class occurs.

    A class whose t_c is not finite keeps its m_c.

    Args:
        memory: m, zero rows for classes not met.
        features: h, any scale; lengths (from the centre) below 1e-6, in float16 1e-3, are divided by that.
        target: class indices below the memory's length.
        momentum: weight of the old mean each time the class is met, in [0, 1].
        center: as in `intra_class_cosine`.

    Raises:
        ValueError: shapes, labels, centre or momentum that do not fit.

    Example:
        >>> once = update_class_means(torch.zeros(2, 2), torch.tensor([[3.0, 0.0]]), torch.tensor([1]))
        >>> update_class_means(once, torch.tensor([[0.0, 2.0]]), torch.tensor([1]))
        tensor([[0.0000, 0.0000],
                [0.9000, 0.1000]])
    """
    check_fraction("momentum", momentum)
    check_rows("features", features)
    target = check_labels(target, features, memory_size(memory, features))
    with torch.no_grad():
        wide = torch.promote_types(memory.dtype, torch.float32)  # bfloat16 cannot count beyond 256
        target = target.to(memory.device)
        label, slots = compact(target, row_count(memory))  # the rows of classes that are absent stay as they are
        means, _ = class_means(directions(features, center).to(memory.device, wide), label, slots)
        old = memory.index_select(0, class_of_slot(target, label, slots))
        keep = momentum * old.any(1, keepdim=True).to(wide)
        # A batch that overflowed must not stay in the memory: a gradient scaler skips it as well.
        taken = means.isfinite().all(1, keepdim=True)
        new = torch.where(taken, keep * old + (1 - keep) * means, old).to(memory.dtype)
        return memory.index_copy(0, target, new.index_select(0, label))


class ClassMeanMemory(nn.Module):
    """Running mean direction of each class, updated by the cosine loss that it is given to as `memory=`.

    Args:
        num_classes: C.
        num_features: d.
        momentum: weight of the old mean each time the class is met, in [0, 1].

    Example:
        >>> memory = ClassMeanMemory(3, 2, momentum=0.9)
        >>> memory.update(torch.tensor([[5.0, 0.0]]), torch.tensor([2]))
        >>> memory.means[2]
        tensor([1., 0.])
    """

    means: Tensor
    extra_repr = show_hyperparameters

    def __init__(self, num_classes: int, num_features: int, *, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = check_fraction("momentum", momentum)
        self.register_buffer(
            "means", torch.zeros(check_num_classes(num_classes), check_integer("num_features", num_features, 1))
        )

    def reset_parameters(self) -> None:
        """Forget all batches; what deferred initialisation calls, too."""
        self.means = torch.zeros_like(self.means)

    def update(self, features: Features, target: Labels, center: Center = None) -> None:
        """Take a batch in: `ncreg.functional.update_class_means`."""
        features, target = for_state("ClassMeanMemory", features, target)
        # A new tensor instead of a write in place: backward still needs the old means.
        self.means = update_class_means(self.means, features, target, momentum=self.momentum, center=center)


def memory_size(memory: Tensor | None, features: Tensor) -> int | None:
    """The number of classes that a memory holds."""
    if memory is None:
        return None
    check_rows("memory", memory, features.shape[1])
    return row_count(memory)
