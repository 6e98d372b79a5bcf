"""The typed study file: a question, the arms that are compared, and the rules fixed before the runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import numpy as np
import yaml

from recipes.core.config import DataConfig
from recipes.core.errors import UserError
from recipes.study.rules import check

Overrides = Mapping[str, Any]


@dataclass(frozen=True)
class Arm:
    """One contender.

    Args:
        recipe: name of a recipe card, or path of a YAML file of keys.
        overrides: keys of recipes/train.py and their values, e.g. optim.lr: 0.05; they win over the study's.
        grid: keys and values searched for this arm instead of the search's own; as many points.
        label: name in tables and figures; null for the arm's own.
    """

    recipe: str
    overrides: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] | None = None
    label: str | None = None


@dataclass(frozen=True)
class Contrast:
    """Two arms held against each other, where the baseline is not the question.

    Args:
        arm: the first of them.
        against: what is subtracted.
    """

    arm: str
    against: str


@dataclass(frozen=True)
class Measure:
    """One number of a run that is compared.

    Args:
        path: where it stands in summary.json, e.g. at_end.test.accuracy, or in the evaluation's parts after the word
            robustness (last checkpoint) or robustness_onset, e.g. robustness.adversarial.headline.accuracy.
        minus: a second path whose value is subtracted, e.g. at_onset.test.accuracy for the gain since zero error.
        better: larger or smaller; neither for what is described, not judged.
        margin: least difference that matters, in the measure's own unit; null for any.
        label: name in tables and figures; null for the path.
        form: how values are written: percent (of 1), plain, or scientific for what spans magnitudes: three digits, a
            logarithmic axis.
    """

    path: str
    minus: str | None = None
    better: Literal["larger", "smaller", "neither"] = "larger"
    margin: float | None = None
    label: str | None = None
    form: Literal["percent", "plain", "scientific"] = "plain"

    @property
    def name(self) -> str:
        """What identifies it within its study."""
        return self.path if self.minus is None else f"{self.path} - {self.minus}"

    @property
    def title(self) -> str:
        """What a reader sees."""
        return self.label or self.name


@dataclass(frozen=True)
class Search:
    """Equal tuning for every arm, on validation images alone.

    Args:
        grid: keys and the values to try; every combination is a point.
        measure: validation measure that chooses, at_end.val... or at_onset.val...
        better: larger or smaller.
        seeds: of the searching runs.
        budget: points tried, drawn evenly from the grid, the same for every arm; null for all.
        overrides: keys that hold while searching only, e.g. fewer epochs.
    """

    grid: dict[str, list[Any]]
    measure: str = "at_end.val.accuracy"
    better: Literal["larger", "smaller"] = "larger"
    seeds: list[int] = field(default_factory=lambda: [100])
    budget: int | None = None
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluations:
    """What recipes/robustness.py measures on every finished run.

    Args:
        preset: quick or full.
        parts: which, e.g. adversarial, corruptions; empty for all.
        checkpoints: last, onset or both; a run that did not reach zero error has no onset.
        args: further words of its command line.
    """

    preset: Literal["quick", "full"] = "quick"
    parts: list[str] = field(default_factory=list)
    checkpoints: list[Literal["last", "onset"]] = field(default_factory=lambda: ["last"])
    args: list[str] = field(default_factory=list)

    def argv(self, checkpoint: str) -> list[str]:
        """The words of the command line for one checkpoint."""
        parts = ["--parts", ",".join(self.parts)] if self.parts else []
        return ["--preset", self.preset, "--checkpoint", checkpoint, *parts, *self.args]

    @property
    def words(self) -> list[str]:
        """All that was asked for: evaluations are the same where these are."""
        return [word for checkpoint in self.checkpoints for word in self.argv(checkpoint)]


MEASURES = (
    Measure("at_end.test.accuracy", label="test accuracy", form="percent"),
    Measure("at_end.test.loss", better="smaller", label="test cross-entropy"),
    Measure(
        "at_end.test.accuracy",
        minus="at_onset.test.accuracy",
        label="test accuracy, end minus zero error",
        form="percent",
    ),
    Measure("at_end.train.nc1", better="neither", label="NC1", form="scientific"),
    Measure("at_end.train.nc3", better="neither", label="NC3", form="scientific"),
)


@dataclass(frozen=True)
class Study:
    """A comparison.

    Args:
        question: what is to be found out.
        arms: the contenders by name.
        baseline: the arm that the others are held against; null for the first.
        seeds: of split, initial weights and batch order, shared by all arms.
        contrasts: pairs of arms whose difference is told besides those to the baseline, as the same head with and
            without class weights; judged by the same rules, among themselves.
        measures: what is compared.
        overrides: keys of recipes/train.py that hold for every arm.
        data: settings by name, each a set of keys; every arm runs on each. Verdicts are given for each on its own.
        search: tuning on validation images before the comparison; null for none.
        evaluations: of every finished run by recipes/robustness.py; null for none.
        collapse: draw the first seed of every arm on the simplex, by recipes/plot_collapse.py.
        min_seeds: pairs below which the verdict is "too few seeds".
        notes: what else a reader of the report must know: rules, limits.
    """

    question: str
    arms: dict[str, Arm]
    seeds: list[int]
    baseline: str | None = None
    contrasts: list[Contrast] = field(default_factory=list)
    measures: list[Measure] = field(default_factory=lambda: list(MEASURES))
    overrides: dict[str, Any] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    search: Search | None = None
    evaluations: Evaluations | None = None
    collapse: bool = False
    min_seeds: int = 3
    notes: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot be compared, by name."""
        check(self)

    @property
    def base(self) -> str:
        """The baseline arm's name."""
        return self.baseline if self.baseline is not None else next(iter(self.arms))

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """The data settings by name; one, named as the set, where the study gives none."""
        nested = self.overrides.get("data", {})
        named = nested.get("name") if isinstance(nested, Mapping) else None
        return self.data or {str(self.overrides.get("data.name", named or DataConfig.name)): {}}

    def points(self, arm: str) -> list[dict[str, Any]]:
        """What is tried for an arm before the comparison: one empty point without a search."""
        return [{}] if self.search is None else _points(self.search, self.arms[arm])


def _points(search: Search, arm: Arm) -> list[dict[str, Any]]:
    grid = search.grid if arm.grid is None else arm.grid
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if search.budget is None or search.budget >= len(points):
        return points
    chosen = np.random.default_rng(0).permutation(len(points))[: search.budget]
    return [points[index] for index in sorted(chosen)]


def read_study(path: Path) -> Study:
    """The study of a YAML file.

    Raises:
        UserError: no such file, an unknown key, a value of the wrong type, a rule broken.
    """
    try:
        return study_from(yaml.load(path.read_text(encoding="utf-8"), _Once))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}): save it as such") from None
    except (yaml.YAMLError, UserError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None


class _Once(yaml.SafeLoader):
    """YAML in which no key of a mapping comes twice: the last one would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        seen = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: {key.value} is named twice")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def study_from(content: Any) -> Study:
    """The study out of plain values.

    Raises:
        UserError: an unknown key, a value of the wrong type, a rule broken.
    """
    if not isinstance(content, dict):
        raise UserError("a study file is a mapping with question, arms and seeds")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study)
    try:
        values = parser.instantiate(parser.parse_object(content))
        return Study(**{item.name: values[item.name] for item in fields(Study)})
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise UserError(" ".join(str(error).replace("Parser key ", "").split())) from None


def plain(study: Study) -> dict[str, Any]:
    """The study as values that `study_from` reads back."""
    return asdict(study)
