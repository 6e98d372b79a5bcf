"""The state of a training run: everything that a checkpoint holds and that a resumed run restores bit for bit."""

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
from recipes.core.distributed import Ranks
from recipes.core.errors import UserError
from recipes.training.loss_terms import Term
from recipes.training.metrics import Clock


@dataclass
class TrainState:
    """The state of a training run.

    Attributes:
        ema: moving average of the weights, or None.
        losses: of the steps taken in the current epoch; their number is the position in its batch order.
        history: one record for each finished epoch.
        at_onset: what was measured at zero error; None before.
        latest: the loss terms of the last step by name; no checkpoint holds them.
    """

    model: Classifier
    terms: list[Term]
    optimizer: Optimizer
    scheduler: TPTScheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None = None
    ranks: Ranks = Ranks()
    clock: Clock = field(default_factory=Clock)
    losses: list[Tensor] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    at_onset: dict[str, Any] | None = None
    latest: dict[str, Tensor] = field(default_factory=dict)

    @property
    def epoch(self) -> int:
        """The epoch in progress, counted from 1."""
        return self.scheduler.epoch + 1

    def capture(self) -> dict[str, Any]:
        """The state as a checkpoint can hold it."""
        return {
            "epoch": self.scheduler.epoch,
            "taken": self.ranks.gather([float(loss) for loss in self.losses]),
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
        """Set the state to what `capture` returned.

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
        like = next(self.model.parameters())
        same_size = len(state["random"]) == self.ranks.size  # a run may be resumed by another number of ranks
        losses = state["taken"][self.ranks.rank if same_size else 0]
        self.losses = [torch.tensor(loss, device=like.device, dtype=like.dtype) for loss in losses]
        self.history, self.at_onset = list(state["history"]), state["at_onset"]
        self.clock = Clock(dict(state["seconds"]))
        if same_size:
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
