"""Collapse is a statement about training data: on a Gaussian mixture it comes with good and with bad generalisation.

Three Gaussian classes of unit variance, 30 training points each in 20 dimensions, their means at the corners of an
equilateral triangle whose side is the signal. Networks with two hidden layers of several widths are trained on each by
cross-entropy with decay. Left: NC1 of the last hidden features on training data, which falls with the width. Right:
test error beside that of the best rule there is. Where the signal is low, wide networks collapse all the same, and
their test error is near chance (the question of Hong & Ling 2024, arXiv 2409.01832).

    python examples/gaussian_mixture.py [--out FOLDER] [--quick]
"""

import argparse
import itertools
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

from ncreg.frames import simplex_etf
from ncreg.metrics import NeuralCollapse

CLASSES, DIM, SAMPLES, TESTED = 3, 20, 30, 2000
SIGNALS = (0.5, 1.0, 2.0, 4.0, 8.0)
WIDTHS = {4: "#D55E00", 16: "#009E73", 128: "#0072B2"}  # and a colour each, apart for colour-blind eyes as well
DECAY, RATE = 3e-3, 5e-3


class Found(NamedTuple):
    """For each signal: NC1 and error on training data, and error on test data."""

    nc1: list[float]
    train_error: list[float]
    test_error: list[float]


def mixture(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points (signals, CLASSES·samples, DIM), the same noise at every signal, and their classes."""
    means = simplex_etf(CLASSES, DIM, rotate=False)
    means = means / torch.pdist(means)[0]
    target = torch.arange(CLASSES).repeat_interleave(samples)
    noise = torch.randn(len(target), DIM, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(SIGNALS)[:, None, None] * means[target] + noise, target


def best_error() -> list[float]:
    """Test error of the nearest true mean, which no rule beats on this mixture."""
    points, target = mixture(TESTED, seed=1)
    means = simplex_etf(CLASSES, DIM, rotate=False)
    logits = points @ means.T  # means of equal length: the nearest is that of the largest product
    return (logits.argmax(2) != target).float().mean(1).tolist()


def trained(width: int, steps: int, seed: int = 0) -> Found:
    """Networks of one width, one for each signal, trained side by side: their losses add up and share no weight."""
    (points, target), (tested, truth) = mixture(SAMPLES, seed=0), mixture(TESTED, seed=1)
    layers = drawn_layers((DIM, width, width, CLASSES), seed)
    optimizer = torch.optim.Adam(layers, lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    labels = target.repeat(len(SIGNALS))
    for _ in range(steps):
        fit = len(SIGNALS) * F.cross_entropy((hidden(layers, points) @ layers[-1]).flatten(0, 1), labels)
        loss = fit + 0.5 * DECAY * sum(layer.square().sum() for layer in layers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        features, of_tested = hidden(layers, points), hidden(layers, tested)
        wrong = ((features @ layers[-1]).argmax(2) != target).float().mean(1)
        wrong_tested = ((of_tested @ layers[-1]).argmax(2) != truth).float().mean(1)
    return Found([nc1_of(rows, target) for rows in features], wrong.tolist(), wrong_tested.tolist())


def drawn_layers(sizes: tuple[int, ...], seed: int) -> list[Tensor]:
    """Weights (signals, inputs, outputs) of each layer, the same at every signal."""
    draw = torch.Generator().manual_seed(seed)
    shapes = itertools.pairwise(sizes)
    drawn = [torch.randn(inputs, outputs, generator=draw) * (2 / inputs) ** 0.5 for inputs, outputs in shapes]
    return [layer.repeat(len(SIGNALS), 1, 1).requires_grad_() for layer in drawn]


def hidden(layers: list[Tensor], points: Tensor) -> Tensor:
    """The features that enter the last layer."""
    for layer in layers[:-1]:
        points = (points @ layer).relu()
    return points


def nc1_of(features: Tensor, target: Tensor) -> float:
    """NC1 of one network's hidden features."""
    measure = NeuralCollapse(CLASSES, features.shape[1])
    measure.update(features, target)
    return float(measure.compute()["nc1"])


def draw_figure(found: dict[int, Found], best: list[float], path: Path) -> None:
    """NC1 on training data and error on test data against the signal."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for (width, colour), marker in zip(WIDTHS.items(), "osD", strict=True):
        left.plot(SIGNALS, found[width].nc1, color=colour, marker=marker, label=f"width {width}")
        right.plot(SIGNALS, found[width].test_error, color=colour, marker=marker, label=f"width {width}")
    right.plot(SIGNALS, best, color="#666666", linestyle="--", label="nearest true mean")
    right.axhline(1 - 1 / CLASSES, color="#666666", linestyle=":", label="chance")
    left.set(xscale="log", yscale="log", title="training data: NC1 of the hidden features", ylabel="NC1")
    right.set(xscale="log", title="test data: error", ylabel="share of wrong answers", ylim=(0, None))
    for axes in (left, right):
        axes.set_xlabel("signal: distance of two means, in standard deviations")
        axes.set_xticks(SIGNALS, [f"{signal:g}" for signal in SIGNALS])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Train, print the numbers, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder of the figure")
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = {width: trained(width, 300 if arguments.quick else 1500) for width in WIDTHS}
    best = best_error()
    print("signal  width   NC1 (train)  error (train)  error (test)  nearest true mean")
    for place, signal in enumerate(SIGNALS):
        for width, row in found.items():
            print(
                f"{signal:6g}  {width:5d}  {row.nc1[place]:12.2e}  {100 * row.train_error[place]:11.1f} %"
                f"  {100 * row.test_error[place]:10.1f} %  {100 * best[place]:15.1f} %"
            )
    path = arguments.out / "gaussian_mixture.png"
    draw_figure(found, best, path)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
