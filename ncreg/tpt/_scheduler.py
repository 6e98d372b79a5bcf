"""The terminal phase of training: find zero error, then train past it on purpose.

Papyan, Han & Donoho (PNAS 2020, arXiv 2008.08186) call what follows the epoch of (almost) zero training error the
terminal phase of training (TPT); it is there that features collapse. `TPTScheduler` wraps any learning-rate schedule,
watches the training accuracy, and when zero error is found swaps the schedule for one that fits the time that is left.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ncreg._checks import check_integer, check_number, described
from ncreg.tpt._inner import InnerSchedule, TimmSchedule
from ncreg.tpt._settings import checked_accuracy, checked_progress, checked_settings, with_min_terminal
from ncreg.tpt._terminal import Terminal, join, part_rates, rate_factor, scale_rate, set_rate, starting_rates

Phase = Literal["fitting", "terminal", "finished"]

STILL = 0.01
"""A watched measure stands still unless it falls by this fraction of its least value so far."""

_HYPERPARAMETERS = (
    "max_epochs",
    "threshold",
    "patience",
    "extend",
    "min_terminal",
    "max_terminal",
    "terminal",
    "terminal_lr",
    "ramp_epochs",
    "stop_patience",
    "interval",
)
_PROGRESS = (
    "epoch",
    "onset_epoch",
    "last_epoch",
    "regressions",
    "_streak",
    "_peaks",
    "_starts",
    "_least",
    "_still",
)


class TPTScheduler:
    """Find zero training error (the onset), then train `extend` times as long again.

    Three phases: **fitting**, in which the inner `schedule` drives the learning rate; **terminal**, from the onset on,
    with a rate curve of its own; **finished**. The onset is the last of `patience` epochs in a row with a metric at or
    above `threshold`; it is latched: a later fall is recorded in `regressions` and not acted on. With T the length of
    the terminal phase and t the epochs since the onset,

        T = min(clamp(round(extend * onset_epoch), min_terminal, max_terminal), max_epochs - onset_epoch)
        cosine:   rate = start * (1 + cos(pi * t / T)) / 2
        constant: rate = start
        step:     rate = start, start / 10, start / 100, a third of T each

    where `start` is `terminal_lr`, or the rate at the onset, but at least `FLOOR` (1 %) of the peak rate, because an
    inner schedule may have annealed to nothing by then. Parameter groups keep the ratios of their peak rates. If zero
    error never comes, the run finishes at `max_epochs` with `onset_epoch` None. An inner schedule that ends before the
    onset keeps its last rate (torch's CosineAnnealingLR would climb again, OneCycleLR would raise). Where it cycles
    momentum (OneCycleLR, CyclicLR), the terminal phase has the value that the optimizer was built with.

    A schedule that has come to rate 0 before the onset is warned of once, for nothing is learned any more; so is a loop
    that goes on when the run is finished: the rates stay where they are, 0 after a cosine.

    A group's `lr_scale` (timm's layer decay, `param_groups`) multiplies its rate under every schedule and none, once:
    the rates that another TPTScheduler or a schedule of timm left on the same optimizer have it, also where its state
    alone is loaded. A group that is added after the onset (late unfreezing) keeps the ratio to the other rates that it
    then has; one added before keeps its rate until the onset, because the inner schedule does not know it: a warning
    says so.

    The protocol is that of timm's schedulers: `step(epoch, metric)` at the end of each epoch (`epoch` counts the
    finished ones, the first call says 1), `step_update(num_updates)` after each optimizer step. The metric is the
    accuracy on clean **training** data in eval mode, in [0, 1]. timm's train.py passes per cent of validation accuracy,
    which is refused: `ncreg.integrations.timm` measures the training set there and drives this class by flags. In a
    distributed run pass the same, reduced metric on all ranks: every decision follows from it.

    Args:
        optimizer: the optimizer whose rates are set.
        schedule: any torch or timm learning-rate schedule on the same optimizer, or None for the constant rates that
            the optimizer has. A ReduceLROnPlateau sees the training accuracy, so it needs mode="max".
        max_epochs: bound of the whole run, in epochs.
        threshold: training accuracy in (0, 1] that counts as zero error. 0.999 as in the paper. An accuracy that was
            rounded to float32 reaches it too.
        patience: epochs in a row at or above the threshold.
        extend: length of the terminal phase in units of `onset_epoch`. None: only record the onset; the inner schedule
            runs on to `max_epochs`, which is the honest control for everything else: what shapes the terminal phase is
            then ignored, stop_patience too.
        min_terminal: least length of the terminal phase, epochs; None takes 10. Above max_epochs it is warned of.
        max_terminal: greatest length of the terminal phase, epochs; None for no bound but `max_epochs`.
        terminal: rate curve of the terminal phase.
        terminal_lr: rate at the start of the terminal phase, of the group with the greatest peak rate.
        ramp_epochs: epochs after the onset over which `ramp` rises linearly from 0 to 1; 0 for at once.
        stop_patience: end the terminal phase after so many epochs in a row in which the measure handed to `step` as
            `watch` did not fall by `STILL` (1 %) below its least value so far, but not before `min_terminal`;
            None for never. The rate curve is that of the full length.
        interval: when an inner *torch* schedule is stepped: each "epoch", or each "update" (OneCycleLR). timm's
            schedules know it themselves.

    Attributes:
        phase: "fitting", "terminal" or "finished".
        onset_epoch: the epoch of the onset, counted from 1; None so far.
        last_epoch: the planned end, known from the onset on; None so far.
        ramp: 0 while fitting, then min(1, t / ramp_epochs): the weight of what belongs to the terminal phase.
        regressions: epochs after the onset whose metric fell below the threshold.

    Raises:
        ValueError: a hyperparameter or a metric out of range, an epoch out of order, a schedule of another optimizer,
            parameter groups that were taken from the optimizer.
        TypeError: a schedule that is neither torch's nor timm's.

    Source: Papyan, Han & Donoho 2020, arXiv 2008.08186 (the phase, its threshold); the extension rule is ours.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> scheduler = TPTScheduler(optimizer, max_epochs=100, extend=2.0, min_terminal=1, terminal="constant")
        >>> accuracy = {1: 0.6, 2: 0.98, 3: 1.0}
        >>> epoch = 0
        >>> while not scheduler.finished:
        ...     epoch += 1  # train one epoch here
        ...     scheduler.step(epoch, accuracy.get(epoch, 1.0))
        >>> scheduler.onset_epoch, scheduler.last_epoch, epoch
        (3, 9, 9)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: LRScheduler | TimmSchedule | None = None,
        *,
        max_epochs: int,
        threshold: float = 0.999,
        patience: int = 1,
        extend: float | None = 1.0,
        min_terminal: int | None = None,
        max_terminal: int | None = None,
        terminal: Terminal = "cosine",
        terminal_lr: float | None = None,
        ramp_epochs: int = 5,
        stop_patience: int | None = None,
        interval: Literal["epoch", "update"] = "epoch",
    ) -> None:
        self.optimizer = optimizer
        self.max_epochs, self.threshold, self.patience = max_epochs, threshold, patience
        self.extend, self.max_terminal = extend, max_terminal
        self.min_terminal = with_min_terminal(min_terminal, max_epochs)
        self.terminal, self.terminal_lr, self.ramp_epochs = terminal, terminal_lr, ramp_epochs
        self.stop_patience, self.interval = stop_patience, interval
        self._set(checked_settings({name: getattr(self, name) for name in _HYPERPARAMETERS}))
        self._inner = InnerSchedule(schedule, optimizer, interval)

        self.epoch = 0
        self.onset_epoch: int | None = None
        self.last_epoch: int | None = None
        self.regressions: list[int] = []
        self._streak = 0
        self._peaks = self.get_last_lr()
        self._starts: list[float] = []
        self._least, self._still = math.inf, 0
        self._measured = self._warned = self._past_the_end = False

    # what a training loop reads

    @property
    def phase(self) -> Phase:
        """Where the run stands after the last `step`."""
        if self.epoch >= (self.max_epochs if self.last_epoch is None else self.last_epoch):
            return "finished"
        return "fitting" if self.onset_epoch is None else "terminal"

    @property
    def finished(self) -> bool:
        """True when the run has come to its end."""
        return self.phase == "finished"

    @property
    def ramp(self) -> float:
        """Weight in [0, 1] of what belongs to the terminal phase, for the coming epoch."""
        if self.onset_epoch is None:
            return 0.0
        return min(1.0, (self.epoch - self.onset_epoch) / self.ramp_epochs) if self.ramp_epochs else 1.0

    def get_last_lr(self) -> list[float]:
        """The rate of each parameter group now in force."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    # what a training loop calls

    def step(self, epoch: int, metric: float | None = None, watch: float | None = None) -> None:
        """Close an epoch: judge the metric, set the rates of the next epoch.

        Args:
            epoch: finished epochs, counted from 1, one call each. The same epoch again without a metric (timm's loop
                does that on resume) sets the rates again and nothing else.
            metric: clean training accuracy in [0, 1]; None where it was not measured (the epoch then neither counts
                for `patience` nor breaks it; a run that ends without any is warned).
            watch: the measure that `stop_patience` looks at, one that falls with collapse such as NC1; NaN counts as
                no fall, None as not measured. Ignored while fitting.
        """
        epoch = check_integer("epoch", epoch, 0)
        if epoch == self.epoch and metric is None:
            self._take_in_new_groups()
            self._set_terminal_rates()
            return
        if epoch != self.epoch + 1:
            raise ValueError(
                f"epoch={epoch} after epoch {self.epoch}: step() closes one epoch after the other, counted from 1; "
                "to go on with an earlier run use load_state_dict()"
            )
        self._take_in_new_groups()
        metric = None if metric is None else checked_accuracy(metric)
        if self.finished:
            self._warn_past_the_end(epoch)
        watch = None if watch is None else check_number("watch", watch)
        self.epoch = epoch
        self._track_peaks()
        if self._schedule_drives:
            self._warn_without_updates()
        self._judge(metric)
        self._watch(watch)
        if self._schedule_drives:
            self._inner.step(epoch, metric)
        else:
            self._set_terminal_rates()
        self._warn_at_rest()
        if self.finished and not self._measured and self.extend is not None:
            warnings.warn(
                f"{epoch} epochs without a metric: no terminal phase could begin; hand in the clean training accuracy, "
                "step(epoch, accuracy)",
                UserWarning,
                stacklevel=2,
            )

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        """After an optimizer step: let an inner schedule that counts updates follow (`num_updates` so far)."""
        self._take_in_new_groups()
        if self._schedule_drives:
            self._inner.step_update(num_updates, metric)
            self._track_peaks()

    def state_dict(self) -> dict[str, Any]:
        """Everything that steers the rest of the run: hyperparameters, progress, rates, the inner schedule."""
        self._take_in_new_groups()
        state = {name: getattr(self, name) for name in (*_HYPERPARAMETERS, *_PROGRESS)}
        state |= {name: list(state[name]) for name in ("regressions", "_peaks", "_starts")}
        return state | {"lr": self.get_last_lr(), "schedule": self._inner.state_dict(), "driven": self._inner.driven}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken, hyperparameters and rates included.

        Raises:
            ValueError: missing keys, a hyperparameter out of range, another number of parameter groups, a schedule
                where there was none.
            TypeError: no number where one belongs.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be what state_dict() gave, not {described(state)}")
        missing = [name for name in (*_HYPERPARAMETERS, *_PROGRESS, "lr", "schedule") if name not in state]
        if missing:
            raise ValueError(f"state lacks {', '.join(missing)}: it is not the state of a TPTScheduler")
        settings = checked_settings({name: state[name] for name in _HYPERPARAMETERS})
        progress = checked_progress({name: state[name] for name in (*_PROGRESS, "lr")})
        rates, groups = progress.pop("lr"), self.optimizer.param_groups
        if len(rates) != len(groups):
            raise ValueError(
                f"state has {len(rates)} parameter groups, the optimizer has {len(groups)}: give it the same groups "
                "(optimizer.add_param_group) before the state is loaded"
            )
        driven = check_integer("driven", state.get("driven", len(groups)), 0, len(groups))  # older states lack it
        self._inner.load_state_dict(state["schedule"])
        self._set(settings | progress)
        self._measured = self.epoch > 0  # not kept; a run that is gone on with is not warned
        self._inner.interval, self._inner.driven = self.interval, driven
        if not self._schedule_drives:
            self._inner.restore_momentum()
        part_rates(groups)
        for group, rate in zip(groups, rates, strict=True):
            set_rate(group, rate)
        self._inner.remember()

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in _HYPERPARAMETERS)
        inner = None if self._inner.schedule is None else type(self._inner.schedule).__name__
        return f"TPTScheduler(schedule={inner}, {shown}, epoch={self.epoch}, phase={self.phase!r})"

    # inside

    @property
    def _schedule_drives(self) -> bool:
        return self.onset_epoch is None or self.extend is None

    def _judge(self, metric: float | None) -> None:
        """Latch the onset, or record a regression."""
        if metric is None:
            return
        self._measured = True
        reached = metric >= min(self.threshold, float(np.float32(self.threshold)))
        if self.onset_epoch is not None:
            if not reached:
                self.regressions.append(self.epoch)
            return
        self._streak = self._streak + 1 if reached else 0
        if self._streak < self.patience:
            return
        self.onset_epoch = self.epoch
        if self.extend is None:
            self.last_epoch = self.max_epochs
            return
        length = max(round(self.extend * self.epoch), self.min_terminal)
        length = length if self.max_terminal is None else min(length, self.max_terminal)
        self.last_epoch = min(self.epoch + length, self.max_epochs)
        self._starts = starting_rates(self.get_last_lr(), self._peaks, self.terminal_lr)
        self._inner.restore_momentum()

    def _watch(self, value: float | None) -> None:
        """Bring the end forward where the watched measure has come to a standstill."""
        if value is None or self.stop_patience is None or self.onset_epoch is None or self.extend is None:
            return
        if value < (self._least if math.isinf(self._least) else self._least - STILL * abs(self._least)):
            self._least, self._still = value, 0
        else:
            self._still += 1
        if self._still >= self.stop_patience and self.epoch - self.onset_epoch >= self.min_terminal:
            self.last_epoch = self.epoch

    def _set_terminal_rates(self) -> None:
        if self.onset_epoch is None or self.last_epoch is None or self.extend is None:
            return
        length = self.last_epoch - self.onset_epoch
        progress = min(1.0, (self.epoch - self.onset_epoch) / length) if length else 1.0
        factor = rate_factor(self.terminal, progress)
        for group, start in zip(self.optimizer.param_groups, self._starts, strict=True):
            set_rate(group, start * factor)
        self._inner.remember()

    def _warn_at_rest(self) -> None:
        """Say once that the inner schedule has come to rate 0 while the onset is still looked for."""
        if self.phase == "fitting" and any(self._peaks) and not any(self.get_last_lr()) and not self._warned:
            self._warned = True
            warnings.warn(
                f"the schedule has come to rate 0 after epoch {self.epoch} of at most {self.max_epochs}, before "
                f"accuracy {self.threshold:g} of the training set: nothing is learned any more; let the schedule end "
                "above 0 (eta_min, lr_min, timm's --min-lr) or later, or lower the threshold",
                UserWarning,
                stacklevel=3,
            )

    def _warn_past_the_end(self, epoch: int) -> None:
        """Say once that the loop goes on after the run has come to its end."""
        if not self._past_the_end:
            self._past_the_end = True
            warnings.warn(
                f"epoch {epoch} comes after the end of the run, epoch {self.epoch} of at most {self.max_epochs}: rates "
                f"stay at {', '.join(f'{rate:.4g}' for rate in self.get_last_lr())}; end the loop with `while not "
                "scheduler.finished`, or give a greater max_epochs, extend or min_terminal",
                UserWarning,
                stacklevel=3,
            )

    def _warn_without_updates(self) -> None:
        """Say once that a schedule that counts updates is told of none."""
        if self._inner.waits_for_updates:
            self._inner.updated = True
            warnings.warn(
                f"the inner schedule {type(self._inner.schedule).__name__} counts updates, but epoch {self.epoch} "
                "ended without a step_update(): the rate stays where it is; call step_update(num_updates) after each "
                "optimizer step, or let the schedule count epochs (interval='epoch', timm's t_in_epochs=True)",
                UserWarning,
                stacklevel=3,
            )

    def _take_in_new_groups(self) -> None:
        """Groups that were added to the optimizer since the last call.

        Raises:
            ValueError: there are fewer than before.
        """
        if len(self._peaks) > len(self.optimizer.param_groups):
            raise ValueError(
                f"the optimizer has {len(self.optimizer.param_groups)} parameter groups, the TPTScheduler knows "
                f"{len(self._peaks)}: which one is gone cannot be told; leave the groups and freeze their parameters "
                "(requires_grad_(False)), or build optimizer and scheduler anew"
            )
        if len(self._peaks) < len(self.optimizer.param_groups):
            part_rates(self.optimizer.param_groups)
        for place in range(len(self._peaks), len(self.optimizer.param_groups)):
            group = self.optimizer.param_groups[place]
            scale_rate(group)
            rate = float(group["lr"])
            if self._schedule_drives:
                self._peaks.append(rate)
                if self._inner.schedule is not None:
                    warnings.warn(
                        f"parameter group {place} was added after the inner schedule was built, which does not know "
                        f"it: it keeps its rate, {rate:.4g}, as long as that schedule drives the others",
                        UserWarning,
                        stacklevel=3,
                    )
            else:
                start, peak = join(self.get_last_lr(), self._starts, self._peaks, rate)
                self._starts.append(start)
                self._peaks.append(peak)

    def _track_peaks(self) -> None:
        """The greatest rate that each group has had while fitting."""
        if self.onset_epoch is None:
            self._peaks = [max(*pair) for pair in zip(self._peaks, self.get_last_lr(), strict=True)]

    def _set(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, value)
