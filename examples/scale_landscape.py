"""The scale of a cosine head: how low the loss can go, and how hard a feature is still pulled.

Left: the smallest cross-entropy that unit features on a simplex can reach, against the scale; dots are the heads'
default. Right: the pull on a feature towards its class vector, measured through ETFHead by autograd. A small scale
keeps pulling at collapse but can never be confident; a large one lets go long before.

    python examples/scale_landscape.py [--out FOLDER] [--quick]
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

from ncreg.heads import ETFHead
from ncreg.theory import minimal_cross_entropy, scale_for_loss

CLASSES = [2, 10, 100, 1000]
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"]
STYLES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))]


def pull(scale: float, cosines: Tensor, num_classes: int = 10) -> tuple[Tensor, Tensor]:
    """Loss, and its slope −dL/d(cosine), of features at each cosine to their class vector, equally far from others."""
    head = ETFHead(num_classes, num_classes, scale=scale, dtype=torch.float64)
    own = head.weight[0]
    aside = torch.linalg.svd(head.weight).Vh[-1]  # orthogonal to every class vector
    cosine = cosines.clone().requires_grad_()
    features = cosine[:, None] * own + (1 - cosine.square()).sqrt()[:, None] * aside
    losses = F.cross_entropy(head(features), torch.zeros(len(cosines), dtype=torch.long), reduction="none")
    (slope,) = torch.autograd.grad(losses.sum(), cosine)
    return losses.detach(), -slope


def draw(scales: Tensor, cosines: Tensor, path: Path) -> None:
    """Floor against scale, pull against cosine."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.7), layout="constrained")
    for num_classes, colour, style in zip(CLASSES, COLOURS, STYLES, strict=False):
        floor = [minimal_cross_entropy(float(scale), num_classes) for scale in scales]
        left.plot(scales, floor, color=colour, ls=style, label=f"C = {num_classes}")
        left.plot(scale_for_loss(num_classes, 0.01), 0.01, "o", color=colour, ms=6)
    left.axhline(0.01, color="0.5", lw=0.8, zorder=0)
    left.text(19.8, 0.0108, "default: 0.01", color="0.35", fontsize=8.5, ha="right", va="bottom")
    left.set(yscale="log", ylim=(1e-4, 10), xlim=(0, 20), xlabel="scale (1 / temperature)")
    left.set_ylabel("smallest cross-entropy (nats)")
    for scale, colour, style in zip([1.0, 3.0, scale_for_loss(10, 0.01), 16.0, 64.0], COLOURS, STYLES, strict=True):
        name = f"scale {scale:.3g}" + (" (default)" if 6 < scale < 7 else "")
        right.plot(cosines, pull(scale, cosines)[1], color=colour, ls=style, label=name)
    right.set(yscale="log", ylim=(1e-6, 3000), xlabel="cosine to the own class vector (C = 10)")
    right.set_ylabel("pull  −dL/d cosine")
    for axis in (left, right):
        axis.grid(alpha=0.25, lw=0.5)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8.5, loc="upper right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Print the scales, save the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder of the figure")
    parser.add_argument("--quick", action="store_true", help="a coarser grid")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    wanted = [0.1, 0.01, 0.001]
    print("scale (and temperature) whose smallest cross-entropy is")
    print(f"{'classes':>8}" + "".join(f"{loss:>18g}" for loss in wanted) + f"{'loss at scale 1':>18}")
    for num_classes in [*CLASSES, 20_000]:
        scales = [scale_for_loss(num_classes, loss) for loss in wanted]
        cells = "".join(f"{scale:>9.3f} ({1 / scale:.4f})" for scale in scales)
        print(f"{num_classes:>8}{cells}{minimal_cross_entropy(1.0, num_classes):>18.3f}")
    points = 60 if arguments.quick else 400
    path = arguments.out / "scale_landscape.png"
    along = torch.linspace(0, 20, points, dtype=torch.float64)
    cosines = torch.linspace(-0.1, 0.999999, points, dtype=torch.float64)
    draw(along, cosines, path)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
