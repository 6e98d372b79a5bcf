"""Where class vectors and class means of unbalanced classes go as the decay goes to 0: the SELI geometry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ncreg._checks import check_class_counts


class SELIGeometry(NamedTuple):
    """Gram matrices (C, C) of Frobenius norm 1, float64.

    Attributes:
        weight: dot products of the class vectors.
        means: dot products of the class means.
    """

    weight: Float[Tensor, "classes classes"]
    means: Float[Tensor, "classes classes"]


def seli_geometry(class_counts: Sequence[int] | Tensor) -> SELIGeometry:
    """Gram matrices of class vectors, VΛVᵀ, and of class means, D^(−½)UΛUᵀD^(−½), up to a factor.

    VΛUᵀ is the singular value decomposition of (I − 11ᵀ/C)·D^½, D = diag(n_c). For free W and H under cross-entropy
    + (λ/2)(‖W‖² + ‖H‖²) without a bias the directions go there as λ → 0, with a distance of order 1/ln(1/λ): slowly.
    Within a class features collapse onto their mean; class vectors and class means sum to 0. Beside the simplex, class
    vectors of rare classes are closer to each other and their class means farther apart. Equal counts give the simplex.

    Args:
        class_counts: n_c, samples of each class, at least 1 each.

    Raises:
        ValueError: fewer than two classes, or a class without a sample.

    Source: Thrampoulidis, Kini, Vakilian & Behnia, "Imbalance Trouble: Revisiting Neural-Collapse Geometry", NeurIPS
    2022 (arXiv 2208.05512).

    Example:
        >>> weight, means = seli_geometry([7, 5, 2, 1])
        >>> lengths = means.diagonal().sqrt()
        >>> [round(float(c), 2) for c in (means / lengths / lengths[:, None])[0]]
        [1.0, -0.22, -0.26, -0.31]
    """
    counts = torch.tensor(check_class_counts(class_counts), dtype=torch.float64, device="cpu")
    root = counts.sqrt()
    left, values, right = torch.linalg.svd(root.diag() - root / len(counts))
    rank = len(counts) - 1  # the last singular value is 0: the columns sum to 0
    weight = (left[:, :rank] * values[:rank]) @ left[:, :rank].T
    features = (right[:rank].T * values[:rank]) @ right[:rank]
    means = features / root / root[:, None]
    return SELIGeometry(weight / torch.linalg.norm(weight), means / torch.linalg.norm(means))
