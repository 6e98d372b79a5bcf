"""TPTScheduler behind timm's scheduler protocol, with its state in the optimizer's."""

from __future__ import annotations

import logging
from typing import Any

import torch.distributed as dist

from ncreg.distributed import world_size
from ncreg.integrations._epochs import EpochCloser
from ncreg.integrations.timm._task import LossTerms
from ncreg.models import Classifier
from ncreg.tpt import TPTScheduler

STATE = "ncreg_terminal_phase"
"""Key in the optimizer's first parameter group: timm's checkpoints keep the optimizer's state and no scheduler's."""


_logger = logging.getLogger(__name__)


def _report(message: str, level: int = logging.INFO) -> None:
    """Log, on rank 0; the other processes, which have the same numbers, log for debugging."""
    _logger.log(logging.DEBUG if world_size() > 1 and dist.get_rank() > 0 else level, message)


class TerminalPhaseEnded(KeyboardInterrupt):
    """The run is over before the last of its epochs; train.py ends its loop on a KeyboardInterrupt, and tidies up."""


class TerminalPhaseSchedule:
    """What train.py calls: `step(epoch, metric)` after each epoch, `step_update(num_updates)` after each update.

    `step` takes no notice of the loop's metric, the *validation* accuracy in per cent, and measures the clean training
    set itself. train.py saves an epoch's checkpoint before it calls `step`: a checkpoint holds the weights of the
    epoch's end and a state of its beginning, and the epoch is closed when that is loaded.

    The run ends with an epoch that is saved, and when train.py has listed that epoch's results: `step` notes the end,
    and `stop_if_ended`, which is called before the first batch of the next epoch, raises.
    """

    def __init__(
        self,
        scheduler: TPTScheduler,
        inner: Any,
        closer: EpochCloser,
        classifier: Classifier,
        terms: LossTerms | None = None,
        updates_per_epoch: int = 0,
    ) -> None:
        self.scheduler, self.closer, self.classifier, self.terms = scheduler, closer, classifier, terms
        self.updates_per_epoch = updates_per_epoch
        self.ended = ""  # how, once it has
        self.t_in_epochs = bool(getattr(inner, "t_in_epochs", True))  # train.py shows it
        self.measured: dict[str, float] = {}
        self._updated = False
        scheduler._past_the_end = True  # an epoch past the end is on purpose here, and `_end` says so: no warning
        if (saved := self._group.get(STATE)) is not None:
            scheduler.load_state_dict(saved["scheduler"])
            if saved["updated"]:
                self._close(scheduler.epoch + 1)
        self._store()

    @property
    def _group(self) -> dict[str, Any]:
        return self.scheduler.optimizer.param_groups[0]

    def step(self, epoch: int, metric: float | None = None) -> None:
        """Close epoch `epoch`, counted from 1. An epoch that has been closed before only has its rates set again.

        Raises:
            ValueError: the scheduler's state is not that of the epoch before.
        """
        if epoch <= self.scheduler.epoch:
            self._refuse_closed_epochs(self._updated)
            self.scheduler.step(self.scheduler.epoch)
            return
        self._close(epoch)
        if self.scheduler.finished and epoch < self.scheduler.max_epochs:
            self._end(epoch, saved=metric is not None)

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        """After each optimizer step.

        Raises:
            ValueError: the update is one of an epoch that has been closed.
        """
        self._refuse_closed_epochs(num_updates < self.scheduler.epoch * self.updates_per_epoch)
        self.scheduler.step_update(num_updates)
        if not self._updated:
            self._updated = True
            self._store()

    def stop_if_ended(self) -> None:
        """Before the first batch of an epoch.

        Raises:
            TerminalPhaseEnded: there is nothing left to train.
        """
        if self.ended:
            raise TerminalPhaseEnded(self.ended)

    def state_dict(self) -> dict[str, Any]:
        """The TPTScheduler's."""
        return self.scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Likewise."""
        self.scheduler.load_state_dict(state)
        self._store()

    def _close(self, epoch: int) -> None:
        self.measured = self.closer.close(self.scheduler, self.classifier, epoch) or {}
        self._updated = False
        self._store()
        shown = ", ".join(
            f"{name} {self.measured[name]:.6g}" for name in ("accuracy", "nc1", "nc3") if name in self.measured
        )
        _report(f"Clean training set after epoch {epoch}: {shown} ({self.scheduler.phase})")

    def _end(self, epoch: int, saved: bool) -> None:
        if saved:
            self.ended = f"the terminal phase ended: epoch {epoch} of at most {self.scheduler.max_epochs}"
            _report(self.ended)
        else:  # with --val-interval train.py calls step without a metric, and has saved nothing
            _report("the terminal phase has ended; training goes on to the next epoch that --val-interval saves")

    def _refuse_closed_epochs(self, trained_again: bool) -> None:
        if trained_again:
            raise ValueError(
                f"an epoch is trained that was closed before, the TPTScheduler stands at epoch {self.scheduler.epoch}: "
                "leave out --start-epoch, or --resume (--initial-checkpoint takes the weights alone)"
            )

    def _store(self) -> None:
        self._group[STATE] = {"scheduler": self.scheduler.state_dict(), "updated": self._updated}
        if self.terms is not None:
            self.terms.ramp = self.scheduler.ramp
