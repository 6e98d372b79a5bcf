"""What would make runs fail, found before the first of them: a set that cannot be had, a batch that it cannot fill."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from recipes.build import check_backbone
from recipes.config import UserError, parse
from recipes.data import SMALLEST, load
from recipes.study.cells import Cell


def foresee(cells: Sequence[Cell]) -> None:
    """Split each set once, as a run would, without reading what lies in files of its own.

    It also leaves a set that has to be downloaded in its place, before several runs ask for it at once.

    Raises:
        UserError: no run of some setting and arm can begin; named with it.
    """
    asked: dict[str, Cell] = {}
    for cell in cells:
        keys = {key: value for key, value in cell.config.items() if key.startswith("data.") or key == "model.backbone"}
        asked.setdefault(repr(keys), cell)
    notes: dict[str, None] = {}
    for cell in asked.values():
        config = parse(list(cell.argv))
        try:
            check_backbone(config.model)
            found = load(replace(config.data, memory_limit=0.0), seed=cell.seed, image_size=lambda native: SMALLEST)
        except UserError as error:
            raise UserError(f"no run of {cell.arm} on {cell.data} can begin: {error}") from None
        notes |= dict.fromkeys(found.notes)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
