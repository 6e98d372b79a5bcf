"""Every loss of the library, left alone with free features, builds the same simplex.

One free feature vector a sample, a head where the loss has one, gradient descent (Adam, annealed). Left: how far the
loss still is above its closed form. Right: how far the class means are from the nearest simplex ETF.

    python examples/unconstrained_features.py [--out FOLDER] [--quick]
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncreg import functional, theory
from ncreg.frames import simplex_etf
from ncreg.heads import CosineHead, ETFHead, LinearHead
from ncreg.metrics import NeuralCollapse
from ncreg.norms import LastBatchNorm

CLASSES, SAMPLES, DIM, DECAY = 10, 10, 16, 1e-3
TARGET = torch.arange(CLASSES).repeat_interleave(SAMPLES)
DOUBLE: dict[str, Any] = {"dtype": torch.float64}
# Okabe & Ito's colours, apart for colour-blind eyes as well; the second round is dashed
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]


class Case(NamedTuple):
    """A loss of the free features, its closed form, what else it learns, and what the head sees of the features."""

    objective: Callable[[Tensor], Tensor]
    closed: float
    learned: Sequence[nn.Module] = ()
    seen: Callable[[Tensor], Tensor] = nn.Identity()


def cases() -> dict[str, Case]:
    """All losses, by name."""
    plain, squared, behind = (LinearHead(DIM, CLASSES, bias=bias, **DOUBLE) for bias in (False, True, False))
    cosine, ntce, nonl = (CosineHead(DIM, CLASSES, **DOUBLE) for _ in range(3))
    etf, norm = ETFHead(DIM, CLASSES, **DOUBLE), LastBatchNorm(DIM, **DOUBLE)
    frame, sizes = simplex_etf(CLASSES, DIM, **DOUBLE), (CLASSES, SAMPLES)

    def decayed(fit: Tensor, *parts: Tensor | None) -> Tensor:
        return fit + 0.5 * DECAY * sum(part.square().sum() for part in parts if part is not None)

    def cosines(h: Tensor) -> Tensor:
        intra = functional.intra_class_cosine_loss(h, TARGET)
        return intra + functional.inter_class_cosine_loss(h, TARGET, CLASSES)

    return {
        "CE + decay": Case(
            lambda h: decayed(F.cross_entropy(plain(h), TARGET), plain.weight, h / SAMPLES),
            theory.cross_entropy_optimum(*sizes, DECAY, DECAY / SAMPLES**2).loss,
            [plain],
        ),
        "CE + decay, BatchNorm": Case(
            lambda h: decayed(F.cross_entropy(behind(norm(h)), TARGET), behind.weight, norm.weight),
            theory.last_batch_norm_optimum(CLASSES, DECAY, DECAY).loss,
            [behind, norm],
            norm,
        ),
        "squared error + decay": Case(
            lambda h: decayed(functional.mse_one_hot_loss(squared(h), TARGET), squared.weight, h / SAMPLES),
            theory.mse_optimum(*sizes, DECAY, DECAY / SAMPLES**2, bias=True).loss,
            [squared],
        ),
        "CE, ETF head": Case(
            lambda h: F.cross_entropy(etf(h), TARGET), theory.minimal_cross_entropy(etf.scale, CLASSES)
        ),
        "CE, cosine head": Case(
            lambda h: F.cross_entropy(cosine(h), TARGET),
            theory.minimal_cross_entropy(cosine.scale, CLASSES),
            [cosine],
        ),
        "dot regression": Case(lambda h: functional.dot_regression_loss(h, TARGET, frame), 0.0),
        "NTCE": Case(
            lambda h: functional.ntce_loss(h, TARGET, ntce.weight, temperature=0.2),
            theory.ntce_optimum(*sizes, 0.2),
            [ntce],
        ),
        "NONL": Case(
            lambda h: functional.nonl_loss(h, TARGET, nonl.weight, temperature=0.2),
            theory.nonl_optimum(*sizes, 0.2),
            [nonl],
        ),
        "SupCon": Case(
            lambda h: functional.supcon_loss(h, TARGET, temperature=0.2), theory.supcon_optimum(*sizes, 0.2)
        ),
        "intra + inter cosine": Case(cosines, 0.0),
    }


def descend(case: Case, steps: int) -> dict[str, list[float]]:
    """Anneal Adam over the features and the modules; record gap and geometry on a logarithmic grid of steps."""
    features = torch.randn(len(TARGET), DIM, generator=torch.Generator().manual_seed(0), **DOUBLE).requires_grad_()
    parameters = [features, *(p for module in case.learned for p in module.parameters())]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    grid = {round(steps ** (k / 24)) for k in range(25)}
    history: dict[str, list[float]] = {"step": [], "loss": [], "gap": [], "etf_distance": [], "trace_ratio": []}
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = case.objective(features)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step in grid:
            measure = NeuralCollapse(CLASSES, DIM)
            measure.update(F.normalize(case.seen(features.detach()).detach(), dim=1), TARGET)
            found = measure.compute()
            history["step"].append(step)
            history["loss"].append(float(loss.detach()))
            history["gap"].append(float(loss.detach()) - case.closed)
            history["etf_distance"].append(float(found["etf_distance"]))
            history["trace_ratio"].append(float(found["trace_ratio"]))
    return history


def draw(histories: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Both panels, a line a loss, on logarithmic axes."""
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.7), sharex=True, layout="constrained")
    for k, (name, history) in enumerate(histories.items()):
        style = {"color": COLOURS[k % len(COLOURS)], "ls": "-" if k < len(COLOURS) else "--", "lw": 1.6, "label": name}
        for axis, key in zip(axes, ("gap", "etf_distance"), strict=True):
            axis.plot(history["step"], [max(value, 1e-16) for value in history[key]], **style)
    for axis, label in zip(
        axes, ("loss above its closed form", "distance of class means\nto the nearest simplex ETF"), strict=True
    ):
        axis.set(xscale="log", yscale="log", xlabel="step", ylabel=label)
        axis.grid(alpha=0.25, lw=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8.5)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Optimise every loss, print the table, save the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder of the figure")
    parser.add_argument("--quick", action="store_true", help="fewer steps, a few seconds")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    histories = {}
    print(f"{'loss':24}{'reached':>12}{'closed form':>14}{'within/between':>16}{'ETF distance':>14}")
    for name, case in cases().items():
        history = histories[name] = descend(case, 80 if arguments.quick else 3000)
        last = {key: values[-1] for key, values in history.items()}
        print(
            f"{name:24}{last['loss']:12.6f}{case.closed:14.6f}{last['trace_ratio']:16.1e}{last['etf_distance']:14.1e}"
        )
    path = arguments.out / "unconstrained_features.png"
    draw(histories, path)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
