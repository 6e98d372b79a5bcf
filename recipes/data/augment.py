"""Training batches, augmented and mixed on the device.

Every random draw is a function of seed, epoch and step, and is made for the batch of all ranks together, so that a
resumed run and any number of ranks see the same images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from torch import Tensor

from recipes.core.config import AugmentConfig
from recipes.core.distributed import Ranks
from recipes.core.errors import UserError
from recipes.data.split import Split


@dataclass(frozen=True)
class Batch:
    """Images in [0, 1], their target (class indices, or a distribution over classes a row), and their class indices."""

    images: Tensor
    target: Tensor
    labels: Tensor

    def chunks(self, count: int) -> Iterator[Batch]:
        """The batch in `count` equal chunks, for gradient accumulation."""
        for chunk in zip(*(tensor.chunk(count) for tensor in (self.images, self.target, self.labels)), strict=True):
            yield Batch(*chunk)


def check_shift(augment: AugmentConfig, split: Split) -> None:
    """Refuse a shift that can move a whole image out of sight.

    Raises:
        UserError: names the side of the images.
    """
    side = min(split.images.shape[-2:])
    if augment.crop >= side:
        raise UserError(
            f"augment.crop={augment.crop} moves whole images of {side} pixels out of sight, black ones are left: "
            f"at most {side - 1}, an eighth of the side ({side // 8}) is usual"
        )


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The order of `count` images in an epoch: a function of seed and epoch alone, the same for every recipe."""
    drawn = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]) >> 1
    return torch.randperm(count, generator=torch.Generator().manual_seed(drawn))


def batches(
    split: Split,
    order: Tensor,
    augment: AugmentConfig,
    *,
    num_classes: int,
    seed: int,
    epoch: int,
    done: int = 0,
    dtype: torch.dtype = torch.float32,
    ranks: Ranks,
) -> Iterator[Batch]:
    """This rank's part of every batch of an epoch.

    Args:
        split: the images.
        order: positions in `split`, (steps, batch of all ranks).
        augment: which augmentation.
        num_classes: of the soft labels.
        seed: of the run.
        epoch: counted from 1.
        done: steps of the epoch that were already taken.
        dtype: of the soft labels: the model's.
        ranks: which part of each batch is returned.
    """
    count = order.shape[1] // ranks.size
    own = slice(ranks.rank * count, (ranks.rank + 1) * count)
    rows = slice(None) if augment.mixes else own  # a partner in mixing may be another rank's image
    for step, (pixels, labels) in enumerate(split.batches(order[done:, rows]), start=done):
        drawn = np.random.SeedSequence([seed, epoch, step, 1]).generate_state(2, np.uint64)
        if augment.crop or augment.flip:
            pixels = moved(pixels, *displacements(int(drawn[0]) >> 1, order.shape[1], rows, augment))
        target = labels
        if augment.softens:
            target = softened(pixels, labels, augment, num_classes, int(drawn[1]) >> 32).to(dtype)
        if augment.mixes:
            pixels, target, labels = pixels[own], target[own], labels[own]
        yield Batch(pixels, target, labels)


def displacements(drawn: int, count: int, rows: slice, augment: AugmentConfig) -> tuple[Tensor, Tensor]:
    """Shifts (B, 2) in pixels, down and right, in [-crop, crop], and which images are mirrored (B,), for `rows`."""
    generator = torch.Generator().manual_seed(drawn)
    shift = torch.randint(-augment.crop, augment.crop + 1, (count, 2), generator=generator)
    mirrored = torch.rand(count, generator=generator) < (0.5 if augment.flip else 0.0)
    return shift[rows], mirrored[rows]


def moved(images: Tensor, shift: Tensor, mirrored: Tensor) -> Tensor:
    """Images (B, C, H, W), each mirrored or not, then shifted; zeros fill the border."""
    device, (height, width) = images.device, images.shape[-2:]
    pad = int(shift.abs().max())
    padded = F.pad(images, [pad] * 4).permute(0, 2, 3, 1)
    down = torch.arange(height) + shift[:, :1] + pad
    right = torch.arange(width) + shift[:, 1:] + pad
    right = torch.where(mirrored[:, None], width - 1 + 2 * pad - right, right)
    here = torch.arange(len(images), device=device)[:, None, None]
    return padded[here, down.to(device)[:, :, None], right.to(device)[:, None, :]].permute(0, 3, 1, 2)


def softened(pixels: Tensor, labels: Tensor, augment: AugmentConfig, num_classes: int, drawn: int) -> Tensor:
    """Soft labels (B, C) by timm's Mixup, which mixes `pixels` in place; the global generator is left as it was."""
    mixing = Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=float(augment.mixes),
        label_smoothing=augment.smoothing,
        num_classes=num_classes,
    )
    before = np.random.get_state()
    np.random.seed(drawn)
    try:
        return mixing(pixels, labels)[1]
    finally:
        np.random.set_state(before)
