"""Compare recipes over seeds: run what is missing, then test which differences are real.

    python recipes/compare.py baseline etf --data.name folder --data.root my_images --seeds 3
    python recipes/compare.py benchmarks/studies/terminal_phase.yaml --workers 2
    python recipes/compare.py benchmarks/studies/terminal_phase.yaml --report-only
    python recipes/compare.py benchmarks/studies/terminal_phase.yaml --power

The same seed gives every recipe the same split, initial backbone weights and batch order, so that
differences are paired. Writes results.json, report.html, report.md and figures/. Run it again to
go on where it was stopped; --report-only makes the report anew from results.json and the files
beside it, --power says what the pairs at hand can show; both run nothing.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
if __name__ == "__main__":
    from recipes.core.extras import require_recipes

    require_recipes()

from recipes.core.cli import boolean_keys, is_recipe_file, recipes
from recipes.core.config import TrainConfig
from recipes.core.errors import UserError
from recipes.core.files import locked
from recipes.core.interrupt import EXIT_CODE
from recipes.core.script import WIDTH, Parser, join_flags, leave_with, run_script
from recipes.core.suggestions import did_you_mean

if TYPE_CHECKING:
    from recipes.study.runner import RunSettings
    from recipes.study.spec import Study

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Options:
    """The parsed command line.

    Attributes:
        study: what is compared.
        name: the study's name in results.json.
        out: folder of results.json and the report.
        settings: where and how the runs are run.
        plan: show what would run, and run nothing.
        report_only: make tables and report from what is there, and run nothing.
        power: print what the pairs that are there can show, and run and write nothing.
        wanted: difference of the first measure that `power` plans for; None for its margin.
        command: the command that makes the same study again, from the project's root.
    """

    study: Study
    name: str
    out: Path
    settings: RunSettings
    plan: bool
    report_only: bool
    power: bool
    wanted: float | None
    command: str


def parse_options(argv: Sequence[str]) -> Options:
    """The options of a command line.

    Raises:
        UserError: an unknown recipe, study or option, or a value that it cannot have.
    """
    parser = _parser()  # what follows loads timm and scipy, seconds, which --help can do without
    names, keys, own = _split(join_flags(argv, [*parser.flags, *boolean_keys()]), parser.options)
    args = parser.parse(own)
    from recipes.study.load import is_study_file, name_from_recipes, read_study, study_from_recipes
    from recipes.study.runner import RunSettings

    if len(names) == 1 and is_recipe_file(names[0]) and is_study_file(Path(names[0])):
        if keys or args.seeds is not None:
            option = f"--{next(iter(keys))}" if keys else "--seeds"
            raise UserError(f"{option}: a study file says everything itself; write it into {names[0]}")
        path = Path(names[0])
        study, name, out = read_study(path), path.stem, path.parent / path.stem
        absolute = path.resolve()
        place = absolute.relative_to(ROOT) if absolute.is_relative_to(ROOT) else path.name
        command = f"python recipes/compare.py {place}"
    else:
        seeds = args.seeds or "3"
        study = study_from_recipes(names, keys, _seeds(seeds))
        name = name_from_recipes(names, keys)
        out = Path("runs") / f"compare-{name}"
        words = [*names, *(f"--{key}={value}" for key, value in keys.items()), "--seeds", seeds]
        command = shlex.join(["python", "recipes/compare.py", *words])
    if args.power and (args.plan or args.report_only):
        raise UserError("--power only prints what the pairs at hand can show: without --plan and --report-only")
    gpus = _gpus(args.devices, workers=args.workers, ray=args.ray)
    workers = len(gpus) if gpus and args.workers is None else _workers(args.workers)
    settings = RunSettings(args.runs, workers, _shard(args.shard), args.ray, gpus)
    return Options(
        study=study,
        name=name,
        out=args.out or out,
        settings=settings,
        plan=args.plan,
        report_only=args.report_only,
        power=args.power,
        wanted=_wanted(args.wanted, args.power),
        command=command,
    )


def _parser() -> Parser:
    parser = Parser(
        "compare.py",
        __doc__,
        usage="compare.py STUDY.yaml | RECIPE RECIPE ... [--KEY VALUE ...] [--seeds N] [--workers N] ...",
        epilog=textwrap.fill(
            f"recipes: {', '.join(recipes())}; --KEY VALUE is any key of recipes/train.py, for all of them alike", WIDTH
        ),
    )
    parser.option("--seeds", help="how many, or which: 5 or 0,1,2 (default: 3)")
    parser.option("--workers", type=int, help="runs at a time, default: the cores; 0: in this process")
    parser.option("--devices", metavar="NAMES", help="GPUs that the runs share: cuda:0,cuda:1; default: the first one")
    parser.option("--shard", default="1/1", help="job i of n that share the folder of runs, e.g. 2/4")
    parser.option("--ray", metavar="ADDRESS", help="run on a Ray cluster that shares the folder of runs")
    parser.option("--out", type=Path, help="folder of results.json and the report")
    parser.option("--runs", type=Path, default=Path("runs/studies"), help="folder of the runs")
    parser.flag("--plan", help="show what would run and for how long, and run nothing")
    parser.flag("--report-only", help="tables and report from what is there, and run nothing")
    parser.flag("--power", help="the difference that the pairs at hand can show, and the pairs that a margin needs")
    parser.option("--wanted", type=float, help="with --power: plan for this difference of the first measure")
    return parser


def _split(argv: Sequence[str], options: Sequence[str]) -> tuple[list[str], dict[str, str], list[str]]:
    """The names of recipes or of a study file, the keys of recipes/train.py, and the words for this script's parser."""
    names: list[str] = []
    keys: dict[str, str] = {}
    own: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        if not word.startswith("-"):
            names.append(word)
        elif option in options or option == "-h":
            own.append(word)
            if not equals and option not in ("--help", "-h") and words:
                own.append(words.pop(0))
        else:
            _check_key(option, options)
            if not equals and not words:
                raise UserError(f"{option} needs a value")
            keys[option[2:]] = value if equals else words.pop(0)
    return names, keys, own


def _check_key(option: str, options: Sequence[str]) -> None:
    """Refuse what is no key of recipes/train.py but looks like an option of this script."""
    key = option[2:]
    known = "." in key or key in (item.name for item in fields(TrainConfig))
    near = "" if known else did_you_mean(key, [name[2:] for name in options], prefix="--")
    if near or not option.startswith("--"):
        raise UserError(f"{option} is unknown{near} (--help lists the options)")


def _seeds(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds {text}: a number of seeds, or their list as 0,1,2") from None
    if "," not in text and numbers[0] < 1:
        raise UserError(f"--seeds {text}: at least one, or their list as 0,1,2")
    return list(range(numbers[0])) if "," not in text else numbers


def _workers(number: int | None) -> int:
    if number is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if number < 0:
        raise UserError(f"--workers {number}: 0 or more")
    return number


def _gpus(text: str | None, *, workers: int | None, ray: str | None) -> tuple[str, ...]:
    """GPUs as CUDA_VISIBLE_DEVICES names them: where it is set, cuda:0 is the first of those."""
    if text is None:
        return ()
    names = text.split(",")
    if not all(re.fullmatch(r"cuda:\d+", name) for name in names) or len(set(names)) < len(names):
        raise UserError(f"--devices {text}: GPUs, none twice, as cuda:0,cuda:1")
    if ray is not None or workers == 0:
        other = "--ray gives each run a GPU of the cluster" if ray is not None else "--workers 0 runs in this process"
        raise UserError(f"--devices {text}: {other}; leave one of the two out")
    import torch

    from recipes.study.processes import VISIBLE

    visible = [name for name in os.environ.get(VISIBLE, "").split(",") if name]
    there = min(torch.cuda.device_count(), len(visible)) if visible else torch.cuda.device_count()
    numbers = [int(name.removeprefix("cuda:")) for name in names]
    if max(numbers) >= there:
        raise UserError(f"--devices {text}: this machine shows {there} GPUs; leave --devices out, or name those")
    return tuple(visible[number] if visible else str(number) for number in numbers)


def _wanted(difference: float | None, power: bool) -> float | None:
    if difference is not None and not power:
        raise UserError(f"--wanted {difference} says what --power plans for: give --power too")
    if difference is not None and not 0 < difference < math.inf:
        raise UserError(f"--wanted {difference}: a difference above 0, in the measure's own unit (0.003 of accuracy)")
    return difference


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise UserError(f"--shard {text}: i/n with 1 <= i <= n, e.g. 2/4")
    return int(index), int(count)


def compare(options: Options) -> int:
    """Search, run, tabulate and report; the exit code is 0, 1 where a run failed, 75 where some are left to run."""
    from recipes.study import results
    from recipes.study.pipeline import collect_all, plan_trials, run_missing, tabulate, write_results
    from recipes.study.power_lines import power_lines
    from recipes.study.preflight import check_evaluations, check_trials
    from recipes.study.processors import pairs_to_be_mixed
    from recipes.study.progress import plan_lines
    from recipes.study.records import missing_trials
    from recipes.study.tables import closing_lines
    from recipes.study.trials import search_trials

    study, settings = options.study, options.settings
    known = results.read_records(options.out, options.name)
    check_evaluations(study)
    records = collect_all(study, known, settings.runs)
    if options.power:
        statistics = tabulate(study, records, plan_trials(study, records))
        print("\n".join(power_lines(study, statistics, options.wanted)))
        return 0
    if not options.report_only and settings.ray is None:  # on a cluster the data lies elsewhere
        check_trials(missing_trials(plan_trials(study, records), records, study.evaluations))
    if options.plan:
        print("\n".join(plan_lines(study, records, search_trials(study))))
        return 0
    _check_writable({"--out": options.out, "--runs": settings.runs})
    if not options.report_only:
        if note := pairs_to_be_mixed(study, plan_trials(study, records), records):
            print(note, flush=True)
        records = run_missing(study, records, settings)
    with locked(settings.runs / "report", wait=True):  # jobs that end at the same time write one after the other
        records = collect_all(study, records, settings.runs)  # other jobs may have finished some
        content = write_results(study, records, options.out, name=options.name, command=options.command)
    total = len(study.settings) * len(study.arms) * len(study.seeds)
    print("\n".join(closing_lines(content, total=total, out=options.out)))
    if any(run["status"] == "failed" for run in content["runs"].values()):
        return 1
    return EXIT_CODE if results.count_missing(content) else 0


def _check_writable(folders: Mapping[str, Path]) -> None:
    """Refuse a folder that cannot be written to before the first run rather than after the last."""
    for option, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(f"{option} {folder} cannot be written to: {error.strerror}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: exit code of `compare`, or 2 with one line where the user has to change something."""
    return run_script(lambda words: compare(parse_options(words)), argv)


if __name__ == "__main__":
    leave_with(main)
