"""Compare recipes over seeds: run what is missing, then say what can be believed.

    python recipes/compare.py baseline etf --data.name folder --data.root my_images --seeds 3
    python recipes/compare.py benchmarks/studies/terminal_phase.yaml --workers 2

Same seed: same split, same initial backbone weights, same batch order, whatever the recipe; differences are paired.
Writes results.json, report.html and report.md. Run it again to go on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
if __name__ == "__main__":
    from recipes.core.extras import require_recipes

    require_recipes()

from recipes.core.cli import recipes
from recipes.core.errors import UserError
from recipes.core.files import locked
from recipes.core.interrupt import EXIT_CODE, StopRequest
from recipes.study import results
from recipes.study.preflight import check_evaluations, foresee
from recipes.study.progress import Progress, plan_lines
from recipes.study.report import write_report
from recipes.study.runner import Outcome, run_all, run_on_ray
from recipes.study.search import chosen, tried
from recipes.study.spec import Arm, Study, read_study
from recipes.study.tables import closing_lines, tabulate
from recipes.study.trials import Cell, grid, search_grid, share


@dataclass(frozen=True)
class Asked:
    """The command line, understood."""

    study: Study
    name: str
    out: Path
    runs: Path
    workers: int
    shard: tuple[int, int]
    ray: str | None
    plan: bool
    report_only: bool
    command: str


def parse_command(argv: Sequence[str]) -> Asked:
    """What a command line asks for.

    Raises:
        UserError: an unknown recipe, study or option.
    """
    parser = argparse.ArgumentParser(
        prog="compare.py",
        usage="compare.py STUDY.yaml | RECIPE RECIPE ... [--KEY VALUE ...] [--seeds N] [--workers N] ...",
        description=(__doc__ or "").splitlines()[0],
        epilog=f"recipes: {', '.join(recipes())}; --KEY VALUE is any key of recipes/train.py, for all of them alike",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--seeds", default="3", help="how many, or which: 5 or 0,1,2 (default: 3)")
    parser.add_argument("--workers", type=int, help="runs at a time, default: the cores; 0: in this process")
    parser.add_argument("--shard", default="1/1", help="job i of n that share the folder of runs, e.g. 2/4")
    parser.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster that shares the folder of runs")
    parser.add_argument("--out", type=Path, help="folder of results.json and the report")
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"), help="folder of the runs")
    parser.add_argument("--plan", action="store_true", help="show what would run and for how long, and run nothing")
    parser.add_argument("--report-only", action="store_true", help="tables and report from what is there")
    own = {word for action in parser._actions for word in action.option_strings}
    words, keys, rest = _sorted_out(argv, own)
    try:
        args = parser.parse_args(rest)
    except argparse.ArgumentError as error:
        raise UserError(f"{error} (--help lists the options)") from None
    study, name, out = _study(words, keys, args.seeds, given="--seeds" in " ".join(rest))
    index, count = _shard(args.shard)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = args.workers if args.workers is not None else cores
    if workers < 0:
        raise UserError(f"--workers {workers}: 0 or more")
    return Asked(
        study,
        name,
        args.out or out,
        args.runs,
        workers,
        (index, count),
        args.ray,
        args.plan,
        args.report_only,
        _command(words, keys, args.seeds),
    )


def _command(words: list[str], keys: dict[str, str], seeds: str) -> str:
    """What makes the same study again, from the project's root, wherever that lies."""
    root = Path(__file__).resolve().parents[1]
    if _is_study(words):
        path = Path(words[0]).resolve()
        return f"python recipes/compare.py {path.relative_to(root) if path.is_relative_to(root) else path.name}"
    return shlex.join(
        ["python", "recipes/compare.py", *words, *(f"--{k}={v}" for k, v in keys.items()), "--seeds", seeds]
    )


def _sorted_out(argv: Sequence[str], own: set[str]) -> tuple[list[str], dict[str, str], list[str]]:
    """Recipes or study, keys of recipes/train.py, and the options of this script."""
    words: list[str] = []
    keys: dict[str, str] = {}
    rest: list[str] = []
    todo = list(argv)
    while todo:
        word = todo.pop(0)
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            words.append(word)
        elif name in own:
            rest.append(word)
            if not equals and name not in ("--plan", "--report-only", "--help", "-h") and todo:
                rest.append(todo.pop(0))
        elif not name.startswith("--"):
            raise UserError(f"{word} is unknown (--help lists the options)")
        else:
            if not equals and not todo:
                raise UserError(f"{name} needs a value")
            keys[name[2:]] = value if equals else todo.pop(0)
    return words, keys, rest


def _is_study(words: Sequence[str]) -> bool:
    return len(words) == 1 and words[0].endswith((".yaml", ".yml"))


def _study(words: list[str], keys: dict[str, str], seeds: str, *, given: bool) -> tuple[Study, str, Path]:
    if _is_study(words):
        path = Path(words[0])
        if keys or given:
            named = f"--{next(iter(keys))}" if keys else "--seeds"
            raise UserError(f"{named}: a study file says everything itself; write it into {path}")
        return read_study(path), path.stem, path.parent / path.stem
    if not words:
        raise UserError(f"name a study file, or recipes to compare: {', '.join(recipes())}")
    unknown = [word for word in words if word not in recipes()]
    if unknown:
        raise UserError(f"recipe={unknown[0]!r} is unknown: one of {', '.join(recipes())}, or one study file alone")
    if len(words) != len(set(words)):
        raise UserError(f"{' '.join(words)}: a recipe is named twice; a study file can hold variants of one")
    question = f"Which does better, {' or '.join(words)}?" if len(words) > 1 else f"What does {words[0]} give?"
    try:
        study = Study(question, {word: Arm(word) for word in words}, _seeds(seeds), overrides=dict(keys))
    except ValueError as error:
        raise UserError(str(error)) from None
    name = "-".join([str(keys.get("data.name", "digits")), *words])
    if keys:  # other keys are another comparison, with a folder of its own; more seeds go on in the same one
        text = json.dumps({key: str(value) for key, value in keys.items()}, sort_keys=True)
        name += f"-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    return study, name, Path("runs") / f"compare-{name}"


def _seeds(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds {text}: a number of seeds, or their list as 0,1,2") from None
    if "," not in text and numbers[0] < 1:
        raise UserError(f"--seeds {text}: at least one, or their list as 0,1,2")
    return list(range(numbers[0])) if "," not in text else numbers


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise UserError(f"--shard {text}: i/n with 1 <= i <= n, e.g. 2/4")
    return int(index), int(count)


def compare(asked: Asked) -> int:
    """Search, run, tabulate and report; 0, 1 where a run failed, 75 where something is left to run."""
    study = asked.study
    found = results.known(asked.out, asked.name)
    check_evaluations(study)
    search_cells = search_grid(study)
    todo = []
    for item in [*search_cells, *grid(study, chosen(study, found))]:  # every cell must resolve before one runs
        if not found.done(item, study.evaluations):
            found.take(item, asked.runs, study.evaluations)
        if not found.done(item, study.evaluations):
            todo.append(item)
    if not asked.report_only and asked.ray is None:  # on a cluster the data lies elsewhere
        foresee(todo)
    if asked.plan:
        print("\n".join(plan_lines(study, found, search_cells)))
        return 0
    for option, folder in (("--out", asked.out), ("--runs", asked.runs)):
        _refuse_unwritable(option, folder)
    if not asked.report_only:
        with StopRequest() as stop:
            for stage in ("search", "comparison"):
                cells = search_cells if stage == "search" else grid(study, chosen(study, found))
                if not _run(asked, found, cells, stop):
                    break
    with locked(asked.runs / "report", wait=True):  # shards that end at once report one after the other
        return _conclude(asked, found, search_cells)


def _refuse_unwritable(option: str, folder: Path) -> None:
    """Known before the first run is better than after the last."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{option} {folder} cannot be written to: {error.strerror}") from None


def _run(asked: Asked, found: results.Found, cells: Sequence[Cell], stop: StopRequest) -> bool:
    """Run a stage's missing cells of this job; False where it was stopped."""
    todo = [item for item in share(cells, asked.shard) if not found.done(item, asked.study.evaluations)]
    progress = Progress(found, todo, asked.study, workers=asked.workers)

    def report(item: Cell, outcome: Outcome) -> None:
        found.take(item, asked.runs, asked.study.evaluations)
        print(progress.line(item, outcome), flush=True)

    if asked.ray is not None:
        return run_on_ray(todo, asked.runs, asked.study.evaluations, address=asked.ray, report=report)
    return run_all(todo, asked.runs, asked.study.evaluations, workers=asked.workers, report=report, stop=stop)


def _conclude(asked: Asked, found: results.Found, search_cells: list[Cell]) -> int:
    study = asked.study
    cells = grid(study, chosen(study, found))
    for item in [*search_cells, *cells]:  # what other jobs have finished meanwhile
        if not found.done(item, study.evaluations):
            found.take(item, asked.runs, study.evaluations)
    statistics = tabulate(study, found, cells)
    content = results.assemble(
        study,
        found,
        [*search_cells, *cells],
        name=asked.name,
        command=asked.command,
        search=tried(study, found),
        statistics=statistics,
    )
    if gone := len(set(found.runs) - set(content["runs"])):
        print(f"note: {gone} runs are no part of the study any more; they are kept in {results.put_aside(asked.out)}")
    results.write(asked.out, content, found)
    content = results.read(asked.out / "results.json")  # tables are made from what is on disk
    write_report(asked.out)
    total = len(study.settings) * len(study.arms) * len(study.seeds)
    print("\n".join(closing_lines(content, total=total, out=asked.out)))
    if any(record["status"] == "failed" for record in content["runs"].values()):
        return 1
    return EXIT_CODE if results.outstanding(content) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0, 1 where a run failed, 2 with one line when something is to be put right, 75 when not all ran."""
    try:
        return compare(parse_command(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
