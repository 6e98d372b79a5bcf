"""Repeat a sample of the committed studies' runs: are the numbers still the same, and how long do all studies take?

    python benchmarks/studies/repeat.py --runs FOLDER [--one-in 12] [--seed 0] [--workers 2] [STUDY ...]

Samples one in `--one-in` runs of every study and of every search (sorted by arm, from a random start), runs each again
with its evaluations, and compares it with the study's results.json. Writes benchmarks/results/studies/repeat-cpu.json:
a row for each run with its seconds then and now and its largest relative differences; before them a row with the hours
that all studies would take at today's rate, without the start of each run's process. The runs stay in FOLDER: the same
command goes on where it was stopped.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks import harness
from recipes.core.interrupt import EXIT_CODE, Stopped, StopRequest
from recipes.study.load import read_study
from recipes.study.records import Records, RunRecord, collect
from recipes.study.results import read_records
from recipes.study.runner import Outcome, RunSettings, run_trials
from recipes.study.search import chosen_points
from recipes.study.spec import Study
from recipes.study.trials import Trial, comparison_trials, search_trials

ROOT = Path(__file__).resolve().parents[2]
STUDIES = ROOT / "benchmarks" / "studies"


def strata(study: Study, records: Records, counted: set[str]) -> list[list[Trial]]:
    """The timed runs of a study in two groups, comparison and search, each sorted by setting, arm and seed.

    `counted` are the runs that an earlier study has too, which are left out; the study's own are added to it.
    """
    groups: list[list[Trial]] = []
    for trials in (comparison_trials(study, chosen_points(study, records)), search_trials(study)):
        new = {trial.key: trial for trial in trials if trial.key not in counted and is_timed(records, trial)}
        counted |= set(new)
        groups.append(sorted(new.values(), key=lambda trial: (trial.data, trial.arm, trial.seed)))
    return [trials for trials in groups if trials]


def is_timed(records: Records, trial: Trial) -> bool:
    """Whether it is known how long a run took."""
    return trial.key in records and records[trial.key].timing is not None


def sample(trials: Sequence[Any], one_in: int, draw: random.Random) -> list[Any]:
    """Every `one_in`-th item from a random start, at least two: each item is equally likely to be in it."""
    step = min(one_in, len(trials) // 2) or 1
    return list(trials[draw.randrange(step) :: step])


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a record with their paths; without the seconds that something took."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield path, float(value)
    elif isinstance(value, Mapping | list):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in pairs:
            if key != "seconds":
                yield from numbers(item, f"{path}.{key}" if path else str(key))


def relative_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, float]:
    """By path, |now − then| / max(|now|, |then|) where that is not zero; 2, the largest possible, where now is missing.

    Example:
        >>> relative_differences({"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 1.0, "b": 2.5})
        {'b': 0.2, 'c': 2.0}
    """
    old, new = dict(numbers(then)), dict(numbers(now))
    found = {}
    for path, was in old.items():
        value = new.get(path)
        if value is None:
            found[path] = 2.0
        elif value != was and not (math.isnan(value) and math.isnan(was)):
            difference = abs(value - was) / max(abs(value), abs(was))
            found[path] = 2.0 if math.isnan(difference) else difference
    return found


def seconds(record: RunRecord) -> float:
    """The time of one run, evaluations included."""
    if record.timing is None:
        raise ValueError("the run has no timing")
    return float(record.timing["train_seconds"] + record.timing["evaluation_seconds"])


def compare_runs(then: RunRecord, now: RunRecord) -> dict[str, Any]:
    """The row of one run: its times and commit, and the differences in its summary and its evaluation."""
    row: dict[str, Any] = {"seconds_then": seconds(then), "seconds": seconds(now)}
    row["commit_then"] = then.result["commit"]
    for part in ("summary", "robustness"):
        if then.result[part] is not None:
            differences = relative_differences(then.result[part], now.result[part])
            largest = dict(sorted(differences.items(), key=lambda pair: -pair[1])[:5])
            count = len(dict(numbers(then.result[part])))
            row[part] = {"numbers": count, "differ": len(differences), "largest": largest}
    return row


def largest_difference(part: Mapping[str, Any]) -> float:
    """The largest relative difference of a row's part."""
    return max(part["largest"].values(), default=0.0)


def expected_seconds(rows: Sequence[Mapping[str, Any]], counts: Mapping[str, int]) -> tuple[float, float]:
    """The time that all runs would take, Σ count · mean of the sampled runs of the stratum, and its standard error."""
    total = variance = 0.0
    for stratum, count in counts.items():
        times = [row["seconds"] for row in rows if row["stratum"] == stratum]
        total += count * statistics.mean(times)
        left = 1 - len(times) / count
        variance += left * count**2 * statistics.variance(times) / len(times) if len(times) > 1 else 0.0
    return total, math.sqrt(variance)


def repeat(study: Study, known: Records, sampled: Mapping[str, str], settings: RunSettings) -> list[dict[str, Any]]:
    """Run the sampled trials of a study anew, and compare each with what the study has.

    Args:
        study: the study.
        known: its records.
        sampled: the stratum of each sampled trial, by the trial's key.
        settings: where and how the trials are run.

    Raises:
        Stopped: it was stopped by a signal; the runs are saved.
        RuntimeError: a run failed.
    """
    trials = {trial.key: trial for trials in strata(study, known, set()) for trial in trials}
    trials = {key: trials[key] for key in sampled}
    with StopRequest() as stop:
        if not run_trials(list(trials.values()), study.evaluations, settings, report=_print_outcome, stop=stop):
            raise Stopped
    again = collect(trials.values(), settings.runs, study.evaluations, {})
    rows = []
    for key, trial in trials.items():
        if again[key].result["status"] != "done":
            raise RuntimeError(f"{trial.name}: {again[key].result['error']}")
        rows.append({"stratum": sampled[key], "run": trial.name} | compare_runs(known[key], again[key]))
    return rows


def _print_outcome(trial: Trial, outcome: Outcome) -> None:
    print(f"{trial.name}: {outcome}", flush=True)


def overview(rows: Sequence[Mapping[str, Any]], counts: Mapping[str, int], recorded: float) -> dict[str, Any]:
    """The first row of the result: how many runs were repeated, how many agree, and the hours of all."""
    total, error = expected_seconds(rows, counts)
    evaluated = [row["robustness"] for row in rows if "robustness" in row]
    within = {str(limit): sum(largest_difference(part) <= limit for part in evaluated) for limit in (0, 1e-5, 2)}
    return {
        "runs": sum(counts.values()),
        "made_again": len(rows),
        "summaries_the_same": sum(not row["summary"]["differ"] for row in rows),
        "evaluated": len(evaluated),
        "evaluations_within": within,
        "hours_then": recorded / 3600,
        "hours": total / 3600,
        "hours_standard_error": error / 3600,
    }


def main() -> int:
    """Sample, run, compare and save; the exit code is 0, 1 where a run failed, 75 where it was stopped."""
    parser = harness.parser("Repeat runs of the committed studies.", rounds=None, threads=False, device=False)
    parser.add_argument("studies", nargs="*", help="names; default: all that have results")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the repeated runs")
    parser.add_argument("--one-in", type=int, default=12, help="repeat one of so many runs of a study")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, of one thread each")
    args = parser.parse_args()
    settings = RunSettings(args.runs, args.workers)
    names = args.studies or sorted(path.stem for path in STUDIES.glob("*.yaml") if (STUDIES / path.stem).is_dir())
    rows: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    counted: set[str] = set()
    recorded = 0.0
    for name in names:
        study, known = read_study(STUDIES / f"{name}.yaml"), read_records(STUDIES / name, name)
        sampled: dict[str, str] = {}
        for trials in strata(study, known, counted):
            stratum = f"{name}, searching" if trials[0].searching else name
            counts[stratum] = len(trials)
            recorded += sum(seconds(known[trial.key]) for trial in trials)
            draw = random.Random(f"{args.seed} {stratum}")  # the sample of a study does not depend on the others
            sampled |= {trial.key: stratum for trial in sample(trials, args.one_in, draw)}
        try:
            rows += repeat(study, known, sampled, settings)
        except Stopped:
            return EXIT_CODE
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    first = overview(rows, counts, recorded) | {"workers": args.workers}
    print(json.dumps(first, indent=1))
    goals = ["every summary the same to the last bit", "16 hours of one thread for all studies, 8 on two cores"]
    print(harness.save("studies/repeat", [first, *rows], goals=goals, out=args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
