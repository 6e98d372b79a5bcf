"""Losses that pull each feature to the vector of its own class, and push it from none."""

import torch
from torch import Tensor

from ncreg._checks import check_constant, check_flag, check_fraction, check_integer, check_num_classes, check_positive
from ncreg._transforms import for_state, fx_leaf, row_count, takes_in
from ncreg.distributed import gather_batch
from ncreg.losses._inputs import (
    ClassVectors,
    ClassWeight,
    Features,
    GatheredLosses,
    Labels,
    Losses,
    LossModule,
    Reduction,
    average,
    check_reduction,
    check_rows,
    dot_products,
    row_dots,
    unit_row_dots,
    unit_rows,
)
from ncreg.losses._targets import (
    Target,
    check_labels,
    check_target,
    class_of_slot,
    class_sums,
    compact,
    is_soft,
    weighed,
)
from ncreg.numerics import at_least_float32


def dot_regression_loss(
    features: Features,
    target: Target,
    weight: ClassVectors,
    *,
    normalize: bool = True,
    length: float = 1.0,
    class_weight: ClassWeight | None = None,
    reduction: Reduction = "mean",
) -> Losses:
    """(ℓ/2)(cos θ − 1)², θ the angle between h and w_y; without normalisation (1/2ℓ)(w_y · h − ℓ)².

    ℓ = √(E_W E_H) is the dot product aimed at; both forms agree where ‖w_y‖‖h‖ = ℓ. A soft target mixes the losses
    of its classes.
    Source: Yang et al., "Inducing Neural Collapse in Imbalanced Learning: Do We Really Need a Learnable Classifier at
    the End of Deep Neural Network?", NeurIPS 2022 (arXiv 2203.09081). Their code weighs classes by inverse
    frequency: here that is `class_weight`, off by default.

    Args:
        features: h.
        target: class indices in [0, C), or soft labels.
        weight: W, one class vector a row, usually a fixed simplex.
        normalize: compare directions alone.
        length: ℓ.
        class_weight: weight of a class's samples; the mean is then the weighted mean.
        reduction: "mean", "sum" or "none" (one value a sample).

    Raises:
        ValueError: shapes, labels, length or reduction that do not fit.
        TypeError: features that are not floating-point, labels that are not integers.

    Example:
        >>> dot_regression_loss(torch.tensor([[0.0, 2.0]]), torch.tensor([0]), torch.eye(2))
        tensor(0.5000)
    """
    check_rows("features", features)
    check_rows("weight", weight, features.shape[1])
    check_positive("length", length)
    check_flag("normalize", normalize)
    scale = unit_rows if normalize else at_least_float32
    aim = 1.0 if normalize else length
    target, sample_weight = weighed(check_target(target, features, row_count(weight)), class_weight, row_count(weight))
    if is_soft(target):
        gaps = ((dot_products(scale(features), scale(weight)) - aim).square() * target).sum(1)
    else:
        dots = unit_row_dots if normalize else row_dots
        gaps = (dots(features, weight, target) - aim).square()
    factor = length / 2 if normalize else 0.5 / length
    return average(factor * gaps, reduction, sample_weight)


class DotRegressionLoss(LossModule):
    """`dot_regression_loss` as a module, on the class vectors of the head.

    Args:
        normalize: compare directions alone.
        length: ℓ, the dot product aimed at.
        class_weight: weight of a class's samples (C,); the mean is then the weighted mean.
        reduction: "mean", "sum" or "none" (one value a sample).
        gather: take the batches of all ranks together; `ncreg.losses` says what for.

    Example:
        >>> DotRegressionLoss()(torch.tensor([[0.0, 2.0]]), torch.tensor([0]), torch.eye(2))  # features, target, weight
        tensor(0.5000)
    """

    consumes = ("features", "target", "weight")
    class_weight: Tensor | None

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
        self.normalize = check_flag("normalize", normalize)
        self.length = check_positive("length", check_constant("length", length, "loss"))
        self.register_buffer("class_weight", class_weight)
        self.reduction = check_reduction(reduction)
        self.gather = check_flag("gather", gather)

    @fx_leaf
    def forward(self, features: Features, target: Target, weight: ClassVectors) -> GatheredLosses:
        """The loss of the batch."""
        if self.gather:
            features, target = gather_batch(features, target)
        return dot_regression_loss(
            features,
            target,
            weight,
            normalize=self.normalize,
            length=self.length,
            class_weight=self.class_weight,
            reduction=self.reduction,
        )


def center_loss(
    features: Features,
    target: Labels,
    centers: ClassVectors,
    *,
    reduction: Reduction = "mean",
) -> Losses:
    """½‖h − c_y‖², c_y the running centre of the class (`ncreg.losses.CenterLoss` keeps them).

    Source: Wen et al., "A Discriminative Feature Learning Approach for Deep Face Recognition", ECCV 2016.

    Args:
        features: h.
        target: class indices in [0, C).
        centers: c, one a class.
        reduction: "mean", "sum" or "none" (one value a sample).

    Raises:
        ValueError: shapes, labels or reduction that do not fit.
        TypeError: features that are not floating-point, labels that are not integers.

    Example:
        >>> center_loss(torch.tensor([[3.0, 1.0]]), torch.tensor([1]), torch.eye(2))
        tensor(4.5000)
    """
    check_rows("features", features)
    check_rows("centers", centers, features.shape[1])
    target = check_labels(target, features, row_count(centers))
    gaps = at_least_float32(features) - at_least_float32(centers.index_select(0, target))
    return average(gaps.square().sum(1) / 2, reduction)


def update_centers(
    centers: ClassVectors,
    features: Features,
    target: Labels,
    *,
    rate: float = 0.5,
) -> ClassVectors:
    """C ← c + rate · Σ(h_i − c)/(1 + n), over the n samples of the class in the batch.

    A class whose new centre would not be finite keeps the old one.

    Source: Wen et al., ECCV 2016, equation 4.

    Args:
        centers: c, one a class.
        features: h.
        target: class indices in [0, C).
        rate: Wen's α, in [0, 1].

    Raises:
        ValueError: shapes, labels or rate that do not fit.

    Example:
        >>> update_centers(torch.zeros(2, 2), torch.tensor([[4.0, 0.0]]), torch.tensor([1]), rate=0.5)
        tensor([[0., 0.],
                [1., 0.]])
    """
    check_rows("features", features)
    check_rows("centers", centers, features.shape[1])
    check_fraction("rate", rate)
    target = check_labels(target, features, row_count(centers))
    with torch.no_grad():
        target = target.to(centers.device)
        label, slots = compact(target, row_count(centers))  # the centres of classes that are absent stay as they are
        old = centers.index_select(0, class_of_slot(target, label, slots))
        wide = old.to(torch.promote_types(old.dtype, torch.float32))  # bfloat16 cannot count beyond 256
        sums, counts = class_sums(features.to(wide) - wide.index_select(0, label), label, slots)
        moved = (wide + rate * sums / (1 + counts)[:, None]).to(old.dtype)
        # A batch that overflowed must not stay in the centres: a gradient scaler skips it as well.
        moved = torch.where(moved.isfinite().all(1, keepdim=True), moved, old)
        return centers.index_copy(0, target, moved.index_select(0, label))


class CenterLoss(LossModule):
    """`center_loss` with its centres: a buffer that batches move after the loss, in training mode with gradients on.

    Args:
        num_classes: C.
        num_features: d.
        rate: Wen's α, in [0, 1]: how far a batch moves its centres.
        reduction: "mean", "sum" or "none" (one value a sample).
        gather: take the batches of all ranks together; `ncreg.losses` says what for.

    Example:
        >>> loss = CenterLoss(2, 2, rate=0.5)
        >>> loss(torch.tensor([[4.0, 0.0]]), torch.tensor([1])), loss.centers[1]
        (tensor(8.), tensor([1., 0.]))
    """

    consumes = ("features", "target")
    centers: Tensor

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
        self.rate = check_fraction("rate", rate)
        self.reduction = check_reduction(reduction)
        # On by default: the centres must stay the same on every rank.
        self.gather = check_flag("gather", gather)
        self.register_buffer(
            "centers", torch.zeros(check_num_classes(num_classes), check_integer("num_features", num_features, 1))
        )

    def reset_parameters(self) -> None:
        """Centres at 0 again; what deferred initialisation calls, too."""
        self.centers = torch.zeros_like(self.centers)

    @fx_leaf
    def forward(self, features: Features, target: Labels) -> GatheredLosses:
        """The loss of the batch."""
        follows = takes_in(self)
        if self.gather:
            features, target = gather_batch(features, target)
        loss = center_loss(features, target, self.centers, reduction=self.reduction)
        if follows:
            features, target = for_state("CenterLoss", features, target)
            self.centers = update_centers(self.centers, features, target, rate=self.rate)
        return loss
