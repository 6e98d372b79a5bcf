"""Classes held out of a set: nothing of them is trained or validated on, so that they can serve as near-OOD images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from recipes.core.errors import UserError
from recipes.data.split import Source, Split


def without_classes(source: Source, held_out: Sequence[int]) -> Source:
    """The source without some classes, which are given by their number; those that stay are numbered anew, in order.

    Raises:
        UserError: a number that is no class of the source, or fewer than two classes stay.
    """
    if not held_out:
        return source
    classes = len(source.class_names)
    for number in held_out:
        if number >= classes:
            names = ", ".join(f"{place} {name}" for place, name in enumerate(source.class_names[:20]))
            raise UserError(f"data.hold_out={list(held_out)}: {number} is no class; there are {classes}: {names}")
    stay = [number for number in range(classes) if number not in held_out]
    if len(stay) < 2:
        raise UserError(
            f"data.hold_out={list(held_out)} leaves {len(stay)} of {classes} classes: at least two must stay"
        )
    places = torch.full((classes,), -1)
    places[stay] = torch.arange(len(stay))
    return replace(
        source,
        class_names=tuple(source.class_names[number] for number in stay),
        train=_renumbered(source.train, places),
        test=None if source.test is None else _renumbered(source.test, places),
        val=None if source.val is None else _renumbered(source.val, places),
    )


def _renumbered(split: Split, places: torch.Tensor) -> Split:
    target = places.to(split.target.device)[split.target]
    kept = (target >= 0).nonzero().flatten()
    return Split(split.images[kept], target[kept])


def only_classes(split: Split, numbers: Sequence[int]) -> Split:
    """The images of some classes, with the classes' own numbers."""
    return split[torch.isin(split.target, torch.tensor(numbers, device=split.target.device)).nonzero().flatten()]
