"""Intra- and inter-class cosine: measures of collapse, and the losses that drive them to their optimum.

Both come from the class sums of unit vectors, O(batch · dim), never from pairs of samples. After Pan & Cao,
"Towards Understanding Neural Collapse: The Effects of Batch Normalization and Weight Decay" (arXiv 2309.04644).
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from ncreg._checks import check_fraction, check_num_classes
from ncreg.losses._inputs import check_rows, dot_products, full_precision, unit_rows
from ncreg.losses._targets import check_labels, class_means, class_of_slot, compact
from ncreg.numerics import in_float64

Center = Literal["batch"] | Float[Tensor, " dim"] | None


def intra_class_cosine(
    features: Float[Tensor, "batch dim"],
    target: Integer[Tensor, " batch"],
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
    features: Float[Tensor, "batch dim"],
    target: Integer[Tensor, " batch"],
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
    features: Float[Tensor, "batch dim"],
    target: Integer[Tensor, " batch"],
    *,
    center: Center = None,
    memory: Float[Tensor, "classes dim"] | None = None,
) -> Float[Tensor, ""]:
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
    target = check_labels(target, features, _length(memory, features))
    label, slots = compact(target)
    means, counts = class_means(_directions(features, center), label, slots)
    if memory is None:
        counted = counts > 0
        cosines = means.square().sum(1)
    else:
        past = memory.detach().to(means).index_select(0, class_of_slot(target, label, slots))
        counted = (counts > 0) & past.any(1)
        cosines = (means * past).sum(1)
    return ((1 - cosines) * counted).sum() / counted.sum().clamp(min=1)


def inter_class_cosine_loss(
    features: Float[Tensor, "batch dim"],
    target: Integer[Tensor, " batch"],
    num_classes: int,
    *,
    center: Center = None,
    memory: Float[Tensor, "classes dim"] | None = None,
) -> Float[Tensor, ""]:
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
    if _length(memory, features) not in (None, num_classes):
        raise ValueError(f"memory holds {_length(memory, features)} classes, num_classes is {num_classes}")
    target = check_labels(target, features, num_classes)
    label, slots = compact(target, num_classes)
    means, counts = class_means(_directions(features, center), label, slots)
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


def update_class_means(
    memory: Float[Tensor, "classes dim"],
    features: Float[Tensor, "batch dim"],
    target: Integer[Tensor, " batch"],
    *,
    momentum: float = 0.9,
    center: Center = None,
) -> Float[Tensor, "classes dim"]:
    """m_c ← momentum · m_c + (1 − momentum) · t_c for the classes present, t_c itself at the first meeting.

    A class whose t_c is not finite keeps its m_c.

    Args:
        memory: m, zero rows for classes not met.
        features: h, any scale; lengths (from the centre) below 1e-6, in float16 1e-3, are divided by that.
        target: class indices below the memory's length.
        momentum: share of the old mean that stays, in [0, 1].
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
    target = check_labels(target, features, _length(memory, features))
    with torch.no_grad():
        wide = torch.promote_types(memory.dtype, torch.float32)  # bfloat16 cannot count beyond 256
        means, counts = class_means(
            _directions(features, center).to(memory.device, wide), target.to(memory.device), len(memory)
        )
        keep = momentum * memory.any(1, keepdim=True).to(wide)
        # A batch that overflowed must not stay in the memory: a gradient scaler skips it as well.
        taken = (counts > 0) & means.isfinite().all(1)
        return torch.where(taken[:, None], keep * memory + (1 - keep) * means, memory).to(memory.dtype)


def _length(memory: Tensor | None, features: Tensor) -> int | None:
    """The number of classes that a memory holds."""
    if memory is None:
        return None
    check_rows("memory", memory, features.shape[1])
    return len(memory)


def _class_directions(
    features: Tensor, target: Tensor, num_classes: int, center: Center
) -> tuple[Float[Tensor, "classes dim"], Float[Tensor, " classes"]]:
    """t_c, the mean unit vector of each class, in float64, and the class counts."""
    check_rows("features", features)
    check_num_classes(num_classes)
    label = check_labels(target, features, num_classes)
    wide = in_float64(features)
    return class_means(_directions(wide, center, _exact_unit_rows), label.to(wide.device), num_classes)


def _exact_unit_rows(rows: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
    """Rows over their lengths, however small or large; a zero row stays zero."""
    largest = rows.detach().abs().amax(1, keepdim=True)
    rows = rows / torch.where(largest > 0, largest, 1)  # the squares of what is left stay within range
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1)  # below 1 are zero rows alone


def check_center(center: Center) -> Center:
    """None, "batch" or a tensor."""
    if isinstance(center, Tensor | str | None):
        if isinstance(center, str) and center != "batch":
            raise ValueError(f"center must be None, 'batch' or a tensor of shape (dim,), got {center!r}")
        return center
    raise TypeError(f"center must be None, 'batch' or a tensor of shape (dim,), got {type(center).__name__}")


def _directions(
    features: Float[Tensor, "batch dim"], center: Center, unit: Callable[[Tensor], Tensor] = unit_rows
) -> Float[Tensor, "batch dim"]:
    """U, the unit vectors from the centre to each feature."""
    check_center(center)
    if center is None:
        return unit(features)
    if isinstance(center, Tensor):
        if center.shape != features.shape[1:]:
            raise ValueError(f"center must have shape ({features.shape[1]},), got {tuple(center.shape)}")
        return unit(full_precision(features) - center.to(features.device))
    lifted = full_precision(features)
    return unit(lifted - lifted.mean(0))
