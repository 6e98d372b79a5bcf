"""Cross-entropy over very many classes: in chunks of classes, so that the logits of a batch are never held."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncreg._checks import check_fraction, check_integer
from ncreg._transforms import fx_leaf
from ncreg.losses._inputs import (
    ClassWeight,
    Features,
    Labels,
    Losses,
    Reduction,
    check_reduction,
    check_rows,
    show_hyperparameters,
    unit_rows,
)
from ncreg.losses._targets import check_labels
from ncreg.numerics import is_dtensor

ENTRIES = 2**21  # logits of a chunk: 8 MiB in float32
EPS = 1e-6  # the least length that CosineHead divides class vectors by


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
        >>> whole = F.cross_entropy(head(features), target)
        >>> torch.allclose(chunked_cross_entropy(features, head, target, chunk=100), whole)
        True
    """
    check_rows("features", features)
    classes = classes_of(head)
    check_reduction(reduction)
    check_fraction("label_smoothing", label_smoothing)
    _check_hard(target, classes)
    ignored = target == check_integer("ignore_index", ignore_index)
    labels = check_labels(torch.where(ignored, 0, target), features, classes)
    if class_weight is not None and class_weight.shape != (classes,):
        raise ValueError(f"class_weight has shape {tuple(class_weight.shape)}: it needs ({classes},), one a class")
    spread = None
    if label_smoothing:
        spread = features.new_ones(classes) if class_weight is None else class_weight
    sums = class_sums(features, head, labels, spread=spread, chunk=chunk)
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


class ChunkedCrossEntropyLoss(nn.Module):
    """`chunked_cross_entropy` as a module: it reads the head itself in place of the logits.

    Example:
        >>> loss, head = ChunkedCrossEntropyLoss(label_smoothing=0.1), nn.Linear(4, 1000)
        >>> features, target = torch.randn(8, 4), torch.arange(8)
        >>> torch.allclose(loss(features, head, target), F.cross_entropy(head(features), target, label_smoothing=0.1))
        True
    """

    consumes: ClassVar[tuple[str, ...]] = ("features", "head", "target")
    class_weight: Tensor | None
    extra_repr = show_hyperparameters

    def __init__(
        self,
        *,
        class_weight: ClassWeight | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("class_weight", class_weight)
        self.ignore_index = check_integer("ignore_index", ignore_index)
        self.label_smoothing = check_fraction("label_smoothing", label_smoothing)
        self.reduction = check_reduction(reduction)
        self.chunk = None if chunk is None else check_integer("chunk", chunk, 1)

    @fx_leaf
    def forward(self, features: Features, head: nn.Module, target: Labels) -> Losses:
        """The loss of the batch."""
        return chunked_cross_entropy(
            features,
            head,
            target,
            class_weight=self.class_weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            chunk=self.chunk,
        )


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
    check_rows("features", features)
    if _kind(head) == "logits":
        return head(features).argmax(1)
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
    assert best_class is not None
    return best_class


class ClassSums(NamedTuple):
    """For each sample (B,): ln Σ_c e^{z_c}, the logit of its label, and Σ_c s_c z_c (0 where no s is given)."""

    lse: Tensor
    own: Tensor
    spread: Tensor


def class_sums(
    features: Tensor, head: nn.Module, labels: Tensor, *, spread: Tensor | None = None, chunk: int | None = None
) -> ClassSums:
    """The three sums over classes that a cross-entropy is made of, in chunks of classes."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "the cross-entropy in chunks knows no transform of torch.func: use F.cross_entropy(head(features), target)"
        )
    if _kind(head) == "logits":
        logits = head(features)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        total = torch.zeros_like(logits[:, 0]) if spread is None else logits @ spread.to(logits)
        return ClassSums(logits.logsumexp(1), logits.gather(1, labels[:, None])[:, 0], total)
    factors = taken_apart(features, head, chunk)
    return ClassSums(*_ClassSums.apply(factors.inputs, factors.weight, factors.bias, labels, spread, factors))


class Factors(NamedTuple):
    """Logits of any range of classes: inputs @ rowsᵀ + bias, the rows of `weight` or computed ones."""

    inputs: Tensor
    weight: Tensor | None
    bias: Tensor | None
    head: Any
    unit: bool
    low: torch.dtype | None
    chunk: int

    def parts(self) -> list[tuple[int, int]]:
        """First and last class (exclusive) of each chunk."""
        classes = classes_of(self.head)
        return [(first, min(first + self.chunk, classes)) for first in range(0, classes, self.chunk)]

    def of_classes(self, classes: slice | Tensor) -> Tensor:
        """Rows of these classes, in the dtype of the products."""
        if self.weight is None:
            indices = classes
            if isinstance(classes, slice):
                indices = torch.arange(classes.start, classes.stop, device=self.inputs.device)
            return self.head.class_rows(indices, self.low or self.inputs.dtype)
        rows = self.weight.detach()[classes]
        if self.unit:
            rows = rows / _row_lengths(rows)
        return rows if self.low is None else rows.to(self.low)

    def live_rows(self, classes: Tensor, sparse: bool) -> Tensor:
        """Rows of these classes with their gradient, a sparse one where that is wanted."""
        if self.weight is None:
            return self.of_classes(classes)
        rows = F.embedding(classes, self.weight, sparse=sparse)
        return rows / _row_lengths(rows) if self.unit else rows

    def products(self, inputs: Tensor, rows: Tensor, first: int) -> Tensor:
        """Logits of the rows' classes, in at least float32."""
        logits = F.linear(inputs if self.low is None else inputs.to(self.low), rows)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits if self.bias is None else logits.add_(self.bias.detach()[first : first + len(rows)].to(logits))

    def logits(self, first: int, last: int) -> Tensor:
        """Logits of a chunk."""
        return self.products(self.inputs, self.of_classes(slice(first, last)), first)


class _ClassSums(torch.autograd.Function):
    """The three sums, with a backward that holds one chunk of logits at a time.

    With upstream g1, g2, g3 a chunk's gradient is G = g1·p + g2·[c = y] + g3·s_c, then dL/dx += G W and dL/dW = Gᵀ x.
    Without a gradient in W, Σ p w is at hand from the forward pass, scaled as the running sum is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        labels: Tensor,
        spread: Tensor | None,
        factors: Factors,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(inputs.device.type, enabled=False):
            factors = factors._replace(inputs=inputs.detach())
            pulls = ctx.needs_input_grad[0] and not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
            return _forward(ctx, labels, spread, factors, pulls)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the cross-entropy in chunks has no second derivative: use F.cross_entropy(head(features), target), "
                "which holds the logits"
            )
        with torch.autocast(upstream[0].device.type, enabled=False):
            if ctx.pulls:
                return _from_pulls(ctx, upstream), None, None, None, None, None
            return *_by_chunks(ctx, upstream), None, None, None


def _forward(
    ctx: Any, labels: Tensor, spread: Tensor | None, factors: Factors, pulls: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if factors.inputs.dtype == torch.float64 else torch.float32
    rows, dim = factors.inputs.shape
    like: dict[str, Any] = {"dtype": wide, "device": factors.inputs.device}
    peak, total = torch.full((rows, 1), -torch.inf, **like), torch.zeros(rows, 1, **like)
    own, even = torch.zeros(rows, **like), torch.zeros(rows, **like)
    pulled, spread_rows = (torch.zeros(rows, dim, **like), torch.zeros(dim, **like)) if pulls else (None, None)
    for first, last in factors.parts():
        vectors = factors.of_classes(slice(first, last))
        logits = factors.products(factors.inputs, vectors, first)
        place, inside = _within(labels, first, last)
        own = torch.where(inside, logits.gather(1, place)[:, 0], own)
        if spread is not None:
            even.addmv_(logits, spread[first:last].to(logits))
            if spread_rows is not None:
                spread_rows += (spread[first:last].to(vectors) @ vectors).to(wide)
        higher = torch.maximum(peak, logits.amax(1, keepdim=True))
        taken = higher.masked_fill(higher == -torch.inf, 0.0)  # so far all logits are -inf: their powers are 0
        kept = (peak - taken).exp_()
        powers = logits.sub_(taken).exp_()
        total.mul_(kept).add_(powers.sum(1, keepdim=True))
        if pulled is not None:
            _add_product(pulled.mul_(kept), powers, vectors)
        peak = higher
    ctx.factors, ctx.pulls, ctx.has_spread = factors, pulls, spread is not None
    lse = (peak + total.log())[:, 0]
    if pulled is not None and spread_rows is not None:
        ctx.save_for_backward(pulled.div_(total), factors.of_classes(labels), spread_rows)
    else:
        ctx.save_for_backward(lse, labels, spread, factors.weight)  # the weight, so that a change of it is noticed
    return lse, own, even


def _within(labels: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Columns (B, 1) of the labels in a chunk, and which of them lie in it: no wait for the device."""
    return (labels - first).clamp(0, last - first - 1)[:, None], (labels >= first) & (labels < last)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Total += left @ right, the product in the right one's dtype."""
    if right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left.to(right.dtype) @ right)


def _from_pulls(ctx: Any, upstream: tuple[Tensor, ...]) -> Tensor:
    """Gradient in the inputs of a fixed head."""
    pulled, own_rows, spread_rows = ctx.saved_tensors
    by_lse, by_own, by_spread = (part[:, None] for part in upstream)
    found = by_lse * pulled + by_own * own_rows.to(pulled)
    if ctx.has_spread:
        found += by_spread * spread_rows
    return found.to(ctx.factors.inputs.dtype)


def _by_chunks(ctx: Any, upstream: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in inputs, weight and bias, each chunk's logits computed again."""
    lse, labels, spread, _ = ctx.saved_tensors
    factors: Factors = ctx.factors
    by_lse, by_own, by_spread = upstream
    inputs, weight, bias = factors.inputs, factors.weight, factors.bias
    by_inputs = torch.zeros_like(inputs, dtype=lse.dtype) if ctx.needs_input_grad[0] else None
    by_weight = torch.empty_like(weight) if weight is not None and ctx.needs_input_grad[1] else None
    by_bias = torch.empty_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
    for first, last in factors.parts():
        vectors = factors.of_classes(slice(first, last))
        gradient = factors.products(inputs, vectors, first).sub_(lse[:, None]).exp_().mul_(by_lse[:, None])
        place, inside = _within(labels, first, last)
        gradient.scatter_add_(1, place, (by_own * inside)[:, None])
        if spread is not None:
            gradient.addr_(by_spread, spread[first:last].to(gradient))
        if by_inputs is not None:
            _add_product(by_inputs, gradient, vectors)
        if by_bias is not None:
            by_bias[first:last] = gradient.sum(0)
        if by_weight is not None and weight is not None:
            lowered = gradient.to(vectors.dtype)
            by_rows = lowered.T @ inputs.to(vectors.dtype)
            by_weight[first:last] = _through_length(by_rows, weight[first:last]) if factors.unit else by_rows
    return None if by_inputs is None else by_inputs.to(inputs.dtype), by_weight, by_bias


def _row_lengths(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(EPS)


def _through_length(gradient: Tensor, rows: Tensor) -> Tensor:
    """From the gradient in w/‖w‖ to that in w: (g − (g·u)u)/‖w‖; below EPS the divisor is constant."""
    length = _row_lengths(rows)
    unit = rows / length
    along = torch.linalg.vecdot(gradient.to(unit), unit)[:, None] * (length > EPS)
    return torch.addcmul(gradient.to(unit), unit, along, value=-1).div_(length)


def classes_of(head: Any) -> int:
    """C of a head that can be taken apart.

    Raises:
        TypeError: for another kind.
    """
    _kind(head)
    return int(head.out_features if isinstance(head, nn.Linear) else head.num_classes)


def _kind(head: Any) -> str:
    """How logits of some classes alone are made: from "weight", "unit weight" or "class_rows"; or "logits", of all."""
    kind = "weight" if type(head) is nn.Linear else getattr(head, "chunks", None)
    if kind is None:
        raise TypeError(
            f"head={type(head).__name__} cannot be taken apart into chunks of classes: it must be nn.Linear or a head "
            "of ncreg.heads; any other takes F.cross_entropy(head(features), target)"
        )
    if is_dtensor(getattr(head, "weight", None) if kind != "class_rows" else None):
        raise TypeError(
            f"head={type(head).__name__} is spread over ranks as a DTensor: keep the head out of fully_shard, or use "
            "F.cross_entropy(head(features), target)"
        )
    return str(kind)


def taken_apart(features: Tensor, head: Any, chunk: int | None) -> Factors:
    """The factors of a head's logits; a structured simplex has none."""
    kind = _kind(head)
    if kind == "logits":
        raise TypeError(f"head={head} holds no class vectors: F.cross_entropy(head(features), target) costs less")
    if features.shape[1] != head.in_features:
        raise ValueError(f"features have {features.shape[1]} columns where head takes {head.in_features}")
    weight = None if kind == "class_rows" else head.weight
    device = features.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if weight is not None and features.dtype != weight.dtype and not autocast:
        if weight.requires_grad or torch.finfo(weight.dtype).eps > torch.finfo(features.dtype).eps:
            raise TypeError(f"features of {features.dtype} into a head of {weight.dtype}: bring both to one dtype")
        weight = weight.to(features.dtype)
    low = torch.get_autocast_dtype(device) if autocast else None
    scale = getattr(head, "scale", 1.0)
    inputs = unit_rows(features).to(features.dtype) if getattr(head, "normalize", False) else features
    chunk = max(1, ENTRIES // len(features)) if chunk is None else check_integer("chunk", chunk, 1)
    inputs = inputs if scale == 1 else inputs * scale
    return Factors(inputs, weight, head.bias, head, kind == "unit weight", low, chunk)


def _check_hard(target: Any, classes: int) -> None:
    if isinstance(target, Tensor) and target.is_floating_point() and target.ndim == 2:
        size = target.shape[0] * classes * 4
        raise ValueError(
            f"target holds soft labels, shape {tuple(target.shape)}: as large as the logits ({size:,} bytes) that this "
            "loss does without; give class indices and label_smoothing=, or use F.cross_entropy(head(features), target)"
        )
    if not isinstance(target, Tensor):
        check_labels(target, target)
