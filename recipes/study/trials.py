"""A cell: one arm on one data setting with one seed, identified by what it resolves to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from recipes.core.cli import parse, recipes
from recipes.core.config import TermConfig, TrainConfig
from recipes.core.errors import UserError
from recipes.data.fingerprint import contents
from recipes.study.spec import Study

GROUPS = tuple(item.name for item in fields(TrainConfig) if is_dataclass(getattr(TrainConfig(), item.name)))
IDLE = ("out", "quiet", "tensorboard", "recipe")
"""Keys that change nothing in a run's numbers."""


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        data, arm, seed: its place in the table.
        point: the searched keys and their values.
        searching: whether it serves the search, not the comparison.
        pictured: whether its features are drawn on the simplex.
        argv: the words after recipes/train.py, --out aside.
        config: what they resolve to, by dotted key.
        key: identifies `config`; cells of the same key are the same run.
    """

    data: str
    arm: str
    seed: int
    point: dict[str, Any]
    searching: bool
    pictured: bool
    argv: tuple[str, ...]
    config: dict[str, Any]
    key: str

    @property
    def name(self) -> str:
        """For people."""
        tried = "".join(f" {key}={value}" for key, value in self.point.items()) if self.searching else ""
        return f"{self.data} {self.arm} seed {self.seed}{tried}"


def cell(study: Study, data: str, arm: str, seed: int, point: Mapping[str, Any], *, searching: bool) -> Cell:
    """The cell at a place of the study.

    Raises:
        UserError: an unknown key or a value out of range.
    """
    layers = [study.overrides, study.settings[data], study.arms[arm].overrides, point]
    if searching and study.search is not None:
        layers.append(study.search.overrides)
    recipe = study.arms[arm].recipe
    argv = [recipe] if recipe in recipes() else ["--config", recipe]
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in flat(layer):
            merged.pop(key, None)  # a later layer's key comes last, after what it may refine
            merged[key] = value
    argv += [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in merged.items()]
    try:
        config = _resolved(tuple(argv)) | {"seed": seed}
    except UserError as error:
        raise UserError(f"arm {arm} on {data}: {error}") from None
    pictured = study.collapse and not searching and seed == study.seeds[0]
    return Cell(data, arm, seed, dict(point), searching, pictured, (*argv, f"--seed={seed}"), config, identity(config))


@cache
def _resolved(argv: tuple[str, ...]) -> dict[str, Any]:
    return dotted(parse(argv))


def flat(layer: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Overrides by dotted key; groups may be given as nested mappings, as in a recipe card."""
    found: list[tuple[str, Any]] = []
    for key, value in layer.items():
        nested = key in GROUPS and isinstance(value, Mapping)
        found += [(f"{key}.{name}", item) for name, item in value.items()] if nested else [(key, value)]
    return found


def dotted(config: TrainConfig) -> dict[str, Any]:
    """What steers a run's numbers, as plain values by dotted key."""
    found: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name in IDLE:
            continue
        if is_dataclass(value):
            found |= {f"{item.name}.{part.name}": getattr(value, part.name) for part in fields(value)}
        else:
            found[item.name] = value
    found["loss"] = {name: asdict(term) for name, term in config.loss.items()}
    found["data.root"] = _images_of(Path(config.data.root).absolute()) if config.data.name == "folder" else ""
    return found


@cache
def _images_of(root: Path) -> str:
    """What tells a folder of images from another, wherever it lies; of other sets the root says only where that is."""
    try:
        return contents(root)
    except (UserError, OSError):  # on a cluster the images lie elsewhere; what cannot be read is said by its run
        return str(root)


def identity(config: Mapping[str, Any]) -> str:
    """A hash of a configuration by dotted key; one that lacks newer keys counts as having their defaults."""
    terms = {name: asdict(TermConfig()) | term for name, term in config.get("loss", {}).items()}
    text = json.dumps(dotted(TrainConfig()) | dict(config) | {"loss": terms}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The keys in which a configuration differs from the defaults."""
    return {key: value for key, value in config.items() if key not in defaults or defaults[key] != value}


def grid(study: Study, chosen: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[Cell]:
    """The cells of the comparison, seed by seed, for the (data, arm) whose point is chosen."""
    return [
        cell(study, data, arm, seed, chosen[data, arm], searching=False)
        for seed in study.seeds
        for data in study.settings
        for arm in study.arms
        if (data, arm) in chosen
    ]


def search_grid(study: Study) -> list[Cell]:
    """The cells of the search; none where the study has none."""
    if study.search is None:
        return []
    return [
        cell(study, data, arm, seed, point, searching=True)
        for seed in study.search.seeds
        for data in study.settings
        for arm in study.arms
        for point in study.points(arm)
    ]


def share(cells: Sequence[Cell], shard: tuple[int, int]) -> list[Cell]:
    """The cells of job i of n, each run once: a run shared by several cells always falls to the same job."""
    runs = list({item.key: item for item in reversed(cells)}.values())[::-1]
    index, count = shard
    return [item for position, item in enumerate(runs) if position % count == index - 1]
