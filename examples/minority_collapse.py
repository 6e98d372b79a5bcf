"""Minority collapse as imbalance grows: a learned head merges minority classes, a fixed simplex cannot.

Free features under cross-entropy and weight decay, five majority classes of 10,000 samples and five minority classes
that shrink. Below the predicted class size N²·λ_W·λ_H the learned class vectors of all minority classes coincide and no
margin is left between them, although every one of them has training data. The fixed simplex has the length that the
learned one has at balance, so that both start from the same optimum.

    python examples/minority_collapse.py [--out FOLDER] [--quick]
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

from ncreg.heads import ETFHead, LinearHead
from ncreg.theory import cross_entropy_optimum, minority_collapse_threshold

MAJORITY, MINORITY, SIZE, DIM = 5, 5, 10_000, 12
CLASSES = MAJORITY + MINORITY
DECAYS = {0.1: "#0072B2", 0.05: "#D55E00"}  # λ_W, with λ_H = λ_W/N; and a colour
DOUBLE: dict[str, Any] = {"dtype": torch.float64}


class Optimum(NamedTuple):
    """Minority classes at the optimum.

    Attributes:
        distance: mean distance of two minority class vectors, over that of two majority ones.
        margin: least margin of a minority class against another minority class.
    """

    distance: float
    margin: float


def optimum(head: LinearHead | ETFHead, count: int, decay: float) -> Optimum:
    """Minimise cross-entropy with decay; by convexity a class's features coincide, so one feature a class will do."""
    sizes = torch.tensor([SIZE] * MAJORITY + [count] * MINORITY, **DOUBLE)
    share, labels = sizes / sizes.sum(), torch.arange(CLASSES)
    # features times √share: the solver sees classes of any size at one curvature
    scaled = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(1), **DOUBLE).requires_grad_()
    learned = list(head.parameters())
    solver = torch.optim.LBFGS(
        [scaled, *learned], max_iter=300, tolerance_grad=1e-8, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        fit = (share * F.cross_entropy(head(scaled / share.sqrt()[:, None]), labels, reduction="none")).sum()
        loss = fit + 0.5 * decay * sum(part.square().sum() for part in [scaled, *learned])
        loss.backward()
        return loss

    solver.step(closure)
    with torch.no_grad():
        logits = head(scaled / share.sqrt()[:, None])[MAJORITY:, MAJORITY:]
        margin = (logits.diagonal() - logits.clone().fill_diagonal_(-torch.inf).amax(1)).min()
        distance = torch.pdist(head.weight[MAJORITY:]).mean() / torch.pdist(head.weight[:MAJORITY]).mean()
        return Optimum(float(distance), float(margin))


def predicted_ratio(decay: float) -> float:
    """The imbalance ratio from which minority classes merge: the largest size that meets the threshold."""
    apart, merged = SIZE, 0
    while apart - merged > 1:
        count = (apart + merged) // 2
        samples = MAJORITY * SIZE + MINORITY * count
        if count <= minority_collapse_threshold(samples, decay, decay / samples):
            merged = count
        else:
            apart = count
    return SIZE / merged


def draw(ratios: list[float], found: dict[tuple[str, float], list[Optimum]], path: Path) -> None:
    """Distance and margin between minority classes against the imbalance ratio; vertical lines: predicted."""
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.7), sharex=True, layout="constrained")
    for axis, key in zip(axes, ("distance", "margin"), strict=True):
        for (kind, decay), values in found.items():
            style = {"ls": "-", "marker": "o"} if kind == "learned" else {"ls": "--", "marker": "s", "mfc": "white"}
            curve = [getattr(value, key) for value in values]
            label = f"{kind} head, decay {decay:g}"
            axis.plot(ratios, curve, color=DECAYS[decay], ms=4, lw=1.4, label=label, **style)
        for decay, colour in DECAYS.items():
            axis.axvline(predicted_ratio(decay), color=colour, ls=":", lw=1.2)
            place = {"xycoords": axis.get_xaxis_transform(), "rotation": 90, "va": "center", "fontsize": 8}
            axis.annotate("predicted", (predicted_ratio(decay) * 1.08, 0.6), color=colour, **place)
        axis.set(xscale="log", xlabel="imbalance ratio (majority : minority class size)")
        axis.set_ylim(bottom=-0.04 * axis.get_ylim()[1])
        axis.grid(alpha=0.25, lw=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("distance of minority class vectors\n(majority = 1)")
    axes[1].set_ylabel("margin between minority classes")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Solve along the ratios, print where classes merge, save the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder of the figure")
    parser.add_argument("--quick", action="store_true", help="fewer ratios")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    steps = 3 if arguments.quick else 30
    counts = [round(SIZE / 1000 ** (k / steps)) for k in range(steps + 1)]
    ratios = [SIZE / count for count in counts]
    found: dict[tuple[str, float], list[Optimum]] = {}
    print(f"{'head':24}{'predicted to merge':>20}{'first seen merged':>20}{'margin at 1':>14}{'at 1000':>10}")
    for decay in DECAYS:
        length = cross_entropy_optimum(CLASSES, SIZE, decay, decay / (CLASSES * SIZE)).weight_norm
        for kind in ("learned", "fixed"):
            values = []
            for count in counts:
                learned = LinearHead(DIM, CLASSES, bias=False, **DOUBLE)
                fixed = ETFHead(DIM, CLASSES, normalize=False, scale=length, **DOUBLE)
                values.append(optimum(learned if kind == "learned" else fixed, count, decay))
            found[kind, decay] = values
            merged = [ratio for ratio, value in zip(ratios, values, strict=True) if value.distance < 1e-3]
            predicted = f"{predicted_ratio(decay):.1f} : 1" if kind == "learned" else "never"
            seen = f"{merged[0]:.1f} : 1" if merged else "never"
            name = f"{kind}, decay {decay:g}"
            print(f"{name:24}{predicted:>20}{seen:>20}{values[0].margin:>14.3f}{abs(values[-1].margin):>10.3f}")
    path = arguments.out / "minority_collapse.png"
    draw(ratios, found, path)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
