"""Any map-style dataset of (image, label) pairs as a source: torchvision's, timm's, one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from recipes.core.config import DataConfig
from recipes.core.errors import UserError
from recipes.core.suggestions import a_kind
from recipes.data.class_names import distinct, same_classes, without_unlabelled
from recipes.data.decode import pixels_of
from recipes.data.lazy_images import LazyImages, worker_count
from recipes.data.split import Source, Split, resized
from recipes.data.unreadable import Unreadable, left_out_note

Size = Callable[[int | None], int]

TRIED = 8
"""Items that are looked at to see what a dataset holds."""

MOST_COMPARED = 1000
"""Classes of which one item each is looked at, to see whether a dataset's list of labels is that of its items."""

MOST_CLASSES = 10**7
"""More numbers of classes than this are taken for other numbers, such as those of persons or articles."""


def source_of(splits: Mapping[str, Any], config: DataConfig, image_size: Size, *, what: str) -> Source:
    """A source from map-style datasets of (image, label) pairs.

    Args:
        splits: the datasets by split; only train is needed.
        config: says how many workers read them.
        image_size: maps the side of the images to the side to use.
        what: what messages call the data, such as data.name=torchvision.CIFAR10.

    Raises:
        UserError: a dataset without items, items that are no such pairs, or labels that are no classes.
    """
    train = splits["train"]
    for part, found in splits.items():
        check_dataset(found, f"{what}: {part}")
    seen = _looked_at(train, what)
    channels = max(image.shape[0] for image in seen)
    first = min(seen[0].shape[1:])
    side = image_size(first)
    skipped: list[str] = []
    opened = {part: _split(found, side, channels, config, what, skipped) for part, found in splits.items()}
    named = {
        part: _own_names(found, what) if part == "train" else _names_to_match(found, what)
        for part, found in splits.items()
    }
    parts, renamed = same_classes(opened, named, what)
    parts, left_out = without_unlabelled(parts, what)
    labels = torch.cat([part.target for part in parts.values()])
    names = _class_names(named["train"], int(labels.min()), int(labels.max()), what)
    native = median_low(min(image.shape[1:]) for image in seen)
    divided = parts["train"], parts.get("test"), parts.get("val")
    notes = (*renamed, *left_out, *([left_out_note(skipped)] if skipped else ()))
    return Source(names, *divided, notes, native_side=native, first_side=first)


def _looked_at(found: Any, what: str) -> list[Tensor]:
    """The pixels of a few items; unreadable ones, which are told or left out with all others, if no other is there."""
    seen: list[Tensor] = []
    failed: list[Unreadable] = []
    for number in _some(found):
        try:
            with naming(number, what):
                seen.append(pixels_of(pair(found[number])[0], None))
        except Unreadable as error:
            failed.append(error)
    if not seen:
        raise failed[0]
    return seen


def check_dataset(found: Any, what: str) -> None:
    """Refuse what is no map-style dataset, or one without items.

    Raises:
        UserError: names what is wrong.
    """
    iterable = isinstance(found, IterableDataset)  # its __getitem__ is there and raises
    if iterable or not hasattr(found, "__getitem__") or not hasattr(found, "__len__"):
        raise UserError(f"{what} is {a_kind(found)}: a map-style dataset has __len__ and __getitem__")
    if len(found) == 0:
        raise UserError(f"{what} has no items")


def _class_names(own: tuple[str, ...] | None, lowest: int, highest: int, what: str) -> tuple[str, ...]:
    """The names of a dataset's classes, else their numbers.

    Raises:
        UserError: labels that are no numbers of classes.
    """
    named = f"numbers of {len(own)} classes (0 to {len(own) - 1})" if own else "the numbers of classes"
    if lowest < 0 or highest >= (len(own) if own else MOST_CLASSES):
        raise UserError(f"{what}: labels run from {lowest} to {highest}, but must be {named}, which count from 0")
    return own or tuple(map(str, range(highest + 1)))


def _own_names(found: Any, what: str) -> tuple[str, ...] | None:
    """The names of a dataset's classes, from its `classes`; None without any. See `distinct`.

    Raises:
        UserError: `classes` is something else than a list of names.
    """
    names = getattr(found, "classes", None)
    if isinstance(names, np.ndarray | Tensor):
        names = names.tolist()
    if not names or isinstance(names, int):  # some call the number of classes so
        return None
    if isinstance(names, str | bytes | Mapping | set | frozenset) or not isinstance(names, Iterable):
        raise UserError(
            f"{what}: its `classes` are {_shown(names)}: a list of names is wanted there, in the order of the classes' "
            "numbers, or no `classes` at all"
        )
    return distinct(names)


def _names_to_match(found: Any, what: str) -> tuple[str, ...] | None:
    """The names by which a split's classes can be found among those of another; None where they cannot be."""
    told = _own_names(found, what)
    if told is None or not all(isinstance(name, str | tuple) for name in found.classes):
        return None  # numbers, or something else of that name
    return told if len(set(found.classes)) == len(told) else None


def _shown(value: Any) -> str:
    """A value in a line, with its kind."""
    return f"{' '.join(repr(value).split()):.60} ({a_kind(value)})"


@dataclass(frozen=True)
class Items:
    """Reads images of a map-style dataset by their number.

    Attributes:
        read_before: whether every item was read once, so that none is left to be checked.
    """

    found: Any
    side: int
    channels: int
    what: str
    paths: Sequence[str] | None = None
    read_before: bool = False

    def __call__(self, number: int) -> Tensor:
        """An image as uint8 (channels, side, side)."""
        with naming(number, self.what):
            return resized(pixels_of(pair(self.found[number])[0], self.channels), self.side)

    def check(self, number: int) -> None:
        """See whether the image's file has the header of an image; without a known file, get the item.

        Raises:
            Unreadable: it has not.
        """
        if self.read_before:
            return
        with naming(number, self.what), nullcontext() if self.paths is None else Image.open(self.paths[number]):
            if self.paths is None:
                pair(self.found[number])


class naming:
    """Turns what goes wrong in the block into the error that names the item."""

    def __init__(self, number: int, what: str) -> None:
        self.number, self.what = number, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError):  # a dataset may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            said = f"{self.what}: its image {self.number} is not readable ({reason[:300]})"
            raise Unreadable({f"image {self.number}": said}) from None


def pair(item: Any) -> tuple[Any, Any]:
    """The image and the label of an item.

    Raises:
        ValueError: it is no such pair.
    """
    if not isinstance(item, tuple | list) or len(item) != 2:
        size = f" of {len(item)}" if isinstance(item, tuple | list) else ""
        raise ValueError(f"an item is {a_kind(item)}{size}, not a pair (image, label)")
    return item[0], item[1]


def _split(found: Any, side: int, channels: int, config: DataConfig, what: str, skipped: list[str]) -> Split:
    """A split; sentences on the images that had to be left out for their label go to `skipped`."""
    labels, all_read, unreadable = _labels(found, what)
    if unreadable and config.unreadable == "refuse":
        raise Unreadable({name: said for error in unreadable.values() for name, said in error.images.items()})
    skipped += map(str, unreadable.values())
    read = Items(found, side, channels, what, _files_behind(found), all_read)
    numbers = torch.tensor([number for number in range(len(found)) if number not in unreadable])
    return Split(LazyImages(read, numbers, (channels, side, side), worker_count(config.workers)), labels)


def _some(found: Any) -> range:
    """Numbers of a few items, evenly spaced."""
    return range(0, len(found), max(1, len(found) // TRIED))


def _label(found: Any, number: int, what: str, *, decode: bool) -> int:
    """The class of an item; `decode` reads all of its image too.

    Raises:
        Unreadable: the item cannot be had.
        UserError: its label is not one class.
    """
    with naming(number, what):
        image, label = pair(found[number])
        if decode and isinstance(image, Image.Image):
            image.load()
    if (known := _class(label)) is None:
        raise UserError(
            f"{what}: the label of its image {number} is {_shown(label)}: the number of one class is wanted, a whole "
            "number from 0 on"
        )
    return known


def _labels(found: Any, what: str) -> tuple[Tensor, bool, dict[int, Unreadable]]:
    """The class of every readable item (N,), whether all items had to be read for it, and which cannot be.

    It comes from the dataset's own list if that agrees with a few items, and with one of each class.
    """
    for attribute in ("targets", "labels", "_labels"):
        listed = _numbers(getattr(found, attribute, None))
        if listed is not None and len(listed) == len(found) and _agree(listed, found, what):
            return listed, False, {}
    labels: list[int] = []
    unreadable: dict[int, Unreadable] = {}
    for number in range(len(found)):
        try:
            labels.append(_label(found, number, what, decode=True))
        except Unreadable as error:
            unreadable[number] = error
    return torch.tensor(labels, dtype=torch.long), True, unreadable


def _numbers(listed: Any) -> Tensor | None:
    """A dataset's list of labels; None where it is something else."""
    try:
        numbers = np.asarray(listed.cpu() if isinstance(listed, Tensor) else listed)
    except ValueError:  # rows of different length
        return None
    if numbers.dtype.kind not in "iuf" or numbers.ndim == 0 or numbers.size != len(numbers):
        return None
    with np.errstate(invalid="ignore"):  # NaN is no whole number
        whole = numbers.astype(np.int64).reshape(-1)
    return torch.from_numpy(whole) if bool((whole == numbers.reshape(-1)).all()) else None


def _agree(listed: Tensor, found: Any, what: str) -> bool:
    """Whether a list of labels is that of the items, by a few of them and the first of each class."""
    first_of_each = np.unique(listed.numpy(), return_index=True)[1]
    for number in {*_some(found), *first_of_each[:: 1 + len(first_of_each) // MOST_COMPARED].tolist()}:
        with suppress(Unreadable):  # told, or left out, with all others
            if _label(found, number, what, decode=False) != int(listed[number]):
                return False
    return True


def _class(label: Any) -> int | None:
    """A label as a number; None if it is not one class."""
    if isinstance(label, np.ndarray) and label.size == 1:  # a row of one column, as MedMNIST has them
        label = label.reshape(-1)[0]
    if isinstance(label, Tensor) and label.numel() == 1 and not label.is_floating_point():
        return int(label)
    return int(label) if isinstance(label, int | np.integer) and not isinstance(label, bool) else None


def _files_behind(found: Any) -> Sequence[str] | None:
    """The image files of a dataset that keeps a list of them, in the order of its items; None without one."""
    for listed in vars(found).values() if hasattr(found, "__dict__") else ():
        if isinstance(listed, list) and len(listed) == len(found):
            first = listed[0][0] if isinstance(listed[0], tuple) and listed[0] else listed[0]
            if isinstance(first, str | Path) and Path(first).suffix.lower() in IMG_EXTENSIONS and Path(first).is_file():
                return [str(entry[0] if isinstance(entry, tuple) else entry) for entry in listed]
    return None
