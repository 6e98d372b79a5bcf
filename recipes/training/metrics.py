"""Clean, eval-mode measurements: accuracy, loss, and how far features have collapsed."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ncreg.metrics import NeuralCollapse
from ncreg.models import Classifier
from ncreg.numerics import float64_device, in_float64
from recipes.core.distributed import Ranks
from recipes.data.load import Dataset
from recipes.data.split import Split, of_rank
from recipes.training.certificate import certificate

BATCH = 512
ALONE = Ranks()


@dataclass
class Clock:
    """Seconds spent, by activity."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, start: float) -> float:
        """Book the time since `start` under `name`; returns now."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - start
        return now


@torch.inference_mode()
def measure(
    model: Classifier, split: Split, *, ranks: Ranks = ALONE, clock: Clock | None = None, collapse: bool = True
) -> dict[str, float]:
    """Accuracy, cross-entropy and, with `collapse`, every measure of NeuralCollapse on a split, in eval mode.

    One forward pass serves them all; each rank takes its share of the images, and all return the same.
    """
    clock = clock or Clock()
    device = split.target.device
    metric = NeuralCollapse(model.num_classes, model.head_hidden_size, classifier=model.head).to(device)
    training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=float64_device(device))  # correct, loss
    now = time.perf_counter()
    for images, target in of_rank(split, ranks).in_batches(BATCH):
        logits, features = model(images, with_features=True)
        sums[0] += (logits.argmax(1) == target).sum().to(sums.device)
        sums[1] += F.cross_entropy(in_float64(logits), target.to(sums.device), reduction="sum")
        now = clock.add("measure_forward", now)
        if collapse:
            metric.update(features, target)
            now = clock.add("measure_collapse", now)
    correct, loss = ranks.sum(sums).tolist()
    result = {"accuracy": correct / len(split), "loss": loss / len(split)}
    if collapse:
        result |= {name: _number(value) for name, value in metric.compute().items()}
        clock.add("measure_collapse", now)
    model.train(training)
    return result


def measure_names() -> tuple[str, ...]:
    """What `measure` gives, by name."""
    metric = NeuralCollapse(2, 2, classifier=torch.nn.Linear(2, 2))
    metric.update(torch.eye(2), torch.arange(2))
    return ("accuracy", "loss", *metric.compute())


def measure_all(
    model: Classifier, data: Dataset, *, ranks: Ranks = ALONE, clock: Clock | None = None
) -> dict[str, Any]:
    """`measure` on the whole of each part, and the certificate: what a run reports at the onset and at its end."""
    return {
        "certificate": certificate(model, data.train),
        "train": measure(model, data.train, ranks=ranks, clock=clock),
        "val": measure(model, data.val, ranks=ranks, clock=clock, collapse=False),
        "test": measure(model, data.test, ranks=ranks, clock=clock),
    }


def _number(value: Tensor) -> float:
    return math.nan if value.numel() != 1 else float(value)
