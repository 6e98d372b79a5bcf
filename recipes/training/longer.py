"""A run trained longer than it was begun for: which rates it has then, and what its folder keeps of its former end."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ncreg.tpt import TPTScheduler
from recipes.core.cli import BOUNDS
from recipes.core.config import TPTConfig, TrainConfig, as_yaml
from recipes.core.errors import UserError
from recipes.core.files import environment, write_atomically, write_json
from recipes.training.build import stop_value
from recipes.training.run_dir import EXTENSIONS, RunDir, new_folder

GOING_ON = (
    *("config.yaml", "environment.json", "history.jsonl", "checkpoints", "tensorboard", "lock", EXTENSIONS),
    *("code", "code.json", "images.json", "data.json", "unreadable.json"),
)
"""What a run needs to go on; everything else in its folder tells of its end."""

FORMER = "until-epoch-"
"""Folder of what told of a former end."""


def bounds(of: TPTConfig | TPTScheduler) -> dict[str, Any]:
    """The values that bound a run, as configured, or as in force: a phase is no longer than the run."""
    return {key: getattr(of, key.removeprefix("tpt.")) for key in BOUNDS}


def moved(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The bounds that differ, with what they were and are.

    Example:
        >>> moved({"tpt.max_epochs": 20, "tpt.extend": 2.0}, {"tpt.max_epochs": 40, "tpt.extend": 2.0})
        {'tpt.max_epochs': (20, 40)}
    """
    return {key: (then[key], value) for key, value in now.items() if then[key] != value}


def under_new_bounds(
    found: dict[str, Any], scheduler: TPTScheduler, config: TrainConfig, run: RunDir
) -> dict[str, Any]:
    """A checkpoint as the run goes on from it; where its bounds have moved, with the schedule of the new ones.

    The schedule is that of a run which had the new bounds from its start: it is stepped through the epochs so far.

    Args:
        found: the checkpoint.
        scheduler: as it is at the start of a run with the new bounds.
        config: the configuration with the new bounds.
        run: the run, for messages; its main rank says where rates differ from those that the run has had.

    Raises:
        UserError: the new bounds end the run before what it has trained, or add no epoch to a run that has ended.
    """
    saved = found["scheduler"]
    then = {key: saved[key.removeprefix("tpt.")] for key in BOUNDS}
    then["tpt.min_terminal"] = min(then["tpt.min_terminal"], saved["max_epochs"])  # earlier runs noted what was asked
    in_force = moved(then, bounds(scheduler))
    changed = moved(bounds(run.begun_with().tpt), bounds(config.tpt)) or in_force  # or an extension that was killed
    if not changed:
        return found
    history, begun = found["history"], any(found["taken"])
    rates = replay(scheduler, history, config.tpt)
    trained = len(history) + begun
    if scheduler.finished and scheduler.epoch < trained:
        given = ", ".join(f"--{key} {value}" for key, (_, value) in changed.items())
        raise UserError(
            f"{given} ends the run at epoch {scheduler.epoch}, but {run.path} has "
            f"{'begun' if begun else 'trained'} epoch {trained}: its end can only come later"
        )
    if scheduler.finished and saved["epoch"] >= (saved["last_epoch"] or saved["max_epochs"]):
        raise UserError(f"run {run.path} is finished: {way_to_longer(config.tpt, scheduler)}")
    if run.writes:
        had = [record["lr"] for record in history] + [max(saved["lr"])] * begun
        _tell(run, changed, had, rates + [max(scheduler.get_last_lr())] * begun, quiet=config.quiet)
    return found | {"scheduler": scheduler.state_dict()}


def replay(scheduler: TPTScheduler, history: Sequence[Mapping[str, Any]], tpt: TPTConfig) -> list[float]:
    """Step a scheduler through the epochs of a run, or up to its own end; the rate that it has in each."""
    rates: list[float] = []
    for record in history:
        if scheduler.finished:
            break
        rates.append(max(scheduler.get_last_lr()))
        values = record["measures"] | {"accuracy": record["train_accuracy"], "loss": record["train_loss"]}
        scheduler.step_update(0)  # changes no rate, but what timm's schedule notes of the epoch
        scheduler.step(record["epoch"], record["train_accuracy"], stop_value(values, tpt))
    return rates


def way_to_longer(tpt: TPTConfig, scheduler: TPTScheduler) -> str:
    """Half a sentence: which bounds a run that has ended needs to go on for an epoch at least."""
    end, onset = scheduler.epoch, scheduler.onset_epoch
    ways, why = [], f"tpt.max_epochs is {tpt.max_epochs}"
    if tpt.max_epochs <= end:
        ways.append(f"--tpt.max_epochs of more than {end}")
    if onset is not None and tpt.extend is not None:
        length = end - onset
        if max(round(tpt.extend * onset), tpt.min_terminal) <= length:
            ways.append(f"--tpt.min_terminal of more than {length}")
        if tpt.max_terminal is not None and tpt.max_terminal <= length:
            ways.append(f"--tpt.max_terminal of more than {length} or null")
        if tpt.max_epochs > end:
            why = f"its terminal phase, {length} epochs after the onset at {onset}, is complete"
    if not ways:
        ways, why = ["a larger --tpt.stop_patience or null"], f"its tpt.stop_measure {tpt.stop_measure} stands still"
    return f"it ended at epoch {end}, because {why}; it goes on with {' and '.join(ways)}"


def _tell(
    run: RunDir, changed: Mapping[str, tuple[Any, Any]], had: Sequence[float], rates: Sequence[float], *, quiet: bool
) -> None:
    """Say what has changed, and whether the run is still what its configuration says."""
    words = ", ".join(f"{key} {_word(then)} -> {_word(now)}" for key, (then, now) in changed.items())
    first = next((place for place, pair in enumerate(zip(had, rates, strict=True)) if pair[0] != pair[1]), None)
    if first is not None:
        print(
            f"note: {words}: from now on {run.path} has the rates that a run with these bounds has from its start; "
            f"since epoch {first + 1} it had others (in epoch {len(had)} {had[-1]:.3g}, not {rates[-1]:.3g}), so it "
            "ends near such a run, not with its digits",
            file=sys.stderr,
        )
    elif not quiet:
        print(f"{words}: the run ends as one that had these bounds from its start")


def _word(value: Any) -> str:
    return "null" if value is None else str(value)


def record_bounds(run: RunDir, config: TrainConfig, command: Sequence[str], epoch: int) -> None:
    """Where a run's bounds have moved, write the new ones into its config.yaml, and set aside what told of its end.

    config.yaml comes last: a run that is killed before has its former end, after it its new one.

    Args:
        run: the run.
        config: its configuration with the new bounds.
        command: the command line, for the record.
        epoch: epochs that it has trained.
    """
    if not run.writes:
        return
    former = run.begun_with()
    changed = moved(bounds(former.tpt), bounds(config.tpt))
    if not changed:
        return
    extension = {
        "epoch": epoch,
        "from": {key: then for key, (then, _) in changed.items()},
        "to": {key: now for key, (_, now) in changed.items()},
        "environment": environment(command),
    }
    with run.writing():
        before = [entry for entry in run.extensions() if entry["epoch"] != epoch]
        write_json(run.path / EXTENSIONS, {"extensions": [*before, extension]})
        if run.finished:
            _set_aside(run, epoch)
        path = run.path / "config.yaml"
        comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        words = [f"{key} {_word(then)} -> {_word(now)}" for key, (then, now) in changed.items()]
        comments += [f"# extended at epoch {epoch}: {', '.join(words)}"]
        write_atomically(path, "\n".join([*comments, as_yaml(replace(former, tpt=config.tpt))]))


def _set_aside(run: RunDir, epoch: int) -> None:
    """Keep the last checkpoint as one of the end at `epoch`, and what told of that end in a folder of its own."""
    kept = run.checkpoint(f"end-{epoch}")
    kept.unlink(missing_ok=True)
    try:
        os.link(run.checkpoint("last"), kept)
    except OSError:  # a file system without links
        shutil.copy2(run.checkpoint("last"), kept)
    aside = new_folder(run.path, f"{FORMER}{epoch}")
    for path in sorted(run.path.iterdir(), key=lambda path: path.name != "summary.json"):  # that one first
        if path.name not in GOING_ON and not path.name.startswith((".", FORMER)):
            os.replace(path, aside / path.name)
    (run.path / "figures").mkdir()
