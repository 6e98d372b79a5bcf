"""Figures of the evaluations: accuracy against the radius of an attack, and under corruptions, for each arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from recipes.core.plot_style import STYLE
from recipes.study.plots.figure import Figure, arm_line, arm_marker, finish_figure
from recipes.study.tables import FEW

Reports = Mapping[str, Sequence[Mapping[str, Any]]]
"""For each arm, the parts of every seed's evaluation."""


def _reports_of(evaluation: str, reports: Reports) -> dict[str, list[Any]]:
    """For each arm that has any, the reports of one evaluation."""
    by_arm = {arm: [parts[evaluation] for parts in seeds if parts.get(evaluation)] for arm, seeds in reports.items()}
    return {arm: found for arm, found in by_arm.items() if found}


def plot_attacks(reports: Reports, arms: Mapping[str, str], data: str, name: str) -> Figure | None:
    """Mean accuracy over seeds against the radius under margin-PGD, and the headline attack at its own radius."""
    found = _reports_of("adversarial", reports)
    if not found:
        return None
    first = next(iter(found.values()))[0]
    with plt.rc_context(STYLE):
        canvas, panel = plt.subplots(figsize=(8.4, 4), layout="constrained")
        means = []
        for place, (arm, parts) in enumerate(found.items()):
            style = arm_marker(list(arms), arm)
            curve = 100 * np.mean([part["curve"]["accuracy"] for part in parts], axis=0)
            line = style | arm_line(list(arms), arm)
            panel.plot(parts[0]["curve"]["epsilons"], curve, linewidth=1.2, markersize=4, label=arms[arm], **line)
            heads = [100 * part["headline"]["accuracy"] for part in parts]
            shift = parts[0]["epsilon"] * (1 + 0.012 * (place - len(found) / 2))  # side by side, not on top of it
            panel.plot([shift] * len(heads), heads, linestyle="", markersize=7, markerfacecolor="none", **style)
            means.append(f"{arms[arm]} {np.mean(heads):.1f} %")
        headline = first["headline"]["name"]
        panel.set(xlabel=f"radius ({first['norm']}, images in [0, 1])", ylabel="accuracy (%)", ylim=(-3, 103))
        panel.grid(alpha=0.25)
        canvas.legend(loc="outside right upper", frameon=False, fontsize=9, handlelength=4)
        return finish_figure(
            canvas,
            name,
            "Adversarial accuracy",
            f"Accuracy on {first['images']} images of {data} by radius of the attack; {headline} at "
            f"{first['epsilon']:.4g}: {'; '.join(means)}.",
            f"Lines: margin-PGD, an upper bound, mean over seeds, {first['curve']['images']} images a run. Hollow: "
            f"{headline}, each seed, {first['images']} images; "
            + ("claims rest on it alone." if first["images"] >= FEW else "too few to carry a claim."),
        )


def plot_corruptions(reports: Reports, arms: Mapping[str, str], data: str, name: str) -> Figure | None:
    """Mean accuracy over seeds and severities of each arm under each corruption."""
    found = _reports_of("corruptions", reports)
    if not found:
        return None
    names = [word.replace("_", " ") for word in next(iter(found.values()))[0]["names"]]
    table = np.array(
        [100 * np.mean([np.mean(part["accuracy"], axis=1) for part in parts], axis=0) for parts in found.values()]
    )
    with plt.rc_context(STYLE):
        canvas, panel = plt.subplots(figsize=(8.4, 0.34 * len(names) + 1.6), layout="constrained")
        image = panel.imshow(table.T, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for (column, row), value in np.ndenumerate(table):
            panel.text(
                column, row, f"{value:.1f}", ha="center", va="center", color="k" if value > 55 else "w", fontsize=8
            )
        panel.set_xticks(range(len(found)), [arms[arm] for arm in found], rotation=30, ha="right")
        panel.set_yticks(range(len(names)), names)
        canvas.colorbar(image, label="accuracy (%)")
        means = "; ".join(f"{arms[arm]} {row.mean():.1f} %" for arm, row in zip(found, table, strict=True))
        return finish_figure(
            canvas,
            name,
            "Accuracy under corruptions",
            f"Accuracy on corrupted images of {data}, mean over seeds and severities. Over all types: {means}.",
            "Mean over seeds and the five severities of each type.",
        )
