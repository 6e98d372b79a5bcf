"""Figures of an evaluation, one file a part; each says how many images it shows and what the bars are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from recipes.evaluation.console_table import whole  # noqa: E402
from recipes.evaluation.results import Result  # noqa: E402

Part = Mapping[str, Any]
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito
STYLE: dict[Any, Any] = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}


def draw(folder: Path, result: Result, parts: Collection[str], *, title: str) -> None:
    """A PNG for each of the parts that the result has and that has a picture; none is left of what it has not."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure_of in FIGURES.items():
        shown = name.split("-")[0]
        part = result.parts.get(shown)
        if part is None:
            (folder / f"{name}.png").unlink(missing_ok=True)
        if part is None or shown not in parts:
            continue
        with plt.rc_context(STYLE):
            figure = figure_of(part)
            figure.suptitle(title, fontsize=9)
            figure.savefig(folder / f"{name}.png", dpi=130)
            plt.close(figure)


def adversarial(part: Part) -> Figure:
    """Accuracy against ε under margin-PGD, and AutoAttack at its radius."""
    figure, panel = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
    curve = part["curve"]
    accuracy = 100 * np.array(curve["accuracy"])
    low, high = 100 * np.array(curve["intervals"]).T
    epsilons = np.array(curve["epsilons"])
    panel.fill_between(epsilons, low, high, color=COLORS[0], alpha=0.2, linewidth=0)
    panel.plot(epsilons, accuracy, "o-", color=COLORS[0], label=f"margin-PGD, upper bound (n = {curve['images']})")
    head = part["headline"]
    ends = 100 * np.array([[head["accuracy"] - head["low"]], [head["high"] - head["accuracy"]]])
    label = f"{head['name']} (n = {part['images']})"
    panel.errorbar(
        part["epsilon"], 100 * head["accuracy"], np.abs(ends), fmt="D", color=COLORS[1], capsize=4, label=label
    )
    panel.set(xlabel=f"ε ({part['norm']}, images in [0, 1])", ylabel="accuracy (%)", ylim=(-3, 103))
    panel.grid(alpha=0.25)
    panel.legend(frameon=False, fontsize=8)
    panel.annotate("95 % intervals", (0.99, 0.01), xycoords="axes fraction", ha="right", fontsize=7, color="#555555")
    return figure


def margins(part: Part) -> Figure:
    """Histogram of the clean margins, in units of the logits' spread."""
    figure, panel = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
    counts, (low, high) = np.array(part["margins"]["counts"]), part["margins"]["ends"]
    edges = np.linspace(low, high, len(counts) + 1)
    wrong = edges[:-1] < 0
    panel.bar(edges[:-1][wrong], counts[wrong], np.diff(edges)[wrong], align="edge", color=COLORS[1], label="wrong")
    panel.bar(edges[:-1][~wrong], counts[~wrong], np.diff(edges)[~wrong], align="edge", color=COLORS[0], label="right")
    panel.axvline(part["margins"]["median"], color="#555555", linestyle=":", linewidth=1, label="median")
    panel.set(xlabel="margin / spread of the logits, clean images", ylabel=f"images of {part['images']}")
    panel.legend(frameon=False, fontsize=8)
    return figure


def corruptions(part: Part) -> Figure:
    """Heat map, type by severity, every cell with its number."""
    accuracy = 100 * np.array(part["accuracy"], dtype=float)
    figure, panel = plt.subplots(figsize=(5.4, 0.32 * len(accuracy) + 1.5), layout="constrained")
    shown = panel.imshow(accuracy, vmin=0, vmax=100, cmap="cividis", aspect="auto")
    for (line, column), value in np.ndenumerate(accuracy):
        color = "black" if value > 55 else "white"
        panel.text(column, line, whole(value), ha="center", va="center", color=color, fontsize=8)
    panel.set_xticks(range(accuracy.shape[1]), part["severities"])
    panel.set_yticks(range(len(accuracy)), [name.replace("_", " ") for name in part["names"]], fontsize=8)
    panel.set(xlabel=f"severity ({part['samples']} images; clean {100 * part['clean_accuracy']:.1f} %)")
    figure.colorbar(shown, label="accuracy (%)")
    return figure


def calibration(part: Part) -> Figure:
    """Reliability diagram before and after the temperature, with the number of images in each bin below."""
    figure, (top, below) = plt.subplots(
        2, 1, figsize=(4.6, 5), layout="constrained", sharex=True, gridspec_kw={"height_ratios": (3, 1)}
    )
    top.plot([0, 1], [0, 1], color="#555555", linestyle=":", linewidth=1)
    labels = {"before": "softmax(z)", "after": f"softmax(z/T), T = {part['temperature']:.2g}"}
    for (key, label), color, marker in zip(labels.items(), COLORS, "os", strict=False):
        bins = part[key]["reliability"]
        filled = [i for i, count in enumerate(bins["count"]) if count]
        confidence, right = ([bins[name][i] for i in filled] for name in ("confidence", "accuracy"))
        top.plot(
            confidence, right, marker + "-", color=color, label=f"{label}, ECE {part[key]['ece']:.3f}", markersize=4
        )
        edges = np.array(bins["edges"])
        below.step(edges, [*bins["count"], bins["count"][-1]], where="post", color=color)
    top.set(ylabel="accuracy", ylim=(-0.03, 1.03), xlim=(-0.02, 1.02))
    top.legend(frameon=False, fontsize=8)
    below.set(xlabel="confidence", ylabel=f"images of {part['samples']}", yscale="symlog")
    below.set_ylim(bottom=0)
    return figure


def ood(part: Part) -> Figure:
    """Histograms of each score: in-distribution against the other sets."""
    scores = part["histograms"]
    columns = min(3, len(scores))
    lines = -(-len(scores) // columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(3.1 * columns, 2.3 * lines), layout="constrained", squeeze=False
    )
    for panel in panels.flat[len(scores) :]:
        panel.axis("off")
    handles: list[Any] = []
    for panel, (score, found) in zip(panels.flat, scores.items(), strict=False):
        edges = np.linspace(found["ends"][0], found["ends"][1], len(found["id"]) + 1)
        handles = []
        for (name, color), style in zip(zip(["id", *part["detections"]], COLORS, strict=False), LINES, strict=False):
            share = np.array(found[name]) / max(1, sum(found[name]))
            label = "in-distribution" if name == "id" else f"{name} ({part['groups'][name]})"
            (line,) = panel.step(edges, [*share, share[-1]], where="post", color=color, linestyle=style, label=label)
            handles.append(line)
        panel.set_title(score.replace("_", " "), fontsize=9)
        panel.set_yticks([])
        panel.tick_params(labelsize=7)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), "-")
FIGURES: dict[str, Callable[[Part], Figure]] = {
    "adversarial": adversarial,
    "adversarial-margins": margins,
    "corruptions": corruptions,
    "calibration": calibration,
    "ood": ood,
}
"""By file name; the word before the first hyphen is the part that the figure shows."""
