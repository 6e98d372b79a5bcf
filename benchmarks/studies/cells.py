"""How the tables in the documents write a row and a paired difference, and where a study's table stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from recipes.study import results
from recipes.study.spec import Measure
from recipes.study.tables import format_difference, format_interval

EVIDENCE = Path(__file__).resolve().parents[2] / "docs" / "evidence.md"
SIGNS = {"better": " ▲", "worse": " ▼", "higher": " ↑", "lower": " ↓", "equivalent": " =", "not worse": " ≥"}


def results_in(folder: Path) -> Mapping[str, Any]:
    """The checked results.json of a study's folder, read once: many tables come from one file.

    Raises:
        UserError: see `results.read`.
    """
    file = folder / "results.json"
    return _read(file, file.stat().st_mtime_ns if file.exists() else 0)


@lru_cache(maxsize=64)
def _read(file: Path, changed: int) -> Mapping[str, Any]:
    return results.read(file)


def lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in rows]


def difference(entry: Mapping[str, Any], measure: Measure) -> str:
    """A paired difference, its interval and the verdict's sign; a dash where it has no interval."""
    if entry["difference_low"] is None:
        return "–"
    text = f"{format_difference(entry, measure)} {format_interval(entry, measure, 'difference')}"
    return f"{text}{SIGNS.get(entry['verdict'], '')}"


def fill(name: str, text: str, page: Path = EVIDENCE) -> None:
    """Put the table of a script into the page, between the comments NAME and `end of NAME`, where it has these."""
    before, mark, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    if mark and end:
        page.write_text(f"{before}{mark}\n{text}\n\n{end}{after}", encoding="utf-8")
