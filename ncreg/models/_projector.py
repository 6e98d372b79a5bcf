"""A projector without anything to learn, behind which features collapse while those before it stay spread."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ncreg._checks import check_integer
from ncreg._features import check_pooled
from ncreg._transforms import fx_leaf

EPS = 1e-6  # F.normalize's own 1e-12 would give a zero row a gradient near 1e12


class FixedProjector(nn.Module):
    """features (B, d) → W₂ ReLU(W₁ h), divided by its length; W = √(c/(c−1))·(E − 11ᵀ/c), fixed, c the output's width.

    E is 1 on the diagonal and 0 elsewhere, of W₁ (hidden, d) as of W₂ (c, hidden), so a product costs a sum and a cut:
    there is no weight, O(d) a sample and nothing in the state_dict. Trained through it, the features behind it
    collapse; a spread loss (`ncreg.losses.KoLeoLoss`, weight 0.1) keeps those before it from doing so.
    On features that are nowhere negative, such as those behind a ReLU, the hidden units beyond d are all 0.

    Args:
        in_features: d, at least 2.
        out_features: c, at least 2; None takes d.
        hidden_features: at least 2.

    Raises:
        ValueError: a width below 2; in forward, features of another width.
        TypeError: a width that is no integer.

    Source: Harun, Gallardo & Kanan, "Controlling Neural Collapse Enhances Out-of-Distribution Detection and Transfer
    Learning", ICML 2025 (arXiv 2502.10691).

    Example:
        >>> import torch
        >>> projector = FixedProjector(3)
        >>> projector(torch.eye(3)[:1]), list(projector.state_dict())
        (tensor([[ 0.8165, -0.4082, -0.4082]]), [])
    """

    def __init__(self, in_features: int, out_features: int | None = None, *, hidden_features: int = 2048) -> None:
        super().__init__()
        self.in_features = check_integer("in_features", in_features, 2)
        self.out_features = check_integer("out_features", in_features if out_features is None else out_features, 2)
        self.hidden_features = check_integer("hidden_features", hidden_features, 2)

    @fx_leaf
    def forward(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch out"]:
        """Unit rows."""
        check_pooled(features, self.in_features, "projector")
        hidden = self._fixed_map(features, self.in_features, self.hidden_features).relu()
        return F.normalize(self._fixed_map(hidden, self.hidden_features, self.out_features), dim=1, eps=EPS)

    def _fixed_map(self, rows: Tensor, width: int, wanted: int) -> Tensor:
        """√(c/(c−1))·(E − 11ᵀ/c) applied to each row; the pad of a negative length cuts."""
        classes = self.out_features
        scale = (classes / (classes - 1)) ** 0.5
        return scale * (F.pad(rows, (0, wanted - width)) - rows.sum(1, keepdim=True) / classes)

    def extra_repr(self) -> str:
        """The widths."""
        return f"{self.in_features} → {self.hidden_features} → {self.out_features}"
