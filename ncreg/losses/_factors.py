"""A head's logits by classes: the inputs and class vectors that they are products of."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncreg._checks import check_integer
from ncreg._wrappers import computes, fresh_weights
from ncreg.losses._inputs import unit_rows
from ncreg.numerics import is_dtensor

ENTRIES = 2**21  # logits of a chunk: 8 MiB in float32
EPS = 1e-6  # the least length that CosineHead divides class vectors by


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
            rows = rows / row_lengths(rows)
        return rows if self.low is None else rows.to(self.low)

    def live_rows(self, classes: Tensor, sparse: bool) -> Tensor:
        """Rows of these classes with their gradient, a sparse one where that is wanted."""
        if self.weight is None:
            return self.of_classes(classes)
        rows = F.embedding(classes, self.weight, sparse=sparse)
        return rows / row_lengths(rows) if self.unit else rows

    def products(self, inputs: Tensor, rows: Tensor, first: int) -> Tensor:
        """Logits of the rows' classes, in at least float32."""
        logits = F.linear(inputs if self.low is None else inputs.to(self.low), rows)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits if self.bias is None else logits.add_(self.bias.detach()[first : first + len(rows)].to(logits))

    def logits(self, first: int, last: int) -> Tensor:
        """Logits of a chunk."""
        return self.products(self.inputs, self.of_classes(slice(first, last)), first)


def row_lengths(rows: Tensor) -> Tensor:
    """Lengths that CosineHead divides class vectors by."""
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(EPS)


def classes_of(head: Any) -> int:
    """C of a head that can be taken apart.

    Raises:
        TypeError: for another kind.
    """
    head = uncompiled(head)
    kind_of(head)
    return int(head.out_features if isinstance(head, nn.Linear) else head.num_classes)


def uncompiled(head: Any) -> Any:
    """The head in the wrapper of torch.compile, which calls the same forward pass; any other as it is."""
    return getattr(head, "_orig_mod", head)


def kind_of(head: Any) -> str:
    """How logits of some classes alone are made: from "weight", "unit weight" or "class_rows"; or "logits", of all."""
    kind = "weight" if type(uncompiled(head)) is nn.Linear else getattr(head, "chunks", None)
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


def _check_called_alike(head: nn.Module) -> None:
    """Refuse a head whose forward pass is more than its class vectors, and say that its hooks are not called."""
    if torch.compiler.is_compiling():
        return
    owner = next(kind for kind in type(head).__mro__ if "forward" in vars(kind))
    if owner.__module__.partition(".")[0] not in ("torch", "ncreg"):
        raise TypeError(
            f"head={type(head).__name__} has a forward pass of its own, and its logits would be made without it, from "
            "the class vectors alone: use F.cross_entropy(head(features), target)"
        )
    others = any(not computes(hook) for hook in head._forward_pre_hooks.values())
    if others or head._forward_hooks or "forward" in vars(head):
        # The words never vary, so that Python's default filter shows them once.
        warnings.warn(
            "the head has forward hooks, or a forward pass put in place of its own, which are not called: its logits "
            "are made in parts, from its class vectors; where one changes them use F.cross_entropy(head(features), "
            "target)",
            stacklevel=4,
        )


def taken_apart(features: Tensor, head: Any, chunk: int | None) -> Factors:
    """The factors of a head's logits; a structured simplex has none."""
    head = uncompiled(head)
    kind = kind_of(head)
    if kind == "logits":
        raise TypeError(f"head={head} holds no class vectors: F.cross_entropy(head(features), target) costs less")
    _check_called_alike(head)
    fresh = fresh_weights(head)
    if features.shape[1] != head.in_features:
        raise ValueError(f"features have {features.shape[1]} columns where head takes {head.in_features}")
    weight = None if kind == "class_rows" else fresh.get("weight", head.weight)
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
    inputs = inputs * scale if isinstance(scale, Tensor) or scale != 1 else inputs
    return Factors(inputs, weight, fresh.get("bias", head.bias), head, kind == "unit weight", low, chunk)
