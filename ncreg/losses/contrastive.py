"""Losses that contrast unit vectors over the batch: class vectors against features, and features among themselves."""

import warnings
from typing import Literal

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from ncreg._checks import check_choice, check_constant, check_flag, check_positive
from ncreg._transforms import bare, fx_leaf, recorded, row_count
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
    unit_rows,
    without_diagonal,
)
from ncreg.losses._targets import (
    Target,
    check_labels,
    check_target,
    class_of_slot,
    class_sums,
    compact,
    is_soft,
    sample_weights,
    weighed,
)

OneClass = Literal["raise", "skip"]


def ntce_loss(
    features: Features,
    target: Target,
    weight: ClassVectors,
    *,
    temperature: float = 0.1,
    class_weight: ClassWeight | None = None,
    reduction: Reduction = "mean",
) -> Losses:
    """−ln[exp(ŵ_y·u_i/τ) / Σ_j exp(ŵ_y·u_j/τ)], unit class vectors ŵ against all unit features u_j of the batch.

    The denominator depends on the class alone: one product of classes present × batch and a log-sum-exp a class,
    O(BP), where the published form builds B × B. A soft target mixes the losses of its classes.
    Source: Koromilas et al., "Neural Collapse by Design", arXiv 2605.20302.

    Args:
        features: h, any scale; lengths below 1e-6, in float16 1e-3, are divided by that.
        target: class indices in [0, C), or soft labels.
        weight: W, one class vector a row, any scale, learned or fixed.
        temperature: τ; it decides the result, tune it.
        class_weight: weight of a class's samples; the mean is then the weighted mean.
        reduction: "mean", "sum" or "none" (one value a sample).

    Raises:
        ValueError: shapes, labels, temperature or reduction that do not fit.
        TypeError: features that are not floating-point, labels that are not integers.

    Example:
        >>> h, y = torch.eye(2), torch.tensor([0, 1])
        >>> ntce_loss(h, y, h, temperature=1.0)  # ln(1 + exp(−1))
        tensor(0.3133)
    """
    check_rows("features", features)
    check_rows("weight", weight, features.shape[1])
    check_positive("temperature", temperature)
    target, sample_weight = weighed(check_target(target, features, row_count(weight)), class_weight, row_count(weight))
    if is_soft(target):
        scores = dot_products(unit_rows(weight), unit_rows(features)) / temperature
        losses = (target * (scores.logsumexp(1) - scores.T)).sum(1)
    else:
        scores, label = _class_scores(features, target, weight, temperature)
        losses = scores.logsumexp(1).index_select(0, label) - scores.gather(0, label[None]).squeeze(0)
    return average(losses, reduction, sample_weight)


class NTCELoss(LossModule):
    """`ntce_loss` as a module: cross-entropy with the roles of samples and classes swapped.

    Args:
        temperature: τ; it decides the result, tune it.
        class_weight: weight of a class's samples (C,); the mean is then the weighted mean.
        reduction: "mean", "sum" or "none" (one value a sample).
        gather: take the batches of all ranks together; `ncreg.losses` says what for.

    Example:
        >>> NTCELoss(temperature=1.0)(torch.eye(2), torch.tensor([0, 1]), torch.eye(2))  # features, target, weight
        tensor(0.3133)
    """

    consumes = ("features", "target", "weight")
    class_weight: Tensor | None

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        class_weight: ClassWeight | None = None,
        reduction: Reduction = "mean",
        gather: bool = True,
    ) -> None:
        super().__init__()
        self.temperature = check_positive("temperature", check_constant("temperature", temperature, "loss"))
        self.register_buffer("class_weight", class_weight)
        self.reduction = check_reduction(reduction)
        self.gather = check_flag("gather", gather)

    @fx_leaf
    def forward(self, features: Features, target: Target, weight: ClassVectors) -> GatheredLosses:
        """The loss of the batch."""
        if self.gather:
            features, target = gather_batch(features, target)
        return ntce_loss(
            features,
            target,
            weight,
            temperature=self.temperature,
            class_weight=self.class_weight,
            reduction=self.reduction,
        )


def nonl_loss(
    features: Features,
    target: Labels,
    weight: ClassVectors,
    *,
    temperature: float = 0.1,
    class_weight: ClassWeight | None = None,
    reduction: Reduction = "mean",
    one_class: OneClass = "raise",
) -> Losses:
    """−ln[exp(ŵ_y·u_i/τ) / Σ_{j: y_j≠y} exp(ŵ_y·u_j/τ)]: NTCE with only negatives in the denominator.

    O(BP) as `ntce_loss`, of which arguments and source are the same. It can be negative. A batch of a single class
    leaves the denominator empty: `one_class` "raise" refuses it, "skip" warns and makes its loss and gradient 0.

    Raises:
        ValueError: a batch of a single class, unless it is to be skipped; shapes, labels, temperature or reduction
            that do not fit.
        TypeError: features that are not floating-point, labels that are not integers.

    Example:
        >>> h, y = torch.eye(2), torch.tensor([0, 1])
        >>> nonl_loss(h, y, h, temperature=0.5)  # (0 − 1)/0.5
        tensor(-2.)
    """
    check_rows("features", features)
    check_rows("weight", weight, features.shape[1])
    check_positive("temperature", temperature)
    target = check_labels(target, features, row_count(weight))
    several = _several_classes(target, check_one_class(one_class))
    scores, label = _class_scores(features, target, weight, temperature)
    own = torch.arange(scores.shape[0], device=label.device)[:, None] == label
    # The smallest number, not −inf: a batch of one class would get NaN gradients.
    negatives = scores.masked_fill(own, torch.finfo(scores.dtype).min).logsumexp(1)
    losses = negatives.index_select(0, label) - scores.gather(0, label[None]).squeeze(0)
    losses = torch.where(several, losses, 0)
    return average(losses, reduction, sample_weights(class_weight, target, row_count(weight)))


class NONLLoss(NTCELoss):
    """`nonl_loss` as a module; with `gather`, the batch of a single class is that of all ranks together.

    Args:
        temperature: τ; it decides the result, tune it.
        class_weight: weight of a class's samples (C,); the mean is then the weighted mean.
        reduction: "mean", "sum" or "none" (one value a sample).
        gather: take the batches of all ranks together; `ncreg.losses` says what for.
        one_class: of a batch of a single class: "raise" refuses it, "skip" warns and makes loss and gradient 0.

    Example:
        >>> NONLLoss(temperature=0.5)(torch.eye(2), torch.tensor([0, 1]), torch.eye(2))  # features, target, weight
        tensor(-2.)
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

    @fx_leaf
    def forward(self, features: Features, target: Target, weight: ClassVectors) -> GatheredLosses:
        """The loss of the batch."""
        if self.gather:
            features, target = gather_batch(features, target)
        return nonl_loss(
            features,
            target,
            weight,
            temperature=self.temperature,
            class_weight=self.class_weight,
            reduction=self.reduction,
            one_class=self.one_class,
        )


def supcon_loss(
    features: Features,
    target: Labels,
    *,
    temperature: float = 0.1,
    reduction: Reduction = "mean",
) -> Losses:
    """−mean over j ≠ i of i's class of ln[exp(u_i·u_j/τ) / Σ_{k≠i} exp(u_i·u_k/τ)], u the unit features.

    A sample alone of its class has no positive: its loss is 0 and the mean leaves it out. Several views of an image
    are rows with its label. The B × B matrix of cosines is the loss's own; the positives come from class sums.
    Fixed prototypes join as one more row a class: `supcon_loss(torch.cat([h, W]), torch.cat([y, arange(C)]))`.
    Source: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020 (arXiv 2004.11362), its L_out.

    Args:
        features: h, any scale; lengths below 1e-6, in float16 1e-3, are divided by that.
        target: class indices, not negative.
        temperature: τ.
        reduction: "mean" (over samples that have a positive), "sum" or "none" (one value a sample).

    Raises:
        ValueError: shapes, labels, temperature or reduction that do not fit.
        TypeError: features that are not floating-point, labels that are not integers.

    Example:
        >>> h = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> supcon_loss(h, torch.tensor([0, 0, 1]), temperature=1.0)  # ln(1 + exp(−1))
        tensor(0.3133)
    """
    check_rows("features", features)
    check_positive("temperature", temperature)
    label, slots = compact(check_labels(target, features))
    directions = unit_rows(features)
    scores = dot_products(directions, directions) / temperature
    denominators = without_diagonal(scores).logsumexp(1)
    sums, counts = class_sums(directions, label, slots)
    positives = counts.index_select(0, label) - 1
    alike = (directions * (sums.index_select(0, label) - directions)).sum(1) / (positives.clamp(min=1) * temperature)
    counted = (positives > 0).to(alike)
    losses = (denominators - alike) * counted
    if reduction == "mean":
        return losses.sum() / counted.sum().clamp(min=1)
    return average(losses, reduction)


class SupConLoss(LossModule):
    """`supcon_loss` as a module; it does not train the head, which needs a loss of its own or stays fixed.

    Args:
        temperature: τ.
        reduction: "mean" (over samples that have a positive), "sum" or "none" (one value a sample).
        gather: take the batches of all ranks together; `ncreg.losses` says what for.

    Example:
        >>> h = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> SupConLoss(temperature=1.0)(h, torch.tensor([0, 0, 1]))
        tensor(0.3133)
    """

    consumes = ("features", "target")

    def __init__(self, *, temperature: float = 0.1, reduction: Reduction = "mean", gather: bool = True) -> None:
        super().__init__()
        self.temperature = check_positive("temperature", check_constant("temperature", temperature, "loss"))
        self.reduction = check_reduction(reduction)
        self.gather = check_flag("gather", gather)

    @fx_leaf
    def forward(self, features: Features, target: Labels) -> GatheredLosses:
        """The loss of the batch."""
        if self.gather:
            features, target = gather_batch(features, target)
        return supcon_loss(features, target, temperature=self.temperature, reduction=self.reduction)


def _class_scores(
    features: Tensor, target: Labels, weight: Tensor, temperature: float
) -> tuple[Float[Tensor, "slots batch"], Integer[Tensor, " batch"]]:
    """ŵ_c · u_j / τ for classes c that may be present, and the row number of each sample's class."""
    label, slots = compact(target, row_count(weight))
    if label is not target:
        weight = weight.index_select(0, class_of_slot(target, label, slots))
    return dot_products(unit_rows(weight), unit_rows(features)) / temperature, label


def check_one_class(one_class: OneClass) -> OneClass:
    """One of the two ways with a batch of a single class."""
    check_choice("one_class", one_class, ("raise", "skip"))
    return one_class


def _several_classes(target: Labels, one_class: OneClass) -> Bool[Tensor, ""]:
    """Whether the batch has two classes; the one check that waits for an accelerator: such batches do occur."""
    several: Bool[Tensor, ""] = (target != target[0]).any()
    seen = bare(several)
    if recorded(seen):
        if one_class == "raise":
            torch._assert_async(seen, "nonl_loss: a batch of a single class has no negatives")
    elif not seen.all():
        if one_class == "raise":
            raise ValueError(
                f"nonl_loss needs samples of two classes, all {target.shape[0]} of this batch are of class "
                f"{int(bare(target).flatten()[0])}: its denominator holds the other classes alone; skip the batch "
                "(one_class='skip'), draw larger ones, or use ntce_loss"
            )
        # The words never vary, so that Python's default filter shows them once.
        warnings.warn("nonl_loss skips batches of a single class: they have no negatives", stacklevel=3)
    return several
