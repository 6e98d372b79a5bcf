"""Are the studies' numbers what today's code gives, and how long do the studies take where nothing else runs?

    python benchmarks/studies/repeat.py --runs FOLDER [--one-in 12] [--seed 0] [--workers 2] [STUDY ...]

Draws runs of the committed studies, one in `--one-in` of every study and of every search (arm by arm, from a random
start), makes each again, evaluations included, and holds what it gives to the study's results.json. Writes
benchmarks/results/studies/repeat-cpu.json: a row a run, with the seconds it took then and now and the largest relative
differences; at the top the hours that all studies would take at the rate of today, not counting the start of each run's
process. FOLDER keeps the runs: the same command goes on where it was stopped.
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

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # run as a script: import from the project's root, not from this folder

from benchmarks import harness  # noqa: E402
from recipes.core.interrupt import EXIT_CODE, StopRequest  # noqa: E402
from recipes.study import results  # noqa: E402
from recipes.study.runner import Outcome, run_all  # noqa: E402
from recipes.study.search import chosen  # noqa: E402
from recipes.study.spec import Study, read_study  # noqa: E402
from recipes.study.trials import Cell, grid, search_grid  # noqa: E402

STUDIES = ROOT / "benchmarks" / "studies"


def strata(study: Study, found: results.Found, taken: set[str]) -> list[list[Cell]]:
    """The runs that a study holds: those of the comparison, and those of the search, arm by arm.

    `taken` are the runs that another study holds too; the study's own are added.
    """
    made: list[list[Cell]] = []
    for cells in (grid(study, chosen(study, found)), search_grid(study)):
        fresh = {cell.key: cell for cell in cells if cell.key not in taken and cell.key in found.timing}
        taken |= set(fresh)
        made.append(sorted(fresh.values(), key=lambda cell: (cell.data, cell.arm, cell.seed)))
    return [cells for cells in made if cells]


def drawn(cells: Sequence[Any], one_in: int, draw: random.Random) -> list[Any]:
    """Every `one_in`-th from a random start, two at the least."""
    step = min(one_in, len(cells) // 2) or 1
    return list(cells[draw.randrange(step) :: step])


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a record, by their place in it."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield path, float(value)
    elif isinstance(value, Mapping | list):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in pairs:
            if key != "seconds":
                yield from numbers(item, f"{path}.{key}" if path else str(key))


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, float]:
    """By place: how far a number now is from what it was, relative to the larger; 2, the most, where it is gone."""
    old, new = dict(numbers(then)), dict(numbers(now))
    found = {}
    for path, was in old.items():
        value = new.get(path)
        if value is None:
            found[path] = 2.0
        elif value != was and not (math.isnan(value) and math.isnan(was)):
            apart = abs(value - was) / max(abs(value), abs(was))
            found[path] = 2.0 if math.isnan(apart) else apart
    return found


def seconds(timing: Mapping[str, Any]) -> float:
    """Of one run, evaluations included."""
    return float(timing["train_seconds"] + timing["evaluation_seconds"])


def compared(known: results.Found, again: results.Found, key: str) -> dict[str, Any]:
    """One run then and now."""
    then, now = known.runs[key], again.runs[key]
    row: dict[str, Any] = {"seconds_then": seconds(known.timing[key]), "seconds": seconds(again.timing[key])}
    row["commit_then"] = then["commit"]
    for part in ("summary", "robustness"):
        if then[part] is not None:
            apart = differences(then[part], now[part])
            largest = dict(sorted(apart.items(), key=lambda pair: -pair[1])[:5])
            row[part] = {"numbers": len(dict(numbers(then[part]))), "differ": len(apart), "largest": largest}
    return row


def most(part: Mapping[str, Any]) -> float:
    """The largest relative difference of a row's part."""
    return max(part["largest"].values(), default=0.0)


def expected(rows: Sequence[Mapping[str, Any]], counts: Mapping[str, int]) -> tuple[float, float]:
    """Seconds that all runs would take at the drawn runs' mean of their stratum, and the standard error of that."""
    total = variance = 0.0
    for stratum, count in counts.items():
        taken = [row["seconds"] for row in rows if row["stratum"] == stratum]
        total += count * statistics.mean(taken)
        left = 1 - len(taken) / count
        variance += left * count**2 * statistics.variance(taken) / len(taken) if len(taken) > 1 else 0.0
    return total, math.sqrt(variance)


def _say(cell: Cell, outcome: Outcome) -> None:
    print(f"{cell.name}: {outcome}", flush=True)


def main() -> int:
    """Draw, run, compare and save."""
    parser = harness.parser("Runs of the committed studies, made again.", rounds=1)
    parser.add_argument("studies", nargs="*", help="names; default: all that have results")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs made again")
    parser.add_argument("--one-in", type=int, default=12, help="of so many runs of a study one is made again")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, of one thread each")
    args = parser.parse_args()
    names = args.studies or sorted(path.stem for path in STUDIES.glob("*.yaml") if (STUDIES / path.stem).is_dir())
    rows, counts, taken, recorded = [], {}, set(), 0.0
    with StopRequest() as stop:
        for name in names:
            study, known = read_study(STUDIES / f"{name}.yaml"), results.known(STUDIES / name, name)
            picked = {}
            for cells in strata(study, known, taken):
                stratum = f"{name}, searching" if cells[0].searching else name
                counts[stratum] = len(cells)
                recorded += sum(seconds(known.timing[cell.key]) for cell in cells)
                draw = random.Random(f"{args.seed} {stratum}")  # another study changes no other's draw
                picked |= {cell.key: (stratum, cell) for cell in drawn(cells, args.one_in, draw)}
            cells = [cell for _, cell in picked.values()]
            if not run_all(cells, args.runs, study.evaluations, workers=args.workers, report=_say, stop=stop):
                return EXIT_CODE
            again = results.Found()
            for stratum, cell in picked.values():
                again.take(cell, args.runs, study.evaluations)
                if again.runs[cell.key]["status"] != "done":
                    print(f"error: {cell.name}: {again.runs[cell.key]['error']}", file=sys.stderr)
                    return 1
                rows.append({"stratum": stratum, "run": cell.name} | compared(known, again, cell.key))
    total, error = expected(rows, counts)
    evaluated = [row["robustness"] for row in rows if "robustness" in row]
    whole = {
        "runs": sum(counts.values()),
        "made_again": len(rows),
        "summaries_the_same": sum(not row["summary"]["differ"] for row in rows),
        "evaluated": len(evaluated),
        "evaluations_within": {str(limit): sum(most(part) <= limit for part in evaluated) for limit in (0, 1e-5, 2)},
        "hours_then": recorded / 3600,
        "hours": total / 3600,
        "hours_standard_error": error / 3600,
        "workers": args.workers,
    }
    print(json.dumps(whole, indent=1))
    goals = ["every summary the same to the last bit", "16 hours of one thread for all studies, 8 on two cores"]
    (args.out / "studies").mkdir(parents=True, exist_ok=True)
    print(harness.save("studies/repeat", [whole, *rows], goals=goals, device=args.device, out=args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
