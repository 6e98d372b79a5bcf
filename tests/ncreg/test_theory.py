"""The closed forms against the problems they solve, optimised."""

import doctest
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import theory_table as table
from ncreg import theory
from ncreg.heads import LinearHead
from ncreg.norms import LastBatchNorm

ROOT = Path(__file__).parents[2]
PROBLEMS = table.problems()


def close(value, expected, tolerance=1e-12):
    return value == pytest.approx(expected, rel=tolerance, abs=tolerance)


# the optimum of every loss, found by optimising it


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: f"{problem.name} ({problem.setting})")
def test_closed_form_is_what_optimising_the_problem_finds(problem):
    assert abs(table.minimise(problem.start, starts=1) - problem.closed) < 1e-8


def test_documented_table_is_the_scripts_table():
    text = (ROOT / "docs" / "theory.md").read_text().split(table.BEGIN)[1].split(table.END)[0]
    shown = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.strip().splitlines()[2:]]
    assert [row[:2] for row in shown] == [[problem.name, problem.setting] for problem in PROBLEMS]
    for (_, _, found, closed, difference), problem in zip(shown, PROBLEMS, strict=True):
        assert float(closed) == pytest.approx(problem.closed, abs=1e-10)
        assert float(found) == pytest.approx(problem.closed, abs=1e-8)
        assert abs(float(difference)) < 1e-8


def test_documentation_runs():
    failed, tried = doctest.testfile(str(ROOT / "docs" / "theory.md"), module_relative=False)
    assert tried > 8 and not failed


def minimiser(parameters, objective):
    """Run L-BFGS to convergence on tensors that require gradients."""
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=3000,
        history_size=30,
        tolerance_grad=1e-13,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        value = objective()
        value.backward()
        return value

    optimizer.step(closure)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_cross_entropy_optimum_gives_logits_lengths_and_wrong_mass():
    weight, features, target = draw(4, 5), draw(12, 5, seed=1), torch.arange(4).repeat_interleave(3)
    best = theory.cross_entropy_optimum(4, 3, 4e-3, 1e-3)

    def objective():
        fit = F.cross_entropy(features @ weight.T, target)
        return fit + 0.5 * 4e-3 * weight.square().sum() + 0.5 * 1e-3 * features.square().sum()

    minimiser([weight, features], objective)
    logits = (features @ weight.T).detach()
    own = F.one_hot(target).bool()
    assert torch.allclose(logits[own], torch.tensor(best.own_logit, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(logits[~own], torch.tensor(best.other_logit, dtype=torch.float64), atol=1e-6)
    assert close(best.margin, best.own_logit - best.other_logit)
    assert close(float(F.cross_entropy(logits, target)), best.cross_entropy, 1e-6)
    assert close(float(1 - logits.softmax(1)[own].mean()), best.wrong_mass, 1e-6)
    assert torch.allclose(weight.detach().norm(dim=1), torch.tensor(best.weight_norm, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(
        features.detach().norm(dim=1), torch.tensor(best.feature_norm, dtype=torch.float64), atol=1e-6
    )


@pytest.mark.parametrize("gamma", ["vector", "scalar"])
def test_a_real_last_batch_norm_reaches_m_reg_with_the_lengths_the_theory_gives(gamma):
    norm = LastBatchNorm(6, gamma=gamma, dtype=torch.float64)
    weight, features, target = draw(4, 6), draw(12, 6, seed=1), torch.arange(4).repeat_interleave(3)
    best = theory.last_batch_norm_optimum(4, 4e-3, 2e-3, gamma=gamma, num_features=6)

    def objective():
        fit = F.cross_entropy(norm(1000 * features) @ weight.T, target)
        return fit + 0.5 * 4e-3 * weight.square().sum() + 0.5 * 2e-3 * norm.weight.square().sum()

    minimiser([weight, features, norm.weight], objective)
    gamma_norm = float(norm.weight.detach().norm()) * (6**0.5 if gamma == "scalar" else 1)
    assert close(float(objective().detach()), best.loss, 1e-8)
    assert close(gamma_norm, best.feature_norm, 1e-5)
    assert close(float(norm(1000 * features).detach().square().sum(1).mean()), best.feature_norm**2, 1e-5)
    assert close(float(weight.detach().norm(dim=1).mean()), best.weight_norm, 1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_deep_linear_optimum_gives_logits_and_every_layers_norm(bias):
    decays, feature_decay = [4e-3, 1e-2], 2e-3
    first, second, features = draw(5, 5), draw(4, 5, seed=1), draw(12, 5, seed=2)
    offset = torch.zeros(4, dtype=torch.float64, requires_grad=bias)
    target = torch.arange(4).repeat_interleave(3)
    best = theory.deep_linear_optimum(4, 3, decays, feature_decay, bias=bias)

    def objective():
        fit = (features @ first.T @ second.T + offset - F.one_hot(target)).square().sum() / 24
        decay = decays[0] * first.square().sum() + decays[1] * second.square().sum()
        return fit + 0.5 * (decay + feature_decay * features.square().sum())

    minimiser([first, second, features] + ([offset] if bias else []), objective)
    logits, own = (features @ first.T @ second.T + offset).detach(), F.one_hot(target).bool()
    assert close(float(objective().detach()), best.loss, 1e-9)
    assert close(float(logits[own].mean()), best.own_logit, 1e-6)
    assert close(float(logits[~own].mean()), best.other_logit, 1e-6)
    assert close(float((logits - F.one_hot(target)).square().sum() / 24), best.squared_error, 1e-6)
    assert torch.allclose(offset.detach(), torch.tensor(best.bias, dtype=torch.float64), atol=1e-6)
    norms = [float(first.detach().norm()), float(second.detach().norm())]
    assert norms == pytest.approx(best.layer_norms, rel=1e-6)
    assert close(float(second.detach().norm(dim=1).mean()), best.weight_norm, 1e-6)
    assert close(float(features.detach().norm(dim=1).mean()), best.feature_norm, 1e-6)


def test_imbalanced_squared_error_shrinks_each_class_by_its_count():
    counts, decays = [8, 4, 1], (0.02, 0.01)
    target = torch.arange(3).repeat_interleave(torch.tensor(counts))
    weight, features = draw(3, 4), draw(13, 4, seed=1)

    def objective():
        fit = (features @ weight.T - F.one_hot(target)).square().sum() / 26
        return fit + 0.5 * decays[0] * weight.square().sum() + 0.5 * decays[1] * features.square().sum()

    minimiser([weight, features], objective)
    logits = (features @ weight.T).detach()
    own = [float(logits[target == k, k].mean()) for k in range(3)]
    assert own == pytest.approx(theory.imbalanced_mse_logits(counts, *decays), abs=1e-6)
    assert theory.imbalanced_mse_logits([100, 1], 0.1, 0.1) == (0.0, 0.0)
    assert theory.imbalanced_mse_logits([3] * 5, *decays)[0] == pytest.approx(
        theory.mse_optimum(5, 3, *decays).own_logit
    )


@pytest.mark.parametrize("loss", ["cross_entropy", "cross_entropy with bias", "squared error"])
@pytest.mark.parametrize("side", [0.96, 1.04])
def test_minority_classes_merge_exactly_below_the_threshold(loss, side):
    """Three minority classes of two samples beside two of ten; the decay puts the threshold at 2·side."""
    counts = [10, 10, 2, 2, 2]
    rate = math.sqrt(2 * side) / 26
    assert close(theory.minority_collapse_threshold(26, rate * 2, rate / 2), 2 * side)
    target = torch.arange(5).repeat_interleave(torch.tensor(counts))
    head = LinearHead(5, 5, bias=loss.endswith("bias"), dtype=torch.float64)
    features = draw(26, 5, seed=3)

    def objective():
        logits = head(features)
        squared = (logits - F.one_hot(target)).square().sum() / 52
        fit = squared if loss.startswith("squared") else F.cross_entropy(logits, target)
        return fit + rate * head.weight.square().sum() + rate / 4 * features.square().sum()

    minimiser([*head.parameters(), features], objective)
    minority = head.weight.detach()[2:]
    spread = float((minority - minority.mean(0)).norm())
    assert spread < 1e-3 if side > 1 else spread > 0.03
