"""Cross-entropy over very many classes: in chunks of classes, so that the logits of a batch are never held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ncreg._checks import check_flag, check_fraction, check_integer
from ncreg._transforms import fx_leaf
from ncreg.distributed import gather_batch
from ncreg.losses._class_sums import ClassSums, class_sums
from ncreg.losses._factors import classes_of, kind_of, taken_apart
from ncreg.losses._inputs import (
    ClassWeight,
    Features,
    GatheredLosses,
    Labels,
    Losses,
    LossModule,
    Reduction,
    check_reduction,
    check_rows,
)
from ncreg.losses._targets import check_class_weight, check_integers, check_labels


def chunked_cross_entropy(
    features: Features,
    head: nn.Module,
    target: Labels,
    *,
    class_weight: ClassWeight | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    chunk: int | None = None,
) -> Losses:
    """Exact F.cross_entropy(head(features), target) without the logits (B, C): memory O(B·chunk) beside the weights.

    Forward goes over the classes once, with a running log-sum-exp. For a learned head, backward computes each chunk's
    logits again: four products of B·C·d in place of three. For a fixed one, whose gradient is wanted in the features
    alone, Σ_c p_c w_c is summed on the way with the same running scale: two products. A structured simplex
    (`ETFHead(structure="grouped")`, …) has no more logits than features, and they are made.

    Arguments and their meaning are those of torch's cross-entropy, all-ignored batches (NaN) included; under autocast
    products are made in its dtype, sums in float32.

    Args:
        features: h, the batch that enters the head.
        head: nn.Linear, or a head of `ncreg.heads`.
        target: class indices in [0, C), or ignore_index.
        class_weight: weight of a class's samples (C,).
        ignore_index: label of the samples that count for nothing.
        label_smoothing: s in [0, 1].
        reduction: "mean", "sum" or "none" (one value a sample).
        chunk: classes at a time; None takes about 2²¹ logits.

    Raises:
        ValueError: shapes, labels or numbers that do not fit; soft labels, which are as large as the logits.
        TypeError: a head of another kind, features or labels of a wrong type.
        RuntimeError: a second derivative, or a transform of torch.func.

    Example:
        >>> head, features = nn.Linear(4, 1000), torch.randn(8, 4)
        >>> target = torch.arange(8)
        >>> whole = nn.functional.cross_entropy(head(features), target)
        >>> torch.allclose(chunked_cross_entropy(features, head, target, chunk=100), whole)
        True
    """
    check_rows("features", features)

    def sums_of(labels: Tensor, spread: Tensor | None) -> ClassSums:
        return class_sums(features, head, labels, spread=spread, chunk=chunk)

    return cross_entropy_of(
        sums_of,
        features,
        target,
        classes_of(head),
        class_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


def cross_entropy_of(
    sums_of: Callable[[Tensor, Tensor | None], ClassSums],
    features: Features,
    target: Labels,
    classes: int,
    class_weight: ClassWeight | None,
    *,
    ignore_index: int,
    label_smoothing: float,
    reduction: Reduction,
) -> Losses:
    """Cross-entropy from the three sums over classes that `sums_of` makes for labels and weights of the smoothing."""
    check_reduction(reduction)
    check_fraction("label_smoothing", label_smoothing)
    _check_hard(target, classes)
    target = target.long()  # in uint8, -100 is 156
    ignored = target == check_integer("ignore_index", ignore_index)
    labels = check_labels(target.masked_fill(ignored, 0), features, classes)
    if class_weight is not None:
        check_class_weight(class_weight, labels, classes)
    spread = None
    if label_smoothing:
        spread = features.new_ones(classes) if class_weight is None else class_weight
    sums = sums_of(labels, spread)
    of_label = torch.ones_like(sums.lse) if class_weight is None else class_weight.to(sums.lse)[labels]
    of_label = of_label.masked_fill(ignored, 0)
    losses = (1 - label_smoothing) * of_label * (sums.lse - sums.own)
    if spread is not None:
        even = spread.to(sums.lse).sum() * sums.lse - sums.spread
        losses = losses + label_smoothing / classes * even
    losses = losses.masked_fill(ignored, 0)
    if reduction == "mean":
        return losses.sum() / of_label.sum()
    return losses.sum() if reduction == "sum" else losses


class ChunkedCrossEntropyLoss(LossModule):
    """`chunked_cross_entropy` as a module: it reads the head itself in place of the logits.

    Args:
        class_weight: weight of a class's samples (C,); the mean is then the weighted mean.
        ignore_index: label of the samples that count for nothing.
        label_smoothing: s in [0, 1].
        reduction: "mean", "sum" or "none" (one value a sample).
        chunk: classes at a time; None takes about 2²¹ logits.
        gather: take the batches of all ranks together; `ncreg.losses` says what for.

    Example:
        >>> loss, head = ChunkedCrossEntropyLoss(label_smoothing=0.1), nn.Linear(4, 1000)
        >>> features, target = torch.randn(8, 4), torch.arange(8)
        >>> whole = nn.functional.cross_entropy(head(features), target, label_smoothing=0.1)
        >>> torch.allclose(loss(features, head, target), whole)
        True
    """

    consumes = ("features", "head", "target")
    class_weight: Tensor | None

    def __init__(
        self,
        *,
        class_weight: ClassWeight | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        chunk: int | None = None,
        gather: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("class_weight", class_weight)
        self.ignore_index = check_integer("ignore_index", ignore_index)
        self.label_smoothing = check_fraction("label_smoothing", label_smoothing)
        self.reduction = check_reduction(reduction)
        self.chunk = None if chunk is None else check_integer("chunk", chunk, 1)
        self.gather = check_flag("gather", gather)

    @fx_leaf
    def forward(self, features: Features, head: nn.Module, target: Labels) -> GatheredLosses:
        """The loss of the batch."""
        if self.gather:
            features, target = gather_batch(features, target)
        return chunked_cross_entropy(features, head, target, **self._options())

    def _options(self) -> dict[str, Any]:
        """The keyword arguments that the function takes from the module."""
        names = ("class_weight", "ignore_index", "label_smoothing", "reduction", "chunk")
        return {name: getattr(self, name) for name in names}


@torch.no_grad()
def chunked_argmax(features: Features, head: nn.Module, *, chunk: int | None = None) -> Labels:
    """The class of the largest logit of each row, head(features).argmax(1), without the logits (B, C).

    Raises:
        TypeError: a head that `chunked_cross_entropy` does not take.

    Example:
        >>> head, features = nn.Linear(4, 1000), torch.randn(8, 4)
        >>> torch.equal(chunked_argmax(features, head, chunk=100), head(features).argmax(1))
        True
    """
    return chunked_max(features, head, chunk)[1]


def chunked_max(features: Features, head: nn.Module, chunk: int | None = None) -> tuple[Tensor, Labels]:
    """The largest logit of each row and its class, the first of several; NaN counts as the largest."""
    check_rows("features", features)
    if kind_of(head) == "logits":
        top = head(features).max(1)
        return top.values, top.indices
    factors = taken_apart(features, head, chunk)
    best = best_class = None
    for part in factors.parts():
        top = factors.logits(*part).max(1)
        if best is None or best_class is None:
            best, best_class = top.values, top.indices
            continue
        higher = (top.values > best) | (top.values.isnan() & ~best.isnan())
        best = torch.where(higher, top.values, best)
        best_class = torch.where(higher, top.indices + part[0], best_class)
    assert best is not None and best_class is not None
    return best, best_class


def _check_hard(target: Any, classes: int) -> None:
    if isinstance(target, Tensor) and target.is_floating_point() and target.ndim == 2:
        size = target.shape[0] * classes * 4
        raise ValueError(
            f"target holds soft labels, shape {tuple(target.shape)}: as large as the logits ({size:,} bytes) that this "
            "loss does without; give class indices and label_smoothing=, or use F.cross_entropy(head(features), target)"
        )
    check_integers(target)
