"""Learned heads: the linear classifier, and unit class vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ncreg._checks import check_flag, check_integer, check_num_classes
from ncreg._transforms import fx_leaf
from ncreg.heads._cosine import check_features, checked_scale, cosine_logits, default_scale, over_length, shown
from ncreg.numerics import as_float, fill, seeded


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

    Raises:
        TypeError: sizes that are no integers, a bias that is no flag.
        ValueError: no feature, fewer than two classes.

    Example:
        >>> LinearHead(16, 10)(torch.zeros(2, 16)).shape
        torch.Size([2, 10])
    """

    normalize = False
    chunks = "weight"  # how ncreg.losses.chunked makes the logits of some classes

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
        sizes = check_integer("in_features", in_features, 1), check_num_classes(num_classes)
        super().__init__(*sizes, bias=check_flag("bias", bias), device=device, dtype=as_float(dtype))

    @property
    def num_classes(self) -> int:
        """C, nn.Linear's out_features."""
        return self.out_features

    @property
    def scale(self) -> float:
        """1, and not to be set: the weights have a length of their own."""
        return 1.0

    def reset_parameters(self) -> None:
        """Draw the initial weights from the head's own generator."""
        generator = seeded(self.seed)
        bound = self.in_features**-0.5
        for parameter in self.parameters():
            drawn = torch.empty(parameter.shape, dtype=torch.float64, device="cpu")
            fill(parameter, drawn.uniform_(-bound, bound, generator=generator))

    @fx_leaf
    def forward(self, input: Float[Tensor, "batch in_features"]) -> Float[Tensor, "batch num_classes"]:
        """Logits of a batch of features."""
        check_features(input, self.in_features, self.weight.dtype)
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

    Raises:
        TypeError: sizes that are no integers, a scale that is no number.
        ValueError: no feature, fewer than two classes, a scale that is not above 0.

    Example:
        >>> bool(CosineHead(16, 10, scale=5.0)(torch.ones(2, 16)).abs().max() <= 5)
        True
    """

    bias = None
    normalize = True
    chunks = "unit weight"

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
        self.in_features = check_integer("in_features", in_features, 1)
        self.num_classes = check_num_classes(num_classes)
        self.scale = checked_scale(scale, default_scale(num_classes))
        self.seed = seed
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=as_float(dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the class vectors uniformly from the unit sphere."""
        drawn = torch.randn(self.weight.shape, dtype=torch.float64, device="cpu", generator=seeded(self.seed))
        fill(self.weight, F.normalize(drawn, dim=1))

    @property
    def class_vectors(self) -> Float[Tensor, "num_classes in_features"]:
        """The unit rows that logits are made of, where `weight` holds them at any length."""
        return self.weight * over_length(self.weight, 1.0).to(self.weight.dtype)

    @fx_leaf
    def forward(self, features: Float[Tensor, "batch in_features"]) -> Float[Tensor, "batch num_classes"]:
        """Logits of a batch of features."""
        check_features(features, self.in_features, self.weight.dtype)
        logits = cosine_logits(features, self.weight, self.scale)
        return logits * over_length(self.weight, 1.0).T.to(logits.dtype)

    def extra_repr(self) -> str:
        """What tells this head from another."""
        return f"in_features={self.in_features}, num_classes={self.num_classes}, scale={shown(self.scale)}"
