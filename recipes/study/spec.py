"""A study as typed data: the question, the arms that are compared, and the rules fixed before the runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from recipes.core.config import DataConfig


@dataclass(frozen=True)
class Arm:
    """One of the compared configurations.

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
    """A pair of arms whose difference is reported in addition to the differences to the baseline.

    Args:
        arm: the first of them.
        against: the arm that is subtracted.
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
        """Identifies the measure within its study."""
        return self.path if self.minus is None else f"{self.path} - {self.minus}"

    @property
    def title(self) -> str:
        """The label, or the name where there is none."""
        return self.label or self.name

    @property
    def needs_evaluation(self) -> bool:
        """Whether it comes from recipes/robustness.py rather than from the training run itself."""
        return any(path.startswith("robustness") for path in (self.path, self.minus or ""))


@dataclass(frozen=True)
class Search:
    """Equal tuning for every arm, on validation images alone.

    Args:
        grid: keys and the values to try; every combination is a point.
        measure: validation measure that chooses, at_end.val... or at_onset.val...
        better: larger or smaller.
        seeds: seeds of the search runs.
        budget: points tried, drawn evenly from the grid, the same for every arm; null for all.
        overrides: keys that hold while searching only, e.g. fewer epochs.
    """

    grid: dict[str, list[Any]]
    measure: str = "at_end.val.accuracy"
    better: Literal["larger", "smaller"] = "larger"
    seeds: list[int] = field(default_factory=lambda: [100])
    budget: int | None = None
    overrides: dict[str, Any] = field(default_factory=dict)

    def points(self, arm: Arm) -> list[dict[str, Any]]:
        """The points of the arm's grid, or `budget` of them."""
        grid = self.grid if arm.grid is None else arm.grid
        points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        if self.budget is None or self.budget >= len(points):
            return points
        drawn = np.random.default_rng(0).permutation(len(points))[: self.budget]
        return [points[index] for index in sorted(drawn)]


@dataclass(frozen=True)
class Evaluations:
    """What recipes/robustness.py measures on every finished run.

    Args:
        preset: quick or full.
        parts: which, e.g. adversarial, corruptions; empty for all.
        checkpoints: last, onset or both; a run that did not reach zero error has no onset.
        args: further words of its command line.
        images: same draws what is attacked, corrupted and probed alike for every seed, so that intervals hold for these
            images; anew draws it with the run's seed, the same for every arm, so that they hold for others too.
    """

    preset: Literal["quick", "full"] = "quick"
    parts: list[str] = field(default_factory=list)
    checkpoints: list[Literal["last", "onset"]] = field(default_factory=lambda: ["last"])
    args: list[str] = field(default_factory=list)
    images: Literal["same", "anew"] = "same"

    def argv(self, checkpoint: str, seed: int = 0) -> list[str]:
        """The command-line arguments of recipes/robustness.py for one checkpoint of the run with a seed."""
        parts = ["--parts", ",".join(self.parts)] if self.parts else []
        draw = ["--seed", str(seed)] if self.images == "anew" else []
        return ["--preset", self.preset, "--checkpoint", checkpoint, *parts, *draw, *self.args]

    @property
    def words(self) -> list[str]:
        """The arguments for all checkpoints, whatever the seed; two evaluations are the same if these are."""
        words = [word for checkpoint in self.checkpoints for word in self.argv(checkpoint)]
        return words if self.images == "same" else [*words, "images anew"]


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
    """A comparison of arms over seeds. `load` makes one, and checks it.

    Args:
        question: the question that the study answers.
        arms: the compared configurations by name.
        baseline: the arm that the others are compared with; null for the first.
        seeds: of split, initial weights and batch order, shared by all arms.
        contrasts: pairs of arms whose difference is reported besides those to the baseline, e.g. the same head with
            and without class weights; judged by the same rules, among themselves.
        measures: the numbers that are compared.
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

    @property
    def base(self) -> str:
        """The baseline arm's name."""
        return self.baseline if self.baseline is not None else next(iter(self.arms))

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """The data settings by name; where the study gives none, a single one named after the data set."""
        nested = self.overrides.get("data", {})
        named = nested.get("name") if isinstance(nested, Mapping) else None
        return self.data or {str(self.overrides.get("data.name", named or DataConfig.name)): {}}

    def points(self, arm: str) -> list[dict[str, Any]]:
        """The points that the search tries for an arm; one empty point without a search."""
        return [{}] if self.search is None else self.search.points(self.arms[arm])
