"""Sums over very many classes in chunks of them, with a backward that holds one chunk of logits at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ncreg.losses._factors import EPS, Factors, kind_of, row_lengths, taken_apart
from ncreg.losses._inputs import dot_products


class ClassSums(NamedTuple):
    """For each sample (B,): ln Σ_c e^{z_c}, the logit of its label, and Σ_c s_c z_c (0 where no s is given)."""

    lse: Tensor
    own: Tensor
    spread: Tensor


def class_sums(
    features: Tensor,
    head: nn.Module,
    labels: Tensor,
    *,
    spread: Tensor | None = None,
    chunk: int | None = None,
    wrap: Callable[[Tensor], Tensor] | None = None,
) -> ClassSums:
    """The three sums over classes that a cross-entropy is made of, in chunks of classes.

    `wrap` is put around what is multiplied by the class vectors: unit features times the scale, or the features.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "the cross-entropy in chunks knows no transform of torch.func: use F.cross_entropy(head(features), target)"
        )
    if kind_of(head) == "logits":
        logits = head(features)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        total = torch.zeros_like(logits[:, 0])
        if spread is not None:
            total = dot_products(logits, spread.to(logits)[None])[:, 0]  # a sum, of no less than float32
        return ClassSums(logits.logsumexp(1), logits.gather(1, labels[:, None])[:, 0], total)
    factors = taken_apart(features, head, chunk)
    if wrap is not None:
        factors = factors._replace(inputs=wrap(factors.inputs))
    return ClassSums(*_ClassSums.apply(factors.inputs, factors.weight, factors.bias, labels, spread, factors))


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
            pulls = ctx.needs_input_grad[0] and not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
            found = _forward(ctx, labels, spread, factors._replace(inputs=inputs.detach()), pulls)
            if not pulls:  # saved as they came, so that a change of them before backward is noticed
                ctx.save_for_backward(found[0], labels, spread, inputs, weight, bias)
            return found

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
    ctx.factors = factors._replace(inputs=factors.inputs.new_empty(0), weight=None, bias=None)
    ctx.pulls, ctx.has_spread = pulls, spread is not None
    lse = (peak + total.log())[:, 0]
    if pulled is not None and spread_rows is not None:
        place, inside = _within(labels, 0, factors.parts()[-1][1])  # labels of other ranks' classes lie outside
        ctx.save_for_backward(pulled.div_(total), factors.of_classes(place[:, 0]) * inside[:, None], spread_rows)
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
    lse, labels, spread, inputs, weight, bias = ctx.saved_tensors
    factors: Factors = ctx.factors._replace(inputs=inputs, weight=weight, bias=bias)
    by_lse, by_own, by_spread = upstream
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


def _through_length(gradient: Tensor, rows: Tensor) -> Tensor:
    """From the gradient in w/‖w‖ to that in w: (g − (g·u)u)/‖w‖; below EPS the divisor is constant."""
    length = row_lengths(rows)
    unit = rows / length
    along = torch.linalg.vecdot(gradient.to(unit), unit)[:, None] * (length > EPS)
    return torch.addcmul(gradient.to(unit), unit, along, value=-1).div_(length)
