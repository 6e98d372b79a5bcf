"""Intra- and inter-class cosine: measures of collapse, and the losses that drive them to their optimum.

Both come from the class sums of unit vectors, O(batch · dim), never from pairs of samples. After Pan & Cao,
"Towards Understanding Neural Collapse: The Effects of Batch Normalization and Weight Decay" (arXiv 2309.04644).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ncreg._checks import check_flag, check_num_classes, described
from ncreg._transforms import fx_leaf, takes_in
from ncreg.distributed import gather_batch
from ncreg.losses._directions import Center, check_center, directions, exact_unit_rows, mean_directions
from ncreg.losses._inputs import ClassVectors, Features, Labels, Loss, LossModule, check_rows, dot_products
from ncreg.losses._targets import check_labels, class_means, class_of_slot, compact
from ncreg.losses.memory import ClassMeanMemory, memory_size
from ncreg.numerics import in_float64


def intra_class_cosine(
    features: Features,
    target: Labels,
    num_classes: int,
    *,
    center: Center = None,
) -> Float[Tensor, " classes"]:
    """Mean cosine between two samples of a class: intra_c = ‖t_c‖², t_c the class mean of u.

    u = (h − center)/‖h − center‖; all n² pairs count, a sample with itself included. 1 at collapse. Computed and
    returned in float64, NaN for a class without samples.
    Source: Pan & Cao, arXiv 2309.04644.

    Args:
        features: h, any scale.
        target: class indices in [0, num_classes).
        num_classes: C, length of the result.
        center: None (the origin: right behind a BatchNorm without bias), "batch" (the mean of all features, as
            in the paper; misleading when classes are unbalanced), or a vector (dim,), say the mean of class means.

    Raises:
        ValueError: shapes, labels or centre that do not fit.
        TypeError: features that are not floating-point, labels that are not integers.

    Example:
        >>> h = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
        >>> intra_class_cosine(h, torch.tensor([0, 0, 1]), 3)
        tensor([0.5000, 1.0000,    nan], dtype=torch.float64)
    """
    means, counts = _class_directions(features, target, num_classes, center)
    return means.square().sum(1).masked_fill(counts == 0, torch.nan)


def inter_class_cosine(
    features: Features,
    target: Labels,
    num_classes: int,
    *,
    center: Center = None,
) -> Float[Tensor, "classes classes"]:
    """Mean cosine between a sample of class c and one of class c': inter_cc' = t_c · t_c'.

    −1/(C−1) off the diagonal at collapse; the diagonal holds the intra-class cosines. Computed and returned in
    float64, NaN in rows and columns of classes without samples. Arguments, errors and source: `intra_class_cosine`.

    Example:
        >>> h = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
        >>> inter_class_cosine(h, torch.tensor([0, 0, 1]), 2)
        tensor([[ 0.5000, -0.5000],
                [-0.5000,  1.0000]], dtype=torch.float64)
    """
    means, counts = _class_directions(features, target, num_classes, center)
    absent = counts == 0
    return dot_products(means, means).masked_fill(absent[:, None] | absent[None, :], torch.nan)


def intra_class_cosine_loss(
    features: Features,
    target: Labels,
    *,
    center: Center = None,
    memory: ClassVectors | None = None,
) -> Loss:
    """1 − mean of intra_c over the classes present; 0 at collapse, in [0, 1].

    A class with one sample counts as collapsed. So where classes outnumber the batch's samples hand in a memory
    of class means m_c: then intra_c = t_c · m_c, each sample against the past of its class (the loss in [0, 2]).
    Source: the measure of Pan & Cao, arXiv 2309.04644, as a loss.

    Args:
        features: h, any scale; lengths (from the centre) below 1e-6, in float16 1e-3, are divided by that.
        target: class indices, not negative; below the memory's length where there is one.
        center: as in `intra_class_cosine`. "batch" is a biased estimate of the training mean; its gradient flows.
        memory: m, mean u of each class so far, no gradient; a zero row is a class not met, and does not count.
            `ncreg.losses.ClassMeanMemory` keeps one.

    Raises:
        ValueError: shapes, labels or centre that do not fit.
        TypeError: features that are not floating-point, labels that are not integers.

    Example:
        >>> h = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
        >>> intra_class_cosine_loss(h, torch.tensor([0, 0, 1]))
        tensor(0.2500)
    """
    check_rows("features", features)
    target = check_labels(target, features, memory_size(memory, features))
    label, slots = compact(target)
    means, counts = mean_directions(features, center, label, slots)
    if memory is None:
        counted = counts > 0
        cosines = means.square().sum(1)
    else:
        past = memory.detach().to(means).index_select(0, class_of_slot(target, label, slots))
        counted = (counts > 0) & past.any(1)
        cosines = (means * past).sum(1)
    return ((1 - cosines) * counted).sum() / counted.sum().clamp(min=1)


class IntraClassCosineLoss(LossModule):
    """`intra_class_cosine_loss` as a module, which may keep a memory of class means.

    Args:
        center: None (the origin), "batch" (the mean of its features), or a vector (d,).
        memory: a `ClassMeanMemory` of its own; the batch is then compared with the past of the classes.
        gather: take the batches of all ranks together; `ncreg.losses` says what for.

    Example:
        >>> h = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
        >>> IntraClassCosineLoss()(h, torch.tensor([0, 0, 1]))
        tensor(0.2500)
    """

    consumes = ("features", "target")
    center: Center

    def __init__(self, *, center: Center = None, memory: ClassMeanMemory | None = None, gather: bool = True) -> None:
        super().__init__()
        _hold_center(self, center)
        self.memory = _checked_memory(memory)
        self.gather = check_flag("gather", gather)

    @fx_leaf
    def forward(self, features: Features, target: Labels) -> Loss:
        """The loss of the batch."""
        follows = self.memory is not None and takes_in(self)
        if self.gather:
            features, target = gather_batch(features, target)
        past = None if self.memory is None else self.memory.means
        loss = intra_class_cosine_loss(features, target, center=self.center, memory=past)
        if self.memory is not None and follows:
            self.memory.update(features, target, self.center)
        return loss


def inter_class_cosine_loss(
    features: Features,
    target: Labels,
    num_classes: int,
    *,
    center: Center = None,
    memory: ClassVectors | None = None,
) -> Loss:
    """Mean of (inter_cc' + 1/(C−1))² over the pairs of classes present; 0 at a simplex, and where there is no pair.

    With a memory of class means m_c, inter_cc' = t_c · m_c', c in the batch, c' any other class met so far: every
    sample sees every class, however small the batch.
    Source: the measure of Pan & Cao, arXiv 2309.04644, as a loss.

    Args:
        features: h, any scale; lengths (from the centre) below 1e-6, in float16 1e-3, are divided by that.
        target: class indices in [0, num_classes).
        num_classes: C; the simplex aimed at is that of all classes, also when some are absent from the batch.
        center: as in `intra_class_cosine`. "batch" is a biased estimate of the training mean: at an exact simplex
            its gradient is not zero.
        memory: as in `intra_class_cosine_loss`.

    Raises:
        ValueError: shapes, labels or centre that do not fit, fewer than 2 classes.
        TypeError: features that are not floating-point, labels that are not integers.

    Example:
        >>> h = torch.tensor([[2.0, 0.0], [-3.0, 0.0]])
        >>> inter_class_cosine_loss(h, torch.tensor([0, 1]), 2)
        tensor(0.)
    """
    check_rows("features", features)
    check_num_classes(num_classes)
    if memory_size(memory, features) not in (None, num_classes):
        raise ValueError(f"memory holds {memory_size(memory, features)} classes, num_classes is {num_classes}")
    target = check_labels(target, features, num_classes)
    label, slots = compact(target, num_classes)
    means, counts = mean_directions(features, center, label, slots)
    present = counts > 0
    if memory is None:
        others, met = means, present
        same = torch.eye(slots, dtype=torch.bool, device=means.device)
    else:
        others = memory.detach().to(means)
        met = others.any(1)
        names = class_of_slot(target, label, slots)
        same = names[:, None] == torch.arange(num_classes, device=means.device)
    pairs = present[:, None] & met & ~same
    gaps = dot_products(means, others) + 1 / (num_classes - 1)
    return (gaps.square() * pairs).sum() / pairs.sum().clamp(min=1)


class InterClassCosineLoss(LossModule):
    """`inter_class_cosine_loss` as a module, which may keep a memory of class means.

    Args:
        num_classes: C; the simplex aimed at is that of all classes.
        center: None (the origin), "batch" (the mean of its features), or a vector (d,).
        memory: a `ClassMeanMemory` of its own; the batch is then compared with the past of the classes.
        gather: take the batches of all ranks together; `ncreg.losses` says what for.

    Example:
        >>> loss = InterClassCosineLoss(1000, memory=ClassMeanMemory(1000, 64, momentum=0.9))
        >>> list(loss.state_dict())
        ['memory.means']
    """

    consumes = ("features", "target")
    center: Center

    def __init__(
        self, num_classes: int, *, center: Center = None, memory: ClassMeanMemory | None = None, gather: bool = True
    ) -> None:
        super().__init__()
        self.num_classes = check_num_classes(num_classes)
        _hold_center(self, center)
        self.memory = _checked_memory(memory)
        self.gather = check_flag("gather", gather)

    @fx_leaf
    def forward(self, features: Features, target: Labels) -> Loss:
        """The loss of the batch."""
        follows = self.memory is not None and takes_in(self)
        if self.gather:
            features, target = gather_batch(features, target)
        past = None if self.memory is None else self.memory.means
        loss = inter_class_cosine_loss(features, target, self.num_classes, center=self.center, memory=past)
        if self.memory is not None and follows:
            self.memory.update(features, target, self.center)
        return loss


def _class_directions(
    features: Tensor, target: Tensor, num_classes: int, center: Center
) -> tuple[Float[Tensor, "classes dim"], Float[Tensor, " classes"]]:
    """t_c, the mean unit vector of each class, in float64, and the class counts."""
    check_rows("features", features)
    check_num_classes(num_classes)
    label = check_labels(target, features, num_classes)
    wide = in_float64(features)
    return class_means(directions(wide, center, exact_unit_rows), label.to(wide.device), num_classes)


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
    raise TypeError(f"memory must be a ClassMeanMemory or None, got {described(memory)}")
