"""What `compare.py --power` prints: for each measure, what the pairs at hand can show and how many would show more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recipes.study.power import (
    MOST,
    POWER,
    Spread,
    detectable_difference,
    pairs_for_difference,
    pairs_for_equality,
    spread_of,
)
from recipes.study.spec import Measure, Study
from recipes.study.tables import columns, format_rounded, unit

HEAD = ["data", "measure", "tests", "pairs", "sd", "shown from", "wanted", "pairs for it", "pairs to show equality"]


def power_lines(study: Study, statistics: Sequence[Mapping[str, Any]], wanted: float | None) -> list[str]:
    """A table of all measures whose differences vary, and what its columns mean.

    Args:
        study: whose measures are meant.
        statistics: of the runs that are there, as in results.json.
        wanted: a difference of the study's first measure, in its unit; None for its margin.
    """
    measures = {measure.name: measure for measure in study.measures}
    rows = []
    for table in statistics:
        measure = measures[table["measure"]]
        asked = wanted if wanted is not None and measure == study.measures[0] else measure.margin
        for name, kind in (("", "arms"), (" (contrasts)", "contrasts")):
            spread = spread_of(table[kind])
            if spread is not None:
                rows.append([table["data"], measure.title + unit(measure) + name, *_cells(spread, measure, asked)])
    if not rows:
        return ["no arm has two pairs yet whose differences vary: nothing to compute power from (run the study first)"]
    return [*columns([HEAD, *rows], right=range(2, len(HEAD))), "", *EXPLANATION]


EXPLANATION = (
    f"shown from: the true difference from zero that these pairs show with {POWER:.0%} power, by the paired t test at",
    "0.05 / tests, the first step of Holm's correction; a verdict beyond a margin needs the margin on top of it.",
    "wanted: the margin, or --wanted. Pairs for it: those that show such a difference with the same power; pairs to",
    "show equality: those with which arms without a difference are called equivalent within it. All of it takes the",
    "standard deviation of the paired differences, pooled over arms, for the true one: from few pairs it is rough.",
)


def _cells(spread: Spread, measure: Measure, wanted: float | None) -> list[str]:
    def text(value: float) -> str:
        return format_rounded(value, measure.form, spread.sd)

    found = [str(spread.tests), str(spread.pairs), text(spread.sd)]
    found.append(text(detectable_difference(spread.sd, spread.pairs, spread.level)))
    if not wanted:
        return [*found, "", "", ""]
    needed = (
        pairs_for_difference(wanted, spread.sd, spread.level),
        pairs_for_equality(wanted, spread.sd, spread.level),
    )
    return [*found, text(wanted), *(f"over {MOST}" if pairs is None else str(pairs) for pairs in needed)]
