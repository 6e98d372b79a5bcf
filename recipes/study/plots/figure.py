"""A figure as SVG with its words: readable at any size, searchable, the same to the last byte every time."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from recipes.core.plot_style import COLORS, LINES, MARKERS


@dataclass(frozen=True)
class Figure:
    """One figure of a report.

    Attributes:
        name: its file's name, and the prefix of its ids.
        title: heading over it.
        svg: the picture.
        alt: what it shows, in words.
        caption: the line under it.
    """

    name: str
    title: str
    svg: str
    alt: str
    caption: str


def finish_figure(canvas: Canvas, name: str, title: str, alt: str, caption: str) -> Figure:
    """Close the canvas and return it as a figure whose ids no other figure on the page has."""
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    plt.close(canvas)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return Figure(name, title, compact(prefix_ids(svg, name), name), alt, caption)


def prefix_ids(svg: str, name: str) -> str:
    """The SVG with ids that begin with `name`; an id that nothing refers to is left out.

    Example:
        >>> prefix_ids('<g id="a"><path id="mb0500"/></g><use href="#mb0500" clip-path="url(#mb0500)"/>', "x")
        '<g><path id="x-i0"/></g><use href="#x-i0" clip-path="url(#x-i0)"/>'
    """
    reference = r'(href="#|url\(#)([^")]+)'
    used = dict.fromkeys(old for _, old in re.findall(reference, svg))
    new = {old: f"{name}-i{number}" for number, old in enumerate(used)}
    svg = re.sub(r' id="([^"]+)"', lambda match: f' id="{new[match[1]]}"' if match[1] in new else "", svg)
    return re.sub(reference, lambda match: match[1] + new[match[2]], svg)


def compact(svg: str, name: str) -> str:
    r"""The SVG in a third of the space: each style written once, positions to a tenth of a point, no indentation.

    Example:
        >>> print(compact('<style>*{a: b}</style>\n <path d="M 1.23 7 \nL 8.96 -0.04" style="c: d"/>', "x"))
        <style>*{a: b}.x-0{c: d}</style>
        <path d="M1.2 7L9 0" class="x-0"/>
    """
    svg = re.sub(r">\n\s+<", ">\n<", svg)
    svg = re.sub(r' transform="rotate\(-?0 [^)]*\)"', "", svg)
    while (flatter := re.sub(r"<g>\n((?:(?!</?g\b).)*)</g>\n", r"\1", svg, flags=re.DOTALL)) != svg:
        svg = flatter  # a group without attributes does nothing
    classes: dict[str, str] = {}

    def shorten(tag: re.Match[str]) -> str:
        text = re.sub(r'(?<= )(?:d|x|y)="[^"]*"', _short_numbers, tag[0])
        return re.sub(
            r'(?<= )style="([^"]*)"',
            lambda style: f'class="{classes.setdefault(style[1], f"{name}-{len(classes)}")}"',
            text,
        )

    svg = re.sub(r"<[a-z][^>]*>", shorten, svg)
    rules = "".join(f".{word}{{{style}}}" for style, word in classes.items())
    return svg.replace("</style>", f"{rules}</style>", 1)


def _short_numbers(attribute: re.Match[str]) -> str:
    text = re.sub(r"-?\d+\.\d+", lambda number: f"{round(float(number[0]), 1) or 0:g}", attribute[0])
    return re.sub(r"([MLCQ]) ", r"\1", re.sub(r" ?\n", "", text))


def arm_marker(arms: Sequence[str], arm: str) -> dict[str, Any]:
    """Colour and marker of an arm: no two arms share both, up to 84."""
    index = list(arms).index(arm)
    return {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}


def arm_line(arms: Sequence[str], arm: str) -> dict[str, Any]:
    """The line style of an arm, so that colour is never the only difference between two arms."""
    return {"linestyle": LINES[list(arms).index(arm) % len(LINES)]}


def legend_label(label: str) -> str:
    """The label; with a space before a leading underscore, which would keep it out of matplotlib's legend."""
    return f" {label}" if label.startswith("_") else label


def scale_for(values: Iterable[float]) -> str:
    """Log for positive values that span a decade or more, else linear."""
    finite = [value for value in values if np.isfinite(value)]
    return "log" if finite and min(finite) > 0 and max(finite) >= 10 * min(finite) else "linear"


def set_scale(axis: XAxis | YAxis, values: Sequence[float]) -> None:
    """Give the axis the scale of `scale_for`; a logarithmic one gets plain numbers, as SVG text has no exponents."""
    if scale_for(values) == "linear":
        return
    (axis.axes.set_xscale if isinstance(axis, XAxis) else axis.axes.set_yscale)("log")
    finite = [value for value in values if np.isfinite(value)]
    wide = max(finite) > 100 * min(finite)
    axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
