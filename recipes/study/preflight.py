"""Checks before the first run: a missing data set, a batch too large, an unknown loss would make every run fail."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from recipes.core.cli import parse
from recipes.core.distributed import pick_device
from recipes.core.errors import UserError
from recipes.data.load import SMALLEST, load
from recipes.evaluation.options import parse_options as parse_evaluation
from recipes.study.spec import Study
from recipes.study.trials import Trial
from recipes.training.build import check_backbone, check_head, check_norm, image_size
from recipes.training.loss_terms import build_terms
from recipes.training.reporting import size_notes

CHECKED_KEYS = ("device", "model.backbone", "model.head", "model.norm", "loss")
"""The keys that are tried out, besides those of the data."""


def check_evaluations(study: Study) -> None:
    """Parse the arguments that recipes/robustness.py will get, before runs are trained for it.

    Raises:
        UserError: it would refuse one of them.
    """
    if study.evaluations is None:
        return
    for checkpoint in study.evaluations.checkpoints:
        argv = study.evaluations.argv(checkpoint)
        try:
            parse_evaluation(argv)
        except UserError as error:
            raise UserError(f"evaluations: recipes/robustness.py {' '.join(argv)}: {error}") from None


def check_trials(trials: Sequence[Trial]) -> None:
    """Load and split each data setting once as a run would, and check the device, backbone, head, norm and loss.

    Images in files of their own are not read. A set that has to be downloaded is downloaded here, before several runs
    need it at once. Notes about the data go to stderr.

    Raises:
        UserError: names an arm and setting of which no run can begin.
    """
    distinct: dict[str, Trial] = {}
    for trial in trials:
        keys = {key: value for key, value in trial.config.items() if key.startswith("data.") or key in CHECKED_KEYS}
        distinct.setdefault(repr(keys), trial)
    notes: dict[str, None] = {}
    for trial in distinct.values():
        try:
            notes |= dict.fromkeys(_check_trial(trial))
        except UserError as error:
            raise UserError(f"no run of {trial.arm} on {trial.data} can begin: {error}") from None
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _check_trial(trial: Trial) -> Sequence[str]:
    """The notes about a trial's data."""
    config = parse(list(trial.argv))
    pick_device(config.device)
    check_backbone(config.model.backbone)
    natives: list[int | None] = []

    def small(native: int | None) -> int:
        natives.append(native)
        return SMALLEST

    data = load(replace(config.data, memory_limit=0.0), seed=trial.seed, image_size=small)
    build_terms(config.loss, class_counts=data.class_counts(), num_features=2)
    check_head(config.model.head)
    check_norm(config.model.norm)
    side = image_size(natives[0], backbone=config.model.backbone, requested=config.data.image_size)
    return [*data.notes, *size_notes(config, data, side)]
