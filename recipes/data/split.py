"""Splits of a data set: images as bytes in memory or still in their files, and how splits are drawn from others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize

from recipes.core.distributed import Ranks
from recipes.core.errors import UserError
from recipes.data.lazy_images import LazyImages, concatenate_lazy
from recipes.data.side import Side

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation"),
    "test": ("test", "testing"),
}
"""Usual folder names of a set's splits; upper and lower case are the same."""

NARROW = 8
"""Images whose longer edge is more than so many times the shorter one are cropped before they are scaled."""


def as_floats(images: Tensor) -> Tensor:
    """Images (B, channels, height, width) as floats in [0, 1], from bytes."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


@dataclass(frozen=True)
class Split:
    """Images (N, channels, side, side) as uint8, and their classes (N,)."""

    images: Tensor | LazyImages
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)

    @property
    def side(self) -> int:
        """Of the images, in pixels."""
        return int(self.images.shape[-1])

    def __getitem__(self, index: Tensor) -> Split:
        return replace(self, images=self.images[index], target=self.target[index])

    def to(self, device: torch.device) -> Split:
        """The same images on a device."""
        return replace(self, images=self.images.to(device), target=self.target.to(device))

    def read(self) -> Tensor:
        """All images as bytes (N, channels, side, side), read from their files if they are not in memory."""
        return self.images.read_all() if isinstance(self.images, LazyImages) else self.images

    def in_memory(self) -> Split:
        """The same images in memory."""
        return Split(self.read(), self.target)

    def batches(self, indices: Iterable[Tensor | slice]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (images in [0, 1], classes), one for each of the given indices."""
        if isinstance(self.images, LazyImages):
            yield from ((images, self.target[index]) for images, index in self.images.batches(indices))
            return
        for index in indices:
            index = index.to(self.target.device) if isinstance(index, Tensor) else index
            yield as_floats(self.images[index]), self.target[index]

    def in_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in their order, in batches of `size`; the last batch may be smaller."""
        return self.batches(slice(start, start + size) for start in range(0, len(self), size))


def of_rank(split: Split, ranks: Ranks) -> Split:
    """The images that one process works on: rank r of n takes images r, r + n, r + 2n and so on."""
    return split if ranks.size == 1 else split[torch.arange(ranks.rank, len(split), ranks.size)]


def concatenate(parts: Sequence[Split]) -> Split:
    """All images of several splits as one split, left in their files if those of every split are."""
    target = torch.cat([part.target for part in parts])
    lazy = [part.images for part in parts if isinstance(part.images, LazyImages)]
    images = concatenate_lazy(lazy) if len(lazy) == len(parts) else torch.cat([part.read() for part in parts])
    return Split(images, target)


@dataclass(frozen=True)
class Source:
    """A data set as its source provides it; `test` and `val` are None if it has no such split of its own.

    Attributes:
        notes: sentences for the user about how it was read, such as files that were left out.
        partial: whether it may lack images of a class, as data that a finished run is evaluated on may.
        gone: names of images that count for the draw of splits but are not there any more.
        native_side: median shorter edge of the training images in pixels, before they are scaled; None if unknown.
        first_side: that of the first image, by which sets of one's own are sized; None where it decides nothing.
    """

    class_names: tuple[str, ...]
    train: Split
    test: Split | None
    val: Split | None = None
    notes: tuple[str, ...] = ()
    partial: bool = False
    gone: frozenset[str] = frozenset()
    native_side: int | None = None
    first_side: int | None = None

    def splits(self) -> dict[str, Split]:
        """The splits that it has, by name."""
        found = {"train": self.train, "val": self.val, "test": self.test}
        return {name: split for name, split in found.items() if split is not None}


def resized(images: Tensor, side: int) -> Tensor:
    """Images of side × side pixels: the shorter edge is scaled to `side`, then the centre is cropped.

    A `Side` may ask for another length, another interpolation, or both edges scaled. Of a very long image only the
    middle is scaled, so that it costs no more memory than its crop.
    """
    how = Side.of(side)
    if images.shape[-2:] == (side, side) and how.shorter == side:
        return images
    interpolation = InterpolationMode(how.interpolation)
    if how.squash:
        return resize(images, [side, side], interpolation, antialias=True)
    if max(images.shape[-2:]) > NARROW * min(images.shape[-2:]):
        images = _middle(images, how.shorter)
    return center_crop(resize(images, [how.shorter], interpolation, antialias=True), [side, side])


def _middle(images: Tensor, side: int) -> Tensor:
    """The middle of long images, with all pixels that reach into the crop when the shorter edge is scaled to `side`.

    Its length is one that is scaled by nearly the same factor and cropped at the same pixels as the whole would be.
    """
    height, width = images.shape[-2:]
    short, long = sorted((height, width))

    def scaled(length: int) -> int:
        return side * length // short

    least = short + 4 * math.ceil(max(1.0, short / side)) + 2  # the scaling filter reaches over the crop's edges
    lengths = [
        length
        for length in range(least, min(long, 2 * least + short))
        if (long - length) % 2 == 0 and (scaled(long) - scaled(length)) % 4 == 0
    ]
    kept = min(lengths, key=lambda length: abs(length / scaled(length) - long / scaled(long)), default=long)
    return center_crop(images, [kept, width] if height > width else [height, kept])


def stratified(split: Split, size: int | None, *, seed: int, what: str) -> Split:
    """`size` images drawn with the seed, classes in proportion and at least one image of each; all for None.

    Raises:
        UserError: `size` is too large or too small; `what` names the option that sets it.
    """
    if size is None or size == len(split):
        return split
    if size > len(split):
        raise UserError(f"{what}={size}: only {len(split)} images are there; null takes them all")
    classes = len(split.target.unique())
    if size < classes:
        raise UserError(f"{what}={size} cannot be drawn from {classes} classes: at least {classes}, an image of each")
    return split[_draw(split.target.cpu(), size, seed=seed, spare=0)]


class TooFew(UserError):
    """Images that cannot be divided, or not so; `divisible` says whether another fraction would do."""

    def __init__(self, message: str, *, divisible: bool) -> None:
        super().__init__(message)
        self.divisible = divisible


def divide(
    split: Split, fraction: float, class_names: tuple[str, ...], *, seed: int, key: str | None = None
) -> tuple[Split, Split]:
    """The split in two: the rest, and a drawn fraction of it, with classes in proportion.

    The rest keeps an image of each class; the drawn split has one of each class that has two.

    Raises:
        TooFew: the fraction is too small or too large for that; `key` names the option that sets it.
    """
    target, size = split.target.cpu(), math.ceil(fraction * len(split))
    counts = torch.bincount(target)
    least, most = max(1, int((counts > 1).sum())), len(split) - int((counts > 0).sum())
    if not least <= size <= most:
        names = ", ".join(class_names[:5]) + (", ..." if len(class_names) > 5 else "")
        low, high = math.ceil(1e4 * least / len(split)) / 1e4, math.floor(1e4 * most / len(split)) / 1e4
        divisible = key is not None and low <= high
        raise TooFew(
            f"{f'{key}={fraction}' if key else f'the test part, a drawn share of {fraction},'} takes {size} of "
            f"{len(split)} images and leaves {len(split) - size}, too few for one of each class ({names}): "
            + (f"{low:g} to {high:g} would do" if divisible else "add images, or a part that is not drawn (test/)"),
            divisible=divisible,
        )
    taken = _draw(target, size, seed=seed, spare=1)
    rest = torch.ones(len(split), dtype=torch.bool)
    rest[taken] = False
    return split[rest.nonzero().flatten()], split[taken]


def _draw(target: Tensor, size: int, *, seed: int, spare: int) -> Tensor:
    """Indices of `size` images, classes in proportion, at least one of each and `spare` of each not taken.

    scikit-learn's stratified draw if it keeps these bounds: it refuses classes of one image and may skip small classes.
    """
    counts = torch.bincount(target)
    room = (counts - spare).clamp_min(0)
    few = len(target) - size < int((counts > 0).sum())  # left out: fewer than one of each class, so no shares to keep
    if few or int(counts[counts > 0].min()) > 1:
        from sklearn.model_selection import train_test_split  # half a second, which train.py --help can do without

        whole, labels = np.arange(len(target)), None if few else target.numpy()
        _, rows = train_test_split(whole, test_size=size, random_state=seed % 2**32, stratify=labels)
        taken = torch.from_numpy(np.sort(rows))
        drawn = torch.bincount(target[taken], minlength=len(counts))
        if bool(((drawn >= room.clamp_max(1)) & (drawn <= room)).all()):
            return taken
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
    kept = proportional_counts(counts, room, size).tolist()
    rows_of = [order[target[order] == label][:count] for label, count in enumerate(kept)]
    return torch.cat(rows_of).sort().values


def proportional_counts(counts: Tensor, room: Tensor, size: int) -> Tensor:
    """Whole numbers (C,) in proportion to `counts` that sum to `size`: at most `room` each, at least 1 if that allows.

    Starts from the proportions rounded down, then corrects by one where the rounding error is largest.
    """
    exact = counts.double() * size / counts.sum()
    kept = torch.minimum(exact.floor().clamp_min(1), room.double())
    while int(kept.sum()) != size:
        step = 1 if int(kept.sum()) < size else -1
        free = kept < room if step > 0 else kept > 1
        kept[torch.where(free, step * (exact - kept), -torch.inf).argmax()] += step
    return kept.long()
