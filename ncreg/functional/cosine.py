"""Intra- and inter-class cosine: measures of collapse, and the losses that drive them to their optimum.

Both come from the class sums of unit vectors, O(batch · dim), never from pairs of samples. After Pan & Cao,
"Towards Understanding Neural Collapse: The Effects of Batch Normalization and Weight Decay" (arXiv 2309.04644).
"""

from typing import Literal

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from ncreg.functional._inputs import (
    check_labels,
    check_num_classes,
    check_rows,
    class_sums,
    compact,
    full_precision,
    no_autocast,
    unit_rows,
)

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

    Args:
        features: h, any scale.
        target: class indices in [0, num_classes).
        num_classes: C, length of the result.
        center: None (the origin: right behind a BatchNorm without bias), "batch" (the mean of all features, as
            in the paper; misleading when classes are unbalanced), or a vector (dim,), say the mean of class means.

    Raises:
        ValueError, TypeError: on shapes, types or labels that do not fit.

    Source: Pan & Cao, arXiv 2309.04644.

    >>> import torch
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
    """Mean cosine between a sample of class c and one of class c', inter_cc' = t_c · t_c'.

    The diagonal holds the intra-class cosines. −1/(C−1) off the diagonal at collapse. Computed and returned in
    float64, NaN in the rows and columns of classes without samples. Arguments, errors and source as in
    `intra_class_cosine`.

    >>> import torch
    >>> h = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    >>> inter_class_cosine(h, torch.tensor([0, 0, 1]), 2)
    tensor([[ 0.5000, -0.5000],
            [-0.5000,  1.0000]], dtype=torch.float64)
    """
    means, counts = _class_directions(features, target, num_classes, center)
    absent = counts == 0
    with no_autocast(means):
        return (means @ means.T).masked_fill(absent[:, None] | absent[None, :], torch.nan)


def intra_class_cosine_loss(
    features: Float[Tensor, "batch dim"],
    target: Integer[Tensor, " batch"],
    *,
    center: Center = None,
) -> Float[Tensor, ""]:
    """1 − mean of intra_c over the classes present; 0 at collapse, at most 1.

    A class with one sample in the batch counts as collapsed: with many more classes than samples use `memory`.

    Args:
        features: h, any scale.
        target: class indices, not negative.
        center: see `intra_class_cosine`. "batch" is a biased estimate of the training mean; its gradient flows.

    Raises:
        ValueError, TypeError: on shapes, types or labels that do not fit.

    Source: the measure of Pan & Cao, arXiv 2309.04644, as a loss.

    >>> import torch
    >>> h = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    >>> intra_class_cosine_loss(h, torch.tensor([0, 0, 1]))
    tensor(0.2500)
    """
    check_rows("features", features)
    label, slots = compact(check_labels(target, features))
    sums, counts = class_sums(_directions(features, center), label, slots)
    cosines = (sums / counts.clamp(min=1)[:, None]).square().sum(1)
    return 1 - cosines.sum() / (counts > 0).sum()


def inter_class_cosine_loss(
    features: Float[Tensor, "batch dim"],
    target: Integer[Tensor, " batch"],
    num_classes: int,
    *,
    center: Center = None,
) -> Float[Tensor, ""]:
    """Mean of (inter_cc' + 1/(C−1))² over the pairs of classes present; 0 at a simplex, and with one class.

    Args:
        features: h, any scale.
        target: class indices in [0, num_classes).
        num_classes: C; the simplex aimed at is that of all classes, also when some are absent from the batch.
        center: see `intra_class_cosine`. "batch" is a biased estimate of the training mean: at an exact simplex
            its gradient is not zero.

    Raises:
        ValueError, TypeError: on shapes, types or labels that do not fit.

    Source: the measure of Pan & Cao, arXiv 2309.04644, as a loss.

    >>> import torch
    >>> h = torch.tensor([[2.0, 0.0], [-3.0, 0.0]])
    >>> inter_class_cosine_loss(h, torch.tensor([0, 1]), 2)
    tensor(0.)
    """
    check_rows("features", features)
    check_num_classes(num_classes)
    label, slots = compact(check_labels(target, features, num_classes), num_classes)
    sums, counts = class_sums(_directions(features, center), label, slots)
    means = sums / counts.clamp(min=1)[:, None]
    present = (counts > 0).to(means)
    pair = (present[:, None] * present[None, :]).fill_diagonal_(0)
    with no_autocast(means):
        gaps = (means @ means.T + 1 / (num_classes - 1)).square() * pair
    return gaps.sum() / pair.sum().clamp(min=1)


def _class_directions(
    features: Tensor, target: Tensor, num_classes: int, center: Center
) -> tuple[Float[Tensor, "classes dim"], Float[Tensor, " classes"]]:
    """t_c, the mean unit vector of each class, in float64, and the class counts."""
    check_rows("features", features)
    check_num_classes(num_classes)
    label = check_labels(target, features, num_classes)
    sums, counts = class_sums(_directions(features.double(), center), label, num_classes)
    return sums / counts.clamp(min=1)[:, None], counts


def _directions(features: Float[Tensor, "batch dim"], center: Center) -> Float[Tensor, "batch dim"]:
    """U, the unit vectors from the centre to each feature."""
    if center is None:
        return unit_rows(features)
    features = full_precision(features)
    if isinstance(center, Tensor):
        if center.shape != features.shape[1:]:
            raise ValueError(f"center must have shape ({features.shape[1]},), got {tuple(center.shape)}")
        return unit_rows(features - center.to(features))
    if center == "batch":
        return unit_rows(features - features.mean(0))
    raise ValueError(f"center must be None, 'batch' or a tensor of shape (dim,), got {center!r}")
