"""Minority collapse: angles between the class vectors of frequent and rare classes, and the theory's threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import inf
from numbers import Integral

import torch
from jaxtyping import Float
from torch import Tensor

from ncreg._checks import check_class_counts, check_flag, check_positive
from ncreg._features import check_features
from ncreg._readable import readable
from ncreg.theory import minority_collapse_threshold

ROWS, ENTRIES = 256, 2**22  # of a table of angles at a time, and of the vectors of those that are done exactly


@dataclass(frozen=True)
class Angles:
    """Angles in degrees between pairs of class vectors.

    Attributes:
        mean: over the pairs.
        smallest: the closest pair's.
        pairs: how many.
    """

    mean: float
    smallest: float
    pairs: int

    __str__ = readable


@dataclass(frozen=True)
class MinorityCollapse:
    """Class sizes compared with the theoretical threshold of minority collapse.

    Attributes:
        threshold: training images a class at or below which free minority classes merge.
        smallest: training images of the smallest class.
        below: classes at or below the threshold.
    """

    threshold: float
    smallest: int
    below: tuple[int, ...]

    __str__ = readable


def minority_angles(
    vectors: Float[Tensor, "classes dim"], groups: dict[str, tuple[int, ...]], *, centre: bool = False
) -> dict[str, Angles]:
    """Angles in degrees between class vectors, or class means, within and between groups of classes.

    Where minority classes collapse, the angles within "few" go to 0 (Fang et al., PNAS 2021, arXiv 2101.12699); at a
    simplex all are arccos(−1/(C−1)). A fixed frame keeps its vectors apart: look at the class means there.

    Args:
        vectors: the head's weight, or the class means.
        groups: class indices by group name, such as `ncreg.robustness.class_groups` gives.
        centre: take the mean of the vectors off first, as class means need it.

    Returns:
        By "group-group", where there is a pair.

    Raises:
        TypeError: vectors that are no floating-point tensor.
        ValueError: vectors not finite or of length 0, or a group with a class that has no vector.

    Example:
        >>> found = minority_angles(torch.eye(3), {"many": (0,), "medium": (), "few": (1, 2)})
        >>> {pair: round(angles.mean) for pair, angles in found.items()}
        {'many-few': 90, 'few-few': 90}
    """
    rows = check_features("vectors", vectors)
    if check_flag("centre", centre):
        rows = rows - rows.mean(0)
    largest = rows.abs().amax(1, keepdim=True)
    if not bool((largest > 0).all()):
        raise ValueError(f"vectors of classes {(largest[:, 0] == 0).nonzero().flatten().tolist()} have length 0")
    rows = rows / largest  # squares stay within range
    unit = rows / rows.norm(dim=1, keepdim=True)
    _check_groups(groups, len(unit))
    named = {name: torch.tensor(classes, dtype=torch.int64, device="cpu") for name, classes in groups.items()}
    between = {
        f"{one}-{other}": _between(unit, named[one], named[other], once=one == other)
        for one, other in combinations_with_replacement(groups, 2)
    }
    return {pair: angles for pair, angles in between.items() if angles.pairs}


def _between(unit: Tensor, one: Tensor, other: Tensor, *, once: bool) -> Angles:
    """Angles between two groups of unit rows; within a group every pair counts `once`."""
    total, smallest, pairs, rows = 0.0, inf, 0, unit[other]
    for classes in one.split(ROWS):
        counted = classes[:, None] < other if once else classes[:, None] != other
        angles = _angles(unit[classes], rows)[counted]
        if len(angles):
            total, smallest = total + float(angles.sum()), min(smallest, float(angles.min()))
        pairs += len(angles)
    return Angles(total / max(pairs, 1), smallest, pairs)


def _check_groups(groups: dict[str, tuple[int, ...]], num_classes: int) -> None:
    for name, classes in groups.items():
        wrong = [c for c in classes if not isinstance(c, Integral) or isinstance(c, bool) or not 0 <= c < num_classes]
        if wrong:
            raise ValueError(f"groups[{name!r}] names {wrong[0]!r}: a class is an integer in [0, {num_classes})")


def minority_collapse(
    class_counts: Sequence[int] | Tensor,
    *,
    weight_decay: float,
    feature_decay: float | None = None,
    gamma_decay: float | None = None,
) -> MinorityCollapse:
    """Which classes are at or below n_B = N²·λ_W·λ_H, where free class vectors and features of minorities merge.

    A last BatchNorm whose γ decays with λ_γ has (λ_γ/2)‖γ‖² = (λ_γ/2N)‖H‖²: a feature decay of λ_γ/N, hence a threshold
    of N·λ_W·λ_γ (with a scalar γ pass λ_γ/d). A network is not free to place every feature, and its BatchNorm also
    centres them: read the threshold as an order of magnitude. It concerns learned heads; a fixed frame cannot merge.

    Args:
        class_counts: training images of each class.
        weight_decay: λ_W of the head, coupled.
        feature_decay: λ_H, the coefficient of ½‖H‖², the sum over all features; or else
        gamma_decay: λ_γ of a last BatchNorm's γ.

    Raises:
        ValueError: both or neither of the last two, decays that are not above 0, counts out of range.

    Source: `ncreg.theory.minority_collapse_threshold`.

    Example:
        >>> minority_collapse([900, 98, 2], weight_decay=5e-3, feature_decay=5e-4)
        MinorityCollapse(threshold=2.5, smallest=2, below=(2,))
    """
    counts = check_class_counts(class_counts)
    if (feature_decay is None) == (gamma_decay is None):
        raise ValueError("pass one of feature_decay and gamma_decay")
    total = sum(counts)
    decay = feature_decay if feature_decay is not None else check_positive("gamma_decay", gamma_decay or 0.0) / total
    threshold = minority_collapse_threshold(total, weight_decay, decay)
    return MinorityCollapse(threshold, min(counts), tuple(c for c, n in enumerate(counts) if n <= threshold))


def _angles(left: Float[Tensor, "m dim"], right: Float[Tensor, "n dim"]) -> Float[Tensor, "m n"]:
    """Degrees between unit rows, exact near 0 and 180, where the arc cosine is not (Kahan)."""
    cosines = left @ right.T
    angles = cosines.clamp(-1, 1).acos()
    for pairs in (cosines.abs() > 0.9999).nonzero().split(max(1, ENTRIES // left.shape[1])):
        one, other = left[pairs[:, 0]], right[pairs[:, 1]]
        angles[pairs.unbind(1)] = 2 * torch.atan2((one - other).norm(dim=1), (one + other).norm(dim=1))
    return torch.rad2deg(angles)
