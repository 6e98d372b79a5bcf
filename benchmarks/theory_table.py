"""Loss × (optimum reached numerically, closed form, difference): the table of docs/theory.md, and its test.

Every row optimises the actual problem in float64 with L-BFGS from random starts, through this library's own heads,
norms and losses, and compares the best value found with the closed form of `ncreg.theory`.

    python benchmarks/theory_table.py            prints the table
    python benchmarks/theory_table.py --write    puts it into docs/theory.md
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncreg import functional, theory
from ncreg.frames import orthoplex, simplex_etf
from ncreg.heads import CosineHead, ETFHead, LinearHead
from ncreg.norms import LastBatchNorm

DOCS = Path(__file__).parents[1] / "docs" / "theory.md"
BEGIN, END = "<!-- theory table: begin -->", "<!-- theory table: end -->"
CLASSES, SAMPLES, DIM = 5, 3, 7

Objective = Callable[[], Tensor]
Start = tuple[Sequence[Tensor], Objective]


@dataclass(frozen=True)
class Problem:
    """One row: what is minimised, in which setting, what the theory says, and how to start from a seed."""

    name: str
    setting: str
    closed: float
    start: Callable[[int], Start]


def minimise(start: Callable[[int], Start], starts: int = 3, iterations: int = 2000) -> float:
    """The smallest value that L-BFGS reaches from several random starts."""
    best = math.inf
    for seed in range(starts):
        parameters, objective = start(seed)
        optimizer = torch.optim.LBFGS(
            list(parameters),
            max_iter=iterations,
            history_size=30,
            tolerance_grad=1e-12,
            tolerance_change=1e-16,
            line_search_fn="strong_wolfe",
        )

        def closure(optimizer: torch.optim.Optimizer = optimizer, objective: Objective = objective) -> Tensor:
            optimizer.zero_grad()
            value = objective()
            value.backward()
            return value

        optimizer.step(closure)
        best = min(best, float(objective().detach()))
    return best


def _draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def _labels(classes: int = CLASSES, samples: int = SAMPLES) -> Tensor:
    return torch.arange(classes).repeat_interleave(samples)


def _linear(seed: int, dim: int = DIM, classes: int = CLASSES, *, bias: bool = False) -> LinearHead:
    head = LinearHead(dim, classes, bias=bias, seed=seed, dtype=torch.float64)
    nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(seed + 100))
    return head


def free_features(classes: int, samples: int, dim: int, decays: tuple[float, float]) -> Problem:
    """Cross-entropy with decay on a learned head and on free features."""

    def start(seed: int) -> Start:
        head, features, target = (
            _linear(seed, dim, classes),
            _draw(seed, classes * samples, dim),
            _labels(classes, samples),
        )

        def objective() -> Tensor:
            fit = F.cross_entropy(head(features), target)
            return fit + 0.5 * decays[0] * head.weight.square().sum() + 0.5 * decays[1] * features.square().sum()

        return [*head.parameters(), features], objective

    closed = theory.cross_entropy_optimum(classes, samples, *decays).loss
    setting = f"C={classes}, n={samples}, d={dim}, λ_W={decays[0]:g}, λ_H={decays[1]:g}"
    return Problem("cross-entropy, free features", setting, closed, start)


def layer_peeled(energies: tuple[float, float]) -> Problem:
    """Cross-entropy with a budget for class vectors and features, kept by projection."""

    def project(free: Tensor, energy: float) -> Tensor:
        budget = math.sqrt(energy * len(free))
        return free * (budget / free.norm().clamp_min(budget))

    def start(seed: int) -> Start:
        weight, features, target = _draw(seed, CLASSES, DIM), _draw(seed + 1, CLASSES * SAMPLES, DIM), _labels()

        def objective() -> Tensor:
            return F.cross_entropy(project(features, energies[1]) @ project(weight, energies[0]).T, target)

        return [weight, features], objective

    closed = theory.layer_peeled_optimum(CLASSES, *energies).loss
    return Problem("cross-entropy, layer-peeled", f"C=5, E_W={energies[0]:g}, E_H={energies[1]:g}", closed, start)


def on_head(name: str, make: Callable[[int], ETFHead | CosineHead]) -> Problem:
    """Cross-entropy of a head on unit features: the floor that its scale sets."""

    def start(seed: int) -> Start:
        head, features, target = make(seed), _draw(seed, CLASSES * SAMPLES, DIM), _labels()
        return [*head.parameters(), features], lambda: F.cross_entropy(head(features), target)

    scale = make(0).scale
    closed = theory.minimal_cross_entropy(scale, CLASSES)
    return Problem(f"cross-entropy, {name}", f"C=5, scale={scale:.4g}", closed, start)


def behind_batch_norm(
    classes: int, decays: tuple[float, float], gamma: Literal["vector", "scalar"] = "vector", dim: int = DIM
) -> Problem:
    """Cross-entropy with decay on a learned head and on the γ of a real, full-batch LastBatchNorm."""

    def start(seed: int) -> Start:
        norm = LastBatchNorm(dim, gamma=gamma, dtype=torch.float64)
        factors = norm.weight
        assert factors is not None
        head, features, target = _linear(seed, dim, classes), _draw(seed, classes * 2, dim), _labels(classes, 2)

        def objective() -> Tensor:
            # the norm's eps costs 1e-7 at unit spread, and nothing at 1000
            fit = F.cross_entropy(head(norm(1000 * features)), target)
            decay = decays[0] * head.weight.square().sum() + decays[1] * factors.square().sum()
            return fit + 0.5 * decay

        return [*head.parameters(), *norm.parameters(), features], objective

    best = theory.last_batch_norm_optimum(classes, *decays, gamma=gamma, num_features=dim)
    setting = f"C={classes}, d={dim}, λ_W={decays[0]:g}, λ_γ={decays[1]:g}, {gamma} γ"
    return Problem("cross-entropy, LastBatchNorm", setting, best.loss, start)


def squared_error(layer_decays: list[float], feature_decay: float, *, bias: bool = False) -> Problem:
    """Squared error on one-hot targets through linear layers, all decayed but the bias."""

    def start(seed: int) -> Start:
        head, target = _linear(seed, bias=bias), _labels()
        inner = [_draw(seed + 10 * k, DIM, DIM) for k in range(1, len(layer_decays))]
        features = _draw(seed, CLASSES * SAMPLES, DIM)

        def objective() -> Tensor:
            hidden = features
            for layer in inner:
                hidden = hidden @ layer.T
            fit = functional.mse_one_hot_loss(head(hidden), target)
            layers = [*inner, head.weight]
            decay = sum(rate * layer.square().sum() for rate, layer in zip(layer_decays, layers, strict=True))
            return fit + 0.5 * (decay + feature_decay * features.square().sum())

        return [*head.parameters(), *inner, features], objective

    closed = theory.deep_linear_optimum(CLASSES, SAMPLES, layer_decays, feature_decay, bias=bias).loss
    depth = "" if len(layer_decays) == 1 else f", {len(layer_decays)} linear layers"
    rates = ", ".join(f"{rate:g}" for rate in layer_decays)
    setting = f"C=5, n=3, λ_W={rates}, λ_H={feature_decay:g}, {'with' if bias else 'no'} bias"
    return Problem(f"squared error{depth}", setting, closed, start)


def on_a_ray(name: str, shape: Tensor, decays: list[float]) -> Problem:
    """Cross-entropy through linear factors whose product is a multiple of a shape, kept so by the last of them."""
    left, values, right = torch.linalg.svd(shape)
    rank = int((values > 1e-9 * values[0]).sum())
    columns, rows = left[:, :rank] * values[:rank], right[:rank]

    def start(seed: int) -> Start:
        inner = [_draw(seed + 10 * k, rank, rank) for k in range(len(decays) - 1)]
        scale = torch.zeros((), dtype=torch.float64, requires_grad=True)

        def objective() -> Tensor:
            mapped = torch.eye(rank, dtype=torch.float64)
            for factor in inner:
                mapped = factor @ mapped
            last = scale.exp() * columns @ torch.linalg.inv(mapped)
            fit = F.cross_entropy(last @ mapped @ rows, torch.arange(len(shape)))
            decay = SAMPLES * decays[-1] * (inner[0] @ rows).square().sum() + decays[-2] * last.square().sum()
            for rate, factor in zip(decays[:-2], inner[1:], strict=True):
                decay = decay + rate * factor.square().sum()
            return fit + 0.5 * decay

        return [*inner, scale], objective

    closed = theory.deep_cross_entropy_optimum(shape, SAMPLES, decays[:-1], decays[-1]).loss
    rates = ", ".join(f"{rate:g}" for rate in decays[:-1])
    setting = f"C={len(shape)}, n=3, rank {rank}, λ_W={rates}, λ_H={decays[-1]:g}"
    return Problem(f"cross-entropy, {len(decays) - 1} linear layers, {name}", setting, closed, start)


def behind_relu(layer_decays: tuple[float, float], feature_decay: float) -> Problem:
    """Squared error on one-hot targets through one hidden layer with ReLU, from starts near a unit a class.

    From elsewhere units die, and L-BFGS stops at local minima or, at the kink, 1e-7 above the optimum.
    """
    classes, hidden = 3, 2 * DIM

    def near(seed: int, rows: Tensor) -> Tensor:
        return (rows.double() + 0.3 * _draw(seed, *rows.shape).detach()).requires_grad_()

    def start(seed: int) -> Start:
        target = _labels(classes)
        inner, outer = near(seed + 40, torch.eye(hidden, DIM)), _draw(seed + 41, classes, hidden)
        features = near(seed + 42, torch.eye(classes, DIM)[target])

        def objective() -> Tensor:
            fit = functional.mse_one_hot_loss((features @ inner.T).relu() @ outer.T, target)
            decay = layer_decays[0] * inner.square().sum() + layer_decays[1] * outer.square().sum()
            return fit + 0.5 * (decay + feature_decay * features.square().sum())

        return [inner, outer, features], objective

    closed = theory.relu_mse_optimum(classes, SAMPLES, list(layer_decays), feature_decay).loss
    setting = f"C=3, n=3, λ_W={layer_decays[0]:g}, {layer_decays[1]:g}, λ_H={feature_decay:g}, no bias"
    return Problem("squared error, 2 layers with ReLU", setting, closed, start)


def supcon_behind_relu(counts: list[int], temperature: float) -> Problem:
    """SupCon of features behind a ReLU, balanced or not, from features that start above 0."""
    target = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))

    def start(seed: int) -> Start:
        features = _draw(seed, len(target), DIM).detach().abs().requires_grad_()
        return [features], lambda: functional.supcon_loss(features.relu(), target, temperature=temperature)

    closed = theory.supcon_relu_optimum(counts, temperature)
    return Problem("SupCon behind ReLU", f"counts {counts}, τ={temperature:g}", closed, start)


def on_sphere(
    name: str, setting: str, closed: float, loss: Callable[..., Tensor], *, prototypes: bool = False
) -> Problem:
    """A loss that looks at directions alone: of features, or of features and learned class vectors."""

    def start(seed: int) -> Start:
        features, target = _draw(seed, CLASSES * SAMPLES, DIM), _labels()
        if not prototypes:
            return [features], lambda: loss(features, target)
        weight = _draw(seed + 1, CLASSES, DIM)
        return [features, weight], lambda: loss(features, target, weight)

    return Problem(name, setting, closed, start)


def dot_regression(length: float, feature_decay: float) -> Problem:
    """Dot regression of free lengths to a fixed simplex, with decay on the features."""
    frame = simplex_etf(CLASSES, DIM, dtype=torch.float64)

    def start(seed: int) -> Start:
        features, target = _draw(seed, CLASSES * SAMPLES, DIM), _labels()

        def objective() -> Tensor:
            fit = functional.dot_regression_loss(features, target, frame, normalize=False, length=length)
            return fit + 0.5 * feature_decay * features.square().sum()

        return [features], objective

    closed = theory.dot_regression_optimum(CLASSES * SAMPLES, length, 1.0, feature_decay).loss
    return Problem("dot regression, free lengths", f"C=5, ℓ={length:g}, λ_H={feature_decay:g}", closed, start)


def free_logits(coefficient: float, *, binary: bool = False) -> Problem:
    """Cross-entropy with the spectral-decoupling penalty on free logits, or on one free logit."""
    target = torch.arange(2) if binary else _labels()

    def start(seed: int) -> Start:
        logits = _draw(seed, len(target), 1 if binary else CLASSES)

        def one_logit() -> Tensor:
            signed = logits[:, 0] * (2 * target - 1)
            return F.softplus(-signed).mean() + 0.5 * coefficient * logits.square().mean()

        if binary:
            return [logits], one_logit
        return [logits], lambda: functional.spectral_decoupling_loss(logits, target, coefficient=coefficient)

    if binary:
        closed = theory.binary_spectral_decoupling_optimum(coefficient).loss
        return Problem("spectral decoupling, one logit", f"λ={coefficient:g}", closed, start)
    closed = theory.spectral_decoupling_optimum(CLASSES, coefficient).loss
    return Problem("spectral decoupling", f"C=5, λ={coefficient:g}", closed, start)


def problems() -> list[Problem]:
    """All rows of the table."""
    batch, sizes = f"C={CLASSES}, n={SAMPLES}", (CLASSES, SAMPLES)
    frame = simplex_etf(CLASSES, DIM, dtype=torch.float64)
    simplex, code = (make(6, DIM, dtype=torch.float64) for make in (simplex_etf, orthoplex))
    return [
        free_features(5, 3, 7, (5e-3, 2e-3)),
        free_features(5, 3, 4, (5e-3, 2e-3)),
        free_features(5, 3, 7, (0.2, 0.1)),
        layer_peeled((2.0, 3.0)),
        on_head("ETFHead", lambda seed: ETFHead(DIM, CLASSES, dtype=torch.float64)),
        on_head("CosineHead", lambda seed: CosineHead(DIM, CLASSES, scale=3.0, seed=seed, dtype=torch.float64)),
        behind_batch_norm(5, (5e-3, 5e-3)),
        behind_batch_norm(5, (2e-3, 1e-2)),
        behind_batch_norm(5, (5e-3, 5e-3), "scalar"),
        behind_batch_norm(10, (5e-4, 5e-4), dim=20),
        squared_error([1e-2], 5e-3),
        squared_error([1e-2], 5e-3, bias=True),
        squared_error([1e-2, 1e-2], 1e-2),
        squared_error([1e-2, 5e-3, 2e-2], 1e-2, bias=True),
        behind_relu((1e-2, 5e-3), 5e-3),
        on_a_ray("simplex", simplex @ simplex.T, [5e-3, 5e-3, 2e-3]),
        on_a_ray("orthoplex", code @ code.T, [5e-3, 5e-3, 2e-3]),
        on_sphere(
            "dot regression",
            "C=5, unit features, fixed simplex",
            0.0,
            lambda h, y: functional.dot_regression_loss(h, y, frame),
        ),
        dot_regression(2.0, 1e-2),
        on_sphere(
            "NTCE",
            f"{batch}, τ=0.5",
            theory.ntce_optimum(*sizes, 0.5),
            lambda h, y, w: functional.ntce_loss(h, y, w, temperature=0.5),
            prototypes=True,
        ),
        on_sphere(
            "NONL",
            f"{batch}, τ=0.5",
            theory.nonl_optimum(*sizes, 0.5),
            lambda h, y, w: functional.nonl_loss(h, y, w, temperature=0.5),
            prototypes=True,
        ),
        on_sphere(
            "SupCon",
            f"{batch}, τ=0.5",
            theory.supcon_optimum(*sizes, 0.5),
            lambda h, y: functional.supcon_loss(h, y, temperature=0.5),
        ),
        supcon_behind_relu([5, 3, 2], 0.5),
        on_sphere(
            "intra- + inter-class cosine",
            batch,
            0.0,
            lambda h, y: functional.intra_class_cosine_loss(h, y) + functional.inter_class_cosine_loss(h, y, CLASSES),
        ),
        free_logits(0.05),
        free_logits(0.05, binary=True),
    ]


def rows(chosen: Sequence[Problem]) -> list[tuple[Problem, float]]:
    """Each problem with the value found numerically."""
    return [(problem, minimise(problem.start)) for problem in chosen]


def as_markdown(found: Sequence[tuple[Problem, float]]) -> str:
    """The table, one line a problem."""
    lines = ["| loss | setting | found by L-BFGS | closed form | difference |", "|---|---|---|---|---|"]
    for problem, value in found:
        lines.append(
            f"| {problem.name} | {problem.setting} | {value:.10f} | {problem.closed:.10f} "
            f"| {value - problem.closed:+.0e} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the table or write it into the documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--write", action="store_true", help=f"replace the table in {DOCS.name}")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    table = as_markdown(rows(problems()))
    if not arguments.write:
        print(table)
        return
    before, rest = DOCS.read_text().split(BEGIN)
    DOCS.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
