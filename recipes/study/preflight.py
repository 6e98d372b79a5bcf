"""What would make runs fail, found before the first: a set that cannot be had, a batch too large, a loss unknown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from ncreg.heads import HEADS
from recipes.core.cli import parse
from recipes.core.distributed import pick_device
from recipes.core.errors import UserError
from recipes.data.load import SMALLEST, load
from recipes.evaluation.options import parse_options as parse_evaluation
from recipes.study.spec import Study
from recipes.study.trials import Cell
from recipes.training.build import check_backbone
from recipes.training.loss_terms import build_terms

LOOKED_AT = ("device", "model.backbone", "model.head", "loss")
"""Keys beside those of the data that are tried out."""


def check_evaluations(study: Study) -> None:
    """Read the words that recipes/robustness.py will be called with, before runs are trained for it.

    Raises:
        UserError: it does not know one of them.
    """
    if study.evaluations is None:
        return
    for checkpoint in study.evaluations.checkpoints:
        argv = study.evaluations.argv(checkpoint)
        try:
            parse_evaluation(argv)
        except UserError as error:
            raise UserError(f"evaluations: recipes/robustness.py {' '.join(argv)}: {error}") from None


def foresee(cells: Sequence[Cell]) -> None:
    """Split each set once, as a run would, without reading what lies in files of its own.

    It also leaves a set that has to be downloaded in its place, before several runs ask for it at once.

    Raises:
        UserError: no run of some setting and arm can begin; named with it.
    """
    asked: dict[str, Cell] = {}
    for cell in cells:
        keys = {key: value for key, value in cell.config.items() if key.startswith("data.") or key in LOOKED_AT}
        asked.setdefault(repr(keys), cell)
    notes: dict[str, None] = {}
    for cell in asked.values():
        config = parse(list(cell.argv))
        try:
            pick_device(config.device)
            check_backbone(config.model.backbone)
            found = load(replace(config.data, memory_limit=0.0), seed=cell.seed, image_size=lambda native: SMALLEST)
            build_terms(config.loss, class_counts=found.class_counts(), num_features=2)
            if config.model.head not in HEADS:
                raise UserError(f"model.head={config.model.head!r} is unknown: one of {', '.join(HEADS)}")
        except UserError as error:
            raise UserError(f"no run of {cell.arm} on {cell.data} can begin: {error}") from None
        notes |= dict.fromkeys(found.notes)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
