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
from ncreg.robustness.adversarial.steps import perturb
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
        config = self.config.adversarial
        return config.epsilon > 0 and (config.phase == "always" or phase == "terminal")

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


def attacked(model: Classifier, batch: Batch, start: Tensor, config: AdversarialConfig) -> Tensor:
    """Images (B, channels, H, W) with a higher cross-entropy, in the ball around the batch's.

    `start` is the first change of each image in units of epsilon.
    """

    def loss(images: Tensor) -> Tensor:
        return F.cross_entropy(full(model(images)), batch.target, reduction="sum")

    return perturb(
        loss,
        batch.images,
        start.to(batch.images.dtype) * config.epsilon,
        epsilon=config.epsilon,
        norm=config.norm,
        steps=config.steps,
        step_size=config.step_size,
    )
