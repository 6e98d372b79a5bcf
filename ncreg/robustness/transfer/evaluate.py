"""The value of frozen features for another task: linear probe, nearest neighbours, few labelled samples a class.

Features come from one forward pass in eval mode over the other task's images; nothing here trains the backbone. All is
computed in float64 on the CPU, and settings are chosen on a part of the training samples, never on the test samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from ncreg._checks import check_finite, check_integer, check_items, check_positive, check_seed
from ncreg._features import check_features, check_indices
from ncreg._readable import readable
from ncreg.numerics import seeded
from ncreg.robustness.intervals import binomial_interval, t_quantile
from ncreg.robustness.transfer.linear_probe import fit_linear_probe, fitted_probe, labelled

L2_GRID = tuple(10.0**power for power in range(-5, 3))
NEIGHBOURS_GRID = (1, 3, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class ProbeResult:
    """Test accuracy of a probe, and the setting that validation chose.

    Attributes:
        accuracy: on the test samples.
        interval: its Wilson 95 % interval.
        chosen: the L2 weight, or the number of neighbours.
        validation: validation accuracy of every setting tried.
        at_edge: whether all best settings are at an end of the grid, so that a wider grid may do better.
        num_train: training samples, validation part included.
        num_test: test samples.
    """

    accuracy: float
    interval: tuple[float, float]
    chosen: float
    validation: dict[float, float]
    at_edge: bool
    num_train: int
    num_test: int

    __str__ = readable


@dataclass(frozen=True)
class FewShotResult:
    """Test accuracy of a linear probe that was fitted to few labelled samples a class.

    Attributes:
        shots: samples a class.
        accuracy: mean test accuracy over the draws.
        interval: 95 % t-interval of that mean over draws of the labelled samples, for these test samples; within
            [0, 1].
        draws: test accuracy of each draw.
    """

    shots: int
    accuracy: float
    interval: tuple[float, float]
    draws: tuple[float, ...]

    __str__ = readable


def linear_probe(
    train_features: Float[Tensor, "train dim"],
    train_target: Integer[Tensor, " train"],
    test_features: Float[Tensor, "test dim"],
    test_target: Integer[Tensor, " test"],
    *,
    l2_grid: Sequence[float] = L2_GRID,
    val_share: float = 0.2,
    seed: int = 0,
) -> ProbeResult:
    """Test accuracy of a linear probe whose L2 weight was chosen on a validation part of the training samples.

    The best validation accuracy wins, the larger penalty where several share it; the probe is then fitted again to all
    training samples.

    Args:
        train_features: of the training samples.
        train_target: their classes.
        test_features: of the test samples.
        test_target: their classes.
        l2_grid: penalties to try.
        val_share: share of each class's training samples that is held out, at least one sample.
        seed: of the draw of the validation part.

    Raises:
        TypeError: no tensors of the right kind.
        ValueError: shapes that do not fit, a class with fewer than two training samples, an empty grid.

    Example:
        >>> features, target = torch.eye(2).repeat(5, 1), torch.tensor([0, 1]).repeat(5)
        >>> probe = linear_probe(features, target, features, target)
        >>> probe.accuracy, probe.num_train
        (1.0, 10)
    """
    train = labelled("train_features", train_features, "train_target", train_target)
    rows, labels, classes = train
    fit, held = stratified_split(labels, val_share, seed=seed)
    grid = sorted({check_positive("l2_grid", l2) for l2 in check_items("l2_grid", l2_grid)}, reverse=True)
    if not grid:
        raise ValueError("l2_grid is empty: pass at least one penalty")
    validation: dict[float, float] = {}
    probe = None
    for l2 in grid:
        probe = fitted_probe(rows[fit], labels[fit], classes, l2, tolerance=1e-6, start=probe)  # enough to rank them
        validation[l2] = _accuracy(probe(rows[held]).argmax(1), labels[held])
    return _result(
        validation,
        lambda l2, test: fit_linear_probe(rows, labels, l2)(test).argmax(1),
        train,
        _test_set(test_features, test_target, rows.shape[1], classes),
        edges=(grid[0], grid[-1]) if len(grid) > 1 else (),
    )


def knn_probe(
    train_features: Float[Tensor, "train dim"],
    train_target: Integer[Tensor, " train"],
    test_features: Float[Tensor, "test dim"],
    test_target: Integer[Tensor, " test"],
    *,
    neighbours_grid: Sequence[int] = NEIGHBOURS_GRID,
    val_share: float = 0.2,
    seed: int = 0,
) -> ProbeResult:
    """Test accuracy of a vote among the k training samples of largest cosine, k chosen on a validation part.

    Where classes share the most votes, the one whose votes have the larger cosines in sum wins. Numbers of neighbours
    above the samples at hand are not tried. The best validation accuracy wins, the smaller k where several share it.

    Args:
        train_features: of the training samples.
        train_target: their classes.
        test_features: of the test samples.
        test_target: their classes.
        neighbours_grid: numbers of neighbours to try.
        val_share: share of each class's training samples that is held out, at least one sample.
        seed: of the draw of the validation part.

    Raises:
        TypeError: no tensors of the right kind.
        ValueError: shapes that do not fit, a class with fewer than two training samples, no k that is small enough.

    Example:
        >>> features, target = torch.eye(2).repeat(5, 1), torch.tensor([0, 1]).repeat(5)
        >>> probe = knn_probe(features, target, features, target, neighbours_grid=[1, 2])
        >>> probe.accuracy, probe.chosen
        (1.0, 1.0)
    """
    train = labelled("train_features", train_features, "train_target", train_target)
    rows, labels, classes = train
    fit, held = stratified_split(labels, val_share, seed=seed)
    tried = {check_integer("neighbours_grid", k, 1) for k in check_items("neighbours_grid", neighbours_grid)}
    grid = sorted(k for k in tried if k <= len(fit))
    if not grid:
        raise ValueError(f"neighbours_grid={tuple(neighbours_grid)}: none is at most the {len(fit)} samples to fit")
    votes = _votes(rows[fit], labels[fit], rows[held], classes, grid)
    return _result(
        {float(k): _accuracy(vote, labels[held]) for k, vote in votes.items()},
        lambda k, test: _votes(rows, labels, test, classes, [int(k)])[int(k)],
        train,
        _test_set(test_features, test_target, rows.shape[1], classes),
        edges=(grid[-1],) if len(grid) > 1 else (),
    )


def few_shot(
    train_features: Float[Tensor, "train dim"],
    train_target: Integer[Tensor, " train"],
    test_features: Float[Tensor, "test dim"],
    test_target: Integer[Tensor, " test"],
    *,
    shots: int,
    draws: int = 10,
    l2: float | None = None,
    seed: int = 0,
) -> FewShotResult:
    """Test accuracy of a linear probe fitted to `shots` samples a class, over several draws of them.

    Too few samples to choose a penalty on: it is fixed, by default at scikit-learn's C = 1, which is 1/(shots·C) here
    (with two classes at its C = 2, see `fit_linear_probe`).

    Args:
        train_features: of the training samples to draw from.
        train_target: their classes.
        test_features: of the test samples.
        test_target: their classes.
        shots: samples a class.
        draws: at least 2.
        l2: penalty.
        seed: of the draws; each has a generator of its own.

    Raises:
        TypeError: no tensors of the right kind.
        ValueError: shapes that do not fit, a class with fewer than `shots` training samples, fewer than 2 draws.

    Example:
        >>> features, target = torch.eye(2).repeat(5, 1), torch.tensor([0, 1]).repeat(5)
        >>> probe = few_shot(features, target, features, target, shots=2, draws=3)
        >>> probe.accuracy, probe.interval
        (1.0, (1.0, 1.0))
    """
    rows, labels, classes = labelled("train_features", train_features, "train_target", train_target)
    test, wanted = _test_set(test_features, test_target, rows.shape[1], classes)
    shots, draws = check_integer("shots", shots, 1), check_integer("draws", draws, 2)
    least = int(torch.bincount(labels).min())
    if least < shots:
        raise ValueError(f"shots={shots} but a class has only {least} training samples")
    found = []
    for draw in range(draws):
        order = _shuffled(labels, seed, draw)
        taken = torch.cat([order[labels[order] == c][:shots] for c in range(classes)])
        probe = fit_linear_probe(rows[taken], labels[taken], 1 / len(taken) if l2 is None else l2)
        found.append(_accuracy(probe(test).argmax(1), wanted))
    values = torch.tensor(found, dtype=torch.float64, device="cpu")
    mean, half = float(values.mean()), t_quantile(draws - 1) * float(values.std()) / sqrt(draws)
    return FewShotResult(shots, mean, (max(mean - half, 0.0), min(mean + half, 1.0)), tuple(found))


def stratified_split(target: Integer[Tensor, " samples"], val_share: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of a part to fit and a part held out: of each class `val_share`, rounded, at least one sample in each.

    Raises:
        ValueError: val_share outside (0, 1), a class with fewer than two samples.
    """
    if not 0 < check_finite("val_share", val_share) < 1:
        raise ValueError(f"val_share={val_share} must be between 0 and 1")
    order = _shuffled(target, seed, 0)
    fit, held = [], []
    for c in target.unique().tolist():
        own = order[target[order] == c]
        if len(own) < 2:
            raise ValueError(f"class {c} has {len(own)} training sample: two are needed, one of them for validation")
        number = min(max(round(val_share * len(own)), 1), len(own) - 1)
        held.append(own[:number])
        fit.append(own[number:])
    return torch.cat(fit).sort().values, torch.cat(held).sort().values


def _votes(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, grid: Sequence[int]
) -> dict[int, Integer[Tensor, " test"]]:
    """The class with the most votes among the k nearest training samples, for each k of an ascending grid."""
    unit = F.normalize(train, eps=1e-300)
    chosen: dict[int, list[Tensor]] = {k: [] for k in grid}
    for block in F.normalize(test, eps=1e-300).split(1024):
        near = (block @ unit.T).topk(grid[-1], dim=1)
        voters = labels[near.indices]
        for k in grid:
            # A sum of cosines cannot outweigh a vote: it is brought below one.
            weight = 1 + (near.values[:, :k] + 1) / (4 * k)
            tally = block.new_zeros(len(block), classes).scatter_add_(1, voters[:, :k], weight)
            chosen[k].append(tally.argmax(1))
    return {k: torch.cat(parts) for k, parts in chosen.items()}


def _result(
    validation: dict[float, float],
    predict: Callable[[float, Tensor], Tensor],
    train: tuple[Tensor, Tensor, int],
    test: tuple[Tensor, Tensor],
    edges: tuple[float, ...],
) -> ProbeResult:
    """Test accuracy of the setting with the best validation accuracy, the first where several share it."""
    chosen = max(validation, key=lambda setting: validation[setting])
    rows, wanted = test
    correct = int((predict(chosen, rows) == wanted).sum())
    return ProbeResult(
        accuracy=correct / len(wanted),
        interval=binomial_interval(correct, len(wanted)),
        chosen=chosen,
        validation=validation,
        at_edge=all(setting in edges for setting, value in validation.items() if value == validation[chosen]),
        num_train=len(train[0]),
        num_test=len(wanted),
    )


def _test_set(features: Tensor, target: Tensor, dim: int, classes: int) -> tuple[Tensor, Tensor]:
    rows = check_features("test_features", features, dim)
    return rows, check_indices("test_target", target, len(rows), classes)


def _shuffled(labels: Tensor, seed: int, draw: int) -> Tensor:
    return torch.randperm(len(labels), generator=seeded((check_seed(seed) * 1_000_003 + draw) % 2**63), device="cpu")


def _accuracy(predicted: Tensor, target: Tensor) -> float:
    return float((predicted == target).double().mean())
