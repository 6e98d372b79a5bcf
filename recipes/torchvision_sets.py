"""Any labelled image set of torchvision by its name: data.name=torchvision.CIFAR10."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchvision
from torchvision.transforms.v2.functional import pil_to_tensor

from recipes.config import DataConfig, UserError
from recipes.split import Source, Split, resized


def torchvision_set(config: DataConfig, image_size: Callable[[int | None], int]) -> Source:
    """The set `torchvision.NAME`, downloaded into data.root where it is not there yet.

    Raises:
        UserError: no set of that name, one that is not split into train and test, or one that cannot be had.
    """
    name = config.name.removeprefix("torchvision.")
    made = getattr(torchvision.datasets, name, None)
    takes = list(inspect.signature(made).parameters) if inspect.isclass(made) else []
    parts: dict[str, tuple[Any, Any]] = {"train": (True, False), "split": ("train", "test")}
    key = next((key for key in parts if key in takes), None)
    if made is None or key is None or "download" not in takes:
        raise UserError(
            f"data.name={config.name!r}: torchvision.datasets.{name} is no set with root, train (or split) and "
            "download, such as torchvision.CIFAR10; put its images in folders and use data.name=folder"
        )
    try:
        train, test = (made(str(config.root), download=True, **{key: value}) for value in parts[key])
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise UserError(
            f"data.name={config.name}: neither in data.root={config.root} nor to be downloaded "
            f"({' '.join(str(error).split())[:200]}); put its files there as torchvision lays them out"
        ) from None
    side = image_size(min(train[0][0].size) if len(train) else None)
    read = [_read(found, side, config.name) for found in (train, test)]
    names = getattr(train, "classes", None) or range(int(read[0].target.max()) + 1)
    return Source(tuple(map(str, names)), *read)


def _read(found: Any, side: int, name: str) -> Split:
    images, target = [], []
    for image, label in found:
        if not isinstance(label, int | np.integer):
            raise UserError(f"data.name={name}: its labels are {type(label).__name__}, not one class an image")
        images.append(resized(pil_to_tensor(image), side))
        target.append(int(label))
    return Split(torch.stack(images), torch.tensor(target))
