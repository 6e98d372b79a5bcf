"""The figures of a study as SVG with words as text: readable at any size, searchable, the same to the last byte."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.axis import XAxis, YAxis  # noqa: E402
from matplotlib.figure import Figure as Canvas  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter  # noqa: E402
from scipy import stats  # noqa: E402

from recipes.core.plot_style import COLORS, GRAY, LINES, MARKERS, STYLE
from recipes.study.spec import Measure  # noqa: E402
from recipes.study.tables import shown, unit  # noqa: E402

MOST_CURVES = 7


@dataclass(frozen=True)
class Figure:
    """One figure: its file's name, its title, the picture, what it shows in words, and the line under it."""

    name: str
    title: str
    svg: str
    alt: str
    caption: str


def look(arms: Sequence[str], arm: str) -> dict[str, Any]:
    """Colour and marker of an arm: no two arms share both, up to 84."""
    index = list(arms).index(arm)
    return {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}


def dashes(arms: Sequence[str], arm: str) -> dict[str, Any]:
    """The line of an arm, where it has one: colour is never alone in telling arms apart."""
    return {"linestyle": LINES[list(arms).index(arm) % len(LINES)]}


def _shown(label: str) -> str:
    """The label; matplotlib leaves those with a leading underscore out of the legend."""
    return f" {label}" if label.startswith("_") else label


def finished(canvas: Canvas, name: str, title: str, alt: str, caption: str) -> Figure:
    """The canvas as a figure whose ids no other figure on the page has."""
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    plt.close(canvas)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    return Figure(name, title, svg, alt, caption)


def dots(table: Mapping[str, Any], measure: Measure, arms: Mapping[str, str], base: str, name: str) -> Figure | None:
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
            style = look(order, entry["arm"])
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
            scaled(left.xaxis, [value for entry in entries for value in entry["by_seed"].values()])
        right.set(xlabel="difference to the baseline" + (" (points)" if measure.form == "percent" else ""))
        for panel in (left, right):
            panel.grid(axis="x", alpha=0.25)
            if panel.get_xscale() == "linear":
                panel.xaxis.set_major_locator(MaxNLocator(5))
        return finished(canvas, name, measure.title, *_dots_words(table, measure, arms, base, entries))


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


def _dots_words(
    table: Mapping[str, Any], measure: Measure, arms: Mapping[str, str], base: str, entries: Sequence[Mapping[str, Any]]
) -> tuple[str, str]:
    said = "; ".join(
        f"{arms[entry['arm']]} {shown(entry['mean'], measure.form)}"
        + ("" if entry["arm"] == base else f" ({entry['verdict']})")
        for entry in entries
    )
    band = " The gray band is the margin." if measure.margin else ""
    never = [arms[entry["arm"]] for entry in table["arms"] if entry["runs"] and not entry["n"]]
    if never:
        band += f" Not reached by any run of {', '.join(never)}."
        said += f"; not reached by {', '.join(never)}"
    return (
        f"{measure.title}{unit(measure)} on {table['data']}, mean over seeds: {said}.",
        "Left: every seed, the same seed joined by a line, the mean as a bar. Right: paired differences to "
        f"{arms[base]}, each seed small, mean and 95 % t interval large.{band}",
    )


def scale_for(values: Iterable[float]) -> str:
    """A logarithmic axis where positive values span a decade; a linear one says more about fewer."""
    seen = [value for value in values if np.isfinite(value)]
    return "log" if seen and min(seen) > 0 and max(seen) >= 10 * min(seen) else "linear"


def scaled(axis: XAxis | YAxis, values: Sequence[float]) -> None:
    """The axis as `scale_for` says, a logarithm with plain numbers: mathematics would be shown as its source."""
    if scale_for(values) == "linear":
        return
    (axis.axes.set_xscale if isinstance(axis, XAxis) else axis.axes.set_yscale)("log")
    seen = [value for value in values if np.isfinite(value)]
    wide = max(seen) > 100 * min(seen)
    axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def scatter(rows: Sequence[Mapping[str, Any]], arms: Mapping[str, str], data: str, name: str) -> Figure | None:
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
            panel.plot(x, y, linestyle="", alpha=0.8, markersize=6, label=_shown(label), **look(list(arms), arm))
        panel.set(xlabel="NC1 of the training features at the end (left: more collapsed)", ylabel="test accuracy (%)")
        scaled(panel.xaxis, [row["nc1"] for row in rows])
        panel.grid(alpha=0.25)
        canvas.legend(loc="outside right upper", frameon=False, fontsize=9)
        x, y = [row["nc1"] for row in rows], [row["accuracy"] for row in rows]
        if len(rows) < 5 or np.ptp(x) == 0 or np.ptp(y) == 0:
            rank = "too few for a correlation" if len(rows) < 5 else "no correlation: one of them is constant"
        else:
            rank = f"rank correlation {stats.spearmanr(x, y).statistic:+.2f}".replace("-", "−")
        return finished(
            canvas,
            name,
            "Collapse against accuracy",
            f"NC1 against test accuracy of {len(rows)} runs on {data}: {rank}.",
            f"A point a run; over all runs {rank}, which mixes what arms and seeds do: a description, not a cause.",
        )


PANELS = (
    ("train_accuracy", "training error (%)"),
    ("val_accuracy", "validation accuracy (%)"),
    ("nc1", "NC1"),
    ("nc3", "NC3"),
)


def curves(
    histories: Mapping[str, Sequence[Mapping[str, list[float | None]]]],
    onsets: Mapping[str, Sequence[int | None]],
    arms: Mapping[str, str],
    data: str,
    name: str,
) -> Figure | None:
    """The course of training, the median over seeds of each arm, and below it every seed's epoch of zero error."""
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
        handles, labels = panels[0].get_legend_handles_labels()
        columns = len(drawn) if len(drawn) < 6 else 4
        canvas.legend(
            handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=9, handlelength=4
        )
        left_out = f" The first {MOST_CURVES} of {len(arms)} arms." if len(arms) > len(drawn) == MOST_CURVES else ""
        when = "; ".join(f"{arms[arm]} {_when(onsets.get(arm, ()))}" for arm in drawn)
        return finished(
            canvas,
            name,
            "Through the terminal phase",
            f"Course of training on {data}: training error, validation accuracy, NC1 and NC3 by epoch. Seeds that "
            f"reached zero error: {when}.",
            f"Curves: median over seeds, as far as all of them went. Below: the epoch at which a seed reached zero "
            f"error and its terminal phase began, a mark a seed. Reached by: {when}.{left_out}",
        )


def _when(onsets: Sequence[int | None]) -> str:
    """How many seeds reached zero error, and when."""
    epochs = [epoch for epoch in onsets if epoch is not None]
    if not epochs:
        return f"none of {len(onsets)}"
    ends = f"epoch {min(epochs)}" if min(epochs) == max(epochs) else f"epochs {min(epochs)} to {max(epochs)}"
    return f"{len(epochs)} of {len(onsets)} ({ends})"


def _onsets(panel: Axes, onsets: Mapping[str, Sequence[int | None]], arms: Mapping[str, str], drawn: list[str]) -> None:
    for row, arm in enumerate(drawn):
        epochs = [epoch for epoch in onsets.get(arm, ()) if epoch is not None]
        panel.plot(epochs, [row] * len(epochs), linestyle="", alpha=0.7, markersize=6, **look(list(arms), arm))
        reached = f"{len(epochs)} of {len(onsets.get(arm, ()))}"
        panel.annotate(reached, (1, row), xycoords=("axes fraction", "data"), ha="right", va="center", fontsize=9)
    panel.set_yticks(range(len(drawn)), [arms[arm] for arm in drawn])
    panel.set(ylim=(len(drawn) - 0.4, -0.6))
    panel.set_title("zero error reached, each seed (right: how many of them)", loc="left", fontsize=10)


def _scale(panel: Axes, key: str) -> None:
    """Errors go down to zero, where a logarithm ends; NC1 and NC3 as `scale_for` says; ticks are plain numbers."""
    values = [float(value) for line in panel.lines for value in np.asarray(line.get_ydata())]
    if key == "train_accuracy":
        panel.set_yscale("symlog", linthresh=0.1)
        panel.set_yticks([0, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"], minor=False)
        panel.set_ylim(0, 1.3 * max([0.1, *(value for value in values if np.isfinite(value))]))
    elif key != "val_accuracy":
        scaled(panel.yaxis, values)


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
    style = look(order, arm) | dashes(order, arm)
    step = max(1, length // 6)
    marked = (order.index(arm) * step // len(order), step)  # arms that run alike carry their marks side by side
    middle = np.median(values, axis=0)
    panel.plot(
        range(1, length + 1), middle, label=_shown(label), markevery=marked, markersize=5, linewidth=1.4, **style
    )
