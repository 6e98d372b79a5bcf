"""Evaluate a run: open it, run the evaluations that its results.json lacks, save each as soon as it is done."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from recipes.core.errors import UserError
from recipes.core.files import environment, locked
from recipes.core.memory import is_out_of_memory, out_of_memory
from recipes.core.script import LESS_MEMORY
from recipes.evaluation.costs import costs_of, digest_of
from recipes.evaluation.evaluations import EVALUATIONS
from recipes.evaluation.model_options import ModelOptions
from recipes.evaluation.options import check_name, folder_name
from recipes.evaluation.plots import draw
from recipes.evaluation.presets import EVALUATION_NAMES, NotAvailable, Settings
from recipes.evaluation.results import Conditions, Damaged, Result, plain
from recipes.evaluation.run_under_test import RunUnderTest


def evaluate_run(
    path: str | Path,
    settings: Settings,
    *,
    evaluations: Sequence[str] = EVALUATION_NAMES,
    checkpoint: str = "last",
    split: str = "test",
    out: str | None = None,
    device: str = "auto",
    fresh: bool = False,
    options: ModelOptions | None = None,
    overrides: Sequence[str] = (),
    command: Sequence[str] = (),
    quiet: bool = False,
) -> tuple[Result, Path]:
    """Run evaluations on a run or a model, each saved as soon as it is done; the result and its folder.

    Args:
        path: the run folder, or another MODEL.
        settings: how to evaluate it.
        evaluations: names from EVALUATION_NAMES; one whose outcome is already in the folder does not run again.
        checkpoint: name of the checkpoint.
        split: a key of SPLITS.
        out: name of the results' folder inside the run; None for the usual one.
        device: of the classifier.
        fresh: run the evaluations again.
        options: of a model that is no run.
        overrides: `--data.KEY VALUE` words for its data.
        command: the command line, for the record.
        quiet: print no progress.

    Raises:
        UserError: no such run or checkpoint, a result of other settings in the way, another evaluation at work in the
            same folder, or an evaluation that failed.
    """
    run = RunUnderTest.open(
        path,
        checkpoint=checkpoint,
        device=device,
        seed=settings.seed,
        split=split,
        options=options,
        overrides=overrides,
    )
    settings = replace(settings, preset=settings.preset.for_images(*run.image_shape[1:]))
    _check_attacked(run, settings)
    _print_notes(run, settings)
    folder = results_folder(run.path, out or folder_name(checkpoint, split))
    with locked(folder) as lock:  # two at once would each write the file without the other's evaluations
        if lock is None:
            raise UserError(f"another evaluation is writing to {folder}: wait for its end, or --out NAME")
        result = open_result(folder, conditions_of(run, settings), fresh=evaluations if fresh else ())
        add_evaluations(result, run, settings, evaluations, folder, command=command, quiet=quiet)
        draw(folder / "figures", result, evaluations, title=run.path.name)
    return result, folder


def add_evaluations(
    result: Result,
    run: RunUnderTest,
    settings: Settings,
    names: Sequence[str],
    folder: Path,
    *,
    command: Sequence[str],
    quiet: bool,
) -> None:
    """Run the evaluations that a result lacks, and save each as soon as it is done; one that fails stops no other.

    Raises:
        UserError: names those that failed, after all have run.
    """
    origin, failed = environment(command), []
    if of_other_code := other_code(result, names, origin["git_commit"]):
        print(f"note: {of_other_code}", file=sys.stderr)
    if not quiet:
        print(f"evaluating {run.path}, checkpoint {run.checkpoint}: {', '.join(names)}", flush=True)
    for name in _with_progress(names, result, quiet=quiet):
        result.skipped.pop(name, None)
        try:
            outcome, warnings = EVALUATIONS[name](run, settings)
        except NotAvailable as reason:
            result.skipped[name] = str(reason)
        except (ValueError, TypeError, RuntimeError, AssertionError) as error:
            said = out_of_memory(error, LESS_MEMORY) if is_out_of_memory(error) else " ".join(str(error).split())
            failed.append(f"part {name}: {said}")
        else:
            result.parts[name], result.commits[name] = plain(outcome, name), origin["git_commit"]
            result.environment = origin
            result.warnings += [f"{name}: {warning}" for warning in warnings]
        result.write(folder)
    if failed:
        raise UserError(f"{run.path}, {'; '.join(failed)}")


def other_code(result: Result, names: Sequence[str], commit: str | None) -> str:
    """A sentence where evaluations that are there already were made by another commit; empty where none was."""
    made_by = {name: result.commits.get(name) for name in names if name in result.parts}
    other = {name: made for name, made in made_by.items() if commit and made and made != commit}
    if not other:
        return ""
    them = "it" if len(other) == 1 else "them"
    return f"{', '.join(other)} done before, at commit {', '.join(sorted({*other.values()}))}; --fresh repeats {them}"


def _with_progress(names: Sequence[str], result: Result, *, quiet: bool) -> Iterator[str]:
    """The names that the result lacks, one after the other under a progress bar; without a terminal as lines."""
    bar = tqdm(names, unit="part", disable=True if quiet else None)
    for name in bar:
        bar.set_description(name)
        if name not in result.parts:
            with _printed_time(name, wanted=bool(bar.disable) and not quiet):
                yield name


@contextmanager
def _printed_time(name: str, *, wanted: bool) -> Iterator[None]:
    start = time.perf_counter()
    if wanted:
        print(f"{name:<14}", end="", flush=True)
    yield
    if wanted:
        print(f"{time.perf_counter() - start:6.0f} s", flush=True)


def _check_attacked(run: RunUnderTest, settings: Settings) -> None:
    target = run.held_out().target
    count, classes = len(target), len(target.unique())
    if settings.attacked is not None and not classes <= settings.attacked <= count:
        raise UserError(
            f"--attacked {settings.attacked}: {run.path} has {count} {run.split} images of {classes} classes, so "
            f"{classes} (one of each) to {count}"
        )


def _print_notes(run: RunUnderTest, settings: Settings) -> None:
    if run.config.data.name in (settings.sets or ()):
        print(f"note: --sets {run.config.data.name} is the run's own data: left out", file=sys.stderr)
    if run.checkpoint == "last" and not (run.path / "summary.json").is_file():
        print(f"note: {run.path} is not finished: what is evaluated is its newest checkpoint", file=sys.stderr)


def results_folder(run: Path, name: str) -> Path:
    """The folder of a run that holds the results of an evaluation, or that is free to hold them.

    Raises:
        UserError: it would lie elsewhere, or there is something else of that name.
    """
    check_name(name)
    folder = run / name
    content = {path.name for path in folder.iterdir()} if folder.is_dir() else {name} if folder.exists() else set()
    if content and not content & {"results.json", "lock"}:  # the lock is there from the start on
        raise UserError(f"--out {name}: {folder} is there and is no evaluation; choose another name")
    return folder


def conditions_of(run: RunUnderTest, settings: Settings) -> Conditions:
    """What is evaluated, and how."""
    config = run.config
    return Conditions(
        run=run.path.name,
        recipe=config.recipe,
        data=config.data.name,
        backbone=config.model.backbone,
        run_seed=config.seed,
        checkpoint=run.checkpoint,
        checkpoint_sha256=run.digest,
        preset=settings.preset.name,
        epsilon=settings.epsilon,
        norm=settings.norm,
        seed=settings.seed,
        sets=settings.sets,
        split=run.split,
        image_share=settings.preset.fraction,
        attacked=settings.attacked,
        cost=digest_of(costs_of(run, settings)),
        images=run.images_named,
    )


def open_result(folder: Path, conditions: Conditions, *, fresh: Sequence[str] = ()) -> Result:
    """The result in a folder, without the evaluations to run again; a new one if there is none.

    Args:
        folder: that of results.json.
        conditions: of the evaluations to add.
        fresh: evaluations to run again; with any, a result of other conditions or a damaged one is replaced.

    Raises:
        UserError: the result is of other conditions or damaged, and `fresh` is empty; or it is of another version.
    """
    path = folder / "results.json"
    if not path.exists():
        return Result(conditions, {})
    try:
        result = Result.read(path)
    except Damaged:
        if fresh:
            return Result(conditions, {})
        raise
    for key, value in asdict(conditions).items():
        before = getattr(result.about, key)
        if before != value and key != "run":
            if fresh:
                return Result(conditions, {})
            raise UserError(
                f"{path} was made with {key}={before!r}, now it is {value!r}: --out NAME keeps both, --fresh replaces "
                "it"
            )
    for name in fresh:
        result.parts.pop(name, None)
        result.warnings = [warning for warning in result.warnings if not warning.startswith(f"{name}: ")]
    return result
