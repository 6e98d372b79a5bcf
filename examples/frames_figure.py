"""Draw the frames in three dimensions: simplex, orthoplex, hypercube and a softmax code, with their measures.

Grey lines join the nearest pairs of class vectors.

    python examples/frames_figure.py [--out FOLDER] [--quick]
"""

import argparse
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from ncreg.frames import hypercube, max_cosine, one_vs_rest_distance, orthoplex, simplex_etf, softmax_code

FRAMES = {
    "simplex ETF, 4 classes": simplex_etf(4, 3),
    "orthoplex, 6 classes": orthoplex(6, 3, rotate=False),
    "hypercube, 8 classes": hypercube(8, 3, rotate=False),
    "softmax code, 12 classes": softmax_code(12, 3),
}


def draw(axes: Any, weight: torch.Tensor) -> None:
    """Class vectors as arrows from the origin, nearest pairs joined."""
    closest = max_cosine(weight)
    for tip in weight.tolist():
        axes.plot(*zip([0, 0, 0], tip, strict=True), color="tab:blue", linewidth=1.5)
        axes.scatter(*tip, color="tab:blue", s=30)
    for one, two in combinations(weight, 2):
        if one @ two > closest - 1e-2:
            axes.plot(*zip(one.tolist(), two.tolist(), strict=True), color="0.6", linewidth=0.8)
    axes.set_box_aspect((1, 1, 1))
    axes.set(xlim=(-0.75, 0.75), ylim=(-0.75, 0.75), zlim=(-0.75, 0.75))
    axes.set_axis_off()
    axes.view_init(elev=18, azim=35)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw all frames in a row, print their measures, and write frames.png."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder for the figure")
    parser.add_argument("--quick", action="store_true", help="nothing to shorten here: it takes seconds as it is")
    args = parser.parse_args(argv)
    figure = plt.figure(figsize=(12, 3.6))
    for place, (name, weight) in enumerate(FRAMES.items(), start=1):
        axes = figure.add_subplot(1, len(FRAMES), place, projection="3d")
        draw(axes, weight)
        cosine, distance = max_cosine(weight).item(), one_vs_rest_distance(weight, tolerance=1e-6).item()
        axes.set_title(f"{name}\nmax cosine {cosine:.3f}\none-vs-rest distance {distance:.3f}", fontsize=9)
        print(f"{name:<26}max cosine {cosine:+.4f}   one-vs-rest distance {distance:.4f}")
    figure.tight_layout()
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "frames.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
