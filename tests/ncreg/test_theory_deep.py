"""Deep networks and ReLU: logits of any shape, when lower rank wins, orthogonal frames, SupCon over starts."""

import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks.theory_table import behind_relu, supcon_behind_relu
from ncreg import functional, theory
from ncreg.frames import orthoplex, simplex_etf

EXACT = {"dtype": torch.float64}


def draw(seed, *size):
    return torch.randn(*size, **EXACT, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def minimise(parameters, objective, iterations=3000):
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=iterations,
        history_size=30,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        value = objective()
        value.backward()
        return value

    optimizer.step(closure)
    return float(objective().detach())


def free_factors(classes, samples, decays, *, seed, width):
    """Cross-entropy and the decay of every factor; features are the last of them."""
    layers = [draw(seed + k, width if k < len(decays) - 2 else classes, width) for k in range(len(decays) - 1)]
    features, target = draw(seed + 50, width, classes * samples), torch.arange(classes).repeat_interleave(samples)

    def objective():
        hidden = features
        for layer in layers:
            hidden = layer @ hidden
        decay = sum(rate * part.square().sum() for rate, part in zip(decays, [*layers, features], strict=True))
        return F.cross_entropy(hidden.T, target) + 0.5 * decay

    return minimise([*layers, features], objective)


@pytest.mark.parametrize(
    ("classes", "samples", "decays"), [(5, 3, (5e-3, 2e-3)), (10, 40, (1e-4, 3e-6)), (2, 1, (0.1, 0.1))]
)
def test_one_layer_and_the_simplex_are_the_known_optimum(classes, samples, decays):
    code = simplex_etf(classes, classes, **EXACT)
    for factor in (1.0, 1e-5, 3e4):  # the scale of the shape is no matter
        best = theory.deep_cross_entropy_optimum(factor * code @ code.T, samples, [decays[0]], decays[1])
        known = theory.cross_entropy_optimum(classes, samples, *decays)
        assert best.loss == pytest.approx(known.loss, rel=1e-12)
        assert best.scale * factor * classes / (classes - 1) == pytest.approx(known.margin, rel=1e-5)
        assert best.rank == classes - 1


def test_the_decay_of_a_product_is_its_schatten_quasi_norm():
    """Two layers and features held to any product at all: the penalty that keeps them there is let grow."""
    shape = draw(3, 4, 4).detach()
    decays = [4e-3, 1e-2, 2e-3]
    best = theory.deep_cross_entropy_optimum(shape, 1, decays[:2], decays[2])
    product = 0.7 * shape
    parts = [draw(k, 4, 4) for k in range(3)]

    def held(stiffness):
        def objective():
            decay = sum(rate * part.square().sum() for rate, part in zip(decays, parts, strict=True))
            return 0.5 * decay + stiffness * (parts[0] @ parts[1] @ parts[2] - product).square().sum()

        return minimise(parts, objective)

    found = [held(stiffness) for stiffness in (1e2, 1e5)][-1]
    singular = torch.linalg.svdvals(product)
    closed = 1.5 * math.prod(decays) ** (1 / 3) * float((singular ** (2 / 3)).sum())
    assert found == pytest.approx(closed, rel=1e-5)
    scales = torch.linspace(0, 60, 6_001, **EXACT)  # the minimum over s by brute force
    fits = torch.stack([F.cross_entropy(s * shape, torch.arange(4)) for s in scales])
    values = fits + closed / 0.7 ** (2 / 3) * scales ** (2 / 3)
    assert best.loss <= float(values.min()) + 1e-12 and best.loss == pytest.approx(float(values.min()), abs=1e-5)


def test_free_factors_fall_below_the_simplex_where_theory_says_so():
    """Six classes, rank 5 against 3: at one layer nothing beats the simplex, at four free training does."""
    simplex, code = (make(6, 6, **EXACT) for make in (simplex_etf, orthoplex))
    for layers, lower_rank_wins in ((1, False), (4, True)):
        decays = [5e-3] * (layers + 1)
        losses = [theory.deep_cross_entropy_optimum(w @ w.T, 1, decays[:-1], decays[-1]).loss for w in (simplex, code)]
        assert (losses[1] < losses[0]) == lower_rank_wins
        found = min(free_factors(6, 1, decays, seed=seed, width=8) for seed in (0, 100, 200, 300))
        assert (found < losses[0] - 1e-3) == lower_rank_wins
        if not lower_rank_wins:
            assert found == pytest.approx(losses[0], abs=1e-8)


def test_strong_decay_leaves_nothing_to_learn():
    code = simplex_etf(4, 3, **EXACT)
    best = theory.deep_cross_entropy_optimum(code @ code.T, 2, [0.5, 0.5], 0.5)
    assert best.loss == math.log(4) == best.cross_entropy and best.scale == 0
    wrong = theory.deep_cross_entropy_optimum(-code @ code.T, 2, [1e-3], 1e-3)  # a shape that points away
    assert wrong.scale == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.ones(2, 3), 1, [1e-3], 1e-3), r"shape of size \(2, 3\) must be \(C, C\)"),
        ((torch.zeros(3, 3), 1, [1e-3], 1e-3), "not all 0"),
        ((torch.full((3, 3), math.nan), 1, [1e-3], 1e-3), "finite"),
        ((torch.eye(3), 1, [], 1e-3), "weight_decays is empty"),
        ((torch.eye(3), 0, [1e-3], 1e-3), "samples_per_class=0"),
        ((torch.eye(3), 1, [-1.0], 1e-3), r"weight_decays\[0\]=-1.0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_has_no_optimum_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        theory.deep_cross_entropy_optimum(*arguments)


@pytest.mark.parametrize("rows", [torch.ones(3, 3), torch.tensor([[1.0, 1, 1], [2, 2, 2], [0, 0, 0]])])
def test_logits_that_tell_no_classes_apart_are_best_at_0(rows):
    found = theory.deep_cross_entropy_optimum(rows, 1, [1e-3], 1e-3)
    assert (found.scale, found.loss) == (0, math.log(3))
    assert found.cross_entropy == pytest.approx(math.log(3), rel=1e-14)


def test_the_default_device_plays_no_part():
    found = theory.deep_cross_entropy_optimum(torch.eye(3), 1, [1e-3], 1e-3)
    with torch.device("meta"):
        assert theory.deep_cross_entropy_optimum(torch.eye(3, device="cpu"), 1, [1e-3], 1e-3) == found


def test_behind_a_relu_the_hidden_class_means_are_an_orthogonal_frame():
    problem = behind_relu((1e-2, 5e-3), 5e-3)
    (inner, outer, features), objective = problem.start(0)
    assert minimise([inner, outer, features], objective) == pytest.approx(problem.closed, abs=1e-8)
    hidden = (features @ inner.T).relu().detach()[::3]
    cosines = F.normalize(hidden, dim=1) @ F.normalize(hidden, dim=1).T
    torch.testing.assert_close(cosines, torch.eye(3, **EXACT), atol=1e-3, rtol=0)
    best = theory.relu_mse_optimum(3, 3, [1e-2, 5e-3], 5e-3)
    torch.testing.assert_close(hidden @ outer.T.detach(), best.own_logit * torch.eye(3, **EXACT), atol=1e-3, rtol=0)


def test_relu_optimum_is_for_two_layers():
    with pytest.raises(ValueError, match="two in all"):
        theory.relu_mse_optimum(3, 3, [1e-2], 1e-2)


def gram_after(counts, seed):
    """The cosines of free features of any sign after SupCon."""
    target = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    features = draw(seed, len(target), 6)
    minimise([features], lambda: functional.supcon_loss(features, target, temperature=0.5))
    unit = F.normalize(features.detach(), dim=1)
    return unit @ unit.T


@pytest.mark.parametrize("counts", [[3, 3, 3], [5, 3, 2], [8, 2, 2]])
def test_supcon_ends_in_one_gram_matrix_from_every_start(counts):
    first, *others = [gram_after(counts, seed) for seed in range(4)]
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-6, rtol=0)
    classes = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    within = first[classes[:, None] == classes]
    torch.testing.assert_close(within, torch.ones_like(within), atol=1e-6, rtol=0)
    apart = first[classes[:, None] != classes]
    off_simplex = float((apart + 1 / (len(counts) - 1)).abs().max())
    assert off_simplex < 1e-6 if len(set(counts)) == 1 else off_simplex > 0.05


def test_supcon_behind_a_relu_is_orthogonal_whatever_the_counts():
    problem = supcon_behind_relu([8, 2, 2], 0.3)
    (features,), objective = problem.start(1)
    assert minimise([features], objective) == pytest.approx(problem.closed, abs=1e-9)
    unit = F.normalize(features.detach().relu(), dim=1)
    assert float((unit[:8] @ unit[8:].T).max()) < 1e-6
    # no draw of nowhere negative features is below it
    target = torch.arange(3).repeat_interleave(torch.tensor([8, 2, 2]))
    for seed in range(20):
        assert float(functional.supcon_loss(draw(seed, 12, 5).detach().abs(), target, temperature=0.3)) > problem.closed


@pytest.mark.parametrize("counts", [[3], [3, 1], [3, 0]])
def test_supcon_needs_a_positive_in_every_class(counts):
    with pytest.raises(ValueError, match="class"):
        theory.supcon_relu_optimum(counts, 0.5)
