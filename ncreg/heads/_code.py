"""The procedural code as a head: class vectors are computed from the class index when they are needed."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ncreg._checks import check_flag, check_indices, check_integer, check_num_classes, check_seed
from ncreg._transforms import fx_leaf, own_backward_pays
from ncreg.frames import code_rows
from ncreg.heads._cosine import DEFAULT_LOSS, autocast_on, check_features, checked_scale, over_length, shown, wide_dtype
from ncreg.numerics import as_float, fill

MOST_CLASSES = 2**31  # columns that a product counts; the hash itself tells apart 2³²
MOST_BYTES = 2**30  # of a matrix that is built from a code: beyond it, it is refused
CLASSES = 8192  # class vectors at a time


class CodeHead(nn.Module):
    """A fixed head without weights: logits = scale · W h/‖h‖, W (C, d) the ±1/√d of `ncreg.frames.procedural_code`.

    Rows of W are computed in chunks when they are needed, in the forward and in the backward pass. The state_dict holds
    one of them, the buffer `first_vector` of class 0: by its signs, a file of another seed is refused instead of giving
    class vectors that nothing was trained on. The logits (B, C) of a batch are made all the same: to train on very many
    classes without them, give the head to `ncreg.losses.ChunkedCrossEntropyLoss`.

    The default scale is the one at which a feature along its own class vector has a mean cross-entropy of at most 0.01
    over random signs: ln(C − 1) − s + d·ln cosh(s/d) = ln(e^0.01 − 1); where d is so small that equal vectors alone
    cost as much, twice what they cost. With normalize=False it is 1.

    Args:
        in_features: d.
        num_classes: C, at least 2, at most 2³¹.
        normalize: whether features are brought to length 1 (at least 1e-6 is divided by, in float16 scale/2¹⁴).
        scale: factor on the logits.
        seed: of the hash.
        device: where `.weight` is computed.
        dtype: of `.weight`.

    Raises:
        ValueError: where scale is None and d < log₂(C(C − 1)): two equal class vectors would be as likely as not.

    Example:
        >>> head = CodeHead(512, 1_000_000)
        >>> head, len(head.state_dict())
        (CodeHead(in_features=512, num_classes=1000000, normalize=True, scale=18.76, seed=0), 1)
        >>> head(head.class_rows(torch.tensor([123_456]))).argmax(1)
        tensor([123456])
    """

    first_vector: Tensor
    bias = None
    chunks = "class_rows"

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        normalize: bool = True,
        scale: float | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = check_integer("in_features", in_features, 1)
        self.num_classes = check_num_classes(num_classes)
        if num_classes > MOST_CLASSES:
            raise ValueError(f"num_classes={num_classes} must be at most 2**31: the hash tells apart no more")
        self.normalize, self.seed = check_flag("normalize", normalize), check_seed(seed)
        default = _default_scale(self.in_features, self.num_classes) if normalize and scale is None else 1.0
        self.scale = checked_scale(scale, default)
        place = torch.empty(0, device=device, dtype=as_float(dtype))
        self.register_buffer("first_vector", self._first(place))

    def _first(self, like: Tensor) -> Tensor:
        """The vector of class 0, with the device and dtype of a tensor."""
        index = torch.zeros(1, dtype=torch.int64, device=like.device)
        row = code_rows(index, self.in_features, seed=self.seed, dtype=like.dtype)[0]
        return row.clone()  # safetensors takes no view of a larger storage

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "first_vector" not in self._buffers:  # pickled by an earlier version
            self.register_buffer("first_vector", self._first(cast(Tensor, self._buffers.pop("_place"))))

    def reset_parameters(self) -> None:
        """Write the one class vector that is kept; the others are computed when they are needed."""
        fill(self.first_vector, self._first(self.first_vector))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        key = prefix + "first_vector"
        given = state_dict.setdefault(key, self._first(self.first_vector))  # files of earlier versions hold none
        if isinstance(given, Tensor) and given.shape == self.first_vector.shape and not given.is_meta:
            if wrong := self._why_not_the_first(given.cpu()):
                args[-1].append(f"{key}: {wrong}")
                state_dict[key] = self.first_vector
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _why_not_the_first(self, given: Tensor) -> str:
        """What is wrong with a vector that should be that of class 0, to rounding; empty if nothing is."""
        signs = given.sign().double()
        if not torch.equal(signs.abs(), torch.ones_like(signs)):
            return "no class vector, with entries of ±1/√d: was it saved before reset_parameters() wrote it?"
        own = self._first(signs)
        if torch.equal(signs, own.sign()):
            return ""
        return (
            f"the state_dict comes from class vectors of another seed than seed={self.seed}: build the head with the "
            "seed that it was trained with"
        )

    def class_rows(self, classes: Tensor, dtype: torch.dtype | None = None) -> Float[Tensor, "rows in_features"]:
        """The vectors of some classes, given by their indices, on the indices' device."""
        check_indices(classes, self.num_classes)
        return code_rows(classes, self.in_features, seed=self.seed, dtype=dtype or self.first_vector.dtype)

    @property
    def weight(self) -> Float[Tensor, "num_classes in_features"]:
        """All class vectors, computed at each access.

        Raises:
            RuntimeError: where they would take more than 1 GiB; the message says how much.
        """
        size = self.num_classes * self.in_features * self.first_vector.element_size()
        if size > MOST_BYTES:
            raise RuntimeError(
                f"the class vectors of CodeHead ({self.num_classes} x {self.in_features} of {self.first_vector.dtype}) "
                f"would take {size:,} bytes, more than the {MOST_BYTES:,} that it builds: class_rows(indices) gives "
                "those of some classes"
            )
        return self.class_rows(torch.arange(self.num_classes, device=self.first_vector.device))

    @fx_leaf
    def forward(self, features: Float[Tensor, "batch in_features"]) -> Float[Tensor, "batch num_classes"]:
        """Logits of a batch of features."""
        check_features(features, self.in_features)
        scaled = scaled_features(features, self)
        if own_backward_pays(scaled):
            return _Product.apply(scaled, self)
        return _product(scaled, self)

    def extra_repr(self) -> str:
        """What tells this head from another."""
        sizes = f"in_features={self.in_features}, num_classes={self.num_classes}"
        return f"{sizes}, normalize={self.normalize}, scale={shown(self.scale)}, seed={self.seed}"


def scaled_features(features: Tensor, head: Any) -> Tensor:
    """What the class vectors are multiplied by: scale · h/‖h‖ or scale · h, in autocast's dtype where that is on."""
    factor = over_length(features, head.scale) if head.normalize else head.scale
    scaled = (features * factor).to(features.dtype)
    return scaled.to(torch.get_autocast_dtype(features.device.type)) if autocast_on(features) else scaled


def _chunks(head: CodeHead, device: torch.device) -> tuple[Tensor, ...]:
    return torch.arange(head.num_classes, device=device).split(CLASSES)


def _product(scaled: Tensor, head: CodeHead) -> Tensor:
    parts = [F.linear(scaled, head.class_rows(part, scaled.dtype)) for part in _chunks(head, scaled.device)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class _Product(torch.autograd.Function):
    """Features times Wᵀ; the chunks of W are computed again in backward, in place of being kept."""

    @staticmethod
    def forward(ctx: Any, scaled: Tensor, head: CodeHead) -> Tensor:
        ctx.head = head
        return _product(scaled, head)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Transposed.apply(gradient, ctx.head), None


class _Transposed(torch.autograd.Function):
    """Gradients of logits times W; its own backward is the product again, since both are linear."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, head: CodeHead) -> Tensor:
        ctx.head = head
        wide = wide_dtype(gradient)  # in half precision each chunk's sum would round the whole
        found = gradient.new_zeros(gradient.shape[0], head.in_features, dtype=wide)
        for part, columns in zip(_chunks(head, gradient.device), gradient.split(CLASSES, dim=1), strict=True):
            rows = head.class_rows(part, gradient.dtype)
            if rows.dtype == wide:
                found.addmm_(columns, rows)
            else:
                found.add_(columns @ rows)
        return found.to(gradient.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Product.apply(gradient, ctx.head), None


def _default_scale(dim: int, num_classes: int) -> float:
    """The scale of CodeHead's formula, by bisection: its left side falls in s, from ln(C − 1) to ln(C − 1) − d ln 2."""
    most, least = math.log(num_classes - 1), math.ceil(math.log2(num_classes) + math.log2(num_classes - 1))
    if dim < least:
        raise ValueError(
            f"in_features={dim} are too few signs to tell num_classes={num_classes} apart: put a linear map before it "
            f"(swap_head's project={least} or more), or give a scale"
        )
    aim = max(math.log(math.expm1(DEFAULT_LOSS)), most - (dim - 1) * math.log(2))
    low, high = 0.0, 1.0
    while most + _log_mean(high, dim) > aim:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if most + _log_mean(middle, dim) > aim else (low, middle)
    return high


def _log_mean(scale: float, dim: int) -> float:
    """Log of the mean of exp(s(cos − 1)) over random signs: −s + d·ln cosh(s/d), without cancellation."""
    return dim * (math.log1p(math.exp(-2 * scale / dim)) - math.log(2))
