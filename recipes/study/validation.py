"""Checks of a study before anything runs; each refusal names the key, its value and what is allowed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.core.cli import recipes
from recipes.study.spec import Arm, Evaluations, Measure, Search, Study

RESERVED_KEYS = {
    "seed": "seeds",
    "out": "--runs",
    "recipe": "an arm's recipe",
    "quiet": None,
    "resume": None,  # every run goes on where it was stopped
    "config": "an arm's recipe",
    "plan": "compare.py --plan",
    "print_config": None,
}
"""Keys of recipes/train.py that a study may not override, and what to use instead, if anything."""

RESERVED_OPTIONS = {"--checkpoint": "checkpoints", "--parts": "parts", "--preset": "preset", "--quick": "preset"}
"""Options of recipes/robustness.py that have keys of their own under `evaluations`."""


def check_study(study: Study) -> None:
    """Refuse a study that cannot be carried out.

    Raises:
        ValueError: names the key, its value and what is allowed.
    """
    _check_names(study)
    _check_measures(study.measures)
    _check_seeds(study)
    _check_recipes(study.arms)
    for where, keys in _all_overrides(study):
        _check_overrides(where, keys)
    if study.evaluations is not None:
        _check_evaluations(study.evaluations)
    if study.search is not None:
        _check_search(study, study.search)
    elif any(arm.grid for arm in study.arms.values()):
        raise ValueError("an arm has a grid, but the study has no search")


def _check_names(study: Study) -> None:
    if not study.arms:
        raise ValueError("arms={}: name at least one")
    for key, names in (("arms", study.arms), ("data", study.data)):
        for name in names:
            if not isinstance(name, str) or not name.strip():
                raise ValueError(f"{key}: {name!r} is no name: write it in quotes, with a letter or digit")
    _refuse_duplicates("labels of arms", [arm.label or name for name, arm in study.arms.items()])
    if study.base not in study.arms:
        raise ValueError(f"baseline={study.base!r} is no arm: one of {', '.join(study.arms)}")
    for pair in study.contrasts:
        for name in (pair.arm, pair.against):
            if name not in study.arms:
                raise ValueError(f"contrasts: {name!r} is no arm: one of {', '.join(study.arms)}")
        if pair.arm == pair.against:
            raise ValueError(f"contrasts: {pair.arm!r} against itself")
    _refuse_duplicates("contrasts", [f"{pair.arm} against {pair.against}" for pair in study.contrasts])


def _check_measures(measures: Sequence[Measure]) -> None:
    if not measures:
        raise ValueError("measures=[]: name at least one, e.g. {path: at_end.test.accuracy}")
    _refuse_duplicates("measures", [measure.name for measure in measures])
    for measure in measures:
        if measure.margin is not None and not 0 <= measure.margin < float("inf"):
            raise ValueError(f"margin={measure.margin} of {measure.name}: a finite number, not negative")


def _check_seeds(study: Study) -> None:
    groups = {"seeds": study.seeds} | ({} if study.search is None else {"search.seeds": study.search.seeds})
    for key, seeds in groups.items():
        if not seeds:
            raise ValueError(f"{key}=[]: give at least one, e.g. [0, 1, 2]")
        _refuse_duplicates(key, seeds)
        if min(seeds) < 0:
            raise ValueError(f"{key}={seeds}: whole numbers, not negative")
    if study.min_seeds < 2:
        raise ValueError(f"min_seeds={study.min_seeds}: an interval needs at least 2")


def _check_recipes(arms: Mapping[str, Arm]) -> None:
    for name, arm in arms.items():
        if arm.recipe not in recipes() and not Path(arm.recipe).is_file():
            raise ValueError(f"arms.{name}.recipe={arm.recipe!r}: one of {', '.join(recipes())}, or a YAML file")


def _all_overrides(study: Study) -> Iterator[tuple[str, Any]]:
    """Every set of overrides, with its place in the study file."""
    yield "overrides", study.overrides
    yield from ((f"data.{name}", keys) for name, keys in study.data.items())
    yield from ((f"arms.{name}.overrides", arm.overrides) for name, arm in study.arms.items())
    if study.search is not None:
        yield "search.overrides", study.search.overrides


def _check_overrides(where: str, keys: Any) -> None:
    if keys is None:
        raise ValueError(f"{where} is empty: write {{}}, or leave it out")
    for key, value in keys.items():
        if key in RESERVED_KEYS:
            instead = "" if RESERVED_KEYS[key] is None else f"; use {RESERVED_KEYS[key]} instead"
            raise ValueError(f"{where}.{key}: a study sets this key itself{instead}")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError(f"{where}.{key}={value!r}: a finite number or a word; write a word in quotes") from None


def _check_evaluations(evaluations: Evaluations) -> None:
    if not evaluations.checkpoints:
        raise ValueError("evaluations.checkpoints=[]: last, onset or both; without evaluations leave them out")
    if evaluations.images == "anew" and any(word.partition("=")[0] == "--seed" for word in evaluations.args):
        raise ValueError("evaluations.args: --seed: images: anew takes the seed of each run; leave one of them out")
    for word in evaluations.args:
        if (option := word.partition("=")[0]) in RESERVED_OPTIONS:
            raise ValueError(f"evaluations.args: {word}: use evaluations.{RESERVED_OPTIONS[option]} instead")


def _check_search(study: Study, search: Search) -> None:
    if not search.measure.startswith(("at_end.val.", "at_onset.val.")):
        raise ValueError(f"search.measure={search.measure!r}: at_end.val... or at_onset.val..., never test images")
    if search.budget is not None and search.budget < 1:
        raise ValueError(f"search.budget={search.budget}: at least 1")
    for name, grid in [("search", search.grid), *((f"arms.{n}", a.grid) for n, a in study.arms.items() if a.grid)]:
        if not grid or not all(grid.values()):
            raise ValueError(f"{name}.grid={grid}: keys, each with its values, e.g. optim.lr: [0.03, 0.1]")
        for key, values in grid.items():
            _refuse_duplicates(f"{name}.grid.{key}", values)
            for value in values:
                _check_overrides(f"{name}.grid", {key: value})
    counts = {name: len(study.points(name)) for name in study.arms}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"search: the arms would try different numbers of points ({shown}); make them equal")


def _refuse_duplicates(key: str, values: Sequence[Any]) -> None:
    duplicates = {str(value): None for value in values if list(values).count(value) > 1}
    if duplicates:
        raise ValueError(f"{key}: {', '.join(duplicates)} is named twice")
