"""Label noise and paired accuracies: counts by hand, and coverage of the intervals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ncreg import robustness as R


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=50))
def test_memorisation_by_counting(rows):
    predicted, given_label, true = (torch.tensor(side) for side in zip(*rows, strict=True))
    found = R.memorization(predicted, given_label, true)
    wrong = [(p, g, t) for p, g, t in rows if g != t]
    right = [(p, g) for p, g, t in rows if g == t]
    assert (found.num_wrong, found.num_right) == (len(wrong), len(right))
    if wrong:
        assert found.memorized == np.mean([p == g for p, g, _ in wrong])
        assert found.recovered == np.mean([p == t for p, _, t in wrong])
        assert found.memorized + found.recovered <= 1
        assert found.memorized_interval == R.binomial_interval(sum(p == g for p, g, _ in wrong), len(wrong))
        assert found.recovered_interval == R.binomial_interval(sum(p == t for p, _, t in wrong), len(wrong))
    else:
        assert found.memorized is found.recovered is found.memorized_interval is None
    assert found.clean_accuracy == (np.mean([p == g for p, g in right]) if right else None)
    assert found.label_accuracy == np.mean([p == g for p, g, _ in rows])
    assert found.true_accuracy == np.mean([p == t for p, _, t in rows])


def test_a_network_that_memorises_and_one_that_sees_through():
    draw = torch.Generator().manual_seed(0)
    true = torch.randint(0, 5, (400,), generator=draw)
    given_label = torch.where(torch.rand(400, generator=draw) < 0.4, (true + 2) % 5, true)
    by_heart, sees = R.memorization(given_label, given_label, true), R.memorization(true, given_label, true)
    assert (by_heart.memorized, by_heart.recovered, by_heart.label_accuracy) == (1, 0, 1)
    assert (sees.memorized, sees.recovered, sees.true_accuracy, sees.clean_accuracy) == (0, 1, 1, 1)
    assert by_heart.true_accuracy == sees.label_accuracy == 1 - by_heart.num_wrong / 400


def test_paired_change_from_the_table():
    target = torch.zeros(100, dtype=torch.long)
    before, after = target.clone(), target.clone()
    before[:15] = 1  # 15 wrong at first
    after[10:25] = 1  # 5 of them stay wrong, 10 are gained, 10 lost
    after[20:25] = 0
    found = R.paired_accuracy(before, after, target)
    assert (found.before, found.after, found.gained, found.lost, found.images) == (0.85, 0.9, 10, 5, 100)
    assert found.change == pytest.approx(0.05)
    b, c, n = 10.5, 5.5, 102  # Agresti and Min: half an image in each cell
    half = 1.959963984540054 * math.sqrt(b + c - (b - c) ** 2 / n) / n
    assert found.interval == pytest.approx(((b - c) / n - half, (b - c) / n + half))
    same = R.paired_accuracy(before, before, target)
    assert same.change == 0 and same.interval[0] < 0 < same.interval[1]


def test_paired_intervals_cover_the_truth():
    draw, held = np.random.default_rng(0), 0
    for _ in range(400):
        kind = torch.from_numpy(draw.choice(4, size=80, p=[0.75, 0.12, 0.05, 0.08]))  # both, gained, lost, neither
        target = torch.zeros(80, dtype=torch.long)
        before, after = ((kind == 1) | (kind == 3)).long(), ((kind == 2) | (kind == 3)).long()
        low, high = R.paired_accuracy(before, after, target).interval
        held += low <= 0.12 - 0.05 <= high
    assert 0.92 < held / 400 < 0.985


P = torch.tensor([0, 1, 2])
REFUSED = [
    (lambda: R.memorization(P, None, P), TypeError, "given must be a tensor, got NoneType"),
    (lambda: R.memorization(P, P, P[:2]), ValueError, r"true must have shape \(3,\)"),
    (lambda: R.memorization(P.double(), P, P), TypeError, "predicted must hold integer class indices"),
    (lambda: R.memorization(P, P - 1, P), ValueError, "given must not be negative, got classes from -1 to 1"),
    (lambda: R.memorization(P[0], P[0], P[0]), ValueError, r"given must have shape \(1,\), .* got \(\)"),
    (lambda: R.paired_accuracy(P, P, None), TypeError, "target must be a tensor, got NoneType"),
    (lambda: R.paired_accuracy(P[0], P[0], P[0]), ValueError, r"target must have shape \(1,\), .* got \(\)"),
    (lambda: R.paired_accuracy(P, torch.eye(3), P), TypeError, r"after .* argmax\(1\)"),
    (lambda: R.paired_accuracy(P[:0], P[:0], P[:0]), ValueError, "target is empty"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("call", "error", "words"), REFUSED)
def test_refusals_name_the_argument_and_the_value(call, error, words):
    with pytest.raises(error, match=words):
        call()
