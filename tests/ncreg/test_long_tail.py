"""Long tails: groups and accuracies by counts by hand and by scikit-learn's averages."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score

from ncreg import robustness as R


def test_the_fields_bounds_are_above_100_and_below_20():
    found = R.class_groups(torch.tensor([101, 100, 20, 19, 1, 5000]))
    assert found == {"many": (0, 5), "medium": (1, 2), "few": (3, 4)}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=3, max_size=12).filter(lambda counts: len(set(counts)) > 1))
def test_thirds_are_as_equal_as_can_be_and_in_order(counts):
    found = R.class_groups(counts, "thirds")
    sizes = [len(group) for group in found.values()]
    assert sum(sizes) == len(counts) and max(sizes) - min(sizes) <= 1
    assert sorted(sum(found.values(), ())) == list(range(len(counts)))
    assert min(counts[c] for c in found["many"]) >= max(counts[c] for c in found["medium"])
    assert min(counts[c] for c in found["medium"]) >= max(counts[c] for c in found["few"])


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint8, torch.int8])
def test_labels_of_any_integers_count_alike(dtype):
    """numpy's uint16, as files of many classes have it, came from torch with an error that named no argument."""
    target, predicted = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2])
    counts = [500, 90, 3]
    assert R.long_tail_accuracy(predicted.to(dtype), target.to(dtype), counts) == R.long_tail_accuracy(
        predicted, target, counts
    )
    with pytest.raises(ValueError, match="got classes from 0 to 2"):
        R.long_tail_accuracy(predicted, target.to(dtype), counts[:2])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_accuracies_are_sklearns(pairs):
    target, predicted = (torch.tensor(side) for side in zip(*pairs, strict=True))
    found = R.long_tail_accuracy(predicted, target, [500, 90, 19, 3])
    assert math.isclose(found.accuracy, np.mean([a == b for a, b in pairs]))
    present = sorted(set(target.tolist()))
    per_class = {c: np.mean([b == a for a, b in pairs if a == c]) for c in present}
    assert math.isclose(found.balanced, np.mean(list(per_class.values())))
    if len(present) > 1 and set(predicted.tolist()) <= set(present):  # it warns otherwise
        assert math.isclose(found.balanced, balanced_accuracy_score(target, predicted))
    assert found.per_class == tuple(per_class.get(c) for c in range(4))
    for name, classes in {"many": [0], "medium": [1], "few": [2, 3]}.items():
        group = found.groups[name]
        seen = [per_class[c] for c in classes if c in per_class]
        assert group.accuracy == (pytest.approx(np.mean(seen)) if seen else None)
        images = [(a, b) for a, b in pairs if a in classes]
        assert (group.images, group.correct) == (len(images), sum(a == b for a, b in images))
        assert group.interval == (R.binomial_interval(group.correct, group.images) if images else None)
    assert found.imbalance == 500 / 3


def test_an_empty_group_is_none_and_a_classifier_of_majorities_shows():
    target = torch.arange(4).repeat(10)
    found = R.long_tail_accuracy(target * 0, target, [900, 300, 5, 2])
    assert found.groups["medium"].accuracy is None and found.groups["medium"].interval is None
    assert (found.groups["many"].accuracy, found.groups["few"].accuracy, found.balanced) == (0.5, 0.0, 0.25)


P = torch.tensor([0, 1, 2])
REFUSED = [
    (lambda: R.class_groups(None), TypeError, "class_counts=None must be a sequence of numbers"),
    (lambda: R.class_groups([5]), ValueError, "class_counts has 1 entries"),
    (lambda: R.class_groups([5, 0]), ValueError, r"class_counts\[1\]=0 must be at least 1"),
    (lambda: R.class_groups([5, 2.5]), TypeError, r"class_counts\[1\]=2.5 must be an integer"),
    (lambda: R.class_groups([5, 4, 3], "halves"), ValueError, "scheme='halves' must be one of 'counts'"),
    (lambda: R.class_groups([5, 5, 5], "thirds"), ValueError, "not all of one size"),
    (lambda: R.class_groups([5, 4], "thirds"), ValueError, "three classes or more"),
    (lambda: R.long_tail_accuracy(P, P[:2], [5, 5, 5]), ValueError, r"predicted must have shape \(2,\)"),
    (lambda: R.long_tail_accuracy(P, P, [5, 5]), ValueError, r"target must lie in \[0, 2\), got classes from 0 to 2"),
    (lambda: R.long_tail_accuracy(torch.eye(3), P, [5, 5, 5]), TypeError, r"predicted .* of logits take argmax\(1\)"),
    (lambda: R.long_tail_accuracy(P, None, [5, 5, 5]), TypeError, "target must be a tensor, got NoneType"),
    (lambda: R.long_tail_accuracy(P[0], P[0], [5, 5]), ValueError, r"target must have shape \(1,\), .* got \(\)"),
    (lambda: R.long_tail_accuracy(P[:0], P[:0], [5, 5, 5]), ValueError, "target is empty"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("call", "error", "words"), REFUSED)
def test_refusals_name_the_argument_and_the_value(call, error, words):
    with pytest.raises(error, match=words):
        call()
