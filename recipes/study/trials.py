"""A trial: the run of one arm on one data setting with one seed, identified by its resolved configuration."""

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
from recipes.core.own_code import content_digest, fingerprint, own_names
from recipes.data.fingerprint import contents, weights_contents
from recipes.study.spec import Study

GROUPS = tuple(item.name for item in fields(TrainConfig) if is_dataclass(getattr(TrainConfig(), item.name)))
"""Keys of recipes/train.py that hold further keys, as data, model, optim."""

LATER_KEYS: dict[str, Any] = {
    "model.weights": None,
    "model.start_from": None,
    "data.unreadable": "refuse",
    "data.hold_out": [],
    "data.cost": None,
    "adversarial.loss": "cross_entropy",
    "extra_measures": [],
}
"""Keys that came after studies had been committed, with their defaults: at these they do not count in the hash."""

LATER_TERM_KEYS: dict[str, Any] = {"features": "last"}
"""The same for the keys of a term of the loss."""

IRRELEVANT_KEYS = ("out", "quiet", "tensorboard", "on_epoch", "recipe")
"""Keys that change nothing in a run's numbers."""


@dataclass(frozen=True)
class Trial:
    """One run that a study needs.

    Attributes:
        data, arm, seed: its place in the study's tables.
        point: the searched keys and their values.
        searching: whether it serves the search, not the comparison.
        pictured: whether its features are drawn on the simplex.
        argv: the arguments of recipes/train.py, without --out.
        config: the configuration that they resolve to, by dotted key.
        key: hash of `config`; trials with the same key are the same run.
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
        """What messages call it."""
        tried = "".join(f" {key}={value}" for key, value in self.point.items()) if self.searching else ""
        return f"{self.data} {self.arm} seed {self.seed}{tried}"


def make_trial(study: Study, data: str, arm: str, seed: int, point: Mapping[str, Any], *, searching: bool) -> Trial:
    """The trial of an arm, setting, seed and searched point.

    Raises:
        UserError: an unknown key or a value out of range.
    """
    recipe = study.arms[arm].recipe
    overrides = _merged_overrides(study, data, arm, point, searching=searching)
    argv = [recipe] if recipe in recipes() else ["--config", recipe]
    argv += [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in overrides.items()]
    try:
        config = _resolved(tuple(argv)) | {"seed": seed}
    except UserError as error:
        raise UserError(f"arm {arm} on {data}: {error}") from None
    return Trial(
        data=data,
        arm=arm,
        seed=seed,
        point=dict(point),
        searching=searching,
        pictured=study.collapse and not searching and seed == study.seeds[0],
        argv=(*argv, f"--seed={seed}"),
        config=config,
        key=config_hash(config),
    )


def _merged_overrides(
    study: Study, data: str, arm: str, point: Mapping[str, Any], *, searching: bool
) -> dict[str, Any]:
    """All overrides of a trial by dotted key, the later ones last: study, data setting, arm, point, search."""
    layers = [study.overrides, study.settings[data], study.arms[arm].overrides, point]
    if searching and study.search is not None:
        layers.append(study.search.overrides)
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in dotted_overrides(layer):
            merged.pop(key, None)  # a later layer's key comes last, after what it may refine
            merged[key] = value
    return merged


@cache
def _resolved(argv: tuple[str, ...]) -> dict[str, Any]:
    return dotted_config(parse(argv))


def dotted_overrides(layer: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Overrides by dotted key; groups may be given as nested mappings, as in a recipe card.

    Example:
        >>> dotted_overrides({"optim": {"lr": 0.1}, "device": "cpu"})
        [('optim.lr', 0.1), ('device', 'cpu')]
    """
    pairs: list[tuple[str, Any]] = []
    for key, value in layer.items():
        nested = key in GROUPS and isinstance(value, Mapping)
        pairs += [(f"{key}.{name}", item) for name, item in value.items()] if nested else [(key, value)]
    return pairs


def dotted_config(config: TrainConfig) -> dict[str, Any]:
    """All keys that influence a run's numbers, as plain values by dotted key."""
    values: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name in IRRELEVANT_KEYS:
            continue
        if is_dataclass(value):
            values |= {f"{item.name}.{part.name}": getattr(value, part.name) for part in fields(value)}
        else:
            values[item.name] = value
    own = {name: fingerprint(name, key) for key, name in own_names(config).items()}
    values |= {key: own[values[key]] for key in ("data.name", "model.head", "model.norm") if values[key] in own}
    values["loss"] = {own.get(name, name): _term_values(asdict(term)) for name, term in config.loss.items()}
    cost = config.data.cost
    values["data.cost"] = None if cost is None else content_digest(cost, f"data.cost={cost}")
    is_folder = config.data.name == "folder"
    values["data.root"] = _folder_fingerprint(Path(config.data.root).absolute()) if is_folder else ""
    for key, source in (("model.weights", config.model.weights), ("model.start_from", config.model.start_from)):
        if source is not None:
            values[key] = _weights_fingerprint(Path(source).absolute())
    return values


def _term_values(term: Mapping[str, Any]) -> dict[str, Any]:
    """A term of the loss without the later keys that are at their defaults."""
    return {key: value for key, value in term.items() if key not in LATER_TERM_KEYS or value != LATER_TERM_KEYS[key]}


@cache
def _folder_fingerprint(root: Path) -> str:
    """A fingerprint of a folder of images, wherever it lies; its path where it cannot be read.

    Only folders need one: for named sets data.root says where they lie, not what they hold.
    """
    try:
        return contents(root)
    except (UserError, OSError):  # on a cluster the images may lie elsewhere; the run itself reports what is wrong
        return str(root)


@cache
def _weights_fingerprint(source: Path) -> str:
    """A fingerprint of a file of weights, wherever it lies; its path where it cannot be read, as for a folder."""
    try:
        return weights_contents(source)
    except OSError:
        return str(source)


def config_hash(config: Mapping[str, Any]) -> str:
    """A hash of a configuration by dotted key; keys that are missing in it count as having their defaults."""
    terms = {name: _term_values(asdict(TermConfig()) | term) for name, term in config.get("loss", {}).items()}
    values = dotted_config(TrainConfig()) | dict(config) | {"loss": terms}
    for key, default in LATER_KEYS.items():
        if values[key] == default:
            del values[key]
    text = json.dumps(values, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def changed_keys(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The keys whose value is not the default."""
    return {key: value for key, value in config.items() if key not in defaults or defaults[key] != value}


def comparison_trials(study: Study, chosen: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[Trial]:
    """The trials of the comparison, seed by seed, for each (data, arm) whose searched point has been chosen."""
    return [
        make_trial(study, data, arm, seed, chosen[data, arm], searching=False)
        for seed in study.seeds
        for data in study.settings
        for arm in study.arms
        if (data, arm) in chosen
    ]


def search_trials(study: Study) -> list[Trial]:
    """The trials of the search; none where the study has no search."""
    if study.search is None:
        return []
    return [
        make_trial(study, data, arm, seed, point, searching=True)
        for seed in study.search.seeds
        for data in study.settings
        for arm in study.arms
        for point in study.points(arm)
    ]


def shard_of(trials: Sequence[Trial], shard: tuple[int, int]) -> list[Trial]:
    """The trials of job i of n, each key once: trials that are the same run always fall to the same job."""
    distinct = list({trial.key: trial for trial in reversed(trials)}.values())[::-1]
    index, count = shard
    return [trial for position, trial in enumerate(distinct) if position % count == index - 1]
