"""Adversarial training: the worst images near a batch, found by projected gradient ascent on its cross-entropy (PGD).

Madry et al. 2018, arXiv 1706.06083. The model attacked is the one in eval mode, its statistics fixed, so that an
attack neither moves them nor needs other ranks; draws are a function of seed, epoch and step, as all of a run's are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ncreg.models import Classifier
from recipes.core.config import AdversarialConfig, TrainConfig
from recipes.core.distributed import Ranks
from recipes.data.augment import Batch
from recipes.training.build import autocast, full


@dataclass(frozen=True)
class Adversary:
    """Turns batches into adversarial ones."""

    config: TrainConfig
    model: Classifier
    ranks: Ranks

    def acts(self, phase: str) -> bool:
        """Whether it does in this phase of training."""
        asked = self.config.adversarial
        return asked.epsilon > 0 and (asked.phase == "always" or phase == "terminal")

    def __call__(self, batch: Batch, *, epoch: int, step: int) -> Batch:
        """The batch with its images moved by `epsilon` at most."""
        model, device = self.model, batch.images.device
        drawn = np.random.SeedSequence([self.config.seed, epoch, step, 4]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(drawn[0]) >> 1)
        whole = (len(batch.labels) * self.ranks.size, *batch.images.shape[1:])
        start = (torch.rand(whole, generator=generator) * 2 - 1).chunk(self.ranks.size)[self.ranks.rank]
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            with autocast(self.config, device):
                count = self.config.optim.accumulate
                pairs = zip(batch.chunks(count), start.to(device).chunk(count), strict=True)
                images = [attacked(model, part, first, self.config.adversarial) for part, first in pairs]
        finally:
            for module in training:
                module.training = True
        return replace(batch, images=torch.cat(images))


def attacked(model: Classifier, batch: Batch, start: Tensor, asked: AdversarialConfig) -> Tensor:
    """Images (B, channels, H, W) in the ball around the batch's, from `start` (in units of epsilon) uphill."""
    clean, epsilon = batch.images, asked.epsilon
    step = 2.5 * epsilon / asked.steps if asked.step_size is None else asked.step_size
    change = within(clean, start.to(clean.dtype) * epsilon, asked)
    for _ in range(asked.steps):
        change.requires_grad_(True)
        loss = F.cross_entropy(full(model(clean + change)), batch.target, reduction="sum")
        (slope,) = torch.autograd.grad(loss, change)
        uphill = (
            slope.sign() if asked.norm == "linf" else slope / lengths(slope).clamp_min(torch.finfo(slope.dtype).tiny)
        )
        change = within(clean, change.detach() + step * uphill, asked)
    return (clean + change).clamp(0, 1)


def within(clean: Tensor, change: Tensor, asked: AdversarialConfig) -> Tensor:
    """The change cut back to the ball, then to images in [0, 1]."""
    if asked.norm == "linf":
        change = change.clamp(-asked.epsilon, asked.epsilon)
    else:
        change = change * (asked.epsilon / lengths(change).clamp_min(asked.epsilon))
    return (clean + change).clamp(0, 1) - clean


def lengths(change: Tensor) -> Tensor:
    """L2 length of each image's change, (B, 1, 1, 1)."""
    return torch.linalg.vector_norm(change, dim=(1, 2, 3), keepdim=True)
