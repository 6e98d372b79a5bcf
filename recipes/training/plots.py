"""Figures of a training run: accuracy and loss, measures of collapse, and the learning rates that were planned."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from recipes.core.plot_style import COLORS, GRAY, LINES, MATH_STYLE
from recipes.training.reporting import zero_error

DISTANCES = {"nc1": "NC1", "nc2_equiangularity": "NC2 (angles)", "nc2_equinorm": "NC2 (lengths)", "nc3": "NC3"}
GAPS = {"intra_cosine_gap": "1 − intra-class cosine", "inter_cosine_gap": "|inter-class cosine + 1/(C−1)|"}


def plot_run(
    folder: Path, history: Sequence[Mapping[str, Any]], onset: int | None, *, title: str, threshold: float
) -> None:
    """accuracy.png and collapse.png in `folder`, from a run's history.

    A dotted line marks the epoch of zero error, and says of a `threshold` below 1 what accuracy that is.
    """
    mark = (onset, zero_error(threshold))
    epochs = [record["epoch"] for record in history]
    with plt.rc_context(MATH_STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        for split, label, style in (("train", "training", "-"), ("val", "validation", "--")):
            accuracy = [100 * record[f"{split}_accuracy"] for record in history]
            left.plot(epochs, accuracy, style, color=COLORS[0], label=label)
            right.plot(epochs, [record[f"{split}_loss"] for record in history], style, color=COLORS[1], label=label)
        left.set(xlabel="epoch", ylabel="accuracy (%)")
        right.set(xlabel="epoch", ylabel="cross-entropy (nats)", yscale="log")
        _finish(figure, (left, right), mark, title, folder / "accuracy.png")

        figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        for panel, measures in zip(panels, (DISTANCES, GAPS), strict=True):
            for color, line, (name, label) in zip(COLORS, LINES, measures.items(), strict=False):
                values = _positive(record["measures"].get(name) for record in history)
                panel.plot(epochs, values, color=color, linestyle=line, label=label)
            panel.set(xlabel="epoch", ylabel="distance from collapse", yscale="log")
        _finish(figure, panels, mark, title, folder / "collapse.png")


def _positive(values: Iterable[float | None]) -> list[float]:
    """The values, with NaN for those that a logarithmic axis cannot show."""
    return [value if value and value > 0 else math.nan for value in values]


def _finish(figure: Any, panels: Sequence[Axes], mark: tuple[int | None, str], title: str, path: Path) -> None:
    onset, word = mark
    for panel in panels:
        if onset is not None:
            panel.axvline(onset, color=GRAY, linewidth=1, linestyle=":")
            panel.annotate(f" {word}", (onset, 1), xycoords=("data", "axes fraction"), va="top", color=GRAY, fontsize=8)
        panel.grid(alpha=0.25)
        panel.legend(frameon=False, fontsize=8, handlelength=3)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_plan(planned: Mapping[int | None, list[float]], path: Path, *, title: str) -> None:
    """Learning rate by epoch, one curve for each assumed epoch of zero error (None: never)."""
    with plt.rc_context(MATH_STYLE):
        figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
        for (onset, rates), color, line in zip(planned.items(), COLORS, LINES, strict=False):
            label = "zero error never reached" if onset is None else f"zero error at epoch {onset}"
            axis.plot(range(1, len(rates) + 1), rates, linestyle=line, color=color, label=label)
        axis.set(xlabel="epoch", ylabel="learning rate", title=title)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
        try:
            figure.savefig(path, dpi=130)
        finally:
            plt.close(figure)
