"""results.json: what a study found, complete enough to go on from it and to make every table again without the runs.

Beside it lie timing.json (seconds and memory, which no two days share), curves.json (histories) and collapse.json
(features on the simplex) for the figures.
"""

from __future__ import annotations

import itertools
import json
import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.core.config import TrainConfig
from recipes.core.errors import UserError
from recipes.core.files import environment, write_atomically
from recipes.evaluation.options import folder_name
from recipes.evaluation.options import parse_options as parse_evaluation
from recipes.study.runner import evaluated, run_folder
from recipes.study.spec import Evaluations, Study, plain
from recipes.study.trials import Cell, differences, dotted, identity

SCHEMA = 1
BESIDE = ("timing", "curves", "collapse")
CURVES = ("train_accuracy", "val_accuracy", "train_loss", "lr")
COLLAPSE_CURVES = ("nc1", "nc2_equiangularity", "nc3", "intra_cosine_gap", "inter_cosine_gap")
EVALUATED = {"robustness": "last", "robustness_onset": "onset"}
RUN_KEYS = {"status", "commit", "environment", "config", "command", "evaluation", "summary", "robustness", "error"}
KEYS = {"schema", "name", "command", "study", "defaults", "environments", "search", "cells", "runs", "statistics"}


@dataclass
class Found:
    """What is known of the runs, by key.

    Attributes:
        runs: records as results.json holds them; `config` complete, `environment` in full.
        timing: seconds, images/s and memory.
        curves: histories, shortened.
        collapse: features on the simplex, for the runs that were drawn.
    """

    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    timing: dict[str, dict[str, Any]] = field(default_factory=dict)
    curves: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    collapse: dict[str, dict[str, Any]] = field(default_factory=dict)

    def done(self, cell: Cell, asked: Evaluations | None) -> bool:
        """Whether nothing is left to run for a cell."""
        record = self.runs.get(cell.key)
        if record is None or record["status"] != "done":
            return False
        return cell.searching or asked is None or record["evaluation"] == asked.words

    def failed(self, cell: Cell) -> bool:
        """Whether the cell's run ended in an error."""
        return self.runs.get(cell.key, {}).get("status") == "failed"

    def take(self, cell: Cell, runs: Path, asked: Evaluations | None) -> None:
        """Read what a cell's folder holds: a finished run, or how it failed."""
        folder = runs / cell.key
        command = shlex.join(["python", "recipes/train.py", *cell.argv])
        common = {"config": cell.config, "command": command, "evaluation": None, "summary": None, "robustness": None}
        try:
            self._take(cell, folder, None if cell.searching else asked, common)
        except (OSError, ValueError, KeyError, TypeError) as error:  # a file cut short, or gone
            text = f"{cell.key}: a file of the run is damaged ({type(error).__name__}: {error}): remove that folder"
            text = text.replace(str(folder), "RUN")
            self.runs[cell.key] = common | {"status": "failed", "error": text, **_made_by(environment([]))}

    def _take(self, cell: Cell, folder: Path, asked: Evaluations | None, common: Mapping[str, Any]) -> None:
        run, failure = run_folder(folder), folder / "failure.json"
        if failure.exists():
            text = json.loads(failure.read_text())["error"].replace(str(folder), "RUN")
            made = environment([]) if run is None else json.loads((run / "environment.json").read_text())
            self.runs[cell.key] = {**common, "status": "failed", "error": text, **_made_by(made)}
        elif run is not None and (run / "summary.json").exists() and evaluated(run, asked):
            made = json.loads((run / "environment.json").read_text())
            record = (
                {**common, "status": "done", "error": None, "summary": json.loads((run / "summary.json").read_text())}
                | _made_by(made)
                | ({} if asked is None else {"evaluation": asked.words, "robustness": _evaluation(run, asked)})
            )
            timing, curves = _timing(run), _curves(run)
            self.runs[cell.key], self.timing[cell.key], self.curves[cell.key] = record, timing, curves
            if cell.pictured and (run / "collapse" / "view-train.json").exists():
                self.collapse[cell.key] = _read(run / "collapse" / "view-train.json")


def _made_by(environment: Mapping[str, Any]) -> dict[str, Any]:
    packages = dict(environment.get("packages", {}))
    commit = environment.get("git_commit") or f"ncreg {packages.get('ncreg', 'unknown')}, not under version control"
    return {
        "commit": commit,
        "environment": {"python": environment.get("python"), "platform": environment.get("platform")} | packages,
    }


def _evaluation(run: Path, asked: Evaluations) -> dict[str, Any]:
    """By checkpoint: parts, warnings and what was skipped; not the path of the run, which no two machines share."""
    found: dict[str, Any] = {}
    for checkpoint in asked.checkpoints:
        args = parse_evaluation(asked.argv(checkpoint))
        content = _read(run / (args.out or folder_name(args.checkpoint, args.split)) / "results.json")
        found[checkpoint] = (
            _scalars({key: content[key] for key in ("parts", "warnings", "skipped")}) if content else None
        )
    return found


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else {}


def _scalars(value: Any) -> Any:
    """Numbers, words and their names; lists stay while they are short, images and scores of single samples go."""
    if isinstance(value, Mapping):
        return {key: _scalars(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_scalars(item) for item in value] if len(value) <= 32 else None
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
    rows = [json.loads(row) for row in (run / "history.jsonl").read_text().splitlines()]
    return {name: [_short(row[name]) for row in rows] for name in CURVES} | {
        name: [_short(row["measures"].get(name)) for row in rows] for name in COLLAPSE_CURVES
    }


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


class Absent(UserError):
    """A run has nothing at a measure's path."""


def lookup(record: Mapping[str, Any], path: str) -> float | None:
    """The number at a dotted path of a run's summary, or of its evaluation after the word robustness.

    None stands for what was not reached, as at_onset without zero error.

    Raises:
        Absent: the path names nothing in this run.
        UserError: it names something that is no number, or an evaluation that the study has not asked for.
    """
    value: Any = record["summary"]
    words = path.split(".")
    if words[0] in EVALUATED:
        checkpoint, words = EVALUATED[words[0]], words[1:]
        if checkpoint not in (record["robustness"] or {}):
            raise UserError(f"measure {path}: the study's evaluations do not look at the {checkpoint} checkpoint")
        report = record["robustness"][checkpoint]
        if report is None or words[0] in report["skipped"]:  # no zero error, or a part that this run cannot have
            return None
        value = report["parts"]
    for position, word in enumerate(words):
        if value is None:
            return None
        if not isinstance(value, Mapping) or word not in value:
            known = ", ".join(value) if isinstance(value, Mapping) else "a number"
            raise Absent(f"measure {path}: no {word!r} in {'.'.join(words[:position]) or 'the run'}, only {known}")
        value = value[word]
    if value is None or isinstance(value, int | float):
        return None if value is None else float(value)
    raise UserError(f"measure {path} is no number but {type(value).__name__}")


def assemble(
    study: Study,
    found: Found,
    cells: Iterable[Cell],
    *,
    name: str,
    command: str,
    search: list[dict[str, Any]],
    statistics: list[dict[str, Any]],
) -> dict[str, Any]:
    """results.json: the same to the last bit for the same study, commit and machine type."""
    cells = list(cells)
    used = {cell.key: found.runs[cell.key] for cell in cells if cell.key in found.runs}
    environments: list[dict[str, Any]] = []
    runs = {}
    defaults = dotted(TrainConfig())
    for key, record in used.items():
        if record["environment"] not in environments:
            environments.append(record["environment"])
        runs[key] = record | {
            "environment": environments.index(record["environment"]),
            "config": differences(record["config"], defaults),
        }
    return {
        "schema": SCHEMA,
        "name": name,
        "command": command,
        "study": plain(study),
        "defaults": defaults,
        "environments": environments,
        "search": search,
        "cells": [
            {"data": cell.data, "arm": cell.arm, "seed": cell.seed, "point": cell.point, "key": cell.key}
            for cell in cells
            if not cell.searching
        ],
        "runs": runs,
        "statistics": statistics,
    }


def write(out: Path, results: Mapping[str, Any], found: Found) -> None:
    """The files; entries a line each, so that a diff shows what was added."""
    out.mkdir(parents=True, exist_ok=True)
    keys = list(results["runs"])
    write_atomically(out / "results.json", _lines(results))
    for name in BESIDE:
        values = getattr(found, name)
        rows = ",\n ".join(f"{json.dumps(key)}: {json.dumps(values[key])}" for key in keys if key in values)
        write_atomically(out / f"{name}.json", f"{{\n {rows}\n}}\n")


def outstanding(content: Mapping[str, Any]) -> int:
    """Runs of the comparison that are still to come; not those that failed, or whose search found nothing."""
    study = content["study"]
    settings = max(1, len(study["data"]))
    hopeless = sum(not entry["missing"] and entry["chosen"] is None for entry in content["search"])
    planned = (settings * len(study["arms"]) - hopeless) * len(study["seeds"])
    return planned - sum(ended(content, cell["key"]) is not None for cell in content["cells"])


def ended(content: Mapping[str, Any], key: str) -> str | None:
    """How a run of the comparison ended: done (and evaluated as the study asks), or failed; None if it has not."""
    record, asked = content["runs"].get(key), content["study"].get("evaluations")
    if record is None or (record["status"] == "done" and asked and record["evaluation"] != Evaluations(**asked).words):
        return None
    return str(record["status"])


def _lines(content: Mapping[str, Any]) -> str:
    """JSON with one line for each entry of the top level and of the collections in it."""

    def row(value: Any) -> str:
        return json.dumps(value, allow_nan=False)

    parts = []
    for key, value in content.items():
        if isinstance(value, Mapping) and value and all(isinstance(item, Mapping) for item in value.values()):
            inner = ",\n  ".join(f"{row(name)}: {row(item)}" for name, item in value.items())
            parts.append(f"{row(key)}: {{\n  {inner}\n }}")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            inner = ",\n  ".join(map(row, value))
            parts.append(f"{row(key)}: [\n  {inner}\n ]")
        else:
            parts.append(f"{row(key)}: {row(value)}")
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def read(path: Path) -> dict[str, Any]:
    """A results.json.

    Raises:
        UserError: it is none, of another version, or has a run whose commit is not named.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is no results.json: {error}") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise UserError(f"{path} is no results.json of schema {SCHEMA}")
    if set(content) != KEYS:
        raise UserError(f"{path}: {', '.join(sorted(set(content) ^ KEYS))} missing or unknown")
    try:
        for key, record in content["runs"].items():
            _check_record(content, key, record)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): put the file back as it was") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return content


def _check_record(content: Mapping[str, Any], key: str, record: Mapping[str, Any]) -> None:
    if set(record) != RUN_KEYS:
        raise UserError(f"run {key}: {', '.join(sorted(set(record) ^ RUN_KEYS))} missing or unknown")
    if record["status"] not in ("done", "failed"):
        raise UserError(f"run {key}: status={record['status']!r} is neither done nor failed")
    if not record["commit"] and record["status"] == "done":
        raise UserError(f"run {key} does not name the commit that made it; no table is made from it")
    identity(content["defaults"] | record["config"])
    dict(content["environments"][record["environment"]])
    if record["status"] == "done":
        dict(record["summary"])


def read_beside(folder: Path, name: str) -> dict[str, Any]:
    """One of `BESIDE` beside a results.json; empty where it is not there."""
    path = folder / f"{name}.json"
    try:
        return dict(_read(path))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): put it back as it was, or remove it with what it says") from None


def known(folder: Path, name: str) -> Found:
    """The runs of an earlier results.json in a folder, by the key that their configuration has today.

    Raises:
        UserError: the file is damaged, or of another study.
    """
    found = Found()
    if not (folder / "results.json").exists():
        return found
    content = read(folder / "results.json")
    if content["name"] != name:
        raise UserError(f"{folder} holds the study {content['name']}, not {name}: --out another folder")
    beside = {name: read_beside(folder, name) for name in BESIDE}
    for old, record in content["runs"].items():
        config = content["defaults"] | record["config"]
        key = identity(config)
        found.runs[key] = record | {"config": config, "environment": content["environments"][record["environment"]]}
        for name, values in beside.items():
            if old in values:
                getattr(found, name)[key] = values[old]
    return found


def put_aside(folder: Path) -> Path:
    """A copy of results.json, before one that holds fewer runs takes its place."""
    free = (folder / f"results-before-{number}.json" for number in itertools.count(1))
    copy = next(path for path in free if not path.exists())
    write_atomically(copy, (folder / "results.json").read_text())
    return copy
