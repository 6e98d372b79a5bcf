"""The inner schedule of the fitting phase: torch's, timm's or none, driven alike."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Protocol, runtime_checkable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from ncreg._checks import check_numbers, described
from ncreg.tpt._terminal import note_scaled, part_rates, scale_once, scale_rate


@runtime_checkable
class TimmSchedule(Protocol):
    """What a timm scheduler can do (`timm.scheduler.scheduler.Scheduler`)."""

    optimizer: Optimizer

    def step(self, epoch: int, metric: float | None = None) -> None: ...  # noqa: D102

    def step_update(self, num_updates: int, metric: float | None = None) -> None: ...  # noqa: D102

    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...  # noqa: D102


class InnerSchedule:
    """One way to drive every schedule: `step` once an epoch, `step_update` once an update, all state kept.

    It drives the `driven` parameter groups that the optimizer had when the schedule was built. A group's `lr_scale`
    multiplies its rate: timm's schedules do so themselves, for torch's and for none it is done here.
    """

    def __init__(
        self,
        schedule: LRScheduler | TimmSchedule | None,
        optimizer: Optimizer,
        interval: Literal["epoch", "update"],
    ) -> None:
        if not isinstance(getattr(optimizer, "param_groups", None), list):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {described(optimizer)}")
        self.optimizer, self.schedule, self.interval = optimizer, schedule, interval
        self.driven = len(optimizer.param_groups)
        self.updated = False  # not kept: whether step_update has been called
        self._check(schedule, optimizer)
        part_rates(optimizer.param_groups)
        if schedule is None or isinstance(schedule, LRScheduler):
            scale_once(optimizer.param_groups)
        self.remember()

    def _check(self, schedule: Any, optimizer: Optimizer) -> None:
        if schedule is None:
            return
        if not isinstance(schedule, LRScheduler | TimmSchedule):
            raise TypeError(
                "schedule must be a torch.optim.lr_scheduler or timm.scheduler schedule on this optimizer, or None, "
                f"got {described(schedule)}"
            )
        if getattr(schedule, "optimizer", None) is not optimizer:
            raise ValueError("schedule drives another optimizer: build it on the optimizer given here")
        plateau = getattr(schedule, "lr_scheduler", schedule)  # timm's wraps torch's
        if isinstance(plateau, ReduceLROnPlateau) and plateau.mode != "max":
            name = type(schedule).__name__
            raise ValueError(f"schedule={name}(mode='min'): it sees the training accuracy; use mode='max'")
        if isinstance(schedule, ReduceLROnPlateau) and self.interval == "update":
            raise ValueError(
                "schedule=ReduceLROnPlateau with interval='update' would never be stepped: it judges the training "
                "accuracy, which comes once an epoch; use interval='epoch'"
            )

    @property
    def waits_for_updates(self) -> bool:
        """Whether the schedule moves with updates alone, of which none has been told."""
        by_update = self.interval == "update" if isinstance(self.schedule, LRScheduler) else self._timm_by_update
        return by_update and not self.updated

    @property
    def _timm_by_update(self) -> bool:
        return getattr(self.schedule, "t_in_epochs", True) is False

    def step(self, epoch: int, metric: float | None) -> None:
        """At the end of an epoch."""
        if isinstance(self.schedule, LRScheduler):
            if self.interval == "epoch":
                self._step_torch(self.schedule, metric)
        elif self.schedule is not None:
            with self._driven_groups():
                self.schedule.step(epoch, metric)
        self.remember()

    def step_update(self, num_updates: int, metric: float | None) -> None:
        """After an optimizer step."""
        self.updated = True
        if isinstance(self.schedule, LRScheduler):
            if self.interval == "update":
                self._step_torch(self.schedule, None)
        elif self.schedule is not None:
            with self._driven_groups():
                self.schedule.step_update(num_updates, metric)
        self.remember()

    def remember(self) -> None:
        """Note the rates in force, which have their scale: another TPTScheduler must not scale them again."""
        note_scaled(self.optimizer.param_groups)

    def _step_torch(self, schedule: LRScheduler, metric: float | None) -> None:
        if isinstance(schedule, ReduceLROnPlateau) and metric is None:
            return
        with self._driven_groups():
            self._scale(inverse=True)  # the schedule may compute a rate from the one before it
            if isinstance(schedule, ReduceLROnPlateau):
                schedule.step(metric)  # type: ignore[arg-type]
            else:
                _step_unless_ended(schedule)
            self._scale()

    def _scale(self, inverse: bool = False) -> None:
        for group in self.optimizer.param_groups:
            scale_rate(group, inverse)

    @contextmanager
    def _driven_groups(self) -> Iterator[None]:
        """Hide groups that were added later: torch's schedules would fail at them."""
        groups = self.optimizer.param_groups
        if len(groups) == self.driven:
            yield
            return
        self.optimizer.param_groups = groups[: self.driven]
        try:
            yield
        finally:
            self.optimizer.param_groups = groups

    def restore_momentum(self) -> None:
        """Where the schedule cycles momentum (or β₁): the optimizer's own value again, that of its constructor."""
        defaults = getattr(self.optimizer, "defaults", {})
        if not _cycles_momentum(self.schedule):
            return
        for group in self.optimizer.param_groups[: self.driven]:
            if "betas" in group and "betas" in defaults:
                _set_momentum(group, defaults["betas"][0])
            elif "momentum" in group and "momentum" in defaults:
                _set_momentum(group, defaults["momentum"])

    def state_dict(self) -> dict[str, Any] | None:
        """All state, also the patience that timm's plateau schedule leaves out; None without a schedule."""
        if self.schedule is None:
            return None
        state: dict[str, Any] = {
            "kind": type(self.schedule).__name__,
            "schedule": dict(self.schedule.state_dict()),
        }
        wrapped = getattr(self.schedule, "lr_scheduler", None)
        if isinstance(wrapped, LRScheduler):
            state["wrapped"] = wrapped.state_dict()
        if _cycles_momentum(self.schedule):  # which the constructor of another such schedule sets to its own start
            state["momentum"] = [_momentum(group) for group in self.optimizer.param_groups[: self.driven]]
        return state

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on where `state_dict` was taken."""
        if (state is None) != (self.schedule is None):
            was, now = ("no", "one") if state is None else ("one", "no")
            raise ValueError(f"state was taken with {was} inner schedule, this scheduler has {now}: build it alike")
        if state is None or self.schedule is None:
            return
        if not isinstance(state, Mapping):
            raise TypeError(f"state of the inner schedule must be a dict, not {described(state)}")
        taken, here = state.get("kind"), type(self.schedule).__name__
        if taken is not None and taken != here:
            raise ValueError(
                f"state was taken with the inner schedule {taken}, this scheduler has {here}: build it alike"
            )
        if "schedule" not in state:
            raise ValueError("state of the inner schedule lacks schedule: it is not a TPTScheduler's")
        momenta = check_numbers("momentum", state.get("momentum", []))  # states of earlier versions lack it
        state = copy.deepcopy(state)  # torch's CyclicLR takes entries out of what it is given
        self.schedule.load_state_dict(state["schedule"])
        if "wrapped" in state:
            self.schedule.lr_scheduler.load_state_dict(state["wrapped"])  # type: ignore[union-attr]
        for group, value in zip(self.optimizer.param_groups, momenta, strict=False):  # later groups are not cycled
            _set_momentum(group, value)


def _momentum(group: dict[str, Any]) -> float:
    """Momentum or β₁ of a parameter group."""
    return float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0))


def _set_momentum(group: dict[str, Any], value: float) -> None:
    if "betas" in group:
        group["betas"] = (value, *group["betas"][1:])
    elif "momentum" in group:
        group["momentum"] = value


def _cycles_momentum(schedule: Any) -> bool:
    """Whether a torch schedule, or a member of it, drives momentum too (OneCycleLR, CyclicLR)."""
    if getattr(schedule, "cycle_momentum", False):
        return True
    return any(_cycles_momentum(member) for member in getattr(schedule, "_schedulers", ()))


def _step_unless_ended(schedule: LRScheduler) -> None:
    """Step a torch schedule that has not ended; of a chain the members that have not."""
    if isinstance(schedule, ChainedScheduler):
        for member in schedule._schedulers:
            _step_unless_ended(member)
        schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]
        return
    end = _length(schedule)
    if end is None or schedule.last_epoch < end:  # counted by the schedule itself, which may have begun at another step
        schedule.step()


def _length(schedule: LRScheduler) -> int | None:
    """Steps after which a torch schedule has ended: it holds its rate from there on, or misbehaves."""
    if isinstance(schedule, CosineAnnealingLR):
        return int(schedule.T_max)
    if isinstance(schedule, ConstantLR | LinearLR | PolynomialLR):
        return int(schedule.total_iters)
    if isinstance(schedule, ChainedScheduler):
        ends = [_length(member) for member in schedule._schedulers]
        return None if None in ends else max(end for end in ends if end is not None)
    if isinstance(schedule, OneCycleLR):
        return int(schedule.total_steps) - 1
    if isinstance(schedule, SequentialLR):
        last = _length(schedule._schedulers[-1])
        return None if last is None else int(schedule._milestones[-1]) + last
    return None
