"""Any labelled image set of torchvision by its name: data.name=torchvision.CIFAR10."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from recipes.core.config import DataConfig
from recipes.core.errors import UserError
from recipes.data.lazy_images import LazyImages, worker_count
from recipes.data.split import Source, Split, resized

SPLIT_ARGUMENTS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "train": ((True,), (False,)),
    "split": (("train", "trainval"), ("test", "val")),
}
"""Values for the training and the test split, by the argument that selects the split; the first accepted is used."""


def torchvision_set(config: DataConfig, image_size: Callable[[int | None], int]) -> Source:
    """The set `torchvision.NAME`, downloaded into data.root if it is not there yet.

    Raises:
        UserError: no set of that name, one without a training and a test split, or one that cannot be downloaded.
    """
    name = config.name.removeprefix("torchvision.")
    made = getattr(torchvision.datasets, name, None)
    takes = list(inspect.signature(made).parameters) if inspect.isclass(made) else []
    key = next((key for key in SPLIT_ARGUMENTS if key in takes), None)
    if made is None or key is None or "root" not in takes:
        raise UserError(
            f"data.name={config.name!r}: torchvision.datasets.{name} is no set with root, train (or split), "
            "such as torchvision.CIFAR10; put its images in folders and use data.name=folder"
        )
    download = {"download": True} if "download" in takes else {}
    try:
        train, test = (_part(made, str(config.root), key, values, download) for values in SPLIT_ARGUMENTS[key])
    except (OSError, RuntimeError, ValueError, TypeError, ImportError) as error:
        raise UserError(
            f"data.name={config.name}: neither in data.root={config.root} nor to be downloaded "
            f"({' '.join(str(error).split())[:200]}); put its files there as torchvision lays them out"
        ) from None
    seen = [_item(train, number, config.name)[0] for number in _some(train)]
    side, mode = image_size(min(seen[0].size)), "L" if all(image.mode in ("1", "L") for image in seen) else "RGB"
    channels, workers = 1 if mode == "L" else 3, worker_count(config.workers)
    parts = []
    for found in (train, test):
        read = Pictures(found, side, mode, config.name)
        images = LazyImages(read, torch.arange(len(found)), (channels, side, side), workers)
        parts.append(Split(images, _labels(found, config.name)))
    names = getattr(train, "classes", None) or range(int(parts[0].target.max()) + 1)
    plain = [", ".join(name) if isinstance(name, tuple) else str(name) for name in names]
    # names may repeat: ImageNet has two classes called crane
    once = (name if plain.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(plain))
    return Source(tuple(once), train=parts[0], test=parts[1])


def _part(made: Any, root: str, key: str, names: tuple[Any, ...], download: dict[str, bool]) -> Any:
    """The split of the set that has one of the names."""
    *others, last = names
    for name in others:
        with suppress(ValueError):  # torchvision's answer to an unknown name
            return made(root, **{key: name}, **download)
    return made(root, **{key: last}, **download)


@dataclass(frozen=True)
class Pictures:
    """Reads images of a torchvision set by their number."""

    found: Any
    side: int
    mode: str
    name: str

    def __call__(self, number: int) -> Tensor:
        """An image as uint8 (channels, side, side)."""
        image = _item(self.found, number, self.name)[0]
        return resized(pil_to_tensor(image if image.mode == self.mode else image.convert(self.mode)), self.side)


def _some(found: Any) -> range:
    """Numbers of a few images, evenly spaced."""
    return range(0, len(found), max(1, len(found) // 8))


def _item(found: Any, number: int, name: str) -> tuple[Image.Image, Any]:
    """A decoded image and its label."""
    try:
        image, label = found[number]
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises
        reason = " ".join(str(error).split())
        raise UserError(f"data.name={name}: its image {number} is not readable ({reason})") from None
    return image, label


def _labels(found: Any, name: str) -> Tensor:
    """The class of every image (N,), from the set's own list if that agrees with a few images, else image by image."""
    tried = _some(found)
    some = {number: _item(found, number, name)[1] for number in tried}
    strange = next((label for label in some.values() if not isinstance(label, int | np.integer)), None)
    if strange is not None:
        raise UserError(f"data.name={name}: its labels are {type(strange).__name__}, not one class an image")
    for attribute in ("targets", "labels", "_labels"):
        listed = getattr(found, attribute, None)
        if listed is not None and all(len(listed) == len(found) and int(listed[n]) == some[n] for n in tried):
            return torch.as_tensor(listed).long()
    return torch.tensor([int(_item(found, number, name)[1]) for number in range(len(found))])
