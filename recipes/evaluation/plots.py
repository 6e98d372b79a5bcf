"""Figures of a result, a file for each evaluation; each says how many images it shows and what the bars are."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from recipes.core.plot_style import COLORS, GRAY, LINES, MATH_STYLE
from recipes.evaluation.console_table import Numbers, whole
from recipes.evaluation.results import Result
from recipes.evaluation.temperature import no_temperature


def draw(folder: Path, result: Result, evaluations: Collection[str], *, title: str) -> None:
    """Write a PNG for each of these evaluations that has a picture; remove those of evaluations without outcome."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure_of in FIGURES.items():
        evaluation = name.split("-")[0]
        numbers = result.parts.get(evaluation)
        if numbers is None:
            (folder / f"{name}.png").unlink(missing_ok=True)
        elif evaluation in evaluations:
            with plt.rc_context(MATH_STYLE):
                figure = figure_of(numbers)
                figure.suptitle(title, fontsize=9)
                figure.savefig(folder / f"{name}.png", dpi=130)
                plt.close(figure)


def adversarial(numbers: Numbers) -> Figure:
    """Accuracy against ε under margin-PGD, and AutoAttack at its radius."""
    figure, panel = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
    curve = numbers["curve"]
    accuracy = 100 * np.array(curve["accuracy"])
    low, high = 100 * np.array(curve["intervals"]).T
    epsilons = np.array(curve["epsilons"])
    panel.fill_between(epsilons, low, high, color=COLORS[0], alpha=0.2, linewidth=0)
    panel.plot(epsilons, accuracy, "o-", color=COLORS[0], label=f"margin-PGD, upper bound (n = {curve['images']})")
    head = numbers["headline"]
    ends = 100 * np.array([[head["accuracy"] - head["low"]], [head["high"] - head["accuracy"]]])
    label = f"{head['name']} (n = {numbers['images']})"
    panel.errorbar(
        numbers["epsilon"], 100 * head["accuracy"], np.abs(ends), fmt="D", color=COLORS[1], capsize=4, label=label
    )
    panel.set(xlabel=f"ε ({numbers['norm']}, images in [0, 1])", ylabel="accuracy (%)", ylim=(-3, 103))
    panel.grid(alpha=0.25)
    panel.legend(frameon=False, fontsize=8)
    panel.annotate("95 % intervals", (0.99, 0.01), xycoords="axes fraction", ha="right", fontsize=7, color=GRAY)
    return figure


def margins(numbers: Numbers) -> Figure:
    """Histogram of the clean margins, in units of the logits' spread."""
    figure, panel = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
    counts, (low, high) = np.array(numbers["margins"]["counts"]), numbers["margins"]["ends"]
    edges = np.linspace(low, high, len(counts) + 1)
    wrong = edges[:-1] < 0
    panel.bar(edges[:-1][wrong], counts[wrong], np.diff(edges)[wrong], align="edge", color=COLORS[1], label="wrong")
    panel.bar(edges[:-1][~wrong], counts[~wrong], np.diff(edges)[~wrong], align="edge", color=COLORS[0], label="right")
    panel.axvline(numbers["margins"]["median"], color=GRAY, linestyle=":", linewidth=1, label="median")
    panel.set(xlabel="margin / spread of the logits, clean images", ylabel=f"images of {numbers['images']}")
    panel.legend(frameon=False, fontsize=8)
    return figure


def corruptions(numbers: Numbers) -> Figure:
    """Heat map, type by severity, every cell with its number."""
    accuracy = 100 * np.array(numbers["accuracy"], dtype=float)
    figure, panel = plt.subplots(figsize=(5.4, 0.32 * len(accuracy) + 1.5), layout="constrained")
    shown = panel.imshow(accuracy, vmin=0, vmax=100, cmap="cividis", aspect="auto")
    for (line, column), value in np.ndenumerate(accuracy):
        color = "black" if value > 55 else "white"
        panel.text(column, line, whole(value), ha="center", va="center", color=color, fontsize=8)
    panel.set_xticks(range(accuracy.shape[1]), numbers["severities"])
    panel.set_yticks(range(len(accuracy)), [name.replace("_", " ") for name in numbers["names"]], fontsize=8)
    panel.set(xlabel=f"severity ({numbers['samples']} images; clean {100 * numbers['clean_accuracy']:.1f} %)")
    figure.colorbar(shown, label="accuracy (%)")
    return figure


def calibration(numbers: Numbers) -> Figure:
    """Reliability diagram before and, if there is one, after a temperature, and the number of images in each bin."""
    figure, (top, below) = plt.subplots(
        2, 1, figsize=(4.6, 5), layout="constrained", sharex=True, gridspec_kw={"height_ratios": (3, 1)}
    )
    top.plot([0, 1], [0, 1], color=GRAY, linestyle=":", linewidth=1)
    labels = {"before": "softmax(z)"}
    why = no_temperature(numbers)
    if why is None:
        labels["after"] = f"softmax(z/T), T = {numbers['temperature']:.2g}"
    else:
        top.set_title(f"no T: {why.partition(':')[0]}", fontsize=7, color=GRAY)
    for (key, label), color, marker, line in zip(labels.items(), COLORS, "os", LINES, strict=False):
        bins = numbers[key]["reliability"]
        filled = [i for i, count in enumerate(bins["count"]) if count]
        confidence, right = ([bins[name][i] for i in filled] for name in ("confidence", "accuracy"))
        look: Any = {"color": color, "linestyle": line}
        top.plot(
            confidence, right, marker=marker, label=f"{label}, ECE {numbers[key]['ece']:.3f}", markersize=4, **look
        )
        edges = np.array(bins["edges"])
        below.step(edges, [*bins["count"], bins["count"][-1]], where="post", **look)
    top.set(ylabel="accuracy", ylim=(-0.03, 1.03), xlim=(-0.02, 1.02))
    top.legend(frameon=False, fontsize=8)
    below.set(xlabel="confidence", ylabel=f"images of {numbers['samples']}", yscale="symlog")
    below.set_ylim(bottom=0)
    return figure


def ood(numbers: Numbers) -> Figure:
    """Histograms of each score: in-distribution against the other sets."""
    scores = numbers["histograms"]
    columns = min(3, len(scores))
    lines = -(-len(scores) // columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(3.1 * columns, 2.3 * lines), layout="constrained", squeeze=False
    )
    for panel in panels.flat[len(scores) :]:
        panel.axis("off")
    handles: list[Any] = []
    for panel, (score, counts) in zip(panels.flat, scores.items(), strict=False):
        edges = np.linspace(counts["ends"][0], counts["ends"][1], len(counts["id"]) + 1)
        handles = []
        for index, name in enumerate(["id", *numbers["detections"]]):
            look: Any = {"color": COLORS[index % len(COLORS)], "linestyle": LINES[index % len(LINES)]}
            fraction = np.array(counts[name]) / max(1, sum(counts[name]))
            label = "in-distribution" if name == "id" else f"{name} ({numbers['groups'][name]})"
            handles += panel.step(edges, [*fraction, fraction[-1]], where="post", label=label, **look)
        panel.set_title(score.replace("_", " "), fontsize=9)
        panel.set_yticks([])
        panel.tick_params(labelsize=7)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def bits(numbers: Numbers) -> Figure:
    """Accuracy and agreement, ECE, NC1 and margins against the bits of a weight."""
    levels = numbers["levels"]
    place = np.arange(len(levels))
    figure, panels = plt.subplots(1, 4, figsize=(10.4, 2.9), layout="constrained")
    for name, color, marker in (("accuracy", COLORS[0], "o"), ("agreement", COLORS[1], "s")):
        values = 100 * np.array([found[name] for found in levels.values()])
        key = "interval" if name == "accuracy" else "agreement_interval"
        low, high = 100 * np.array([found[key] for found in levels.values()]).T
        panels[0].fill_between(place, low, high, color=color, alpha=0.2, linewidth=0)
        panels[0].plot(place, values, marker + "-", color=color, markersize=4, label=name)
    panels[0].legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("% (95 % intervals)")
    rows = (("ece", "ECE"), ("nc1", "NC1 (training images)"), ("normalized_margin_mean", "margin / norms (training)"))
    for panel, (name, label) in zip(panels[1:], rows, strict=True):
        panel.plot(
            place, np.array([found[name] for found in levels.values()], float), "o-", color=COLORS[0], markersize=4
        )
        panel.set_ylabel(label)
    panels[2].set_yscale("log")
    for panel in panels:
        panel.set_xticks(place, ["±s, 0" if level == "ternary" else level for level in levels], fontsize=8)
        panel.set_xlabel("bits a weight")
        panel.grid(alpha=0.25)
    return figure


FIGURES: dict[str, Callable[[Numbers], Figure]] = {
    "adversarial": adversarial,
    "adversarial-margins": margins,
    "corruptions": corruptions,
    "bits": bits,
    "calibration": calibration,
    "ood": ood,
}
"""By file name; the word before the first hyphen is the evaluation that the figure shows."""
