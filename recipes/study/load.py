"""Load a study: from a YAML file, or from the names of recipes and keys for all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from recipes.core.cli import is_recipe_file, recipes
from recipes.core.config import TrainConfig
from recipes.core.errors import UserError
from recipes.core.files import file_name
from recipes.core.suggestions import did_you_mean
from recipes.core.unique_keys import UniqueKeyLoader
from recipes.study.spec import Arm, Study
from recipes.study.validation import check_study


def read_study(path: Path) -> Study:
    """The study in a YAML file.

    Raises:
        UserError: no such file, an unknown key, a value of the wrong type, a rule broken.
    """
    try:
        return study_from_dict(yaml.load(path.read_text(encoding="utf-8"), UniqueKeyLoader))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}): save it as such") from None
    except (yaml.YAMLError, UserError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None


def study_from_dict(content: Any) -> Study:
    """The study given as plain values, as a YAML file or results.json holds them.

    Raises:
        UserError: an unknown key, a value of the wrong type, a rule broken.
    """
    if not isinstance(content, dict):
        raise UserError("a study file is a mapping with question, arms and seeds")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study)
    try:
        values = parser.instantiate(parser.parse_object(content))
        study = Study(**{item.name: values[item.name] for item in fields(Study)})
        check_study(study)
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise UserError(" ".join(str(error).replace("Parser key ", "").split())) from None
    return study


def study_to_dict(study: Study) -> dict[str, Any]:
    """The study as plain values; `study_from_dict` reads them back."""
    return asdict(study)


def study_from_recipes(names: Sequence[str], keys: Mapping[str, str], seeds: Sequence[int]) -> Study:
    """The comparison of recipes, by name or by YAML file, each with the same keys of recipes/train.py.

    Raises:
        UserError: an unknown recipe, one named twice, a key or seed that a study cannot have.
    """
    if not names:
        raise UserError(f"name a study file, or recipes to compare: {', '.join(recipes())}")
    unknown = [name for name in names if name not in recipes() and not is_recipe_file(name)]
    if unknown:
        near = did_you_mean(unknown[0], recipes())
        raise UserError(
            f"recipe={unknown[0]!r} is unknown: one of {', '.join(recipes())}, a recipe's YAML file, or one study "
            f"file alone{near}"
        )
    files, names = dict(zip(_arm_names(names), names, strict=True)), _arm_names(names)
    if len(names) != len(set(names)):
        raise UserError(f"{' '.join(names)}: a recipe is named twice; a study file can hold variants of one")
    question = f"Which does better, {' or '.join(names)}?" if len(names) > 1 else f"What does {names[0]} give?"
    study = Study(question, {name: Arm(recipe) for name, recipe in files.items()}, list(seeds), overrides=dict(keys))
    try:
        check_study(study)
    except ValueError as error:
        raise UserError(str(error)) from None
    return study


def is_study_file(path: Path) -> bool:
    """Whether a YAML file holds a study, not a recipe; one that cannot be read counts as one, for `read_study` to say.

    Example:
        >>> path = getfixture("tmp_path") / "mine.yaml"
        >>> _ = path.write_text("optim: {lr: 0.2}", encoding="utf-8")
        >>> is_study_file(path)
        False
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return True
    return not isinstance(content, dict) or not set(content) <= {item.name for item in fields(TrainConfig)}


def _arm_names(names: Sequence[str]) -> list[str]:
    return [Path(name).stem if is_recipe_file(name) else name for name in names]


def name_from_recipes(names: Sequence[str], keys: Mapping[str, str]) -> str:
    """A name for such a comparison: other keys give another one, more seeds the same.

    Example:
        >>> name_from_recipes(["baseline", "etf"], {})
        'digits-baseline-etf'
    """
    name = "-".join([file_name(str(keys.get("data.name", "digits"))), *_arm_names(names)])
    if not keys:
        return name
    text = json.dumps({key: str(value) for key, value in keys.items()}, sort_keys=True)
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
