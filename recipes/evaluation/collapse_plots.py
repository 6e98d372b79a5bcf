"""Figures of a collapse report as SVG, narrow enough to be read on a telephone."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from recipes.core.errors import UserError
from recipes.core.fonts import drawable
from recipes.core.plot_style import COLORS, GRAY, LINES, MATH_STYLE, STYLE
from recipes.evaluation import simplex_plot
from recipes.evaluation.collapse_report import MeasuredSplit, shown_features
from recipes.evaluation.snapshots import Snapshot

WIDTH = 4.3
"""Of a figure in inches: about the width of a telephone's page, so that its text keeps its size there."""

MOST_CELLS = 20
"""Classes whose cosines are shown one by one; of more a histogram."""

MOST_CORNERS = 60
"""Classes that the simplex view can show."""


@dataclass(frozen=True)
class Picture:
    """A figure on the page: SVG, its caption, and words for those who cannot see it."""

    title: str
    svg: str
    caption: str


def pictures(splits: Sequence[MeasuredSplit], class_names: Sequence[str], head: Any) -> list[Picture]:
    """Every figure that the splits allow; the first split is the one whose collapse is told."""
    first, last = splits[0], splits[-1]
    found = [spectrum(splits), cosines(first, class_names)]
    view = simplex_view(first, class_names, head)
    found += [view] if view is not None else []
    if last.seen.decisions is not None:
        found += [margins(splits), reliability(last)]
    if first.seen.layers:
        found.append(layers(splits))
    return found


def spectrum(splits: Sequence[MeasuredSplit]) -> Picture:
    """Eigenvalues within and between classes."""
    figure, panel = _figure()
    for place, split in enumerate(splits):
        for index, (key, label) in enumerate((("between", "between classes"), ("within", "within classes"))):
            values = np.array(split.record["spectrum"][key])
            values = np.where(values > 0, values, np.nan)
            look: Any = {"color": COLORS[index], "linestyle": LINES[(2 * place + index) % len(LINES)]}
            panel.plot(np.arange(1, len(values) + 1), values, label=f"{label}, {split.name}", **look)
    spread = any(max(values) > 0 for split in splits for values in split.record["spectrum"].values())
    panel.set(xlabel="direction, in order", ylabel="variance", xscale="log", yscale="log" if spread else "linear")
    panel.grid(alpha=0.25)
    panel.legend(frameon=False, fontsize=8)
    return Picture(
        "Spectrum",
        _svg(figure, MATH_STYLE),
        "Variance of the class means and of features around their class mean, along their own directions. At collapse "
        "the curve within classes lies far below, and that between classes is flat over C − 1 directions.",
    )


def cosines(split: MeasuredSplit, class_names: Sequence[str]) -> Picture:
    """Cosines of the centred class means: a matrix, or a histogram of many."""
    here = (split.collapse.counts > 0).numpy()
    table = split.collapse.cosines().cpu().numpy()[np.ix_(here, here)]
    every, style = drawable(class_names, STYLE)
    names = [name for name, present in zip(every, here, strict=True) if present]
    ideal = -1 / max(1, len(names) - 1)
    if len(names) > MOST_CELLS:
        figure, panel = _figure()
        values = table[np.triu_indices(len(names), 1)]
        panel.hist(values, bins=60, color=COLORS[0])
        panel.axvline(ideal, color=COLORS[1], linestyle=LINES[1], label=f"simplex, {ideal:.3f}")
        panel.set(xlabel="cosine of two class means", ylabel="pairs of classes", yscale="log")
        panel.legend(frameon=False, fontsize=8)
    else:
        figure, panel = _figure(height=WIDTH * 0.9)
        shown = panel.imshow(table, vmin=-1, vmax=1, cmap="RdBu_r")
        short = [name if len(name) < 12 else f"{name[:10]}…" for name in names]
        look = {"fontsize": 8, "family": style["font.family"]}
        panel.set_xticks(range(len(names)), short, rotation=90, **look)
        panel.set_yticks(range(len(names)), short, **look)
        if len(names) <= 10:
            for (row, column), value in np.ndenumerate(table):
                color = "white" if abs(value) > 0.6 else "black"
                text = f"{value:.1f}".replace("-", "−")
                panel.text(column, row, text, ha="center", va="center", color=color, fontsize=7)
        for spine in panel.spines.values():
            spine.set_visible(False)
        figure.colorbar(shown, ax=panel, shrink=0.8)
    return Picture(
        "Cosines between classes",
        _svg(figure, MATH_STYLE if len(names) > MOST_CELLS else STYLE),
        f"Cosines of the class means around their centre, {split.name} images. In a simplex every pair has "
        f"{ideal:.3f}; a large one is a pair of classes that share a direction.",
    )


def simplex_view(split: MeasuredSplit, class_names: Sequence[str], head: Any) -> Picture | None:
    """Features in the plane of the nearest simplex; None for classes without images, or too many."""
    classes, width = len(class_names), split.seen.features.width
    if classes > MOST_CORNERS or width < classes - 1 or int((split.collapse.counts > 0).sum()) < classes:
        return None
    features, target = shown_features(split.seen, split.collapse.counts)
    weight: Any = getattr(head, "class_vectors", getattr(head, "weight", None))
    if not isinstance(weight, Tensor) or tuple(weight.shape) != (classes, width):
        weight = split.collapse.centred
    snapshot = Snapshot(f"{split.name} images", features.numpy(), target.numpy(), weight.detach().cpu().float().numpy())
    try:
        view = simplex_plot.project(snapshot)
    except UserError:  # features that hold no simplex
        return None
    figure, words = simplex_plot.draw([view], class_names)
    figure.set_size_inches(WIDTH, WIDTH + 0.5)
    return Picture("Simplex view", _svg(figure), words)


def margins(splits: Sequence[MeasuredSplit]) -> Picture:
    """Histogram of the margins of each split."""
    figure, panel = _figure()
    for place, split in enumerate(splits):
        held = split.record["margins"]["histogram"]
        counts = np.array(held["counts"], dtype=float) / max(1, sum(held["counts"]))
        low, high = held["ends"]
        edges = np.linspace(low, high, len(counts) + 1)
        look: Any = {"color": COLORS[place], "linestyle": LINES[place % len(LINES)]}
        panel.step(edges, [*counts, counts[-1]], where="post", label=split.name, **look)
    panel.axvline(0, color=GRAY, linewidth=1, linestyle=":")
    panel.set(xlabel="logit of the true class − largest other", ylabel="share of the images")
    panel.legend(frameon=False, fontsize=8)
    return Picture("Margins", _svg(figure), "Left of 0 an image is classified wrongly; far right it is safely right.")


def reliability(split: MeasuredSplit) -> Picture:
    """Accuracy against confidence."""
    figure, panel = _figure(height=WIDTH * 0.8)
    rows = [row for row in split.record["reliability"] if row["count"]]
    total = sum(row["count"] for row in rows)
    panel.plot([0, 1], [0, 1], color=GRAY, linestyle=":", linewidth=1)
    panel.scatter(
        [row["confidence"] for row in rows],
        [row["accuracy"] for row in rows],
        s=[12 + 250 * row["count"] / total for row in rows],
        color=COLORS[0],
        alpha=0.8,
    )
    panel.set(xlabel="confidence", ylabel="accuracy", xlim=(-0.03, 1.05), ylim=(-0.05, 1.08))
    return Picture(
        "Calibration",
        _svg(figure),
        f"Images of {split.name} by their confidence, the size of a point by their number. Below the line the model is "
        "too sure.",
    )


def layers(splits: Sequence[MeasuredSplit]) -> Picture:
    """NC1 of the inner layers."""
    figure, panel = _figure()
    for place, split in enumerate(splits):
        found: Mapping[str, Mapping[str, float]] = split.seen.layers
        if found:
            values = [row["nc1"] for row in found.values()]
            look: Any = {"color": COLORS[place], "linestyle": LINES[place % len(LINES)], "marker": "o"}
            panel.plot(range(len(values)), values, label=split.name, **look)
            panel.set_xticks(range(len(values)), list(found), rotation=45, ha="right", fontsize=8)
    panel.set(ylabel="NC1", yscale="log")
    panel.grid(alpha=0.25)
    panel.legend(frameon=False, fontsize=8)
    return Picture(
        "Layer by layer",
        _svg(figure, MATH_STYLE),
        "Within-class variability of the pooled outputs of inner layers, first to last.",
    )


def _figure(height: float = WIDTH * 0.66) -> tuple[Figure, Any]:
    with plt.rc_context(MATH_STYLE):
        return plt.subplots(figsize=(WIDTH, height), layout="constrained")


def _svg(figure: Figure, style: Any = STYLE) -> str:
    """The figure as an SVG element whose size follows the page."""
    out = io.StringIO()
    with plt.rc_context(style):
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    plt.close(figure)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    head, _, rest = text.partition(">")
    return re.sub(r' (width|height)="[^"]*"', "", head) + ">" + rest
