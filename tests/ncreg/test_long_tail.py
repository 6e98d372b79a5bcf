"""Long tails and label noise: counts by hand, scikit-learn's averages, angles of known figures, coverage."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score

from ncreg import robustness as R
from ncreg.frames import simplex_etf
from ncreg.theory import minority_collapse_threshold

# ---- groups and accuracies


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


# ---- angles


def test_a_simplex_has_one_angle_in_every_pair_of_groups():
    groups = R.class_groups([300, 200, 50, 40, 9, 8, 7])
    weight = simplex_etf(7, 10, dtype=torch.float64)
    for vectors, centre in ((weight, False), (3 * weight + 5, True)):
        found = R.minority_angles(vectors, groups, centre=centre)
        assert {pair: angles.pairs for pair, angles in found.items()} == {
            "many-many": 1,
            "many-medium": 4,
            "many-few": 6,
            "medium-medium": 1,
            "medium-few": 6,
            "few-few": 3,
        }
        for angles in found.values():
            assert angles.mean == pytest.approx(math.degrees(math.acos(-1 / 6)), abs=1e-9)
            assert angles.smallest == pytest.approx(angles.mean, abs=1e-9)


def test_collapsed_minorities_have_small_angles_told_exactly():
    """Two rare classes 1e-9 radians apart: the arc cosine of their cosine would say 0."""
    vectors = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1e-9]], dtype=torch.float64)
    found = R.minority_angles(vectors, R.class_groups([500, 5, 5]))
    assert found["few-few"].mean == pytest.approx(math.degrees(1e-9), rel=1e-6)
    assert found["many-few"].mean == pytest.approx(90)
    opposite = R.minority_angles(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]), {"many": (0,), "few": (1,)})
    assert opposite["many-few"].mean == pytest.approx(180)


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_angles_know_no_scale(size):
    groups = {"many": (0,), "few": (1, 2)}
    vectors = torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, 0.0], [0.3, 0.0, 1.0]], dtype=torch.float64)
    wanted = R.minority_angles(vectors, groups)
    for pair, angles in R.minority_angles(vectors * size, groups).items():
        assert angles.mean == pytest.approx(wanted[pair].mean, rel=1e-14)


def test_free_features_collapse_where_the_threshold_says_so():
    """Cross-entropy over free W and H, two large classes and two small: these merge where n is below the threshold."""
    counts, n = [20, 20, 4, 4], 48
    target = torch.arange(4).repeat_interleave(torch.tensor(counts))
    angles, below = [], []
    for decay in (0.2, 0.4):  # thresholds Nλ², of 1.9 and 7.7
        draw = torch.Generator().manual_seed(0)
        w = torch.randn(4, 6, generator=draw, dtype=torch.float64).requires_grad_()
        h = torch.randn(n, 6, generator=draw, dtype=torch.float64).requires_grad_()
        optimizer = torch.optim.LBFGS([w, h], 1, 1500, tolerance_change=0, line_search_fn="strong_wolfe")

        def loss(w=w, h=h, decay=decay, optimizer=optimizer):
            optimizer.zero_grad()
            value = F.cross_entropy(h @ w.T, target) + decay / 2 * (w.square().sum() + h.square().sum() / n)
            value.backward()
            return value

        optimizer.step(loss)
        found = R.minority_angles(w.detach(), {"many": (0, 1), "few": (2, 3)})
        angles.append(found["few-few"].mean)
        below.append(R.minority_collapse(counts, weight_decay=decay, gamma_decay=decay).below)
    assert angles[0] > 60 and angles[1] < 1
    assert below == [(), (2, 3)]


def test_the_threshold_is_the_theorys():
    counts = torch.tensor([900, 98, 2])
    free = R.minority_collapse(counts, weight_decay=5e-3, feature_decay=5e-4)
    assert free.threshold == minority_collapse_threshold(1000, 5e-3, 5e-4) == 2.5
    assert (free.smallest, free.below) == (2, (2,))
    batch_norm = R.minority_collapse(counts, weight_decay=5e-3, gamma_decay=0.5)
    assert batch_norm.threshold == pytest.approx(free.threshold)


# ---- label noise


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


# ---- onset against end


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


# ---- refusals

P = torch.tensor([0, 1, 2])
REFUSED = [
    (lambda: R.class_groups(None), TypeError, "class_counts=None must be a sequence of numbers"),
    (lambda: R.memorization(P, None, P), TypeError, "given must be a tensor, got NoneType"),
    (lambda: R.class_groups([5]), ValueError, "class_counts has 1 entries"),
    (lambda: R.class_groups([5, 0]), ValueError, r"class_counts\[1\]=0 must be at least 1"),
    (lambda: R.class_groups([5, 2.5]), TypeError, r"class_counts\[1\]=2.5 must be an integer"),
    (lambda: R.class_groups([5, 4, 3], "halves"), ValueError, "scheme='halves' must be one of 'counts'"),
    (lambda: R.class_groups([5, 5, 5], "thirds"), ValueError, "not all of one size"),
    (lambda: R.class_groups([5, 4], "thirds"), ValueError, "three classes or more"),
    (lambda: R.long_tail_accuracy(P, P[:2], [5, 5, 5]), ValueError, r"predicted must have shape \(2,\)"),
    (lambda: R.long_tail_accuracy(P, P, [5, 5]), ValueError, r"target must lie in \[0, 2\), got classes from 0 to 2"),
    (lambda: R.long_tail_accuracy(torch.eye(3), P, [5, 5, 5]), TypeError, r"predicted .* of logits take argmax\(1\)"),
    (lambda: R.long_tail_accuracy(P[:0], P[:0], [5, 5, 5]), ValueError, "target is empty"),
    (lambda: R.minority_angles(torch.eye(3) * 0, {"few": (0, 1)}), ValueError, r"classes \[0, 1, 2\] have length 0"),
    (lambda: R.minority_angles(torch.eye(3), {"few": (1, 3)}), ValueError, r"groups\['few'\] names 3: .* in \[0, 3\)"),
    (lambda: R.minority_angles(torch.eye(3), {"few": (2, -1)}), ValueError, r"groups\['few'\] names -1"),
    (lambda: R.minority_angles(torch.eye(3), {"few": (2, 1.0)}), ValueError, r"groups\['few'\] names 1.0"),
    (lambda: R.minority_angles(torch.eye(3), {"few": (0, 1)}, centre="no"), TypeError, "centre='no' must be True"),
    (lambda: R.minority_collapse([5, 5], weight_decay=1e-4, gamma_decay=0.0), ValueError, "gamma_decay=0.0 must"),
    (lambda: R.minority_angles(torch.eye(3) / 0, {"few": (1, 2)}), ValueError, "vectors holds NaN"),
    (lambda: R.minority_collapse([5, 5], weight_decay=1e-4), ValueError, "one of feature_decay and gamma_decay"),
    (lambda: R.minority_collapse([5, 5], weight_decay=0, gamma_decay=1), ValueError, "weight_decay=0 must be"),
    (lambda: R.memorization(P, P, P[:2]), ValueError, r"true must have shape \(3,\)"),
    (lambda: R.memorization(P.double(), P, P), TypeError, "predicted must hold integer class indices"),
    (lambda: R.memorization(P, P - 1, P), ValueError, "given must not be negative, got classes from -1 to 1"),
    (lambda: R.paired_accuracy(P, torch.eye(3), P), TypeError, r"after .* argmax\(1\)"),
    (lambda: R.paired_accuracy(P[:0], P[:0], P[:0]), ValueError, "target is empty"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("call", "error", "words"), REFUSED)
def test_refusals_name_the_argument_and_the_value(call, error, words):
    with pytest.raises(error, match=words):
        call()
