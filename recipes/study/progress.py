"""What a study says while it runs, and before: cells, and how long they will take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from recipes.study.cells import Cell, grid
from recipes.study.jobs import Outcome
from recipes.study.results import Found, lookup
from recipes.study.search import chosen
from recipes.study.study import Study


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
    """Every cell with its state and time, then the sum."""
    ready = chosen(study, found)
    assumed = {(data, arm): ready.get((data, arm), {}) for data in study.settings for arm in study.arms}
    cells = [*search_cells, *grid(study, assumed)]
    lines, left, unknown = [], 0.0, 0
    for cell in cells:
        waiting = not cell.searching and (cell.data, cell.arm) not in ready
        done = not waiting and found.done(cell, study.evaluations)
        seconds = seconds_of(found, cell, cells)
        state = "done" if done else "after the search" if waiting else "failed" if found.failed(cell) else "to run"
        if not done:
            left, unknown = left + (seconds or 0.0), unknown + (seconds is None)
        time_said = "" if seconds is None else f"  {words(seconds)}"
        lines.append(f"{'search' if cell.searching else 'run':<8}{cell.name:<60}{state}{time_said}")
    guess = f"about {words(left)} of one thread" if not unknown else "time not known: no such cell is timed yet"
    count = sum(line.rstrip().find("done") < 0 for line in lines)
    return [*lines, f"{len(cells)} cells, {count} to run, {guess}"]


class Progress:
    """Counts ended cells and guesses the rest."""

    def __init__(self, found: Found, todo: Sequence[Cell], study: Study, *, workers: int) -> None:
        self.found, self.todo, self.study = found, list(todo), study
        self.workers = max(1, workers)
        self.ended = 0
        self.began = time.perf_counter()

    def line(self, cell: Cell, outcome: Outcome) -> str:
        """A cell that ended."""
        self.ended += 1
        said: dict[str, Any] = {
            "failed": lambda: f"FAILED: {self.found.runs[cell.key]['error']}",
            "stopped": lambda: "stopped and saved",
            "elsewhere": lambda: "is run by another job",
            "done": lambda: self._result(cell),
        }
        left = (time.perf_counter() - self.began) / self.ended * (len(self.todo) - self.ended)
        more = f"; about {words(left)} left" if self.ended < len(self.todo) else ""
        return f"[{self.ended}/{len(self.todo)}] {cell.name}: {said[outcome]()}{more}"

    def _result(self, cell: Cell) -> str:
        record = self.found.runs[cell.key]
        path = self.study.search.measure if cell.searching and self.study.search else self.study.measures[0].path
        for measure in self.study.measures:  # a path misspelt is better known after one run than after all
            if not measure.path.startswith("robustness"):
                lookup(record, measure.path)
        value = lookup(record, path)
        taken = self.found.timing[cell.key]["train_seconds"]
        return f"{path} {'not reached' if value is None else f'{value:.4g}'} in {words(taken)}"
