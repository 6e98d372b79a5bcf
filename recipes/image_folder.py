"""A folder of images as a set: its parts, its classes, its files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2.functional import pil_to_tensor

from recipes.config import DataConfig, UserError
from recipes.split import Source, Split, resized
from recipes.unread import Unread, reading_processes

PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation"),
    "test": ("test", "testing"),
}
"""Usual names of the folders of a set's parts."""


def image_folder(config: DataConfig, image_size: Callable[[int | None], int]) -> Source:
    """Images in root/train/CLASS, with root/val or root/test or both beside it, or in root/CLASS alone.

    Of val and test, one alone is the test part; where there are both, val is the validation part.

    Raises:
        UserError: no folder, fewer than two classes, a class without images, or parts that do not fit together.
    """
    parts = parts_of(config.root)
    train = parts["train"]
    names = tuple(sorted(path.name for path in _folders(train)))
    if len(names) < 2:
        raise UserError(f"{train} has {len(names)} class folders: a classifier needs at least 2")
    side, workers = image_size(None), reading_processes(config.workers)
    splits = {part: _split(folder, names, side, workers) for part, folder in parts.items()}
    if "test" not in splits and "val" in splits:
        splits["test"] = splits.pop("val")
    return Source(names, splits["train"], splits.get("test"), splits.get("val"), tuple(_left_out(config.root, parts)))


def parts_of(root: Path) -> dict[str, Path]:
    """The folders of the parts, train always among them: the root itself where the classes lie right in it.

    Raises:
        UserError: no folder, one part under two names, or a part beside none for training.
    """
    if not root.is_dir():
        raise UserError(f"data.root={root} is not a folder: --data.root FOLDER with a folder for each class in it")
    parts: dict[str, Path] = {}
    for part, names in PARTS.items():
        # A folder that holds images but no folders is a class, though it be called train.
        there = [root / name for name in names if (root / name).is_dir() and _folders(root / name)]
        if len(there) > 1:
            raise UserError(f"{there[0]} and {there[1]} are both for {part}: remove one of them")
        if there:
            parts[part] = there[0]
    if parts and "train" not in parts:
        other = next(iter(parts.values()))
        raise UserError(f"{other} has no {root / 'train'} beside it: put the training images there")
    return parts or {"train": root}


def image_files(folder: Path) -> list[Path]:
    """The files in a folder that are images by their names, and those in its folders."""
    return [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMG_EXTENSIONS]


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()]


def _split(folder: Path, names: tuple[str, ...], side: int, workers: int) -> Split:
    unknown = sorted(path.name for path in _folders(folder) if path.name not in names)
    if unknown:
        raise UserError(f"{folder} has classes without training images: {', '.join(unknown)}")
    files = [(path, index) for index, name in enumerate(names) for path in image_files(folder / name)]
    if not files:
        raise UserError(f"{folder} has no images ({', '.join(IMG_EXTENSIONS)}) in its class folders")
    present = {index for _, index in files}
    absent = [name for index, name in enumerate(names) if index not in present]
    if absent:
        raise UserError(f"no image of class {', '.join(absent)} in {folder}: add some, or remove the folder")
    read = Files(np.array([os.fsencode(path) for path, _ in files]), side)
    images = Unread(read, torch.arange(len(files)), (3, side, side), workers)
    return Split(images, torch.tensor([index for _, index in files]))


def _left_out(root: Path, parts: dict[str, Path]) -> Iterable[str]:
    """What lies in the folder and is not read, in words; hidden files aside."""
    used = set(parts.values())
    beside = [] if root in used else sorted(path.name for path in _folders(root) if path not in used)
    if beside:
        yield f"left out: {', '.join(str(root / name) for name in beside)}, beside {', '.join(map(str, sorted(used)))}"
    strange: Counter[str] = Counter()
    for part in used:
        for path in part.rglob("*"):
            image = path.suffix.lower() in IMG_EXTENSIONS
            if path.name[0] != "." and (path.parent == part or not image) and path.is_file():
                strange["images outside class folders" if image else path.suffix or "without a suffix"] += 1
    if strange:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(strange.items()))
        yield f"left out: files in {root} that are no images of a class ({kinds}); read are {', '.join(IMG_EXTENSIONS)}"


@dataclass(frozen=True)
class Files:
    """Image files by their number; the paths (N,) in one array, which a worker is handed without a copy."""

    paths: np.ndarray
    side: int

    def __call__(self, number: int) -> Tensor:
        """An image as uint8 (3, side, side)."""
        return read_image(Path(os.fsdecode(self.paths[number])), self.side)


def read_image(path: Path, side: int, channels: int = 3) -> Tensor:
    """An image file as uint8 (channels, side, side), RGB or gray; of 16 bits a pixel the upper eight, rounded.

    Raises:
        UserError: the file is not a readable image, or its pixels are numbers of no known range.
    """
    try:
        with Image.open(path) as opened:
            image = pil_to_tensor(_of_bytes(opened).convert("RGB" if channels == 3 else "L"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises
        reason = str(error).replace(str(path), "").strip(" :'")
        raise UserError(f"{path} is not a readable image ({reason}): repair or remove it") from None
    return resized(image, side)


def _of_bytes(image: Image.Image) -> Image.Image:
    """The same with a byte a channel, which Pillow's own conversion of wider gray pixels would clip to."""
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits, mode {image.mode}, have no known range; 8 or 16 bits do")
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
