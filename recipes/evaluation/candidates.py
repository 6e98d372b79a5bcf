"""The backbones to rank: words of a command line, or a YAML list, each with its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from recipes.core.errors import UserError
from recipes.core.own_code import is_own
from recipes.core.suggestions import did_you_mean
from recipes.evaluation.model_options import INTERPOLATIONS, ModelOptions

UNTRAINED = "untrained"
"""In the place of a file of weights: random ones, drawn with the seed."""

CANDIDATE_HELP = (
    "a run folder or one of its checkpoint files; timm:NAME or torchvision:NAME, pretrained, NAME=FILE with those "
    "weights, NAME=untrained with random ones; a folder that fold, save_pretrained or timm wrote; FILE.py:FUNCTION, "
    "=FILE and =untrained too; a YAML list of these"
)

OPTIONS = [item.name for item in fields(ModelOptions) if item.name not in ("untrained", "out_dir", "class_names")]
KEYS = ("model", "name", *OPTIONS)
"""Keys of an entry of a YAML list."""


@dataclass(frozen=True)
class Candidate:
    """A backbone to rank.

    Attributes:
        name: in the table.
        word: MODEL, as evaluate.py takes it.
        options: its weights, and what is said of its images.
    """

    name: str
    word: str
    options: ModelOptions


def read_candidates(words: Sequence[str], *, seed: int = 0) -> list[Candidate]:
    """The candidates that a command line names.

    Args:
        words: see `CANDIDATE_HELP`.
        seed: of random weights.

    Raises:
        UserError: a list that cannot be read, an unknown key, a name that comes twice.

    Example:
        >>> first, second = read_candidates(["timm:resnet18=mine.pth", "timm:test_vit=untrained"])
        >>> first.word, str(first.options.weights), second.options.untrained
        ('timm:resnet18', 'mine.pth', 0)
    """
    found: list[Candidate] = []
    for word in words:
        found += _listed(Path(word), seed) if word.endswith((".yaml", ".yml")) else [_candidate({"model": word}, seed)]
    names = [candidate.name for candidate in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"MODEL {twice[0]} is given twice; in a YAML list `name` tells such entries apart")
    return found


def _listed(path: Path, seed: int) -> list[Candidate]:
    """The candidates of a YAML list."""
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"MODELS {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"MODELS {path} holds no list of models: a line `- timm:resnet18` for each")
    found = []
    for number, entry in enumerate(entries, 1):
        where = f"MODELS {path}, entry {number}"
        values = {"model": entry} if isinstance(entry, str) else entry
        if not isinstance(values, Mapping) or not isinstance(values.get("model"), str):
            raise UserError(f"{where}: {entry!r} names no model; `model: timm:NAME`, or the word alone")
        for key in values:
            if key not in KEYS:
                raise UserError(f"{where}: {key!r} is unknown: one of {', '.join(KEYS)}{did_you_mean(str(key), KEYS)}")
        try:
            found.append(_candidate(values, seed))
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: {error}") from None
    return found


def _candidate(values: Mapping[str, Any], seed: int) -> Candidate:
    """A candidate of an entry's values; the word may name the weights too.

    Raises:
        ValueError: a value of the wrong kind or out of range.
    """
    word, weights = with_weights(values["model"].rstrip("/") or "/")
    if weights is not None and values.get("weights") is not None:
        raise ValueError(f"{values['model']} names its weights: drop `weights`")
    weights = weights or values.get("weights")
    options = {key: values[key] for key in OPTIONS if values.get(key) is not None and key != "weights"}
    for key, value in options.items():
        options[key] = _checked(key, value)
    made = ModelOptions(**options)
    if weights == UNTRAINED:
        made = replace(made, untrained=seed)
    elif weights is not None:
        made = replace(made, weights=Path(str(weights)))
    name = values.get("name") or (word if weights is None else f"{word}={weights}")
    return Candidate(str(name), word, made)


def with_weights(word: str) -> tuple[str, str | None]:
    """MODEL and, behind a =, its weights; a path of a folder may hold a = itself.

    Example:
        >>> with_weights("timm:resnet18=w/a=1.pth"), with_weights("runs/lr=0.1")
        (('timm:resnet18', 'w/a=1.pth'), ('runs/lr=0.1', None))
    """
    model, equals, weights = word.partition("=")
    named = model.startswith(("timm:", "torchvision:")) or is_own(model)
    return (model, weights) if named and equals and weights else (word, None)


def _checked(key: str, value: Any) -> Any:
    """The value of an option, of the kind that it needs.

    Raises:
        ValueError: it is of another kind or out of range.
    """
    if key in ("image_size", "channels", "num_classes"):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key}={value!r}: must be a whole number, at least 1")
        return value
    if key in ("mean", "std"):
        numbers = value if isinstance(value, list) else [value]
        if not all(isinstance(x, int | float) and (key == "mean" or x > 0) for x in numbers):
            raise ValueError(f"{key}={value!r}: must be numbers, one for each channel, such as [0.5, 0.5, 0.5]")
        return tuple(map(float, numbers))
    if key == "crop_pct":
        if not isinstance(value, int | float) or not 0 < value <= 1:
            raise ValueError(f"{key}={value!r}: must be a share in (0, 1]")
        return float(value)
    if key == "interpolation" and value not in INTERPOLATIONS:
        raise ValueError(f"{key}={value!r}: must be one of {', '.join(INTERPOLATIONS)}")
    return str(value)
