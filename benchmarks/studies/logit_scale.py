"""Large logits fake robustness: against cross-entropy attacks always, and with dot regression against margin-PGD too.

    python benchmarks/studies/logit_scale.py [--images 150] [--runs runs/logit_scale]

First part: one net trained with cross-entropy, its logits multiplied by k. The larger k, the weaker is PGD on
cross-entropy, whose gradient rounds to zero; PGD on the margin does not depend on k. Second part: that net and one with
a fixed simplex-ETF head and dot regression, on which PGD on the margin is too weak as well and targeted APGD is not.

Trains two small nets on digits through the recipes (minutes; finished runs in --runs are used again). Writes
benchmarks/results/studies/logit_scale-cpu.json and docs/figures/logit_scale.png.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import matplotlib
import torch
from torch import Tensor

from benchmarks import harness
from ncreg.checkpoint import load_classifier
from ncreg.models import Classifier
from ncreg.robustness import autoattack, binomial_interval, find_suspicions, pgd
from recipes.core.cli import parse
from recipes.data.load import load

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {"baseline": "linear head, cross-entropy", "etf_dr": "simplex-ETF head, dot regression"}
SETTINGS = ["--data.name", "digits", "--model.norm", "none", "--tpt.max_epochs", "60", "--tpt.min_terminal", "20"]
SETTINGS += ["--measure_size", "500", "--quiet", "true"]
RADII = {"baseline": 9, "etf_dr": 5}  # L-infinity, in 255ths: some images resist the attacks, others do not
SCALES = (1, 3, 10, 30, 100, 300, 1000)
BARS = {
    "clean": "clean",
    "cross_entropy": "PGD-20\ncross-entr.",
    "margin": "PGD-20\nmargin",
    "dlr": "PGD-20\nDLR",
    "apgd-ce": "APGD-CE",
    "apgd-t": "APGD-CE\n+ APGD-T",
}
"""Keys of a net's row, and their names in the figure."""


def trained(recipe: str, runs: Path) -> Classifier:
    """The net of a recipe, from a finished run in the folder; without one it is trained first."""
    if not list((runs / recipe).glob("*/summary.json")):
        command = [sys.executable, str(ROOT / "recipes" / "train.py"), recipe, *SETTINGS, "--out", str(runs / recipe)]
        subprocess.run(command, check=True)
    return load_classifier(sorted((runs / recipe).glob("*/summary.json"))[-1].parent)


def accuracy(correct: Tensor) -> dict[str, float]:
    """Accuracy with its Wilson 95 % interval."""
    low, high = binomial_interval(int(correct.sum()), len(correct))
    return {"accuracy": float(correct.double().mean()), "low": low, "high": high}


def scaled(model: Classifier, images: Tensor, target: Tensor, epsilon: float, seed: int, k: float) -> dict[str, Any]:
    """Accuracy under PGD, on cross-entropy and on the margin, when the net's logits are multiplied by k."""

    def louder(x: Tensor) -> Tensor:
        return k * model(x)

    row: dict[str, Any] = {"part": "scale", "k": k}
    for loss in ("cross_entropy", "margin"):
        row[loss] = accuracy(pgd(louder, images, target, epsilon=epsilon, loss=loss, seed=seed).robust)
    found = {finding.name: finding.value for finding in find_suspicions(louder, images, target)}
    return row | {name: found[name] for name in ("zero_gradient", "logit_scale")}


def compared(model: Classifier, images: Tensor, target: Tensor, epsilon: float, seed: int) -> dict[str, Any]:
    """Accuracy of one net under each attack alone, and under APGD on cross-entropy followed by targeted APGD."""
    attack: dict[str, Any] = {"epsilon": epsilon, "seed": seed}
    masks = {
        loss: pgd(model, images, target, loss=loss, **attack).robust for loss in ("cross_entropy", "margin", "dlr")
    }
    strong = autoattack(model, images, target, version="apgd", **attack)
    masks |= {"clean": strong.clean_correct, **strong.after}
    findings = find_suspicions(
        model,
        images,
        target,
        cross_entropy=masks["cross_entropy"],
        margin=masks["margin"],
        ensemble=strong.robust,
    )
    return {
        **{name: accuracy(mask) for name, mask in masks.items()},
        "findings": {finding.name: finding.value for finding in findings},
        "flagged": [finding.name for finding in findings if finding.flagged],
    }


def draw(rows: list[dict[str, Any]], caption: str, path: Path) -> None:
    """Left: accuracy and zero gradients against k. Right: the two nets under each attack."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.3), width_ratios=(1.05, 1))
    draw_scales(left, [row for row in rows if row["part"] == "scale"])
    draw_nets(right, [row for row in rows if row["part"] == "nets"])
    figure.text(0.5, 0.015, caption, ha="center", fontsize=8)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=130)


def draw_scales(panel: Axes, rows: list[dict[str, Any]]) -> None:
    """Accuracy and images with zero gradient against the factor on the logits."""
    ks = [row["k"] for row in rows]
    for key, label, colour in (
        ("cross_entropy", "PGD-20 on cross-entropy", "C3"),
        ("margin", "PGD-20 on the margin", "C0"),
    ):
        panel.plot(ks, [100 * row[key]["accuracy"] for row in rows], "o-", color=colour, label=label)
        low, high = ([100 * row[key][end] for row in rows] for end in ("low", "high"))
        panel.fill_between(ks, low, high, color=colour, alpha=0.15, linewidth=0)
    zero = [100 * row["zero_gradient"] for row in rows]
    panel.plot(ks, zero, "s:", color="0.45", label="images with zero gradient")
    panel.set(xscale="log", ylim=(0, 100), xlabel="factor k on the logits", ylabel="per cent of images")
    panel.set_title("One net, logits × k", fontsize=11)
    panel.legend(fontsize=8.5, loc="lower right")


def draw_nets(panel: Axes, rows: list[dict[str, Any]]) -> None:
    """Accuracy of each net under each attack, with intervals."""
    for number, net in enumerate(rows):
        places = [place + 0.4 * number - 0.2 for place in range(len(BARS))]
        heights = [100 * net[key]["accuracy"] for key in BARS]
        below = [100 * (net[key]["accuracy"] - net[key]["low"]) for key in BARS]
        above = [100 * (net[key]["high"] - net[key]["accuracy"]) for key in BARS]
        panel.bar(places, heights, 0.38, yerr=(below, above), capsize=2, label=net["net"], color=f"C{2 * number}")
        for place, height in zip(places, heights, strict=True):
            panel.text(place, 2, f"{height:.0f}", ha="center", fontsize=8, color="white")
    panel.set_xticks(range(len(BARS)), BARS.values(), fontsize=8)
    panel.set(ylim=(0, 128), yticks=range(0, 101, 20), ylabel="robust accuracy, per cent")
    panel.set_title("Two nets, each attack", fontsize=11)
    panel.legend(fontsize=8.5, loc="upper right")


def main() -> None:
    """Train, attack, save, draw."""
    parser = harness.parser("Large logits fake robustness.", rounds=None, device=False)
    parser.add_argument("--images", type=int, default=150, help="test images attacked")
    parser.add_argument("--seed", type=int, default=0, help="of every attack")
    parser.add_argument("--runs", type=Path, default=Path("runs/logit_scale"), help="folder of the two runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    nets = {recipe: trained(recipe, args.runs) for recipe in RECIPES}
    data = load(parse(["baseline", *SETTINGS]).data, seed=0, image_size=lambda native: 28)
    images, target = data.test.read()[: args.images].float() / 255, data.test.target[: args.images]
    n = {"images": len(images), "seed": args.seed}
    rows = []
    for k in SCALES:
        row = scaled(nets["baseline"], images, target, RADII["baseline"] / 255, args.seed, k)
        rows.append(n | {"epsilon_255ths": RADII["baseline"]} | row)
    for recipe, name in RECIPES.items():
        row = compared(nets[recipe], images, target, RADII[recipe] / 255, args.seed)
        about = {"part": "nets", "recipe": recipe, "net": f"{name}, {RADII[recipe]}/255"}
        rows.append(n | {"epsilon_255ths": RADII[recipe]} | about | row)
    goals = [
        "PGD on cross-entropy: accuracy rises with the scale of the logits; PGD on the margin: unchanged",
        "ETF + dot regression: PGD on the margin overrates robustness, targeted APGD does not",
    ]
    print(harness.save("studies/logit_scale", rows, goals=goals, out=args.out))
    caption = (
        "digits, test_resnet without a last norm, 60 epochs (recipes baseline and etf_dr, one seed); "
        f"{len(images)} test images,\nL∞ radius {RADII['baseline']}/255 for the linear head and {RADII['etf_dr']}/255 "
        f"for the ETF head: compare attacks, not nets; attack seed {args.seed}; "
        "bands and bars: Wilson 95 % intervals of the sampling of images"
    )
    draw(rows, caption, ROOT / "docs" / "figures" / "logit_scale.png")


if __name__ == "__main__":
    main()
