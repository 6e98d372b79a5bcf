"""Any map-style dataset of (image, label) pairs as a source: torchvision's, timm's, one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2.functional import rgb_to_grayscale

from recipes.core.config import DataConfig
from recipes.core.errors import UserError
from recipes.core.suggestions import a_kind
from recipes.data.class_names import distinct, same_classes, without_unlabelled
from recipes.data.decode import decoded
from recipes.data.lazy_images import LazyImages, worker_count
from recipes.data.split import Source, Split, resized
from recipes.data.unreadable import Unreadable

Size = Callable[[int | None], int]

TRIED = 8
"""Items that are looked at to see what a dataset holds."""


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
    seen = []
    for number in _some(train):
        with naming(number, what):
            seen.append(pixels_of(pair(train[number])[0], None))
    channels = max(image.shape[0] for image in seen)
    first = min(seen[0].shape[1:])
    side = image_size(first)
    opened = {part: _split(found, side, channels, worker_count(config.workers), what) for part, found in splits.items()}
    named = {part: _own_names(found) if part == "train" else _names_to_match(found) for part, found in splits.items()}
    parts, renamed = same_classes(opened, named, what)
    parts, left_out = without_unlabelled(parts, what)
    labels = torch.cat([part.target for part in parts.values()])
    names = class_names(train, count=int(labels.max()) + 1)
    if int(labels.min()) < 0 or int(labels.max()) >= len(names):
        raise UserError(
            f"{what}: labels run from {int(labels.min())} to {int(labels.max())}, but must be the numbers of "
            f"{len(names)} classes, which count from 0 (0 to {len(names) - 1})"
        )
    native = median_low(min(image.shape[1:]) for image in seen)
    divided = parts["train"], parts.get("test"), parts.get("val")
    return Source(names, *divided, (*renamed, *left_out), native_side=native, first_side=first)


def check_dataset(found: Any, what: str) -> None:
    """Refuse what is no map-style dataset, or one without items.

    Raises:
        UserError: names what is wrong.
    """
    if not hasattr(found, "__getitem__") or not hasattr(found, "__len__"):
        raise UserError(f"{what} is {a_kind(found)}: a map-style dataset has __len__ and __getitem__")
    if len(found) == 0:
        raise UserError(f"{what} has no items")


def class_names(found: Any, *, count: int) -> tuple[str, ...]:
    """The names of a dataset's classes, from its `classes`, else their numbers; see `distinct`."""
    return _own_names(found) or tuple(map(str, range(count)))


def _own_names(found: Any) -> tuple[str, ...] | None:
    """The names of a dataset's classes, from its `classes`; None without any."""
    return distinct(getattr(found, "classes", None) or ()) or None


def _names_to_match(found: Any) -> tuple[str, ...] | None:
    """The names by which a split's classes can be found among those of another; None where they cannot be."""
    names = getattr(found, "classes", None)
    if not isinstance(names, list | tuple) or not all(isinstance(name, str | tuple) for name in names):
        return None  # numbers, or something else of that name
    told = distinct(names)
    return told if told and len(set(names)) == len(names) else None


def pixels_of(image: Any, channels: int | None) -> Tensor:
    """An image as uint8 (channels, height, width).

    Args:
        image: of Pillow; a tensor (channels, height, width) or (height, width), or an array (height, width, channels)
            or (height, width), of bytes or of floats in [0, 1].
        channels: 1 or 3; None takes the image's own.

    Raises:
        ValueError: another type, shape or range.

    Example:
        >>> pixels_of(np.ones((2, 3), np.float32), 3)[:, 0, 0].tolist()
        [255, 255, 255]
    """
    if isinstance(image, Image.Image):
        own = 1 if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16") else 3
        return decoded(image, channels or own)
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.ascontiguousarray(image if image.ndim == 2 else image.transpose(2, 0, 1)))
    if not isinstance(image, Tensor) or image.ndim not in (2, 3):
        raise ValueError(f"{_described(image)} is no image: Pillow's, a tensor (C, H, W) or an array (H, W, C) is one")
    image = image if image.ndim == 3 else image[None]
    if image.shape[0] not in (1, 3):
        raise ValueError(f"{_described(image)} has {image.shape[0]} channels: 1 (gray) or 3 (RGB) come first")
    if image.is_floating_point():
        if bool(image.isnan().any()):
            raise ValueError("some of its values are NaN")
        if not bool(((image >= 0) & (image <= 1)).all()):
            raise ValueError("its values leave [0, 1]: take Normalize out, the classifier normalises by itself")
        image = image.mul(255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise ValueError(f"its values are {image.dtype}: uint8, or floats in [0, 1]")
    if channels == 1 and image.shape[0] == 3:
        return rgb_to_grayscale(image)
    return image if channels in (None, image.shape[0]) else image.expand(channels, -1, -1)


def _described(image: Any) -> str:
    shape = getattr(image, "shape", None)
    return type(image).__name__ if shape is None else f"{type(image).__name__} of shape {tuple(shape)}"


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


def _split(found: Any, side: int, channels: int, workers: int, what: str) -> Split:
    labels, all_read = _labels(found, what)
    read = Items(found, side, channels, what, _files_behind(found), all_read)
    return Split(LazyImages(read, torch.arange(len(found)), (channels, side, side), workers), labels)


def _some(found: Any) -> range:
    """Numbers of a few items, evenly spaced."""
    return range(0, len(found), max(1, len(found) // TRIED))


def _item(found: Any, number: int, what: str) -> tuple[Any, Any]:
    """A decoded image and its label."""
    with naming(number, what):
        image, label = pair(found[number])
        if isinstance(image, Image.Image):
            image.load()
    return image, label


def _labels(found: Any, what: str) -> tuple[Tensor, bool]:
    """The class of every item (N,), and whether all items had to be read for it.

    It comes from the dataset's own list if that agrees with a few items.
    """
    tried = _some(found)
    some = {number: _item(found, number, what)[1] for number in tried}
    strange = next((label for label in some.values() if _class(label) is None), None)
    if strange is not None:
        raise UserError(f"{what}: its labels are {type(strange).__name__}, not one class an image")
    for attribute in ("targets", "labels", "_labels"):
        listed = getattr(found, attribute, None)
        if listed is not None and _agree(listed, found, some):
            return torch.as_tensor(listed).long(), False
    labels: list[int | None] = []
    unreadable: dict[str, str] = {}
    for number in range(len(found)):
        try:
            labels.append(_class(_item(found, number, what)[1]))
        except Unreadable as error:
            unreadable |= error.images
    if unreadable:
        raise Unreadable(unreadable)
    if None in labels:
        raise UserError(f"{what}: the label of its image {labels.index(None)} is not one class")
    return torch.tensor(labels), True


def _agree(listed: Any, found: Any, some: Mapping[int, Any]) -> bool:
    """Whether a list of labels is that of the items."""
    try:
        return len(listed) == len(found) and all(int(listed[number]) == int(label) for number, label in some.items())
    except (TypeError, ValueError):  # lists of something else
        return False


def _class(label: Any) -> int | None:
    """A label as a number; None if it is not one class."""
    if isinstance(label, Tensor) and label.ndim == 0 and not label.is_floating_point():
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
