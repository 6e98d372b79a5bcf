"""Figures of measures: every seed with the paired differences, and collapse against accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from scipy import stats

from recipes.core.plot_style import GRAY, STYLE
from recipes.study.plots.figure import Figure, arm_marker, finish_figure, legend_label, set_scale
from recipes.study.spec import Measure
from recipes.study.tables import format_value, unit


def plot_measure(
    table: Mapping[str, Any], measure: Measure, arms: Mapping[str, str], base: str, name: str
) -> Figure | None:
    """Every seed of every arm, and the paired differences to the baseline with their 95 % intervals."""
    entries = [entry for entry in table["arms"] if entry["n"]]
    if not entries:
        return None
    factor = 100.0 if measure.form == "percent" else 1.0
    with plt.rc_context(STYLE):
        canvas, (left, right) = plt.subplots(
            1, 2, figsize=(8.4, 1.25 + 0.34 * len(entries)), sharey=True, layout="constrained", width_ratios=(1, 1)
        )
        order = list(arms)
        for row, entry in enumerate(entries):
            style = arm_marker(order, entry["arm"])
            values = [factor * value for value in entry["by_seed"].values()]
            left.plot(values, [row] * len(values), linestyle="", alpha=0.75, markersize=5, **style)
            left.plot([factor * entry["mean"]] * 2, [row - 0.28, row + 0.28], color=style["color"], linewidth=2)
            if entry["arm"] != base and entry["pairs"]:
                _difference(right, row, entry, table, base, factor, style)
        for seed in entries[0]["by_seed"]:
            there = [
                (factor * entry["by_seed"][seed], row) for row, entry in enumerate(entries) if seed in entry["by_seed"]
            ]
            left.plot(*zip(*there, strict=True), color=GRAY, linewidth=0.5, alpha=0.35, zorder=0)
        right.axvline(0, color=GRAY, linewidth=1)
        if measure.margin:
            right.axvspan(-factor * measure.margin, factor * measure.margin, color=GRAY, alpha=0.12, linewidth=0)
        left.set_yticks(range(len(entries)), [arms[entry["arm"]] for entry in entries])
        left.invert_yaxis()
        left.set(xlabel=f"{measure.title}{unit(measure)}")
        if measure.form == "scientific":
            set_scale(left.xaxis, [value for entry in entries for value in entry["by_seed"].values()])
        right.set(xlabel="difference to the baseline" + (" (points)" if measure.form == "percent" else ""))
        for panel in (left, right):
            panel.grid(axis="x", alpha=0.25)
            if panel.get_xscale() == "linear":
                panel.xaxis.set_major_locator(MaxNLocator(5))
        return finish_figure(canvas, name, measure.title, *_measure_words(table, measure, arms, base, entries))


def _difference(
    panel: Axes,
    row: int,
    entry: Mapping[str, Any],
    table: Mapping[str, Any],
    base: str,
    factor: float,
    style: Mapping[str, Any],
) -> None:
    theirs = next(other for other in table["arms"] if other["arm"] == base)["by_seed"]
    each = [factor * (value - theirs[seed]) for seed, value in entry["by_seed"].items() if seed in theirs]
    panel.plot(each, [row + 0.18] * len(each), linestyle="", alpha=0.45, markersize=3.5, **style)
    if entry["difference_low"] is not None:
        ends = [factor * entry["difference_low"], factor * entry["difference_high"]]
        panel.plot(ends, [row - 0.1] * 2, color=style["color"], linewidth=2)
    panel.plot([factor * entry["difference"]], [row - 0.1], linestyle="", markersize=6, **style)


def _measure_words(
    table: Mapping[str, Any], measure: Measure, arms: Mapping[str, str], base: str, entries: Sequence[Mapping[str, Any]]
) -> tuple[str, str]:
    means = "; ".join(
        f"{arms[entry['arm']]} {format_value(entry['mean'], measure.form)}"
        + ("" if entry["arm"] == base else f" ({entry['verdict']})")
        for entry in entries
    )
    band = " The gray band is the margin." if measure.margin else ""
    never = [arms[entry["arm"]] for entry in table["arms"] if entry["runs"] and not entry["n"]]
    if never:
        band += f" Not reached by any run of {', '.join(never)}."
        means += f"; not reached by {', '.join(never)}"
    return (
        f"{measure.title}{unit(measure)} on {table['data']}, mean over seeds: {means}.",
        "Left: every seed, the same seed joined by a line, the mean as a bar. Right: paired differences to "
        f"{arms[base]}, each seed small, mean and 95 % t interval large.{band}",
    )


def plot_collapse_accuracy(
    rows: Sequence[Mapping[str, Any]], arms: Mapping[str, str], data: str, name: str
) -> Figure | None:
    """NC1 of the training features against test accuracy at the end; a point a run."""
    rows = [row for row in rows if row["nc1"] and row["nc1"] > 0 and row["accuracy"] is not None]
    if len(rows) < 2:
        return None
    with plt.rc_context(STYLE):
        canvas, panel = plt.subplots(figsize=(8.4, 3.4), layout="constrained")
        for arm, label in arms.items():
            own = [row for row in rows if row["arm"] == arm]
            if not own:
                continue
            x, y = [row["nc1"] for row in own], [100 * row["accuracy"] for row in own]
            panel.plot(
                x, y, linestyle="", alpha=0.8, markersize=6, label=legend_label(label), **arm_marker(list(arms), arm)
            )
        panel.set(xlabel="NC1 of the training features at the end (left: more collapsed)", ylabel="test accuracy (%)")
        set_scale(panel.xaxis, [row["nc1"] for row in rows])
        panel.grid(alpha=0.25)
        canvas.legend(loc="outside right upper", frameon=False, fontsize=9)
        x, y = [row["nc1"] for row in rows], [row["accuracy"] for row in rows]
        if len(rows) < 5 or np.ptp(x) == 0 or np.ptp(y) == 0:
            rank = "too few for a correlation" if len(rows) < 5 else "no correlation, for one of them is constant"
            note = f"A point a run; {rank}."
        else:
            rank = f"rank correlation {stats.spearmanr(x, y).statistic:+.2f}".replace("-", "−")
            mixes = "which mixes what arms and seeds do: a description, not a cause"
            note = f"A point a run; over all runs {rank}, {mixes}."
        return finish_figure(
            canvas,
            name,
            "Collapse against accuracy",
            f"NC1 against test accuracy of {len(rows)} runs on {data}: {rank}.",
            note,
        )
