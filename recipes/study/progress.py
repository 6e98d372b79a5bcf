"""What the command says before and while runs go on: the planned trials, their time, and a line for each that ended."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from recipes.study.measures import MissingValueError, value_of
from recipes.study.records import Records, RunRecord, has_failed, is_done
from recipes.study.runner import Outcome
from recipes.study.search import chosen_points
from recipes.study.spec import Measure, Study
from recipes.study.tables import columns, format_value, unit
from recipes.study.trials import Trial, comparison_trials


def seconds_of(records: Records, trial: Trial, trials: Sequence[Trial]) -> float | None:
    """The seconds that a trial took, or the median of the most similar trials that are timed; None without any."""
    for alike in (
        lambda other: other.key == trial.key,
        lambda other: (other.data, other.arm, other.searching) == (trial.data, trial.arm, trial.searching),
        lambda other: (other.data, other.searching) == (trial.data, trial.searching),
        lambda other: True,
    ):
        timings = [records[other.key].timing for other in trials if other.key in records and alike(other)]
        seconds = [timing["train_seconds"] + timing["evaluation_seconds"] for timing in timings if timing is not None]
        if seconds:
            return statistics.median(seconds)
    return None


def duration(seconds: float) -> str:
    """A duration for people.

    Example:
        >>> duration(42.3), duration(600), duration(9000)
        ('42 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def plan_lines(study: Study, records: Records, searching: Sequence[Trial]) -> list[str]:
    """A line for each setting and arm: what is done, what is to run and how long that takes; then the sum."""
    ready = chosen_points(study, records)
    assumed = {(data, arm): ready.get((data, arm), {}) for data in study.settings for arm in study.arms}
    trials = [*searching, *comparison_trials(study, assumed)]
    groups: dict[tuple[bool, str, str], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.searching, trial.data, trial.arm), []).append(trial)
    rows = [["", "data", "arm", "done", "failed", "to run", "time"]]
    left: list[float | None] = []
    for (is_search, data, arm), own in groups.items():
        waiting = not is_search and (data, arm) not in ready
        todo = [trial for trial in own if waiting or not is_done(records, trial, study.evaluations)]
        failed = sum(not waiting and has_failed(records, trial) for trial in todo)
        seconds = [seconds_of(records, trial, trials) for trial in todo]
        left += seconds
        counts = [str(count) if count else "" for count in (len(own) - len(todo), failed, len(todo))]
        how_long = (_total(seconds) if todo else "") + ("  after its search" * waiting)
        rows.append(["search" if is_search else "run", data, arm, *counts, how_long])
    total = f"{len(trials)} runs, {len(left)} to run"
    if left and None in left:
        total += ", time not known: no such run is timed yet"
    elif left:
        total += f", about {_total(left)} of one thread"
    return [*columns(rows, right=(3, 4, 5)), total]


def _total(seconds: Sequence[float | None]) -> str:
    known = [value for value in seconds if value is not None]
    return duration(sum(known)) if len(known) == len(seconds) else "?"


class Progress:
    """Counts the trials that ended and estimates the time for the rest.

    Args:
        count: trials that will end.
        study: whose first measure is shown.
    """

    def __init__(self, count: int, study: Study) -> None:
        self.count, self.study = count, study
        self.ended = 0
        self.errors: dict[str, int] = {}
        self.arms_without: dict[str, set[str]] = {}
        self.began = time.perf_counter()

    def line(self, trial: Trial, outcome: Outcome, record: RunRecord | None) -> str:
        """The line for a trial that ended.

        Raises:
            MissingValueError: no arm has one of the measures; its path is misspelt.
        """
        self.ended += 1
        if outcome == "stopped":
            text = "stopped and saved"
        elif outcome == "elsewhere" or record is None:
            text = "is run by another job"
        elif record.result["status"] == "failed":
            text = self._error(record.result["error"])
        else:
            text = self._value(trial, record)
        left = (time.perf_counter() - self.began) / self.ended * (self.count - self.ended)
        more = f"; about {duration(left)} left" if self.ended < self.count else ""
        return f"[{self.ended}/{self.count}] {trial.name}: {text}{more}"

    def _error(self, error: str) -> str:
        """Written in full the first time only."""
        number = self.errors[error] = self.errors.get(error, 0) + 1
        return f"FAILED: {error}" if number == 1 else f"FAILED with the same error, as {number} runs so far"

    def _value(self, trial: Trial, record: RunRecord) -> str:
        missing = self._missing_values(trial, record)
        first = self.study.measures[0]
        if trial.searching and self.study.search:
            first = Measure(self.study.search.measure)
        value = None if first.name in missing else value_of(record.result, first)
        text = "not reached" if value is None else format_value(value, first.form)
        took = "" if record.timing is None else f" in {duration(record.timing['train_seconds'])}"
        return f"{first.title}{unit(first)} {text}{took}" + "".join(f"; {why}" for why in missing.values())

    def _missing_values(self, trial: Trial, record: RunRecord) -> dict[str, str]:
        """The measures that a run does not have, and why."""
        missing = {}
        for measure in self.study.measures:
            if measure.needs_evaluation:
                continue
            try:
                value_of(record.result, measure)
            except MissingValueError as error:
                without = self.arms_without.setdefault(measure.name, set())
                without.add(trial.arm)
                if without >= set(self.study.arms):
                    raise
                missing[measure.name] = str(error)
        return missing
