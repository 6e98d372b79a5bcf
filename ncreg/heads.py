"""Classifier heads on (batch, in_features) features, fixed and learned.

Every head has `.weight` (num_classes, in_features) as in nn.Linear, `.in_features`, `.num_classes`, `.scale`.
A head draws from a generator of its own, seeded by `seed`: runs that differ in the head alone stay paired.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ncreg.frames import as_size, simplex_etf
from ncreg.theory import scale_for_loss

DEFAULT_LOSS = 0.01  # the smallest cross-entropy that the default scale can reach
EPS = 1e-6  # F.normalize's own 1e-12 would give a zero feature a gradient near 1e12


def _checked_scale(scale: float | None, default: float) -> float:
    if scale is None:
        return default
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale={scale} must be finite and positive; None takes the default, {default:.4g}")
    return float(scale)


def _check_features(features: Tensor, in_features: int) -> None:
    if features.ndim != 2 or features.shape[1] != in_features:
        shape = tuple(features.shape)
        raise ValueError(f"features of shape {shape}: the head takes pooled features (batch, {in_features})")


def _cosine_logits(features: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Logits scale · W · h/‖h‖, the length divided out of the (smaller) product."""
    length = torch.linalg.vector_norm(features, dim=1, keepdim=True).clamp_min(EPS)
    return F.linear(features, weight) * (scale / length)


class ETFHead(nn.Module):
    """Fixed simplex-ETF classifier: logits = scale · W · h/‖h‖, W (C, d) the class vectors, never learned.

    The frame is a buffer: in the state_dict, not among the parameters. By default the scale is the one at
    which the smallest reachable cross-entropy, ln(1 + (C−1)·exp(−scale·C/(C−1))), is 0.01; with
    normalize=False it is 1.
    Source: Yang et al., "Inducing Neural Collapse in Imbalanced Learning", NeurIPS 2022 (arXiv 2203.09081).

    Args:
        in_features: d, at least C − 1.
        num_classes: C, at least 2.
        normalize: whether features are brought to length 1 (at least 1e-6 is divided by).
        scale: factor on the logits.
        seed: of the frame's rotation.
        device: where the frame lives.
        dtype: of the frame.

    Example:
        >>> head = ETFHead(16, 10)
        >>> head(head.weight).argmax(1).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    weight: Tensor
    bias = None

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
        self.in_features = as_size("in_features", in_features, 1)
        self.num_classes = as_size("num_classes", num_classes, 2)
        self.normalize = normalize
        self.scale = _checked_scale(scale, scale_for_loss(num_classes, DEFAULT_LOSS) if normalize else 1.0)
        self.seed = seed
        generator = torch.Generator(device="cpu").manual_seed(seed)
        frame = simplex_etf(num_classes, in_features, generator=generator, dtype=dtype, device=device)
        self.register_buffer("weight", frame)

    def forward(self, features: Float[Tensor, "batch in_features"]) -> Float[Tensor, "batch num_classes"]:
        """Logits of a batch of features."""
        _check_features(features, self.in_features)
        if self.normalize:
            return _cosine_logits(features, self.weight, self.scale)
        return self.scale * F.linear(features, self.weight)

    def extra_repr(self) -> str:
        """What tells this head from another."""
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, "
            f"normalize={self.normalize}, scale={self.scale:.4g}, seed={self.seed}"
        )


class LinearHead(nn.Linear):
    """The learned linear classifier, logits = W h + b, under the names of the other heads.

    Weights start as nn.Linear's do (uniform within ±1/√d), from the head's own generator.

    Args:
        in_features: d.
        num_classes: C, at least 2.
        bias: whether to learn a bias.
        seed: of the initial weights.
        device: where the weights live.
        dtype: of the weights.

    Example:
        >>> LinearHead(16, 10)(torch.zeros(2, 16)).shape
        torch.Size([2, 10])
    """

    scale = 1.0

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = True,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.seed = seed
        sizes = as_size("in_features", in_features, 1), as_size("num_classes", num_classes, 2)
        super().__init__(*sizes, bias=bias, device=device, dtype=dtype)

    @property
    def num_classes(self) -> int:
        """C, nn.Linear's out_features."""
        return self.out_features

    def reset_parameters(self) -> None:
        """Draw the initial weights from the head's own generator."""
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        bound = self.in_features**-0.5
        with torch.no_grad():
            for parameter in self.parameters():
                drawn = torch.empty(parameter.shape, dtype=torch.float64, device="cpu")
                parameter.copy_(drawn.uniform_(-bound, bound, generator=generator))

    def forward(self, input: Float[Tensor, "batch in_features"]) -> Float[Tensor, "batch num_classes"]:
        """Logits of a batch of features."""
        _check_features(input, self.in_features)
        return super().forward(input)


class CosineHead(nn.Module):
    """Learned unit class vectors on unit features: logits = scale · cos(w_c, h).

    Source: NormFace, Wang et al. 2017 (arXiv 1704.06369). The default scale is ETFHead's: at it the smallest
    reachable cross-entropy is 0.01 where a simplex fits (d ≥ C − 1), and larger otherwise.

    Args:
        in_features: d.
        num_classes: C, at least 2.
        scale: factor on the cosines, an inverse temperature.
        seed: of the initial weights.
        device: where the weights live.
        dtype: of the weights.

    Example:
        >>> bool(CosineHead(16, 10, scale=5.0)(torch.ones(2, 16)).abs().max() <= 5)
        True
    """

    bias = None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = as_size("in_features", in_features, 1)
        self.num_classes = as_size("num_classes", num_classes, 2)
        self.scale = _checked_scale(scale, scale_for_loss(num_classes, DEFAULT_LOSS))
        self.seed = seed
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the class vectors uniformly from the unit sphere."""
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        drawn = torch.randn(self.weight.shape, dtype=torch.float64, device="cpu", generator=generator)
        with torch.no_grad():
            self.weight.copy_(F.normalize(drawn, dim=1))

    def forward(self, features: Float[Tensor, "batch in_features"]) -> Float[Tensor, "batch num_classes"]:
        """Logits of a batch of features."""
        _check_features(features, self.in_features)
        return _cosine_logits(features, F.normalize(self.weight, dim=1, eps=EPS), self.scale)

    def extra_repr(self) -> str:
        """What tells this head from another."""
        return f"in_features={self.in_features}, num_classes={self.num_classes}, scale={self.scale:.4g}"


HEADS: dict[str, type[nn.Module]] = {"linear": LinearHead, "etf": ETFHead, "cosine": CosineHead}
"""Heads that swap_head knows by name; each is called as Head(in_features, num_classes, **head_args)."""
