"""How far class vectors and class means of unbalanced classes are from the geometry that theory gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ncreg._checks import check_choice, check_class_counts
from ncreg._features import check_features
from ncreg._readable import readable
from ncreg.theory import seli_geometry


@dataclass(frozen=True)
class GramDistance:
    """Distances between Gram matrices of Frobenius norm 1: 0 where they agree, at most √2.

    Attributes:
        seli: to the SELI geometry of the class counts.
        simplex: to the simplex.
    """

    seli: float
    simplex: float

    __str__ = readable


def seli_distance(
    vectors: Float[Tensor, "classes dim"], class_counts: Sequence[int] | Tensor, role: Literal["weight", "means"]
) -> GramDistance:
    """‖G/‖G‖ − G*/‖G*‖‖_F of the Gram matrix G of class vectors or class means, G* that of SELI and of the simplex.

    A learned head on a long tail that is far from the simplex may still be where theory puts it: then `seli` is the
    smaller one. Of class means their unweighted mean is taken off first; it is 0 at both geometries. For the weight,
    `simplex` is `nc2_weight_gram` of `ncreg.metrics.NeuralCollapse`. The optimum at a decay λ above 0 is off SELI by an
    order of 1/ln(1/λ). A fixed frame stays at its own place whatever the counts: compare the class means there.

    Args:
        vectors: the head's weight, or the class means, one row a class.
        class_counts: training images of each class, in the same order.
        role: which of the two the vectors are.

    Raises:
        TypeError: vectors that are no floating-point tensor.
        ValueError: vectors not finite or all 0 (as means: all the same), another number of counts, an unknown role.

    Source: Thrampoulidis et al. 2022 (arXiv 2208.05512); `ncreg.theory.seli_geometry`.

    Example:
        >>> weight = torch.tensor([[2.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> seli_distance(weight, [8, 1, 1], "weight")
        GramDistance(seli=0.0759..., simplex=0.4595...)
    """
    check_choice("role", role, ("weight", "means"))
    counts = check_class_counts(class_counts)
    rows = check_features("vectors", vectors)
    if len(rows) != len(counts):
        raise ValueError(f"vectors has {len(rows)} rows where class_counts names {len(counts)} classes")
    if role == "means":
        rows = rows - rows.mean(0)
    largest = rows.abs().max()
    if not largest > 0:
        raise ValueError(f"vectors as {role} have length 0: they have no direction")
    rows = rows / largest  # squares stay within range
    gram = rows @ rows.T
    gram = gram / torch.linalg.norm(gram)
    simplex = (torch.eye(len(rows), dtype=torch.float64, device="cpu") - 1 / len(rows)) / sqrt(len(rows) - 1)
    wanted = getattr(seli_geometry(counts), role)
    return GramDistance(*(float(torch.linalg.norm(gram - goal)) for goal in (wanted, simplex)))
