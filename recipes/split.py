"""Images in memory, bytes on a device, or still in their files; made floats a batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop, resize

from recipes.unread import Unread, in_a_row


def as_floats(images: Tensor) -> Tensor:
    """Images (B, channels, height, width) from bytes to [0, 1]."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


@dataclass(frozen=True)
class Split:
    """Images (N, channels, side, side) as uint8, and their classes (N,)."""

    images: Tensor | Unread
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
        return self.images.whole() if isinstance(self.images, Unread) else self.images

    def held(self) -> Split:
        """The same images in memory."""
        return Split(self.read(), self.target)

    def batches(self, indices: Iterable[Tensor | slice]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (images in [0, 1], classes) of the given indices."""
        if isinstance(self.images, Unread):
            yield from ((images, self.target[index]) for images, index in self.images.batches(indices))
            return
        for index in indices:
            index = index.to(self.target.device) if isinstance(index, Tensor) else index
            yield as_floats(self.images[index]), self.target[index]

    def in_turn(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in batches of `size`, the last one partial."""
        return self.batches(slice(start, start + size) for start in range(0, len(self), size))


def joined(parts: Sequence[Split]) -> Split:
    """Splits one after the other, left in their files if all of them are."""
    target = torch.cat([part.target for part in parts])
    unread = [part.images for part in parts if isinstance(part.images, Unread)]
    return Split(in_a_row(unread) if len(unread) == len(parts) else torch.cat([part.read() for part in parts]), target)


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
