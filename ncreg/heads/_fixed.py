"""Fixed heads: class vectors given, or a simplex ETF as a dense frame or as a structure that needs none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ncreg._checks import check_choice, check_flag, check_integer, check_num_classes, described
from ncreg._transforms import fx_leaf
from ncreg.frames import simplex_etf
from ncreg.heads._cosine import (
    check_features,
    checked_scale,
    default_scale,
    eager,
    fixed_logits,
    over_length,
    shown,
    wide_dtype,
)
from ncreg.heads._grouped import GroupedCosine, group_sums
from ncreg.heads._permuted import PermutedHead, checked_permutation
from ncreg.numerics import as_float, fill, in_float64, seeded, whole, widest

Structure = Literal["dense", "grouped", "householder", "centre"]
ROWS = 1024  # of a Gram matrix at a time


class FixedHead(nn.Module):
    """Fixed class vectors: logits = scale · W · h/‖h‖, or scale · W h; W (C, d) is a buffer, never learned.

    The default scale is the one at which a feature along its own class vector has a cross-entropy of at most 0.01:
    ln((C−1)/(e^0.01 − 1))/m, where m is the smallest margin (w_c − w_k)·w_c/‖w_c‖ (C/(C−1) for a simplex). With
    normalize=False it is 1. Other class vectors that are loaded (load_state_dict) have their own default scale.

    Args:
        weight: class vectors, copied.
        normalize: whether features are brought to length 1 (at least 1e-6 is divided by, in float16 scale/2¹⁴).
        scale: factor on the logits.

    Raises:
        ValueError: for a weight that is not a finite (C ≥ 2, d) matrix, or whose margin m is not positive while
            the scale is left open.

    Example:
        >>> from ncreg.frames import orthoplex
        >>> FixedHead(orthoplex(6, 3))
        FixedHead(in_features=3, num_classes=6, normalize=True, scale=6.21)
    """

    weight: Tensor
    bias = None
    chunks = "weight"
    _draw: Callable[[], Tensor] | None = None  # gives a frame that was drawn by name once more
    _default: float | None = None  # the default scale, where none was given
    _scale_open = False

    def __init__(
        self, weight: Float[Tensor, "num_classes dim"], *, normalize: bool = True, scale: float | None = None
    ) -> None:
        super().__init__()
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight must be a tensor of class vectors, not {described(weight)}")
        if weight.ndim != 2 or len(weight) < 2 or not weight.is_floating_point():
            got = f"{tuple(weight.shape)} of {weight.dtype}"
            raise ValueError(f"weight is {got}: it must be a floating-point (num_classes >= 2, dim) matrix")
        if not weight.is_meta and not weight.isfinite().all():
            raise ValueError("weight must be finite")
        self.num_classes, self.in_features = weight.shape
        self.normalize = check_flag("normalize", normalize)
        by_margin = normalize and scale is None
        self.scale = checked_scale(scale, _margin_scale(weight.detach()) if by_margin else 1.0)
        self._default = self.scale if by_margin else None
        self._scale_open = by_margin and weight.is_meta  # a meta weight has no margin
        self.register_buffer("weight", weight.detach().clone(memory_format=torch.contiguous_format))

    def reset_parameters(self) -> None:
        """Write a frame that was drawn by name (swap_head's "orthoplex", …) again, exactly.

        Raises:
            RuntimeError: for class vectors that were given as a tensor, of which nothing else is kept.
        """
        if self._draw is None:
            raise RuntimeError(
                "FixedHead cannot draw its class vectors again: they were given as a tensor. Build this head on its "
                "own device, outside torch.device('meta'), or fill it by load_state_dict"
            )
        frame = self._draw()
        fill(self.weight, frame)
        self._renew_scale(frame)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        given = state_dict.get(f"{prefix}weight")  # a state that comes in parts may bring it later
        fits = isinstance(given, Tensor) and given.shape == self.weight.shape
        other = fits and (self._scale_open or not _same(given, self.weight))
        super()._load_from_state_dict(state_dict, prefix, *args)
        if other:
            self._renew_scale(given)

    def _renew_scale(self, weight: Tensor) -> None:
        """The default scale of other class vectors, unless a scale was given or set."""
        is_default = not isinstance(self.scale, Tensor) and self.scale == self._default
        if is_default and not weight.is_meta and not self.weight.is_meta:
            self.scale = self._default = _margin_scale(weight)
            self._scale_open = False

    @fx_leaf
    def forward(self, features: Float[Tensor, "batch in_features"]) -> Float[Tensor, "batch num_classes"]:
        """Logits of a batch of features."""
        return fixed_logits(features, self.weight, self.scale, self.normalize)

    def extra_repr(self) -> str:
        """What tells this head from another."""
        sizes = f"in_features={self.in_features}, num_classes={self.num_classes}"
        return f"{sizes}, normalize={self.normalize}, scale={shown(self.scale)}"


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two matrices differ by no more than rounding to bfloat16 or to 8 bits does."""
    if one.is_meta or other.is_meta:
        return False
    one, other = (whole(matrix).cpu().double() for matrix in (one, other))
    return float((one - other).abs().max()) <= 2.0**-7 * float(other.abs().max())


def _margin_scale(weight: Tensor) -> float:
    """The simplex's scale, stretched by the frame's smallest margin at its own class vectors."""
    num_classes, simplex_margin = len(weight), len(weight) / (len(weight) - 1)
    if weight.is_meta:
        return default_scale(num_classes)
    exact = in_float64(weight)
    size = float(exact.abs().amax()) or 1.0
    wide = exact / size  # squares stay within range
    unit, smallest = F.normalize(wide, dim=1), float("inf")
    for first in range(0, num_classes, ROWS):
        logits = unit[first : first + ROWS] @ wide.T
        own = torch.arange(first, first + len(logits), device=exact.device)[:, None]
        rest = logits.scatter(1, own, -torch.inf).amax(1)
        smallest = min(smallest, float((logits.gather(1, own)[:, 0] - rest).min()))
    if not smallest > 1e-6:
        raise ValueError(
            f"scale=None has no default for this weight: a feature along its own class vector does not beat the "
            f"other classes (smallest margin {smallest * size:.3g}); give a scale, or class vectors of equal lengths"
        )
    return default_scale(num_classes) * simplex_margin / smallest / size


class ETFHead(PermutedHead):
    """Fixed simplex-ETF classifier: logits = scale · W · h/‖h‖, W (C, d) the class vectors, never learned.

    By default the scale is the one at which the smallest reachable cross-entropy, ln(1 + (C−1)·exp(−scale·C/(C−1))),
    is 0.01; with normalize=False it is 1. Source: Yang et al., "Inducing Neural Collapse in Imbalanced Learning",
    NeurIPS 2022 (arXiv 2203.09081).

    Structures, with a = √(C/(C−1)); all but "dense" hold no (C, d) matrix and cost O(d) a sample:

    - "dense", d ≥ C − 1: a randomly rotated frame, kept as the buffer `weight`.
    - "grouped", d ≥ C: class c sums the features j ≡ c mod C, g_c = Σh_j/√m_c, m_c of them; logits a(g − mean g).
    - "householder", d = C − 1: with s = Σh: a·[h − s/(√C(√C+1)); −s/√C].
    - "centre", d = C: a(h − mean h). Under cross-entropy without normalisation this is the identity head.

    Features behind a ReLU reach a cosine of only ≈ 0.71 with a dense vertex (√((C−1)/C) with a grouped one): put a
    norm without activation in between.

    Args:
        in_features: d.
        num_classes: C, at least 2.
        structure: "dense", "grouped", "householder" or "centre".
        normalize: whether features are brought to length 1 (at least 1e-6 is divided by, in float16 scale/2¹⁴).
        scale: factor on the logits.
        permutation: class c sits on vertex permutation[c]; by default on vertex c.
        seed: of the dense frame's rotation; the other structures have nothing to draw.
        device: where the frame lives.
        dtype: of the frame.

    Raises:
        ValueError: for a structure that does not fit d and C, or a permutation that is none ("similar", which other
            fixed heads take, is none: all permutations of a simplex are congruent).

    Example:
        >>> head = ETFHead(16, 10)
        >>> head(head.weight).argmax(1).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    _place: Tensor
    bias = None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        structure: Structure = "dense",
        normalize: bool = True,
        scale: float | None = None,
        permutation: Sequence[int] | Tensor | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = check_integer("in_features", in_features, 1)
        self.num_classes = check_num_classes(num_classes)
        _check_structure(structure, self.in_features, self.num_classes)
        self.structure, self.normalize, self.seed = structure, check_flag("normalize", normalize), seed
        self.scale = checked_scale(scale, default_scale(num_classes) if normalize else 1.0)
        if isinstance(permutation, str):
            raise ValueError(
                f"permutation={permutation!r}: a simplex takes a list of vertices; similar classes have no nearer "
                "place there, for all its permutations are congruent (heads orthoplex and softmax_code take 'similar')"
            )
        seats = None if permutation is None else checked_permutation(permutation, num_classes)
        if structure == "dense":
            frame = simplex_etf(num_classes, in_features, generator=seeded(seed), dtype=dtype, device=device)
            self.register_buffer("weight", frame if seats is None else frame[seats.to(frame.device)])
        else:
            self.register_buffer("_place", torch.empty(0, device=device, dtype=as_float(dtype)), persistent=False)
        self._register_permutation(seats, next(self.buffers()).device)

    def reset_parameters(self) -> None:
        """Write the frame again as it was built, from seed, permutation and structure."""
        if self.structure == "dense":
            generator = seeded(self.seed)
            frame = simplex_etf(
                self.num_classes, self.in_features, generator=generator, dtype=torch.float64, device="cpu"
            )
            fill(self.weight, frame if self._seats is None else frame[list(self._seats)])
        self._reset_permutation()

    @property
    def chunks(self) -> str:
        """How the losses in chunks make the logits of some classes: a structure makes all, no more than features."""
        return "weight" if self.structure == "dense" else "logits"

    @property
    def weight(self) -> Tensor:
        """Class vectors (C, d): the dense frame, or the same matrix built from the structure at each access."""
        if self.structure == "dense":
            return cast(Tensor, super().__getattr__("weight"))
        place = self._place.device
        axes = torch.eye(self.in_features, dtype=widest(place), device=place)
        return self._structured(axes, 1.0).T.contiguous().to(self._place.dtype)

    @fx_leaf
    def forward(self, features: Float[Tensor, "batch in_features"]) -> Float[Tensor, "batch num_classes"]:
        """Logits of a batch of features."""
        if self.structure == "dense":
            return fixed_logits(features, self.weight, self.scale, self.normalize)
        check_features(features, self.in_features)
        if self.structure == "grouped" and self.normalize and self._seats is None and eager(features, self.scale):
            return GroupedCosine.apply(features, self.num_classes, self.scale)
        return self._structured(features, over_length(features, self.scale) if self.normalize else self.scale)

    def _structured(self, features: Tensor, factor: Tensor | float) -> Tensor:
        """Inner products with the class vectors, without the class vectors, times a factor for each row."""
        stretched = (self.num_classes / (self.num_classes - 1)) ** 0.5 * factor
        grouped = self.structure == "grouped"
        groups = group_sums(features, self.in_features, self.num_classes) if grouped else features
        groups = groups.to(wide_dtype(features))  # sums over a row, of gradients too, are beyond float16 or coarse
        logits = (
            _householder(groups, self.in_features)
            if self.structure == "householder"
            else groups - groups.mean(1, keepdim=True)
        )
        logits = (logits * stretched).to(features.dtype)
        seats = self.permutation
        return logits if seats is None else logits.index_select(1, seats)

    def extra_repr(self) -> str:
        """What tells this head from another."""
        sizes = f"in_features={self.in_features}, num_classes={self.num_classes}, structure={self.structure!r}"
        seed = f", seed={self.seed}" if self.structure == "dense" else ""
        permuted = "" if self._seats is None else ", permuted"
        return f"{sizes}, normalize={self.normalize}, scale={shown(self.scale)}{seed}{permuted}"


def _householder(features: Tensor, dim: int) -> Tensor:
    """Q h for the Householder basis Q of 1^⊥."""
    root, total = (dim + 1) ** 0.5, features.sum(1, keepdim=True)
    return torch.cat([features - total / (root * (root + 1)), -total / root], dim=1)


def _check_structure(structure: str, dim: int, num_classes: int) -> None:
    """Refuse a structure that does not fit; simplex_etf itself refuses a dense one."""
    needs = {"dense": dim, "grouped": max(dim, num_classes), "householder": num_classes - 1, "centre": num_classes}
    check_choice("structure", structure, needs)
    if dim != needs[structure]:
        at_least = ">= " if structure == "grouped" else ""
        raise ValueError(
            f"in_features={dim}: structure={structure!r} with num_classes={num_classes} needs in_features "
            f"{at_least}{needs[structure]}: put a linear map before it (swap_head's project={needs[structure]}), "
            f"or take structure='dense', which needs in_features >= {num_classes - 1}"
        )
