"""Adversarial training: each batch is replaced by the worst images near it, found by projected gradient ascent (PGD).

Madry et al. 2018, arXiv 1706.06083. The model is attacked in eval mode: its statistics stay fixed, and no other rank is
needed. Random starts are a function of seed, epoch and step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ncreg.functional import expected_cost_loss
from ncreg.models import Classifier
from ncreg.numerics import at_least_float32
from recipes.core.config import AdversarialConfig
from recipes.core.distributed import Ranks
from recipes.data.augment import Batch
from recipes.training.step import autocast


@dataclass(frozen=True)
class Adversary:
    """Turns batches into adversarial ones."""

    config: AdversarialConfig
    model: Classifier
    ranks: Ranks = Ranks()
    seed: int = 0
    chunks: int = 1
    precision: str = "float32"
    cost: Tensor | None = None

    def active(self, phase: str) -> bool:
        """Whether batches are attacked in this phase of training."""
        return self.config.epsilon > 0 and (self.config.phase == "always" or phase == "terminal")

    def __call__(self, batch: Batch, *, epoch: int, step: int) -> Batch:
        """The batch with each image moved by `epsilon` at most."""
        model, device = self.model, batch.images.device
        drawn = np.random.SeedSequence([self.seed, epoch, step, 4]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(drawn[0]) >> 1)
        whole = (len(batch.labels) * self.ranks.size, *batch.images.shape[1:])
        start = (torch.rand(whole, generator=generator) * 2 - 1).chunk(self.ranks.size)[self.ranks.rank]
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with autocast(self.precision, device):
                pairs = zip(batch.chunks(self.chunks), start.to(device).chunk(self.chunks), strict=True)
                images = [attacked(model, chunk, first, self.config, self.cost) for chunk, first in pairs]
        finally:
            model.train()  # what a backbone keeps from pass to pass in eval mode goes: its weights move on
            for module, training in modes:
                module.training = training
        return replace(batch, images=torch.cat(images))


def attacked(
    model: Classifier, batch: Batch, start: Tensor, config: AdversarialConfig, cost: Tensor | None = None
) -> Tensor:
    """Images (B, channels, H, W) with a higher loss of the attack, in the ball around the batch's.

    `start` is the first change of each image in units of epsilon, `cost` what mistakes cost (C, C), for loss=cost.
    """
    from ncreg.robustness.adversarial.steps import perturb  # with torchmetrics, for adversarial training alone

    def loss(images: Tensor) -> Tensor:
        logits = at_least_float32(model(images))
        if config.loss == "cost" and cost is not None:
            return expected_cost_loss(logits, batch.target, cost, reduction="sum")
        return F.cross_entropy(logits, batch.target, reduction="sum")

    return perturb(
        loss,
        batch.images,
        start.to(batch.images.dtype) * config.epsilon,
        epsilon=config.epsilon,
        norm=config.norm,
        steps=config.steps,
        step_size=config.step_size,
    )
