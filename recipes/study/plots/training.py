"""The figure of training: median curves of each arm, and the epochs of zero error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from recipes.core.plot_style import STYLE
from recipes.study.plots.figure import Figure, arm_line, arm_marker, finish_figure, legend_label, set_scale

MOST_CURVES = 7

PANELS = (
    ("train_accuracy", "training error (%)"),
    ("val_accuracy", "validation accuracy (%)"),
    ("nc1", "NC1"),
    ("nc3", "NC3"),
)


def plot_training(
    histories: Mapping[str, Sequence[Mapping[str, list[float | None]]]],
    onsets: Mapping[str, Sequence[int | None]],
    arms: Mapping[str, str],
    data: str,
    name: str,
) -> Figure | None:
    """The course of training, as the median over seeds of each arm, and below it every seed's epoch of zero error.

    Args:
        histories: for each arm, the curves of its runs.
        onsets: for each arm, the epoch of zero error of each run; None where a run did not reach it.
        arms: label of each arm.
        data: the data setting.
        name: the figure's.
    """
    drawn = [arm for arm in arms if histories.get(arm)][:MOST_CURVES]
    if not drawn:
        return None
    with plt.rc_context(STYLE):
        strip = 0.55 + 0.24 * len(drawn)
        canvas = plt.figure(figsize=(8.4, 6 + strip), layout="constrained")
        grid = canvas.add_gridspec(3, 2, height_ratios=(2.6, 2.6, strip))
        panels = [canvas.add_subplot(grid[place // 2, place % 2]) for place in range(4)]
        for panel, (key, label) in zip(panels, PANELS, strict=True):
            for arm in drawn:
                _curve(panel, key, histories[arm], list(arms), arm, arms[arm])
            panel.set(ylabel=label)
            _scale(panel, key)
        below = canvas.add_subplot(grid[2, :])
        _onsets(below, onsets, arms, drawn)
        last = max(len(run["train_accuracy"]) for arm in drawn for run in histories[arm])
        for panel in (*panels, below):
            panel.set(xlabel="epoch", xlim=(0, last * (1.1 if panel is below else 1.02)))
            panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            panel.grid(alpha=0.25, axis="x" if panel is below else "both")
        entries = panels[0].get_legend_handles_labels()
        columns = len(drawn) if len(drawn) < 6 else 4
        canvas.legend(*entries, loc="outside upper center", ncols=columns, frameon=False, fontsize=9, handlelength=4)
        return finish_figure(canvas, name, "Through the terminal phase", *_curves_words(onsets, arms, data, drawn))


def _curves_words(
    onsets: Mapping[str, Sequence[int | None]], arms: Mapping[str, str], data: str, drawn: Sequence[str]
) -> tuple[str, str]:
    """The description and the caption."""
    left_out = f" The first {MOST_CURVES} of {len(arms)} arms." if len(arms) > len(drawn) == MOST_CURVES else ""
    when = "; ".join(f"{arms[arm]} {_when(onsets.get(arm, ()))}" for arm in drawn)
    return (
        f"Course of training on {data}: training error, validation accuracy, NC1 and NC3 by epoch. Seeds that "
        f"reached zero error: {when}.",
        f"Curves: median over seeds, as far as all of them went. Below: the epoch at which a seed reached zero "
        f"error and its terminal phase began, a mark a seed. Reached by: {when}.{left_out}",
    )


def _when(onsets: Sequence[int | None]) -> str:
    """How many seeds reached zero error, and when.

    Example:
        >>> _when([3, None, 5])
        '2 of 3 (epochs 3 to 5)'
    """
    epochs = [epoch for epoch in onsets if epoch is not None]
    if not epochs:
        return f"none of {len(onsets)}"
    ends = f"epoch {min(epochs)}" if min(epochs) == max(epochs) else f"epochs {min(epochs)} to {max(epochs)}"
    return f"{len(epochs)} of {len(onsets)} ({ends})"


def _onsets(panel: Axes, onsets: Mapping[str, Sequence[int | None]], arms: Mapping[str, str], drawn: list[str]) -> None:
    for row, arm in enumerate(drawn):
        epochs = [epoch for epoch in onsets.get(arm, ()) if epoch is not None]
        panel.plot(epochs, [row] * len(epochs), linestyle="", alpha=0.7, markersize=6, **arm_marker(list(arms), arm))
        reached = f"{len(epochs)} of {len(onsets.get(arm, ()))}"
        panel.annotate(reached, (1, row), xycoords=("axes fraction", "data"), ha="right", va="center", fontsize=9)
    panel.set_yticks(range(len(drawn)), [arms[arm] for arm in drawn])
    panel.set(ylim=(len(drawn) - 0.4, -0.6))
    panel.set_title("zero error reached, each seed (right: how many of them)", loc="left", fontsize=10)


def _scale(panel: Axes, key: str) -> None:
    """The training error on an axis that is linear near zero and logarithmic above; NC1 and NC3 by `set_scale`."""
    values = [float(value) for line in panel.lines for value in np.asarray(line.get_ydata())]
    if key == "train_accuracy":
        panel.set_yscale("symlog", linthresh=0.1)
        panel.set_yticks([0, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"], minor=False)
        panel.set_ylim(0, 1.3 * max([0.1, *(value for value in values if np.isfinite(value))]))
    elif key != "val_accuracy":
        set_scale(panel.yaxis, values)


def _curve(
    panel: Axes,
    key: str,
    runs: Sequence[Mapping[str, list[float | None]]],
    order: list[str],
    arm: str,
    label: str,
) -> None:
    length = min(len(run[key]) for run in runs)
    values = np.array([[np.nan if v is None else v for v in run[key][:length]] for run in runs], dtype=np.float64)
    values = {"train_accuracy": 100 * (1 - values), "val_accuracy": 100 * values}.get(key, values)
    style = arm_marker(order, arm) | arm_line(order, arm)
    step = max(1, length // 6)
    marked = (order.index(arm) * step // len(order), step)  # arms that run alike carry their marks side by side
    middle = np.median(values, axis=0)
    panel.plot(
        range(1, length + 1), middle, label=legend_label(label), markevery=marked, markersize=5, linewidth=1.4, **style
    )
