"""The epochs of a run: steps of the optimizer, the measures after them, checkpoints between."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ncreg.heads import NearestETFHead
from ncreg.models import Classifier
from ncreg.numerics import in_float64
from recipes.core.config import TrainConfig, as_yaml
from recipes.core.errors import UserError
from recipes.core.interrupt import Stopped, StopRequest
from recipes.data.augment import Batch, batches
from recipes.data.load import Dataset
from recipes.data.split import Split
from recipes.training.adversarial import Adversary
from recipes.training.build import autocast, build_args, class_vectors, freeze, full, watched
from recipes.training.metrics import measure, measure_all
from recipes.training.reporting import epoch_record
from recipes.training.run_dir import RunDir
from recipes.training.state import TrainState


class Loop:
    """The epochs of a run."""

    def __init__(
        self, config: TrainConfig, data: Dataset, state: TrainState, run: RunDir, stop: StopRequest, steps: int
    ) -> None:
        self.config, self.data, self.state, self.run, self.stop, self.steps = config, data, state, run, stop, steps
        self.device = next(state.model.parameters()).device
        self.adversary = Adversary(config, state.model, state.ranks)
        self.wrapped = self._wrapped()
        self.began = time.perf_counter()  # with the training of the epoch in progress
        self.about = {
            "config": as_yaml(config),
            "build": build_args(config, data),
            "class_names": list(data.class_names),
            "image_shape": list(data.train.images.shape[1:]),
        }

    def epoch(self, bar: tqdm) -> dict[str, Any]:
        """Train for the rest of the epoch in progress; its number, phase, ramp and learning rate."""
        config, state, scheduler = self.config, self.state, self.state.scheduler
        epoch, self.began = state.epoch, time.perf_counter()
        planned = {"epoch": epoch, "phase": scheduler.phase, "ramp": scheduler.ramp, "lr": max(scheduler.get_last_lr())}
        weights = {term.name: term.weight(scheduler.ramp) for term in state.terms}
        state.model.train()
        if config.model.freeze_epochs and epoch <= config.model.freeze_epochs + 1:  # frozen, or free from now on
            freeze(state.model, state.optimizer, epoch <= config.model.freeze_epochs)
            self.wrapped = self._wrapped()
        for batch in self._batches():
            if self.adversary.acts(scheduler.phase):
                batch = self.adversary(batch, epoch=epoch, step=len(state.taken))
            self.step(batch, weights)
            bar.update()
            self._look_up()
        state.clock.add("train", self.began)
        return planned

    def step(self, batch: Batch, weights: Mapping[str, float]) -> None:
        """One step of the optimizer, and of all that moves with it."""
        config, state = self.config, self.state
        state.optimizer.zero_grad(set_to_none=True)
        loss, features = descend(batch, self.wrapped, state, weights, config)
        state.taken.append(loss)
        if self._looks_up:
            refuse_non_finite(state, self.steps, self.run)
        if config.optim.clip is not None:
            state.scaler.unscale_(state.optimizer)
            torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.optim.clip)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if isinstance(state.model.head, NearestETFHead):
            state.model.head.update(features, batch.labels)
        if state.ema is not None:
            state.ema.update(state.model)
        state.scheduler.step_update((state.epoch - 1) * self.steps + len(state.taken))

    def measure_epoch(self, planned: Mapping[str, Any], subset: Split) -> tuple[dict[str, Any], list[str]]:
        """Measure, and tell the scheduler; the epoch's entry, and the further checkpoints that it deserves."""
        config, state, scheduler = self.config, self.state, self.state.scheduler
        on_validation = partial(measure, split=self.data.val, ranks=state.ranks, clock=state.clock, collapse=False)
        state.ranks.broadcast_buffers(state.model)
        values = measured(state.model, subset, state, self.run)
        val = on_validation(state.model)
        scheduler.step(planned["epoch"], values["accuracy"], watched(values, config.tpt))
        loss = float(state.ranks.sum(in_float64(torch.stack(state.taken)).mean())) / state.ranks.size
        entry = epoch_record({**planned, "loss": loss}, values, val, state.model.num_classes)
        if state.ema is not None:
            state.ranks.broadcast_buffers(state.ema.module)
            entry["ema"] = on_validation(state.ema.module)
        copies = []
        if val["accuracy"] > max((old["val_accuracy"] for old in state.history), default=-1.0):
            copies.append("best")
        if scheduler.onset_epoch == planned["epoch"]:
            state.at_onset = measure_all(state.model, self.data, ranks=state.ranks, clock=state.clock)
            copies.append("onset")
        return entry, copies

    def save(self, *copies: str) -> None:
        """A checkpoint of everything."""
        self.run.save(self.about | self.state.capture(), *copies)

    def _wrapped(self) -> nn.Module:
        return self.state.ranks.wrap(self.state.model, self.device, compiled=self.config.compile)

    def _batches(self) -> Iterator[Batch]:
        """The batches of the epoch that are still to come."""
        config, state, train = self.config, self.state, self.data.train
        turn = order(config.seed, state.epoch, len(train))[: self.steps * config.data.batch_size]
        return batches(
            train,
            turn.view(self.steps, -1),
            config.augment,
            ranks=state.ranks,
            dtype=next(state.model.parameters()).dtype,
            seed=config.seed,
            epoch=state.epoch,
            done=len(state.taken),
            num_classes=state.model.num_classes,
        )

    @property
    def _looks_up(self) -> bool:
        """Whether the host waits for the step just taken; a GPU is not waited for at every one."""
        done = len(self.state.taken)
        return self.device.type == "cpu" or done % 50 == 0 or done == self.steps

    def _look_up(self) -> None:
        """Save and stop, if that was asked of any rank."""
        if self._looks_up and self.state.ranks.any(self.stop.requested, self.device):
            self.state.clock.add("train", self.began)
            self.save()
            at = f"step {len(self.state.taken)} of epoch {self.state.epoch}"
            raise Stopped(f"stopped at {at}; go on with --resume {self.run.path}")


def descend(
    batch: Batch, wrapped: nn.Module, state: TrainState, weights: Mapping[str, float], config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """Forward, losses and backward of a batch, in as many parts as asked for; its loss, and its features."""
    count, ranks, device = config.optim.accumulate, state.ranks, batch.images.device
    reads_weight = any("weight" in term.consumes for term in state.terms)
    # DDP waits for the gradient of every parameter: a learned head whose logits no loss reads gets one of 0.
    learned = any(p.requires_grad for p in state.model.head.parameters())
    unread = learned and not any("logits" in term.consumes for term in state.terms if weights[term.name])
    total, seen = torch.zeros((), device=device), []
    for number, part in enumerate(batch.chunks(count), start=1):
        with ranks.no_sync_unless_last(wrapped, number == count):
            with autocast(config, device):
                logits, features = wrapped(part.images, with_features=True)
            available = {"logits": full(logits), "features": full(features), "target": part.target}
            if reads_weight:
                available["weight"] = class_vectors(state.model)
            losses = {term.name: term(available) for term in state.terms if weights[term.name]}
            loss = torch.stack([weights[name] * value for name, value in losses.items()]).sum() / count
            if unread:
                loss = loss + 0 * available["logits"].sum()
            state.scaler.scale(loss).backward()
        total = total + loss.detach()
        seen.append(available["features"].detach())
    return total, torch.cat(seen)


def order(seed: int, epoch: int, count: int) -> Tensor:
    """The batch order of an epoch: a function of seed and epoch alone, so that recipes and resumed runs share it."""
    drawn = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]) >> 1
    return torch.randperm(count, generator=torch.Generator().manual_seed(drawn))


def measured(model: Classifier, subset: Split, state: TrainState, run: RunDir) -> dict[str, float]:
    """The measures of an epoch; a model that its last step has broken ends the run."""
    try:
        return measure(model, subset, ranks=state.ranks, clock=state.clock)
    except ValueError as error:
        raise UserError(
            f"epoch {state.epoch} left a model that is not finite ({error}); the last good checkpoint is "
            f"{run.checkpoint('last')}; lower --optim.lr"
        ) from None


def refuse_non_finite(state: TrainState, steps: int, run: RunDir) -> None:
    """Stop at the first loss of the epoch that is not finite; the last checkpoint is from before it."""
    finite = state.ranks.sum(torch.stack(state.taken[-50:])).isfinite()  # the same verdict on all ranks
    if finite.all():
        return
    first = len(state.taken) - len(finite) + int((~finite).nonzero()[0]) + 1
    value, whole = state.taken[first - 1].item(), (state.epoch - 1) * steps + first
    raise UserError(
        f"the loss is {value} at step {first} of epoch {state.epoch} (step {whole} of the run); the last good "
        f"checkpoint is {run.checkpoint('last')}; lower --optim.lr"
    )
