"""Image sets as uint8 tensors in memory, split into train, validation and test.

The test part is the set's own, or a fixed draw that no seed changes; the seed draws validation and `train_size`.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.datasets import FashionMNIST
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize

from recipes.config import DataConfig, UserError

SMALLEST = 28
"""Side in pixels to which smaller images are brought: below it, timm's backbones have nothing left to look at."""

MEMORY_LIMIT = 8 * 2**30
"""Bytes of images that are held in memory at most."""

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the four files of the set."""


@dataclass(frozen=True)
class Split:
    """Images (N, channels, side, side) as uint8, and their classes (N,)."""

    images: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: Tensor) -> Split:
        return Split(self.images[index], self.target[index])

    def to(self, device: torch.device) -> Split:
        """The same images on a device."""
        return Split(self.images.to(device), self.target.to(device))

    def batches(self, indices: Iterable[Tensor | slice]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (images in [0, 1], classes) of the given indices."""
        for index in indices:
            index = index.to(self.target.device) if isinstance(index, Tensor) else index
            images = self.images[index].to(torch.float32, memory_format=torch.channels_last)
            yield images.div_(255), self.target[index]

    def in_turn(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in batches of `size`, the last one partial."""
        return self.batches(slice(start, start + size) for start in range(0, len(self), size))


@dataclass(frozen=True)
class Dataset:
    """A set of images in three parts."""

    class_names: tuple[str, ...]
    train: Split
    val: Split
    test: Split

    def to(self, device: torch.device) -> Dataset:
        """The same set on a device."""
        return Dataset(self.class_names, self.train.to(device), self.val.to(device), self.test.to(device))

    def moments(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over the training images, in units of [0, 1]."""
        levels = torch.arange(256, dtype=torch.float64) / 255
        channels = self.train.images.cpu().transpose(0, 1).flatten(1)
        shares = (
            torch.stack([torch.bincount(channel, minlength=256) for channel in channels]).double() / channels.shape[1]
        )
        mean = shares @ levels
        return mean.tolist(), (shares @ levels**2 - mean**2).clamp_min(1e-8).sqrt().tolist()


@dataclass(frozen=True)
class Source:
    """What a set gives before it is split: `test` is None where the set has no test part of its own."""

    class_names: tuple[str, ...]
    train: Split
    test: Split | None


def load(config: DataConfig, *, seed: int, image_size: Callable[[int | None], int]) -> Dataset:
    """The set that `config` names.

    Args:
        config: which set, and how much of it.
        seed: of the validation split and of `train_size`.
        image_size: gives the side to use, from the side that the set has (None for a folder of mixed sizes).

    Raises:
        UserError: an unknown set, missing or unreadable files, a class without training images, too few images.
    """
    if config.name not in SOURCES:
        raise UserError(f"data.name={config.name!r} is unknown: one of {', '.join(SOURCES)}")
    source = SOURCES[config.name](config, image_size)
    train, test = source.train, source.test
    if test is None:
        train, test = _split(train, 0.2, seed=0, what="test part")
    train, val = _split(train, config.val_share, seed=seed, what="data.val_share")
    train = stratified(train, config.train_size, seed=seed, what="data.train_size")
    counts = torch.bincount(train.target, minlength=len(source.class_names))
    absent = [source.class_names[index] for index in (counts == 0).nonzero().flatten()]
    if absent:
        raise UserError(f"no training image of class {', '.join(absent)}: add some, or remove the class from the set")
    if len(train) < config.batch_size:
        raise UserError(
            f"{len(train)} training images are fewer than data.batch_size={config.batch_size}: "
            "no full batch; lower --data.batch_size"
        )
    return Dataset(source.class_names, train, val, test)


def stratified(split: Split, size: int | None, *, seed: int, what: str) -> Split:
    """A fixed draw of `size` images that keeps the class shares; everything for None."""
    if size is None or size == len(split):
        return split
    if size > len(split):
        raise UserError(f"{what}={size}: only {len(split)} images are there; null takes them all")
    return _split(split, size, seed=seed, what=what)[1]


def _split(split: Split, part: float | int, *, seed: int, what: str) -> tuple[Split, Split]:
    target = split.target.cpu().numpy()
    try:
        rest, taken = train_test_split(
            np.arange(len(split)), test_size=part, random_state=seed % 2**32, stratify=target
        )
    except ValueError as error:
        raise UserError(f"{what}={part} cannot be drawn from {len(split)} images: {error}") from None
    return split[torch.from_numpy(np.sort(rest))], split[torch.from_numpy(np.sort(taken))]


def _resized(images: Tensor, side: int) -> Tensor:
    """Images brought to side × side: the shorter edge scaled, the rest cropped around the centre."""
    if images.shape[-2:] == (side, side):
        return images
    return center_crop(resize(images, [side], antialias=True), [side, side])


def _digits(config: DataConfig, image_size: Callable[[int | None], int]) -> Source:
    bunch = load_digits()  # levels 0 ... 16
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    target = torch.from_numpy(bunch.target).long()
    return Source(tuple(map(str, range(10))), Split(_resized(images, image_size(8)), target), None)


def _idx(path: Path) -> Tensor:
    """An IDX file of unsigned bytes, gzipped: magic number 0, 0, 8, rank, then the sizes as big-endian int32."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise UserError(f"{path} is no IDX file of unsigned bytes")
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy())


def _fashion_mnist(config: DataConfig, image_size: Callable[[int | None], int]) -> Source:
    places = [config.root, config.root / "FashionMNIST" / "raw", DEBIAN]
    place = next((place for place in places if (place / "train-images-idx3-ubyte.gz").exists()), None)
    if place is None:
        try:
            FashionMNIST(str(config.root), download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"Fashion-MNIST is neither in {', '.join(map(str, places))} nor to be downloaded "
                f"({' '.join(str(error).split())}): install Debian's dataset-fashion-mnist, "
                "or put the four .gz files in --data.root"
            ) from None
        place = config.root / "FashionMNIST" / "raw"
    parts = []
    for name in ("train", "t10k"):
        try:
            images = _idx(place / f"{name}-images-idx3-ubyte.gz").unsqueeze(1)
            target = _idx(place / f"{name}-labels-idx1-ubyte.gz").long()
        except (OSError, EOFError, ValueError) as error:
            raise UserError(
                f"Fashion-MNIST in {place} cannot be read: {error}; remove it to download it anew"
            ) from None
        parts.append(Split(_resized(images, image_size(28)), target))
    return Source(tuple(FashionMNIST.classes), *parts)


def _folder(config: DataConfig, image_size: Callable[[int | None], int]) -> Source:
    """root/train/CLASS/*.png with root/test or root/val beside it, or root/CLASS/*.png alone."""
    if not config.root.is_dir():
        raise UserError(
            f"data.root={config.root} is not a folder: --data.root FOLDER with a folder for each class in it"
        )
    train = config.root / "train" if (config.root / "train").is_dir() else config.root
    names = tuple(sorted(path.name for path in train.iterdir() if path.is_dir()))
    if len(names) < 2:
        raise UserError(f"{train} has {len(names)} class folders: a classifier needs at least 2")
    side = image_size(None)
    test = None
    if train != config.root:
        held_out = next((config.root / part for part in ("test", "val") if (config.root / part).is_dir()), None)
        test = None if held_out is None else _read_folder(held_out, names, side)
    return Source(names, _read_folder(train, names, side), test)


def _read_folder(folder: Path, names: tuple[str, ...], side: int) -> Split:
    unknown = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in names)
    if unknown:
        raise UserError(f"{folder} has classes without training images: {', '.join(unknown)}")
    files = [
        (path, index)
        for index, name in enumerate(names)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in IMG_EXTENSIONS
    ]
    if not files:
        raise UserError(f"{folder} has no images ({', '.join(IMG_EXTENSIONS)}) in its class folders")
    present = {index for _, index in files}
    absent = [name for index, name in enumerate(names) if index not in present]
    if absent:
        raise UserError(f"no image of class {', '.join(absent)} in {folder}: add some, or remove the folder")
    if len(files) * 3 * side**2 > MEMORY_LIMIT:
        raise UserError(
            f"{len(files)} images of {side} pixels in {folder} need more than {MEMORY_LIMIT / 2**30:.0f} GiB of "
            "memory: lower --data.image_size"
        )
    images = torch.empty(len(files), 3, side, side, dtype=torch.uint8)
    for position, (path, _) in enumerate(files):
        images[position] = read_image(path, side)
    return Split(images, torch.tensor([index for _, index in files]))


def read_image(path: Path, side: int, channels: int = 3) -> Tensor:
    """An image file as uint8 (channels, side, side), RGB or gray.

    Raises:
        UserError: the file is not a readable image.
    """
    try:
        with Image.open(path) as opened:
            image = pil_to_tensor(opened.convert("RGB" if channels == 3 else "L"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises
        reason = str(error).replace(str(path), "").strip(" :'")
        raise UserError(f"{path} is not a readable image ({reason}): repair or remove it") from None
    return _resized(image, side)


SOURCES: dict[str, Callable[[DataConfig, Callable[[int | None], int]], Source]] = {
    "digits": _digits,
    "fashion_mnist": _fashion_mnist,
    "folder": _folder,
}
