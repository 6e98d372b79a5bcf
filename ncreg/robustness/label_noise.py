"""Effects of wrong training labels: how many are memorised or recovered, and the change of accuracy between epochs."""

from dataclasses import dataclass
from math import sqrt

from jaxtyping import Integer
from torch import Tensor

from ncreg._features import check_indices, check_labels
from ncreg._readable import readable
from ncreg.robustness.intervals import Z95, binomial_interval


@dataclass(frozen=True)
class Memorization:
    """Predictions on training images with wrong labels; None where there is no image of the kind.

    Attributes:
        num_wrong: training images whose label is wrong.
        num_right: the others.
        memorized: share of the wrongly labelled images that are predicted as their wrong label.
        memorized_interval: its Wilson 95 % interval.
        recovered: share of them that are predicted as their true class; the rest as a third class.
        recovered_interval: its Wilson 95 % interval.
        clean_accuracy: share of the rightly labelled images that are predicted as their class.
        label_accuracy: share of all training images that are predicted as labelled, as a training curve shows it.
        true_accuracy: share of all training images that are predicted as their true class.
    """

    num_wrong: int
    num_right: int
    memorized: float | None
    memorized_interval: tuple[float, float] | None
    recovered: float | None
    recovered_interval: tuple[float, float] | None
    clean_accuracy: float | None
    label_accuracy: float
    true_accuracy: float

    __str__ = readable


@dataclass(frozen=True)
class PairedAccuracy:
    """Accuracies of two classifiers, or of one at two times, on the same test images.

    Attributes:
        before: accuracy of the first, at the onset of the terminal phase, say.
        after: accuracy of the second, at the last epoch.
        change: after − before.
        interval: 95 % interval of the change, from the images on which they differ.
        gained: images that only the second classifies rightly.
        lost: images that only the first classifies rightly.
        images: test images.
    """

    before: float
    after: float
    change: float
    interval: tuple[float, float]
    gained: int
    lost: int
    images: int

    __str__ = readable


def memorization(
    predicted: Integer[Tensor, " train"], given: Integer[Tensor, " train"], true: Integer[Tensor, " train"]
) -> Memorization:
    """How a classifier treats training images whose given label is not their true one.

    Args:
        predicted: classes predicted for clean views of the training images, in eval mode.
        given: the labels that it was trained on.
        true: the labels before the noise.

    Raises:
        TypeError: no integer tensors.
        ValueError: shapes that do not fit, no image, a negative class.

    Example:
        >>> import torch
        >>> found = memorization(torch.tensor([1, 0, 2, 1]), torch.tensor([1, 1, 1, 1]), torch.tensor([0, 0, 0, 1]))
        >>> found.num_wrong, round(found.memorized, 3), round(found.recovered, 3), found.label_accuracy
        (3, 0.333, 0.333, 0.5)
    """
    label = check_labels("given", given)
    truth = check_indices("true", true, len(label))
    guess = check_indices("predicted", predicted, len(label))
    wrong = label != truth
    num_wrong, num_right = int(wrong.sum()), int((~wrong).sum())
    memorized, recovered = (int((guess == kind)[wrong].sum()) for kind in (label, truth))
    return Memorization(
        num_wrong=num_wrong,
        num_right=num_right,
        memorized=memorized / num_wrong if num_wrong else None,
        memorized_interval=binomial_interval(memorized, num_wrong) if num_wrong else None,
        recovered=recovered / num_wrong if num_wrong else None,
        recovered_interval=binomial_interval(recovered, num_wrong) if num_wrong else None,
        clean_accuracy=int((guess == truth)[~wrong].sum()) / num_right if num_right else None,
        label_accuracy=int((guess == label).sum()) / len(label),
        true_accuracy=int((guess == truth).sum()) / len(label),
    )


def paired_accuracy(
    before: Integer[Tensor, " test"], after: Integer[Tensor, " test"], target: Integer[Tensor, " test"]
) -> PairedAccuracy:
    """Change of accuracy on the same images, (gained − lost)/N, with a paired interval.

    The interval is Wald's with half an image added to each cell of the two-by-two table (Agresti & Min, Statistics in
    Medicine 2005), so that it has a width where nothing changed, cut to [−1, 1]: centre (g − l)/(N + 2), variance
    (g + l + 1 − (g − l)²/(N + 2))/(N + 2)².

    Args:
        before: classes that the first classifier predicts, at the onset of the terminal phase, say.
        after: classes that the second predicts for the same images, at the last epoch.
        target: their classes.

    Raises:
        TypeError: no integer tensors.
        ValueError: shapes that do not fit, no image, a negative class.

    Example:
        >>> import torch
        >>> target = torch.tensor([0, 1, 2, 0])
        >>> paired_accuracy(torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 2, 1]), target).change
        0.25
    """
    truth = check_labels("target", target)
    first = check_indices("before", before, len(truth)) == truth
    second = check_indices("after", after, len(truth)) == truth
    gained, lost, images = int((second & ~first).sum()), int((first & ~second).sum()), len(truth)
    padded, difference = images + 2, gained - lost
    centre = difference / padded
    half = Z95 * sqrt(gained + lost + 1 - difference**2 / padded) / padded
    return PairedAccuracy(
        before=int(first.sum()) / images,
        after=int(second.sum()) / images,
        change=difference / images,
        interval=(max(-1.0, centre - half), min(1.0, centre + half)),
        gained=gained,
        lost=lost,
        images=images,
    )
