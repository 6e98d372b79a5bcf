"""What steers the rest of a run, in one object that goes into a checkpoint and comes back from it bit for bit."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor
from torch.optim import Optimizer

from ncreg.models import Classifier
from ncreg.tpt import TPTScheduler
from recipes.core.config import TrainConfig
from recipes.core.distributed import Ranks
from recipes.core.errors import UserError
from recipes.data.load import Dataset
from recipes.training.build import build_model, build_optimizer, build_scheduler
from recipes.training.loss_terms import Term, build_terms, try_out
from recipes.training.metrics import Clock


@dataclass
class TrainState:
    """The moving parts of a run.

    Attributes:
        ema: the moving average of the weights, where one is kept.
        taken: losses of the steps done in the current epoch; their number is the position in its batch order.
        history: one entry for each finished epoch.
        at_onset: what was measured at zero error, once it has come.
    """

    model: Classifier
    terms: list[Term]
    optimizer: Optimizer
    scheduler: TPTScheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None = None
    ranks: Ranks = Ranks()
    clock: Clock = field(default_factory=Clock)
    taken: list[Tensor] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    at_onset: dict[str, Any] | None = None

    @property
    def epoch(self) -> int:
        """The epoch in progress, counted from 1."""
        return self.scheduler.epoch + 1

    def capture(self) -> dict[str, Any]:
        """Everything, as a checkpoint can hold it."""
        return {
            "epoch": self.scheduler.epoch,
            "taken": self.ranks.gather([float(loss) for loss in self.taken]),
            "history": self.history,
            "at_onset": self.at_onset,
            "seconds": self.clock.seconds,
            "model": self.model.state_dict(),
            "terms": {term.name: term.loss.state_dict() for term in self.terms},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "random": self.ranks.gather(random_state()),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `capture` was called.

        Raises:
            UserError: the checkpoint is of another model, loss or optimizer.
        """
        try:
            self._restore(state)
        except (RuntimeError, ValueError, KeyError, TypeError, IndexError) as error:
            reason = " ".join(f"{type(error).__name__} {error}".split())[:300]
            raise UserError(f"the checkpoint does not fit this run's configuration: {reason}") from None

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for term in self.terms:
            term.loss.load_state_dict(state["terms"][term.name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        device = next(self.model.parameters()).device
        alike = len(state["random"]) == self.ranks.size  # otherwise another number of ranks goes on with the run
        taken = state["taken"][self.ranks.rank if alike else 0]
        self.taken = [torch.tensor(loss, device=device) for loss in taken]
        self.history, self.at_onset = list(state["history"]), state["at_onset"]
        self.clock = Clock(dict(state["seconds"]))
        if alike:
            restore_random(state["random"][self.ranks.rank])


def random_state() -> dict[str, Any]:
    """The global generators of torch, numpy and Python, as plain values."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    keys = np.asarray(keys, dtype=np.uint32)
    version, internal, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(name), keys.tolist(), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), next_gauss],
    }


def restore_random(state: Mapping[str, Any]) -> None:
    """Set the global generators as `random_state` found them."""
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([item.cpu() for item in state["cuda"]])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, next_gauss = state["python"]
    random.setstate((version, tuple(internal), next_gauss))


def build_state(config: TrainConfig, data: Dataset, device: torch.device, ranks: Ranks) -> TrainState:
    """Model, losses, optimizer and schedule as a run begins."""
    model = build_model(config, data).to(device)
    counts, width = data.class_counts(), model.head_hidden_size
    terms = build_terms(config.loss, class_counts=counts, num_features=width, device=device)
    try_out(terms, model, soft=config.augment.softens)
    optimizer = build_optimizer(config.optim, model)
    scheduler = build_scheduler(config, optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
    ema = None if config.optim.ema is None else ModelEmaV3(model, decay=config.optim.ema)
    return TrainState(model, terms, optimizer, scheduler, scaler, ema, ranks)
