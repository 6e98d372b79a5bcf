"""Any labelled image set of torchvision by its name: data.name=torchvision.CIFAR10."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torchvision

from recipes.core.config import DataConfig
from recipes.core.errors import NotHere, UserError
from recipes.core.suggestions import did_you_mean
from recipes.data.map_style import source_of
from recipes.data.split import Source

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
            + did_you_mean(name, torchvision.datasets.__all__, prefix="torchvision.")
        )
    download = {"download": True} if "download" in takes else {}
    try:
        train, test = (_part(made, str(config.root), key, values, download) for values in SPLIT_ARGUMENTS[key])
    except (OSError, RuntimeError, ValueError, TypeError, ImportError) as error:
        if f"argument {key}" in str(error):  # torchvision's answer to an unknown name
            raise UserError(
                f"data.name={config.name}: {error} None is for training or for testing by its name: a function in a "
                "file may give both parts, --data.name FILE.py:NAME"
            ) from None
        raise NotHere(
            f"data.name={config.name}: neither in data.root={config.root} nor to be downloaded "
            f"({' '.join(str(error).split())[:200]}); put its files there as torchvision lays them out"
        ) from None
    return source_of({"train": train, "test": test}, config, image_size, what=f"data.name={config.name}")


def _part(made: Any, root: str, key: str, names: tuple[Any, ...], download: dict[str, bool]) -> Any:
    """The split of the set that has one of the names."""
    *others, last = names
    for name in others:
        with suppress(ValueError):  # torchvision's answer to an unknown name
            return made(root, **{key: name}, **download)
    return made(root, **{key: last}, **download)
