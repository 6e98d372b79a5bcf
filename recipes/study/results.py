"""The file results.json: everything that a study found, enough to continue it and to remake every table without runs.

Beside it lie timing.json (seconds and memory, which differ from day to day), curves.json (histories) and collapse.json
(features on the simplex) for the figures.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from recipes.core.config import TrainConfig
from recipes.core.errors import UserError
from recipes.core.files import write_atomically
from recipes.study.load import study_to_dict
from recipes.study.records import Records, RunRecord
from recipes.study.spec import Evaluations, Study
from recipes.study.trials import Trial, changed_keys, config_hash, dotted_config

SCHEMA = 1
ATTACHMENTS = ("timing", "curves", "collapse")
"""Fields of a run's record that have a file of their own beside results.json."""
RUN_KEYS = {"status", "commit", "environment", "config", "command", "evaluation", "summary", "robustness", "error"}
KEYS = {"schema", "name", "command", "study", "defaults", "environments", "search", "cells", "runs", "statistics"}


def assemble(
    study: Study,
    records: Records,
    trials: Iterable[Trial],
    *,
    name: str,
    command: str,
    search: list[dict[str, Any]],
    statistics: list[dict[str, Any]],
) -> dict[str, Any]:
    """The content of results.json: the same to the last bit for the same study, commit and machine type."""
    trials = list(trials)
    used = {trial.key: records[trial.key].result for trial in trials if trial.key in records}
    environments: list[dict[str, Any]] = []
    runs = {}
    defaults = dotted_config(TrainConfig())
    for key, result in used.items():
        if result["environment"] not in environments:
            environments.append(result["environment"])
        runs[key] = result | {
            "environment": environments.index(result["environment"]),
            "config": changed_keys(result["config"], defaults),
        }
    return {
        "schema": SCHEMA,
        "name": name,
        "command": command,
        "study": study_to_dict(study),
        "defaults": defaults,
        "environments": environments,
        "search": search,
        "cells": [
            {"data": trial.data, "arm": trial.arm, "seed": trial.seed, "point": trial.point, "key": trial.key}
            for trial in trials
            if not trial.searching
        ],
        "runs": runs,
        "statistics": statistics,
    }


def write(out: Path, content: Mapping[str, Any], records: Records) -> None:
    """Write results.json and the files beside it, one entry a line, so that a diff shows what was added."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "results.json", _one_entry_a_line(content))
    for name in ATTACHMENTS:
        values = {key: getattr(records[key], name) for key in content["runs"]}
        rows = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items() if value is not None)
        write_atomically(out / f"{name}.json", "{\n " + ",\n ".join(rows) + "\n}\n")


def _one_entry_a_line(content: Mapping[str, Any]) -> str:
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


def back_up(folder: Path) -> Path:
    """Copy results.json to results-before-N.json, before one with fewer runs replaces it; returns the copy."""
    free = (folder / f"results-before-{number}.json" for number in itertools.count(1))
    copy = next(path for path in free if not path.exists())
    write_atomically(copy, (folder / "results.json").read_text(encoding="utf-8"))
    return copy


def read(path: Path) -> dict[str, Any]:
    """The checked content of a results.json.

    Raises:
        UserError: it is not one, has another schema, or has a run whose commit is not named.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(
            f"{path} is no results.json: {error}; it is damaged: move it away, and what the runs' folder has comes back"
        ) from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise UserError(f"{path} is no results.json of schema {SCHEMA}")
    if set(content) != KEYS:
        raise UserError(f"{path}: {', '.join(sorted(set(content) ^ KEYS))} missing or unknown")
    try:
        for key, result in content["runs"].items():
            _check_run(content, key, result)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): put the file back as it was") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return content


def _check_run(content: Mapping[str, Any], key: str, result: Mapping[str, Any]) -> None:
    if set(result) != RUN_KEYS:
        raise UserError(f"run {key}: {', '.join(sorted(set(result) ^ RUN_KEYS))} missing or unknown")
    if result["status"] not in ("done", "failed"):
        raise UserError(f"run {key}: status={result['status']!r} is neither done nor failed")
    if not result["commit"] and result["status"] == "done":
        raise UserError(f"run {key} does not name the commit that made it; no table is made from it")
    config_hash(content["defaults"] | result["config"])
    dict(content["environments"][result["environment"]])
    if result["status"] == "done":
        dict(result["summary"])


def read_attachment(folder: Path, name: str) -> dict[str, Any]:
    """One of the files beside results.json, by run; empty where it does not exist.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / f"{name}.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): put it back as it was, or remove it with what it says") from None


def read_records(folder: Path, name: str) -> dict[str, RunRecord]:
    """The runs of the results.json in a folder, each by the key that its configuration has today; empty without one.

    Raises:
        UserError: the file is damaged, or holds another study.
    """
    if not (folder / "results.json").exists():
        return {}
    content = read(folder / "results.json")
    if content["name"] != name:
        raise UserError(f"{folder} holds the study {content['name']}, not {name}: --out another folder")
    attached = {name: read_attachment(folder, name) for name in ATTACHMENTS}
    records = {}
    for key, stored in content["runs"].items():
        config = content["defaults"] | stored["config"]
        result = stored | {"config": config, "environment": content["environments"][stored["environment"]]}
        attachments = {name: values.get(key) for name, values in attached.items()}
        records[config_hash(config)] = RunRecord(result, **attachments)
    return records


def count_missing(content: Mapping[str, Any]) -> int:
    """The number of comparison runs that have not ended; without those for which the search found no point."""
    study = content["study"]
    settings = max(1, len(study["data"]))
    without_point = sum(not entry["missing"] and entry["chosen"] is None for entry in content["search"])
    planned = (settings * len(study["arms"]) - without_point) * len(study["seeds"])
    return planned - sum(final_status(content, cell["key"]) is not None for cell in content["cells"])


def final_status(content: Mapping[str, Any], key: str) -> str | None:
    """How a run of the comparison ended: done (and evaluated as the study wants), or failed; None if it has not."""
    result, evaluations = content["runs"].get(key), content["study"].get("evaluations")
    if result is None:
        return None
    evaluated = not evaluations or result["evaluation"] == Evaluations(**evaluations).words
    return str(result["status"]) if evaluated or result["status"] != "done" else None
