"""What a long tail does: accuracy of frequent and rare classes, and whether the rare ones keep apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from numbers import Integral
from typing import Literal

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from ncreg._checks import check_count, check_flag, check_positive
from ncreg._features import check_features, check_indices
from ncreg.robustness.intervals import binomial_interval
from ncreg.theory import minority_collapse_threshold

MANY, FEW = 100, 20
"""Bounds of the field's groups: many above 100 training images, few below 20, medium from 20 to 100."""

Scheme = Literal["counts", "thirds"]
_NAMES = ("many", "medium", "few")


@dataclass(frozen=True)
class GroupAccuracy:
    """How well a group of classes is recognised.

    Attributes:
        classes: their indices.
        accuracy: mean of their class accuracies, those without a test image left out; None where none has one.
        correct: test images of the group that are recognised.
        images: its test images.
        interval: Wilson 95 % interval of correct/images, which is `accuracy` where classes have equally many test
            images; None without images.
    """

    classes: tuple[int, ...]
    accuracy: float | None
    correct: int
    images: int
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class LongTailAccuracy:
    """Accuracy by class and by class size.

    Attributes:
        accuracy: share of test images recognised.
        balanced: mean of the class accuracies, classes without a test image left out.
        per_class: accuracy of each class, None without a test image.
        groups: "many", "medium" and "few"; a group may be empty.
        imbalance: training images of the largest class over those of the smallest.
    """

    accuracy: float
    balanced: float
    per_class: tuple[float | None, ...]
    groups: dict[str, GroupAccuracy]
    imbalance: float


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


@dataclass(frozen=True)
class MinorityCollapse:
    """Class sizes beside the theory's threshold of minority collapse.

    Attributes:
        threshold: training images a class at or below which free minority classes merge.
        smallest: training images of the smallest class.
        below: classes at or below the threshold.
    """

    threshold: float
    smallest: int
    below: tuple[int, ...]


def class_groups(class_counts: Sequence[int] | Tensor, scheme: Scheme = "counts") -> dict[str, tuple[int, ...]]:
    """Classes by their number of training images: "many", "medium" and "few".

    "counts" takes the field's bounds: above 100, 20 to 100, below 20 (Liu et al., "Large-Scale Long-Tailed Recognition
    in an Open World", CVPR 2019, arXiv 1904.05160). "thirds" cuts the classes, sorted by size, into three parts that
    are as equal as they can be, the first ones larger; for sets whose classes all fall in one of the field's groups.

    Raises:
        ValueError: an unknown scheme, fewer than two classes, a class without a training image; thirds of fewer than
            three classes or of classes that are all of one size.

    Example:
        >>> class_groups([500, 100, 19])
        {'many': (0,), 'medium': (1,), 'few': (2,)}
        >>> class_groups([50, 40, 30, 20], "thirds")
        {'many': (0, 1), 'medium': (2,), 'few': (3,)}
    """
    counts = check_class_counts(class_counts)
    if scheme == "counts":
        bounds = ((MANY + 1, None), (FEW, MANY), (1, FEW - 1))
        inside = [
            tuple(c for c, n in enumerate(counts) if n >= low and (high is None or n <= high)) for low, high in bounds
        ]
        return dict(zip(_NAMES, inside, strict=True))
    if scheme != "thirds":
        raise ValueError(f"scheme={scheme!r} is unknown: 'counts' or 'thirds'")
    if len(counts) < 3 or len(set(counts)) == 1:
        raise ValueError(f"thirds need three classes or more, not all of one size: got sizes {counts[:10]}")
    order = sorted(range(len(counts)), key=lambda c: (-counts[c], c))
    cuts = [-(-len(counts) * part // 3) for part in range(4)]
    return {name: tuple(sorted(order[cuts[i] : cuts[i + 1]])) for i, name in enumerate(_NAMES)}


def long_tail_accuracy(
    predicted: Integer[Tensor, " test"],
    target: Integer[Tensor, " test"],
    class_counts: Sequence[int] | Tensor,
    *,
    scheme: Scheme = "counts",
) -> LongTailAccuracy:
    """Accuracy of each class, of many-, medium- and few-shot classes, and balanced accuracy.

    Args:
        predicted: classes predicted for test images.
        target: their classes.
        class_counts: training images of each class.
        scheme: of `class_groups`.

    Raises:
        TypeError: predictions or target that hold no integers.
        ValueError: shapes or classes that do not fit, no test image, groups that cannot be made.

    Example:
        >>> found = long_tail_accuracy(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 2]), [500, 50, 5])
        >>> found.per_class, found.groups["few"].accuracy, round(found.balanced, 3)
        ((1.0, 1.0, 0.0), 0.0, 0.667)
    """
    counts = check_class_counts(class_counts)
    truth = check_indices("target", target, len(target), len(counts))
    guess = check_indices("predicted", predicted, len(truth), len(counts))
    images = torch.bincount(truth, minlength=len(counts)).tolist()
    correct = torch.bincount(truth[guess == truth], minlength=len(counts)).tolist()
    per_class = tuple(right / n if n else None for right, n in zip(correct, images, strict=True))
    seen = [value for value in per_class if value is not None]
    return LongTailAccuracy(
        accuracy=sum(correct) / sum(images),
        balanced=sum(seen) / len(seen),
        per_class=per_class,
        groups={
            name: _group(classes, per_class, correct, images)
            for name, classes in class_groups(class_counts, scheme).items()
        },
        imbalance=max(counts) / min(counts),
    )


def minority_angles(
    vectors: Float[Tensor, "classes dim"], groups: dict[str, tuple[int, ...]], *, centre: bool = False
) -> dict[str, Angles]:
    """Angles in degrees between class vectors, or class means, within and between groups of classes.

    Where minority classes collapse, the angles within "few" go to 0 (Fang et al., PNAS 2021, arXiv 2101.12699); at a
    simplex all are arccos(−1/(C−1)). A fixed frame keeps its vectors apart: look at the class means there.

    Args:
        vectors: the head's weight, or the class means.
        groups: of `class_groups`.
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
    for name, classes in groups.items():
        wrong = [c for c in classes if not isinstance(c, Integral) or isinstance(c, bool) or not 0 <= c < len(unit)]
        if wrong:
            raise ValueError(f"groups[{name!r}] names {wrong[0]!r}: a class is an integer in [0, {len(unit)})")
    found = {}
    for one, other in combinations_with_replacement(groups, 2):
        pairs = [(i, j) for i in groups[one] for j in groups[other] if i < j or (one != other and i != j)]
        if not pairs:
            continue
        left, right = (torch.tensor(side, device="cpu") for side in zip(*pairs, strict=True))
        angles = _angles(unit[left], unit[right])
        found[f"{one}-{other}"] = Angles(float(angles.mean()), float(angles.min()), len(pairs))
    return found


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


def check_class_counts(class_counts: Sequence[int] | Tensor) -> list[int]:
    """Training images of each class, at least one each, of two classes or more.

    Raises:
        TypeError: no integers.
        ValueError: fewer than two classes, or one without an image.
    """
    try:
        counts = list(class_counts.tolist() if isinstance(class_counts, Tensor) else class_counts)
    except TypeError:
        raise TypeError(f"class_counts must hold a whole number a class, got {class_counts!r}") from None
    if len(counts) < 2:
        raise ValueError(f"class_counts has {len(counts)} entries: a classifier needs at least 2 classes")
    return [check_count(f"class_counts[{index}]", count) for index, count in enumerate(counts)]


def _group(
    classes: tuple[int, ...], per_class: Sequence[float | None], correct: Sequence[int], images: Sequence[int]
) -> GroupAccuracy:
    seen = [value for c in classes if (value := per_class[c]) is not None]
    right, number = sum(correct[c] for c in classes), sum(images[c] for c in classes)
    return GroupAccuracy(
        classes=classes,
        accuracy=sum(seen) / len(seen) if seen else None,
        correct=right,
        images=number,
        interval=binomial_interval(right, number) if number else None,
    )


def _angles(left: Tensor, right: Tensor) -> Tensor:
    """Degrees between unit rows, exact near 0 and 180 where the arc cosine is not (Kahan)."""
    return 2 * torch.rad2deg(torch.atan2((left - right).norm(dim=1), (left + right).norm(dim=1)))
