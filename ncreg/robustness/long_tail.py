"""Accuracy of frequent and rare classes after training on a long-tailed set."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Integer
from torch import Tensor

from ncreg._checks import check_choice, check_class_counts
from ncreg._features import check_indices, check_labels
from ncreg._readable import readable
from ncreg.robustness.intervals import binomial_interval

MANY, FEW = 100, 20
"""Bounds of the field's groups: many above 100 training images, few below 20, medium from 20 to 100."""

Scheme = Literal["counts", "thirds"]
_NAMES = ("many", "medium", "few")


@dataclass(frozen=True)
class GroupAccuracy:
    """Accuracy over a group of classes.

    Attributes:
        classes: their indices.
        accuracy: mean of their class accuracies, those without a test image left out; None where none has one.
        correct: test images of the group that are classified rightly.
        images: its test images.
        interval: Wilson 95 % interval of correct/images, which is `accuracy` where classes have equally many test
            images; None without images.
    """

    classes: tuple[int, ...]
    accuracy: float | None
    correct: int
    images: int
    interval: tuple[float, float] | None

    __str__ = readable


@dataclass(frozen=True)
class LongTailAccuracy:
    """Accuracy by class and by class size.

    Attributes:
        accuracy: share of test images that are classified rightly.
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

    __str__ = readable


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
    if check_choice("scheme", scheme, ("counts", "thirds")) == "counts":
        bounds = ((MANY + 1, None), (FEW, MANY), (1, FEW - 1))
        inside = [
            tuple(c for c, n in enumerate(counts) if n >= low and (high is None or n <= high)) for low, high in bounds
        ]
        return dict(zip(_NAMES, inside, strict=True))
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
    truth = check_labels("target", target, len(counts))
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
