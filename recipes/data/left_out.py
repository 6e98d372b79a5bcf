"""Images that do not take part: unreadable ones, those that are gone; and classes that other data may lack."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from recipes.core.distributed import Ranks, joined_ranks
from recipes.core.errors import UserError
from recipes.data.lazy_images import LazyImages
from recipes.data.split import Source, Split, of_rank
from recipes.data.unreadable import Unreadable, left_out_note


def of_classes(source: Source, class_names: tuple[str, ...]) -> Source:
    """A source as data for a classifier of these classes, some of which it may lack.

    Raises:
        UserError: it has another class.
    """
    if source.class_names != class_names:
        if set(source.class_names) - set(class_names):
            raise UserError(f"classes differ: the run knows {class_names}, the data has {source.class_names}")
        number = torch.tensor([class_names.index(name) for name in source.class_names])
        renamed: dict[str, Any] = {
            part: Split(images.images, number[images.target]) for part, images in source.splits().items()
        }
        source = replace(source, class_names=class_names, **renamed)
    return replace(source, partial=True)


def without_unreadable(source: Source) -> Source:
    """A source without the images that cannot be read, each of which is tried out; a note counts them.

    Under torchrun each rank tries its share, and all leave out the same.
    """
    ranks = joined_ranks()
    kept: dict[str, Any] = {}
    sentences: list[str] = []
    for part, split in source.splits().items():
        found: dict[int, Unreadable] = {}
        if isinstance(split.images, LazyImages):
            share = torch.arange(ranks.rank, len(split), ranks.size)
            mine = split.images[share].unreadable(headers=False)
            for part_found in ranks.gather({int(share[place]): error for place, error in mine.items()}):
                found |= part_found
        found = dict(sorted(found.items()))
        sentences += [str(error) for error in found.values()]
        rest = torch.ones(len(split), dtype=torch.bool)
        rest[list(found)] = False
        kept[part] = split[rest.nonzero().flatten()] if found else split
    if not sentences:
        return source
    return replace(source, **kept, notes=(*source.notes, left_out_note(sentences)))


def check_readable(splits: Iterable[Split], ranks: Ranks) -> None:
    """Look at the header of every image that is still in its file; each rank takes its part.

    Raises:
        Unreadable: names all images that have none.
    """
    found: dict[str, str] = {}
    for split in splits:
        if isinstance(images := of_rank(split, ranks).images, LazyImages):
            for error in images.unreadable(headers=True).values():
                found |= error.images
    everything = {name: said for part in ranks.gather(found) for name, said in part.items()}
    if everything:
        raise Unreadable(everything)


def still_there(split: Split, gone: Collection[str]) -> Tensor:
    """Which images of a split are not gone (N,)."""
    if not gone or not isinstance(split.images, LazyImages):
        return torch.ones(len(split), dtype=torch.bool)
    read: Any = split.images.read
    return torch.tensor([str(read.path(number)) not in gone for number in split.images.numbers.tolist()])
