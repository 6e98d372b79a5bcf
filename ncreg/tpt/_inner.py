"""The inner schedule of the fitting phase: torch's, timm's or none, driven alike."""

from __future__ import annotations

from typing import Any, Literal, Protocol, runtime_checkable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR, ReduceLROnPlateau, SequentialLR


@runtime_checkable
class TimmSchedule(Protocol):
    """What a timm scheduler can do (`timm.scheduler.scheduler.Scheduler`)."""

    optimizer: Optimizer

    def step(self, epoch: int, metric: float | None = None) -> None: ...  # noqa: D102

    def step_update(self, num_updates: int, metric: float | None = None) -> None: ...  # noqa: D102

    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...  # noqa: D102


class InnerSchedule:
    """One way to drive every schedule: `step` once an epoch, `step_update` once an update, all state kept."""

    def __init__(
        self,
        schedule: LRScheduler | TimmSchedule | None,
        optimizer: Optimizer,
        interval: Literal["epoch", "update"],
    ) -> None:
        self.schedule, self.interval, self.steps = schedule, interval, 0
        if schedule is None:
            return
        if not isinstance(schedule, LRScheduler | TimmSchedule):
            name = type(schedule).__name__
            raise TypeError(f"schedule={name}: a torch.optim.lr_scheduler or timm.scheduler schedule, or None")
        if getattr(schedule, "optimizer", None) is not optimizer:
            raise ValueError("schedule drives another optimizer: build it on the optimizer given here")
        if isinstance(schedule, ReduceLROnPlateau) and schedule.mode != "max":
            raise ValueError("schedule=ReduceLROnPlateau(mode='min'): it sees the training accuracy; use mode='max'")

    def step(self, epoch: int, metric: float | None) -> None:
        """At the end of an epoch."""
        if isinstance(self.schedule, LRScheduler):
            if self.interval == "epoch":
                self._step_torch(self.schedule, metric)
        elif self.schedule is not None:
            self.schedule.step(epoch, metric)

    def step_update(self, num_updates: int, metric: float | None) -> None:
        """After an optimizer step."""
        if isinstance(self.schedule, LRScheduler):
            if self.interval == "update":
                self._step_torch(self.schedule, None)
        elif self.schedule is not None:
            self.schedule.step_update(num_updates, metric)

    def _step_torch(self, schedule: LRScheduler, metric: float | None) -> None:
        if isinstance(schedule, ReduceLROnPlateau):
            if metric is not None:
                schedule.step(metric)
            return
        end = _length(schedule)
        if end is None or self.steps < end:
            schedule.step()
            self.steps += 1

    def state_dict(self) -> dict[str, Any] | None:
        """All state, also the patience that timm's plateau schedule leaves out; None without a schedule."""
        if self.schedule is None:
            return None
        state = {"schedule": dict(self.schedule.state_dict()), "steps": self.steps}
        wrapped = getattr(self.schedule, "lr_scheduler", None)
        return state | ({"wrapped": wrapped.state_dict()} if isinstance(wrapped, LRScheduler) else {})

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on where `state_dict` was taken."""
        if (state is None) != (self.schedule is None):
            was, now = ("no", "one") if state is None else ("one", "no")
            raise ValueError(f"state was taken with {was} inner schedule, this scheduler has {now}: build it alike")
        if state is None or self.schedule is None:
            return
        self.schedule.load_state_dict(state["schedule"])
        self.steps = state["steps"]
        if "wrapped" in state:
            self.schedule.lr_scheduler.load_state_dict(state["wrapped"])  # type: ignore[union-attr]


def _length(schedule: LRScheduler) -> int | None:
    """Steps after which a torch schedule has ended, where it has an end past which it misbehaves."""
    if isinstance(schedule, CosineAnnealingLR):
        return int(schedule.T_max)
    if isinstance(schedule, OneCycleLR):
        return int(schedule.total_steps) - 1
    if isinstance(schedule, SequentialLR):
        last = _length(schedule._schedulers[-1])
        return None if last is None else int(schedule._milestones[-1]) + last
    return None
