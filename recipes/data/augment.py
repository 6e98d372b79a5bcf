"""Training batches, augmented and mixed on the device; every draw is a function of seed, epoch and step.

Draws are made for the global batch, so that a resumed run and any number of ranks see the same images.
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
from recipes.data.split import Split


@dataclass(frozen=True)
class Batch:
    """Images in [0, 1], what the loss is to give (classes, or a distribution a row), and the classes themselves."""

    images: Tensor
    target: Tensor
    labels: Tensor

    def parts(self, count: int) -> Iterator[Batch]:
        """The batch in `count` equal parts, for gradient accumulation."""
        for part in zip(*(tensor.chunk(count) for tensor in (self.images, self.target, self.labels)), strict=True):
            yield Batch(*part)


def batches(
    split: Split,
    turn: Tensor,
    asked: AugmentConfig,
    *,
    num_classes: int,
    seed: int,
    epoch: int,
    done: int = 0,
    dtype: torch.dtype = torch.float32,
    ranks: Ranks,
) -> Iterator[Batch]:
    """This rank's share of every global batch of an epoch.

    Args:
        split: the images.
        turn: positions in `split`, (steps, global batch).
        asked: which augmentation.
        num_classes: of the soft labels.
        seed: of the run.
        epoch: counted from 1.
        done: steps that are behind already.
        dtype: of the soft labels: the model's.
        ranks: whose share is given.
    """
    share = turn.shape[1] // ranks.size
    own = slice(ranks.rank * share, (ranks.rank + 1) * share)
    rows = slice(None) if asked.mixes else own  # a partner in mixing may be another rank's image
    for step, (pixels, labels) in enumerate(split.batches(turn[done:, rows]), start=done):
        drawn = np.random.SeedSequence([seed, epoch, step, 1]).generate_state(2, np.uint64)
        if asked.crop or asked.flip:
            pixels = moved(pixels, *displacements(int(drawn[0]) >> 1, turn.shape[1], rows, asked))
        target = labels
        if asked.softens:
            target = softened(pixels, labels, asked, num_classes, int(drawn[1]) >> 32).to(dtype)
        if asked.mixes:
            pixels, target, labels = pixels[own], target[own], labels[own]
        yield Batch(pixels, target, labels)


def displacements(drawn: int, count: int, rows: slice, asked: AugmentConfig) -> tuple[Tensor, Tensor]:
    """Shifts (B, 2) in pixels, down and right, in [-crop, crop], and who is mirrored (B,), of the `rows` asked for."""
    generator = torch.Generator().manual_seed(drawn)
    shift = torch.randint(-asked.crop, asked.crop + 1, (count, 2), generator=generator)
    mirrored = torch.rand(count, generator=generator) < (0.5 if asked.flip else 0.0)
    return shift[rows], mirrored[rows]


def moved(images: Tensor, shift: Tensor, mirrored: Tensor) -> Tensor:
    """Each image mirrored or not, then cut out of its zero-padded self at its own place; (B, C, H, W) as it came."""
    device, (height, width) = images.device, images.shape[-2:]
    pad = int(shift.abs().max())
    padded = F.pad(images, [pad] * 4).permute(0, 2, 3, 1)
    down = torch.arange(height) + shift[:, :1] + pad
    right = torch.arange(width) + shift[:, 1:] + pad
    right = torch.where(mirrored[:, None], width - 1 + 2 * pad - right, right)
    here = torch.arange(len(images), device=device)[:, None, None]
    return padded[here, down.to(device)[:, :, None], right.to(device)[:, None, :]].permute(0, 3, 1, 2)


def softened(pixels: Tensor, labels: Tensor, asked: AugmentConfig, num_classes: int, drawn: int) -> Tensor:
    """Soft labels (B, C) by timm's Mixup, which mixes `pixels` in place; the global generator is left as it was."""
    mixing = Mixup(
        mixup_alpha=asked.mixup,
        cutmix_alpha=asked.cutmix,
        prob=float(asked.mixes),
        label_smoothing=asked.smoothing,
        num_classes=num_classes,
    )
    before = np.random.get_state()
    np.random.seed(drawn)
    try:
        return mixing(pixels, labels)[1]
    finally:
        np.random.set_state(before)
