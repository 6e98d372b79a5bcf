"""The SELI geometry against the max-margin problem it solves, and against training with less and less decay."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp

from ncreg.metrics import NeuralCollapse, seli_distance
from ncreg.theory import seli_geometry

COUNTS = [7, 5, 2, 1]


def gram(rows):
    product = rows @ rows.T
    return product / np.linalg.norm(product)


def largest_margins(counts):
    """min ½‖W‖² + ½Σ n_c‖m_c‖² with every margin at least 1: the limit of vanishing decay, by SLSQP."""
    classes, dim = len(counts), len(counts)

    def split(x):
        return x[: classes * dim].reshape(classes, dim), x[classes * dim :].reshape(classes, dim)

    def margins(x):
        weight, means = split(x)
        logits = means @ weight.T
        return (np.diag(logits)[:, None] - logits)[~np.eye(classes, dtype=bool)] - 1

    def size(x):
        weight, means = split(x)
        return (weight**2).sum() / 2 + (np.array(counts)[:, None] * means**2).sum() / 2

    start = np.random.default_rng(0).normal(size=2 * classes * dim)
    found = minimize(
        size,
        start,
        method="SLSQP",
        constraints={"type": "ineq", "fun": margins},
        options={"maxiter": 500, "ftol": 1e-12},
    )
    assert margins(found.x).min() > -1e-8
    return split(found.x)


@pytest.mark.parametrize("counts", [COUNTS, [3, 3, 3], [9, 1], [1, 4, 30]])
def test_it_solves_the_max_margin_problem(counts):
    weight, means = largest_margins(counts)
    wanted = seli_geometry(counts)
    np.testing.assert_allclose(gram(weight), wanted.weight, atol=1e-4)
    np.testing.assert_allclose(gram(means), wanted.means, atol=1e-4)
    assert seli_distance(torch.from_numpy(weight), counts, "weight").seli < 2e-4
    assert seli_distance(torch.from_numpy(means) + 7, counts, "means").seli < 2e-4


def test_equal_counts_give_the_simplex():
    simplex = (np.eye(5) - 0.2) / 2
    for matrix in seli_geometry(torch.full((5,), 40)):
        np.testing.assert_allclose(matrix, simplex, atol=1e-15)


def test_training_with_less_and_less_decay_goes_there_and_not_to_the_simplex():
    """Distance falls like 1/ln(1/λ): the line through it at λ = 1e-4 … 1e-10 ends near 0, the simplex's does not."""
    target = np.repeat(np.arange(4), COUNTS)
    rows, x, found = np.arange(len(target)), np.random.default_rng(0).normal(size=3 * (4 + len(target))), {}

    def objective(x, decay):
        weight, features = x[:12].reshape(4, 3), x[12:].reshape(-1, 3)
        logits = features @ weight.T
        normalizer = logsumexp(logits, axis=1)
        excess = np.exp(logits - normalizer[:, None])
        excess[rows, target] -= 1
        loss = (normalizer - logits[rows, target]).sum() + decay / 2 * (x @ x)
        slope = np.concatenate([(excess.T @ features).ravel(), (excess @ weight).ravel()]) + decay * x
        return loss / decay, slope / decay

    options = {"maxiter": 4000, "gtol": 1e-9, "ftol": 1e-15, "maxcor": 50}
    for power in range(1, 11):
        x = minimize(objective, x, 10.0**-power, jac=True, method="L-BFGS-B", options=options).x
        weight, features = x[:12].reshape(4, 3), x[12:].reshape(-1, 3)
        means = np.stack([features[target == c].mean(0) for c in range(4)])
        found[power] = [
            seli_distance(torch.from_numpy(vectors), COUNTS, role)
            for vectors, role in ((weight, "weight"), (means, "means"))
        ]
    for which in (0, 1):
        seli = [distances[which].seli for distances in found.values()]
        assert all(later < earlier for earlier, later in zip(seli, seli[1:], strict=False)) and seli[-1] < 0.04
        late = range(4, 11)
        ends = [
            np.polyfit([1 / power for power in late], [getattr(found[power][which], goal) for power in late], 1)[1]
            for goal in ("seli", "simplex")
        ]
        assert abs(ends[0]) < 0.01 and ends[1] > 0.25


def test_the_distance_to_the_simplex_is_that_of_the_metric():
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(6, 4, bias=False)
    metric = NeuralCollapse(4, 6, classifier=head)
    metric.update(torch.randn(40, 6, generator=generator), torch.arange(40) % 4)
    got = seli_distance(head.weight, COUNTS, "weight").simplex
    assert got == pytest.approx(float(metric.compute()["nc2_weight_gram"]), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_rotation_and_scale_do_not_matter(scale):
    rows = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    turned = scale * rows @ torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    for role in ("weight", "means"):
        one, other = seli_distance(rows, COUNTS, role), seli_distance(turned, COUNTS, role)
        assert (other.seli, other.simplex) == pytest.approx((one.seli, one.simplex), rel=1e-12)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: seli_geometry([5]), ValueError, "class_counts has 1 entries"),
        (lambda: seli_geometry([5, 0]), ValueError, r"class_counts\[1\]=0 must be at least 1"),
        (lambda: seli_distance(torch.eye(3), [1, 2], "weight"), ValueError, "3 rows where class_counts names 2"),
        (lambda: seli_distance(torch.ones(2, 3), [1, 2], "means"), ValueError, "vectors as means have length 0"),
        (lambda: seli_distance(torch.eye(2), [1, 2], "head"), ValueError, "role='head' must be one of"),
        (lambda: seli_distance(torch.eye(2) / 0, [1, 2], "weight"), ValueError, "NaN or infinite"),
        (lambda: seli_distance([[1.0]], [1, 2], "weight"), TypeError, "vectors must be a tensor"),
    ],
)
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call()
