"""What is known of each run: read from an earlier results.json, or collected from the runs' folders."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.core.files import environment
from recipes.evaluation.options import folder_name
from recipes.evaluation.options import parse_options as parse_evaluation
from recipes.study.runner import find_run_dir, has_evaluations
from recipes.study.spec import Evaluations
from recipes.study.trials import Trial

CURVES = ("train_accuracy", "val_accuracy", "train_loss", "lr")
COLLAPSE_CURVES = ("nc1", "nc2_equiangularity", "nc3", "intra_cosine_gap", "inter_cosine_gap")


@dataclass(frozen=True)
class RunRecord:
    """What is known of one run.

    Attributes:
        result: the record as results.json holds it, but with the whole configuration and environment.
        timing: seconds, images/s and memory; None where they are not known.
        curves: its history, shortened.
        collapse: its features on the simplex, where they were drawn.
    """

    result: dict[str, Any]
    timing: dict[str, Any] | None = None
    curves: dict[str, list[float | None]] | None = None
    collapse: dict[str, Any] | None = None


Records = Mapping[str, RunRecord]
"""The known runs by the key of their trials."""


def is_done(records: Records, trial: Trial, evaluations: Evaluations | None) -> bool:
    """Whether a trial has a finished run, evaluated as the study wants; search runs need no evaluation."""
    if trial.key not in records or records[trial.key].result["status"] != "done":
        return False
    return trial.searching or evaluations is None or records[trial.key].result["evaluation"] == evaluations.words


def has_failed(records: Records, trial: Trial) -> bool:
    """Whether a trial's run ended in an error."""
    return trial.key in records and records[trial.key].result["status"] == "failed"


def missing_trials(trials: Iterable[Trial], records: Records, evaluations: Evaluations | None) -> list[Trial]:
    """The trials that are not done."""
    return [trial for trial in trials if not is_done(records, trial, evaluations)]


def collect(
    trials: Iterable[Trial], runs: Path, evaluations: Evaluations | None, known: Records
) -> dict[str, RunRecord]:
    """The known records, and those that the folders of runs add for trials that are not done."""
    records = dict(known)
    for trial in trials:
        if not is_done(records, trial, evaluations):
            record = read_run(trial, runs, evaluations)
            if record is not None:
                records[trial.key] = _completed(record, known.get(trial.key))
    return records


def _completed(record: RunRecord, earlier: RunRecord | None) -> RunRecord:
    """The record, with what only an earlier one knows, as the timing of a run whose evaluation failed now."""
    if earlier is None:
        return record
    return RunRecord(
        record.result,
        earlier.timing if record.timing is None else record.timing,
        earlier.curves if record.curves is None else record.curves,
        earlier.collapse if record.collapse is None else record.collapse,
    )


def read_run(trial: Trial, runs: Path, evaluations: Evaluations | None) -> RunRecord | None:
    """The record of a trial's run from its folder; None where the run is neither finished nor failed."""
    folder = runs / trial.key
    try:
        return _read_run(trial, folder, None if trial.searching else evaluations)
    except (OSError, ValueError, KeyError, TypeError) as error:  # a file cut short, or gone
        text = f"{trial.key}: a file of the run is damaged ({type(error).__name__}: {error}): remove that folder"
        text = text.replace(str(folder), "RUN")
        return RunRecord(_result(trial, environment([]), status="failed", error=text))


def _read_run(trial: Trial, folder: Path, evaluations: Evaluations | None) -> RunRecord | None:
    run, failure = find_run_dir(folder), folder / "failure.json"
    if failure.exists():
        text = json.loads(failure.read_text(encoding="utf-8"))["error"].replace(str(folder), "RUN")
        made_by = environment([]) if run is None else json.loads((run / "environment.json").read_text(encoding="utf-8"))
        return RunRecord(_result(trial, made_by, status="failed", error=text))
    if run is None or not (run / "summary.json").exists() or not has_evaluations(run, evaluations):
        return None
    result = _result(
        trial,
        json.loads((run / "environment.json").read_text(encoding="utf-8")),
        status="done",
        summary=json.loads((run / "summary.json").read_text(encoding="utf-8")),
        evaluation=None if evaluations is None else evaluations.words,
        robustness=None if evaluations is None else evaluation_results(run, evaluations),
    )
    collapse = run / "collapse" / "view-train.json"
    drawn = trial.pictured and collapse.exists()
    return RunRecord(result, _timing(run), _curves(run), _read(collapse) if drawn else None)


def _result(
    trial: Trial,
    made_by: Mapping[str, Any],
    *,
    status: str,
    error: str | None = None,
    summary: dict[str, Any] | None = None,
    evaluation: list[str] | None = None,
    robustness: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A record in the key order of results.json."""
    packages = dict(made_by.get("packages", {}))
    processors = _each(made_by, "processor")
    machine = {"processor": processors} if processors else {}  # earlier runs do not tell it
    return {
        "config": trial.config,
        "command": shlex.join(["python", "recipes/train.py", *trial.argv]),
        "evaluation": evaluation,
        "summary": summary,
        "robustness": robustness,
        "status": status,
        "error": error,
        "commit": _each(made_by, "git_commit")
        or f"ncreg {packages.get('ncreg', 'unknown')}, not under version control",
        "environment": {"python": made_by.get("python"), "platform": made_by.get("platform")} | machine | packages,
    }


def _each(made_by: Mapping[str, Any], key: str) -> str:
    """A value of a run's environment; all that it had, where the run went on elsewhere; empty where none is told."""
    told = [made_by, *(entry["environment"] for entry in made_by.get("resumed", []))]
    return ", then ".join(dict.fromkeys(each[key] for each in told if each.get(key)))


def evaluation_results(run: Path, evaluations: Evaluations) -> dict[str, Any]:
    """By checkpoint: parts, warnings and what was skipped; without the run's path, which differs between machines."""
    by_checkpoint: dict[str, Any] = {}
    for checkpoint in evaluations.checkpoints:
        args = parse_evaluation(evaluations.argv(checkpoint))
        content = _read(run / (args.out or folder_name(args.checkpoint, args.split)) / "results.json")
        by_checkpoint[checkpoint] = (
            _without_long_lists({key: content[key] for key in ("parts", "warnings", "skipped")}) if content else None
        )
    return by_checkpoint


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _without_long_lists(value: Any) -> Any:
    """The same with null for lists of more than 32 items: images, or scores of single samples."""
    if isinstance(value, Mapping):
        return {key: _without_long_lists(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_long_lists(item) for item in value] if len(value) <= 32 else None
    return value


def _timing(run: Path) -> dict[str, Any]:
    timing, memory = _read(run / "timing.json"), _read(run / "memory.json")
    evaluation = _read(run / "evaluated.json")
    return {
        "train_seconds": sum(timing["seconds"].values()),
        "evaluation_seconds": evaluation.get("seconds", 0.0),
        "train_images_per_second": timing["train_images_per_second"],
        "peak_bytes": memory.get("peak_bytes", 0),
    }


def _curves(run: Path) -> dict[str, list[float | None]]:
    rows = [json.loads(row) for row in (run / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    return {name: [_five_digits(row[name]) for row in rows] for name in CURVES} | {
        name: [_five_digits(row["measures"].get(name)) for row in rows] for name in COLLAPSE_CURVES
    }


def _five_digits(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
