"""How the tables in the documents write a row and a paired difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recipes.study.spec import Measure
from recipes.study.tables import format_difference, format_interval

SIGNS = {"better": " ▲", "worse": " ▼", "higher": " ↑", "lower": " ↓", "equivalent": " =", "not worse": " ≥"}


def lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in rows]


def difference(entry: Mapping[str, Any], measure: Measure) -> str:
    """A paired difference, its interval and the verdict's sign; a dash where it has no interval."""
    if entry["difference_low"] is None:
        return "–"
    text = f"{format_difference(entry, measure)} {format_interval(entry, measure, 'difference')}"
    return f"{text}{SIGNS.get(entry['verdict'], '')}"
