"""A ranking of backbones as lines to print, and as a figure with the scores beside each other."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from recipes.core.plot_style import COLORS, GRAY, STYLE
from recipes.evaluation.backbone_scores import NOT_FOR_TRAINED, BackboneRanking, BackboneScores

Cell = Callable[[BackboneScores], str]

WIDEST = 44
"""Characters of a candidate's name in the table, at most; the beginning of a longer one is left out."""


def number(value: float | None, form: str) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else format(value, form)


COLUMNS: tuple[tuple[str, Cell], ...] = (
    ("probe", lambda row: f"{row.linear_probe:.1%}"),
    ("[95 %]", lambda row: "[{:.1f}, {:.1f}]".format(*(100 * end for end in row.probe_interval))),
    ("centre", lambda row: f"{row.nearest_center:.1%}"),
    ("CDNV", lambda row: number(row.cdnv, ".3g")),
    ("LogME", lambda row: number(row.logme, ".3f")),
    ("NCTI", lambda row: number(row.ncti, "g")),
    ("NASWOT", lambda row: number(row.naswot, ".1f")),
    ("dim", lambda row: str(row.dim)),
    ("params", lambda row: f"{row.parameters / 1e6:.2f} M"),
    ("side", lambda row: str(row.image_size)),
    ("seconds", lambda row: f"{row.seconds:.1f}"),
    ("images/s", lambda row: f"{row.images_per_second:.0f}"),
)

MEANING = (
    "probe: accuracy of logistic regression on frozen features; centre: leave-one-out nearest class centre on the "
    "training features; lower CDNV is better, higher is better in all others; NCTI: sum of three ranks among these "
    "candidates; NASWOT: untrained ReLU networks alone"
)

PANELS: tuple[tuple[str, Callable[[BackboneScores], float | None]], ...] = (
    ("linear probe (%)", lambda row: 100 * row.linear_probe),
    ("nearest centre (%)", lambda row: 100 * row.nearest_center),
    ("CDNV (lower is better)", lambda row: row.cdnv),
    ("LogME", lambda row: row.logme),
    ("NCTI (ranks)", lambda row: row.ncti),
    ("NASWOT", lambda row: row.naswot),
    ("images/s", lambda row: row.images_per_second),
    ("parameters (M)", lambda row: row.parameters / 1e6),
)


def ranking_table(ranking: BackboneRanking) -> str:
    """The ranking, best linear probe first, then what could not be scored.

    Example:
        >>> row = BackboneScores("net", 0.5, (0.4, 0.6), 1.0, 0.5, 2.0, -0.5, 8, 1_000_000, 28, 2.0, 50.0)
        >>> table = ranking_table(BackboneRanking("digits", {}, 10, 80, "val", 20, 0, (row,), {}))
        >>> print(table.partition("probe: ")[0])
        digits: 10 classes, 80 training images, probe on 20 val images, seed 0
             probe        [95 %]  centre  CDNV   LogME  NCTI  NASWOT  dim  params  side  seconds  images/s
        net  50.0%  [40.0, 60.0]   50.0%     2  -0.500     -       -    8  1.00 M    28      2.0        50
        <BLANKLINE>
    """
    head = (
        f"{ranking.data}: {ranking.classes} classes, {ranking.train_images} training images, probe on "
        f"{ranking.held_out_images} {ranking.held_out} images, seed {ranking.seed}"
    )
    names = [_short(row.name) for row in ranking.scores]
    columns = [["", *names]] + [[title, *map(cell, ranking.scores)] for title, cell in COLUMNS]
    widths = [max(map(len, column)) for column in columns]
    lines = [head]
    for cells in zip(*columns, strict=True):
        first = f"{cells[0]:<{widths[0]}}"
        lines.append("  ".join([first, *(f"{cell:>{w}}" for cell, w in zip(cells[1:], widths[1:], strict=True))]))
    lines += ["", *textwrap.wrap(MEANING, 100)]
    without = [row for row in ranking.scores if row.naswot is None and row.no_naswot != NOT_FOR_TRAINED]
    lines += [f"no NASWOT of {row.name}: {row.no_naswot}" for row in without]
    edge = [f"{row.name} (l2 = {row.probe_l2:g})" for row in ranking.scores if row.probe_at_edge]
    lines += [f"probe at the end of its grid of penalties: {', '.join(edge)}"] if edge else []
    lines += [f"NOT SCORED {name}: {reason}" for name, reason in ranking.failed.items()]
    return "\n".join(lines)


def _short(name: str) -> str:
    return name if len(name) <= WIDEST else f"…{name[1 - WIDEST :]}"


def draw_ranking(ranking: BackboneRanking, path: Path) -> list[Path]:
    """Write the figure as PNG and SVG: a panel a score, a line a candidate, the best probe on top."""
    panels = [(title, value) for title, value in PANELS if any(_finite(value(row)) for row in ranking.scores)]
    rows = len(ranking.scores)
    lines = np.arange(rows)[::-1]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(1.7 * len(panels) + 3, 0.34 * rows + 1.6), sharey=True, layout="constrained"
        )
        for axis, (title, value) in zip(np.atleast_1d(axes), panels, strict=True):
            points = [
                (found, line) for row, line in zip(ranking.scores, lines, strict=True) if _finite(found := value(row))
            ]
            axis.plot(*zip(*points, strict=True), "o", color=COLORS[0], markersize=5)
            axis.set_title(title, fontsize=9)
            axis.grid(axis="both", alpha=0.25)
            axis.tick_params(labelsize=7)
            axis.margins(x=0.15)
        first = np.atleast_1d(axes)[0]
        ends = 100 * np.array([row.probe_interval for row in ranking.scores])
        first.hlines(lines, ends[:, 0], ends[:, 1], color=COLORS[0], linewidth=1)
        first.set_yticks(lines, [_short(row.name) for row in ranking.scores], fontsize=8)
        first.set_ylim(-0.6, rows - 0.4)
        images = f"{ranking.train_images} training and {ranking.held_out_images} {ranking.held_out} images"
        figure.suptitle(f"{ranking.data}, {images}; probe with its 95 % interval", fontsize=9, color=GRAY)
        paths = [path.with_suffix(kind) for kind in (".png", ".svg")]
        for place in paths:
            figure.savefig(place, dpi=130)
        plt.close(figure)
    return paths


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
