"""Minority classes: angles of known figures, and collapse of free features at the theory's threshold."""

import math

import pytest
import torch
import torch.nn.functional as F

from ncreg import metrics as M
from ncreg.frames import simplex_etf
from ncreg.robustness import class_groups
from ncreg.theory import minority_collapse_threshold


def test_a_simplex_has_one_angle_in_every_pair_of_groups():
    groups = class_groups([300, 200, 50, 40, 9, 8, 7])
    weight = simplex_etf(7, 10, dtype=torch.float64)
    for vectors, centre in ((weight, False), (3 * weight + 5, True)):
        found = M.minority_angles(vectors, groups, centre=centre)
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
    found = M.minority_angles(vectors, class_groups([500, 5, 5]))
    assert found["few-few"].mean == pytest.approx(math.degrees(1e-9), rel=1e-6)
    assert found["many-few"].mean == pytest.approx(90)
    opposite = M.minority_angles(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]), {"many": (0,), "few": (1,)})
    assert opposite["many-few"].mean == pytest.approx(180)


def test_angles_of_long_groups_go_by_blocks(monkeypatch):
    """Every pair of two groups that share classes, one pair almost and one exactly on the same line."""
    monkeypatch.setattr("ncreg.metrics.minority.ROWS", 4)
    monkeypatch.setattr("ncreg.metrics.minority.ENTRIES", 6)
    unit = F.normalize(torch.randn(14, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=1)
    unit[3], unit[4], unit[12] = -unit[5], F.normalize(unit[5] + 1e-7 * unit[6], dim=0), unit[9]
    groups = {"many": (8, 3, 0, 12, 5, 4, 9, 1), "few": (13, 5, 2, 11, 10, 7, 6, 4, 3)}

    def angle(i, j):
        apart, together = (float((unit[i] + sign * unit[j]).norm()) for sign in (-1, 1))
        return math.degrees(2 * math.atan2(apart, together))

    wanted = {
        "many-many": [angle(i, j) for i in groups["many"] for j in groups["many"] if i < j],
        "many-few": [angle(i, j) for i in groups["many"] for j in groups["few"] if i != j],
        "few-few": [angle(i, j) for i in groups["few"] for j in groups["few"] if i < j],
    }
    found = M.minority_angles(unit, groups)
    assert {pair: angles.pairs for pair, angles in found.items()} == {pair: len(all_) for pair, all_ in wanted.items()}
    for pair, angles in found.items():
        assert angles.mean == pytest.approx(sum(wanted[pair]) / len(wanted[pair]), rel=1e-14)
        assert angles.smallest == pytest.approx(min(wanted[pair]), rel=1e-8, abs=1e-13)


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_angles_know_no_scale(size):
    groups = {"many": (0,), "few": (1, 2)}
    vectors = torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, 0.0], [0.3, 0.0, 1.0]], dtype=torch.float64)
    wanted = M.minority_angles(vectors, groups)
    for pair, angles in M.minority_angles(vectors * size, groups).items():
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
        found = M.minority_angles(w.detach(), {"many": (0, 1), "few": (2, 3)})
        angles.append(found["few-few"].mean)
        below.append(M.minority_collapse(counts, weight_decay=decay, gamma_decay=decay).below)
    assert angles[0] > 60 and angles[1] < 1
    assert below == [(), (2, 3)]


def test_the_threshold_is_the_theorys():
    counts = torch.tensor([900, 98, 2])
    free = M.minority_collapse(counts, weight_decay=5e-3, feature_decay=5e-4)
    assert free.threshold == minority_collapse_threshold(1000, 5e-3, 5e-4) == 2.5
    assert (free.smallest, free.below) == (2, (2,))
    batch_norm = M.minority_collapse(counts, weight_decay=5e-3, gamma_decay=0.5)
    assert batch_norm.threshold == pytest.approx(free.threshold)


REFUSED = [
    (lambda: M.minority_angles(torch.eye(3) * 0, {"few": (0, 1)}), ValueError, r"classes \[0, 1, 2\] have length 0"),
    (lambda: M.minority_angles(torch.eye(3), {"few": (1, 3)}), ValueError, r"groups\['few'\] names 3: .* in \[0, 3\)"),
    (lambda: M.minority_angles(torch.eye(3), {"few": (2, -1)}), ValueError, r"groups\['few'\] names -1"),
    (lambda: M.minority_angles(torch.eye(3), {"few": (2, 1.0)}), ValueError, r"groups\['few'\] names 1.0"),
    (lambda: M.minority_angles(torch.eye(3), {"few": (0, 1)}, centre="no"), TypeError, "centre='no' must be True"),
    (lambda: M.minority_collapse([5, 5], weight_decay=1e-4, gamma_decay=0.0), ValueError, "gamma_decay=0.0 must"),
    (lambda: M.minority_angles(torch.eye(3) / 0, {"few": (1, 2)}), ValueError, "vectors holds NaN"),
    (lambda: M.minority_collapse([5, 5], weight_decay=1e-4), ValueError, "one of feature_decay and gamma_decay"),
    (lambda: M.minority_collapse([5, 5], weight_decay=0, gamma_decay=1), ValueError, "weight_decay=0 must be"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("call", "error", "words"), REFUSED)
def test_refusals_name_the_argument_and_the_value(call, error, words):
    with pytest.raises(error, match=words):
        call()
