"""Images in memory, bytes on a device, or still in their files; made floats a batch at a time, and drawn from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop, resize

from recipes.core.distributed import Ranks
from recipes.core.errors import UserError
from recipes.data.lazy_images import LazyImages, concatenate_lazy


def as_floats(images: Tensor) -> Tensor:
    """Images (B, channels, height, width) from bytes to [0, 1]."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


@dataclass(frozen=True)
class Split:
    """Images (N, channels, side, side) as uint8, and their classes (N,)."""

    images: Tensor | LazyImages
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: Tensor) -> Split:
        return Split(self.images[index], self.target[index])

    def to(self, device: torch.device) -> Split:
        """The same images on a device."""
        return Split(self.images.to(device), self.target.to(device))

    def read(self) -> Tensor:
        """All images as bytes, out of their files where they are not in memory."""
        return self.images.read_all() if isinstance(self.images, LazyImages) else self.images

    def in_memory(self) -> Split:
        """The same images in memory."""
        return Split(self.read(), self.target)

    def batches(self, indices: Iterable[Tensor | slice]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (images in [0, 1], classes) of the given indices."""
        if isinstance(self.images, LazyImages):
            yield from ((images, self.target[index]) for images, index in self.images.batches(indices))
            return
        for index in indices:
            index = index.to(self.target.device) if isinstance(index, Tensor) else index
            yield as_floats(self.images[index]), self.target[index]

    def in_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in batches of `size`, the last one partial."""
        return self.batches(slice(start, start + size) for start in range(0, len(self), size))


def of_rank(split: Split, ranks: Ranks) -> Split:
    """The images that one process works on: every size-th of them, from the process's own on."""
    return split if ranks.size == 1 else split[torch.arange(ranks.rank, len(split), ranks.size)]


def concatenate(parts: Sequence[Split]) -> Split:
    """Splits one after the other, left in their files if all of them are."""
    target = torch.cat([part.target for part in parts])
    unread = [part.images for part in parts if isinstance(part.images, LazyImages)]
    return Split(
        concatenate_lazy(unread) if len(unread) == len(parts) else torch.cat([part.read() for part in parts]), target
    )


@dataclass(frozen=True)
class Source:
    """What a set gives before it is split: `test` and `val` are None where it has no such part of its own.

    `notes` say what a person should know of how it was read.
    """

    class_names: tuple[str, ...]
    train: Split
    test: Split | None
    val: Split | None = None
    notes: tuple[str, ...] = ()


def resized(images: Tensor, side: int) -> Tensor:
    """Images brought to side × side: the shorter edge scaled, the rest cropped around the centre."""
    if images.shape[-2:] == (side, side):
        return images
    return center_crop(resize(images, [side], antialias=True), [side, side])


def stratified(split: Split, size: int | None, *, seed: int, what: str) -> Split:
    """A fixed draw of `size` images that keeps the class shares, one of each class at least; everything for None."""
    if size is None or size == len(split):
        return split
    if size > len(split):
        raise UserError(f"{what}={size}: only {len(split)} images are there; null takes them all")
    classes = len(split.target.unique())
    if size < classes:
        raise UserError(f"{what}={size} cannot be drawn from {classes} classes: at least {classes}, an image of each")
    return split[_draw(split.target.cpu(), size, seed=seed, spare=0)]


def divide(
    split: Split, share: float, class_names: tuple[str, ...], *, seed: int, key: str | None = None
) -> tuple[Split, Split]:
    """What is left, and a share that is drawn: the first with an image of each class, both where there are two.

    Raises:
        UserError: the share, which `key` sets, is too small or too large for that.
    """
    target, size = split.target.cpu(), math.ceil(share * len(split))
    counts = torch.bincount(target)
    least, most = max(1, int((counts > 1).sum())), len(split) - int((counts > 0).sum())
    if not least <= size <= most:
        names = ", ".join(class_names[:5]) + (", ..." if len(class_names) > 5 else "")
        low, high = math.ceil(1e4 * least / len(split)) / 1e4, math.floor(1e4 * most / len(split)) / 1e4
        raise UserError(
            f"{f'{key}={share}' if key else f'the test part, a drawn share of {share},'} takes {size} of {len(split)} "
            f"images and leaves {len(split) - size}, too few for one of each class ({names}): "
            + (f"{low:g} to {high:g} would do" if key and low <= high else "add images")
        )
    taken = _draw(target, size, seed=seed, spare=1)
    rest = torch.ones(len(split), dtype=torch.bool)
    rest[taken] = False
    return split[rest.nonzero().flatten()], split[taken]


def _draw(target: Tensor, size: int, *, seed: int, spare: int) -> Tensor:
    """Indices of `size` images by class shares: one of each class at least, and `spare` left of each, if it has more.

    scikit-learn's draw, where it is one; it takes no class of a single image, and leaves out small ones.
    """
    counts = torch.bincount(target)
    room = (counts - spare).clamp_min(0)
    few = len(target) - size < int((counts > 0).sum())  # left out: fewer than one of each class, so no shares to keep
    if few or int(counts[counts > 0].min()) > 1:
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
    """Whole numbers that sum to `size`, nearest to the shares of `counts`: at most `room`, at least one where it is."""
    share = counts.double() * size / counts.sum()
    kept = torch.minimum(share.floor().clamp_min(1), room.double())
    while int(kept.sum()) != size:  # one more where most is missing, or one fewer where most is too many
        step = 1 if int(kept.sum()) < size else -1
        free = kept < room if step > 0 else kept > 1
        kept[torch.where(free, step * (share - kept), -torch.inf).argmax()] += step
    return kept.long()
