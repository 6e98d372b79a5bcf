"""What a study says while it runs, and before: cells, and how long they will take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from recipes.study.results import Absent, Found
from recipes.study.runner import Outcome
from recipes.study.search import chosen
from recipes.study.spec import Measure, Study
from recipes.study.tables import shown, unit, value_of
from recipes.study.text_table import columns
from recipes.study.trials import Cell, grid


def seconds_of(found: Found, cell: Cell, cells: Sequence[Cell]) -> float | None:
    """What a cell took, or will take by the median of those most like it; None where none is timed."""
    for alike in (
        lambda other: other.key == cell.key,
        lambda other: (other.data, other.arm, other.searching) == (cell.data, cell.arm, cell.searching),
        lambda other: (other.data, other.searching) == (cell.data, cell.searching),
        lambda other: True,
    ):
        taken = [
            found.timing[other.key]["train_seconds"] + found.timing[other.key]["evaluation_seconds"]
            for other in cells
            if other.key in found.timing and alike(other)
        ]
        if taken:
            return statistics.median(taken)
    return None


def words(seconds: float) -> str:
    """A duration for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def plan_lines(study: Study, found: Found, search_cells: Sequence[Cell]) -> list[str]:
    """A line for each setting and arm, with what is done, what is to run and how long that takes; then the sum."""
    ready = chosen(study, found)
    assumed = {(data, arm): ready.get((data, arm), {}) for data in study.settings for arm in study.arms}
    cells = [*search_cells, *grid(study, assumed)]
    groups: dict[tuple[bool, str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.searching, cell.data, cell.arm), []).append(cell)
    rows = [["", "data", "arm", "done", "failed", "to run", "time"]]
    left: list[float | None] = []
    for (searching, data, arm), own in groups.items():
        waiting = not searching and (data, arm) not in ready
        todo = [cell for cell in own if waiting or not found.done(cell, study.evaluations)]
        failed = sum(not waiting and found.failed(cell) for cell in todo)
        seconds = [seconds_of(found, cell, cells) for cell in todo]
        left += seconds
        numbers = [str(number) if number else "" for number in (len(own) - len(todo), failed, len(todo))]
        time_said = _sum_said(seconds) if todo else ""
        rows.append(
            ["search" if searching else "run", data, arm, *numbers, time_said + ("  after its search" * waiting)]
        )
    total = f"{len(cells)} runs, {len(left)} to run"
    if left and None in left:
        total += ", time not known: no such run is timed yet"
    elif left:
        total += f", about {_sum_said(left)} of one thread"
    return [*columns(rows, right=(3, 4, 5)), total]


def _sum_said(seconds: Sequence[float | None]) -> str:
    known = [value for value in seconds if value is not None]
    return words(sum(known)) if len(known) == len(seconds) else "?"


class Progress:
    """Counts ended cells and guesses the rest."""

    def __init__(self, found: Found, todo: Sequence[Cell], study: Study, *, workers: int) -> None:
        self.found, self.todo, self.study = found, list(todo), study
        self.workers = max(1, workers)
        self.ended = 0
        self.errors: dict[str, int] = {}
        self.without: dict[str, set[str]] = {}
        self.began = time.perf_counter()

    def line(self, cell: Cell, outcome: Outcome) -> str:
        """A cell that ended."""
        self.ended += 1
        said: dict[str, Any] = {
            "failed": lambda: self._error(self.found.runs[cell.key]["error"]),
            "stopped": lambda: "stopped and saved",
            "elsewhere": lambda: "is run by another job",
            "done": lambda: self._result(cell),
        }
        left = (time.perf_counter() - self.began) / self.ended * (len(self.todo) - self.ended)
        more = f"; about {words(left)} left" if self.ended < len(self.todo) else ""
        return f"[{self.ended}/{len(self.todo)}] {cell.name}: {said[outcome]()}{more}"

    def _error(self, error: str) -> str:
        """Said in full the first time."""
        number = self.errors[error] = self.errors.get(error, 0) + 1
        return f"FAILED: {error}" if number == 1 else f"FAILED with the same error, as {number} runs so far"

    def _result(self, cell: Cell) -> str:
        record = self.found.runs[cell.key]
        lacking = self._lacking(cell)
        first = self.study.measures[0]
        if cell.searching and self.study.search:
            first = Measure(self.study.search.measure)
        value = None if first.name in lacking else value_of(record, first)
        said = "not reached" if value is None else shown(value, first.form)
        took = words(self.found.timing[cell.key]["train_seconds"])
        return f"{first.title}{unit(first)} {said} in {took}" + "".join(f"; {why}" for why in lacking.values())

    def _lacking(self, cell: Cell) -> dict[str, str]:
        """The measures that a run does not have, and why; an error where no arm has one: its path is misspelt."""
        found = {}
        for measure in self.study.measures:
            if any(path.startswith("robustness") for path in (measure.path, measure.minus or "")):
                continue
            try:
                value_of(self.found.runs[cell.key], measure)
            except Absent as absent:
                without = self.without.setdefault(measure.name, set())
                without.add(cell.arm)
                if without >= set(self.study.arms):
                    raise
                found[measure.name] = str(absent)
        return found
