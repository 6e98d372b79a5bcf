"""The value of a measure in the record of a run, and on how many images it was taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recipes.core.errors import UserError
from recipes.evaluation.temperature import no_temperature
from recipes.study.spec import Measure

CHECKPOINTS = {"robustness": "last", "robustness_onset": "onset"}
"""The first word of a measure's path that names an evaluation, and the checkpoint that was evaluated."""


class MissingValueError(UserError):
    """A run has nothing at a measure's path."""


def value_of(record: Mapping[str, Any], measure: Measure) -> float | None:
    """A measure of a finished run; None where it was not reached.

    Raises:
        MissingValueError: the run has nothing at the measure's path.
    """
    value = lookup(record, measure.path)
    if value is None or measure.minus is None:
        return value
    subtracted = lookup(record, measure.minus)
    return None if subtracted is None else value - subtracted


def lookup(record: Mapping[str, Any], path: str) -> float | None:
    """The number at a dotted path of a run's summary, or of its evaluation after the word robustness.

    None stands for what was not reached, as at_onset without zero error, or a calibration after a temperature that the
    validation images do not determine.

    Raises:
        MissingValueError: the run has nothing at the path.
        UserError: it leads to something that is no number, or to a checkpoint that the study does not evaluate.

    Example:
        >>> lookup({"summary": {"at_end": {"test": {"loss": 0.5}}}}, "at_end.test.loss")
        0.5
    """
    value: Any = record["summary"]
    words = path.split(".")
    if words[0] in CHECKPOINTS:
        checkpoint, words = CHECKPOINTS[words[0]], words[1:]
        if checkpoint not in (record["robustness"] or {}):
            raise UserError(f"measure {path}: the study's evaluations do not look at the {checkpoint} checkpoint")
        report = record["robustness"][checkpoint]
        if report is None or words[0] in report["skipped"]:  # no zero error, or a part that this run cannot have
            return None
        value = report["parts"]
        scaled = words[0] == "calibration" and words[1:2] in (["after"], ["temperature"])
        if scaled and no_temperature(value.get("calibration", {})) is not None:
            return None
    for position, word in enumerate(words):
        if value is None:
            return None
        if not isinstance(value, Mapping) or word not in value:
            known = ", ".join(value) if isinstance(value, Mapping) else "a number"
            place = ".".join(words[:position]) or "the run"
            raise MissingValueError(f"measure {path}: no {word!r} in {place}, only {known}")
        value = value[word]
    if value is None or isinstance(value, int | float):
        return None if value is None else float(value)
    raise UserError(f"measure {path} is no number but {type(value).__name__}")


def image_count(content: Mapping[str, Any], data: str, measure: Measure) -> int | None:
    """The smallest number of images on which an evaluation took a measure, over the runs on a data setting.

    None for measures of training, and where the evaluation does not record a number.
    """
    if not measure.path.startswith("robustness"):
        return None
    first, *words = measure.path.split(".")
    keys = {cell["key"] for cell in content["cells"] if cell["data"] == data} & set(content["runs"])
    reports = [(content["runs"][key]["robustness"] or {}).get(CHECKPOINTS[first]) for key in keys]
    counts = [_last_count(report["parts"], words) for report in reports if report]
    return min((number for number in counts if number is not None), default=None)


def _last_count(value: Any, words: Sequence[str]) -> int | None:
    """The number of images or samples recorded nearest to the end of a path."""
    count = None
    for word in words:
        value = value.get(word) if isinstance(value, Mapping) else None
        if isinstance(value, Mapping):
            count = value.get("images", value.get("samples", count))
    return count
