"""TPTScheduler behind timm's scheduler protocol, with its state in the optimizer's."""

from __future__ import annotations

import logging
from typing import Any

from ncreg.integrations._epochs import EpochCloser
from ncreg.integrations.timm._task import LossTerms
from ncreg.models import Classifier
from ncreg.tpt import TPTScheduler

STATE = "ncreg_terminal_phase"
"""Key in the optimizer's first parameter group: timm's checkpoints keep the optimizer's state and no scheduler's."""


_logger = logging.getLogger(__name__)


class TerminalPhaseEnded(KeyboardInterrupt):
    """The run is over before the last of `--epochs`; train.py ends its loop on a KeyboardInterrupt, and tidies up."""


class TerminalPhaseSchedule:
    """What train.py calls: `step(epoch, metric)` after each epoch, `step_update(num_updates)` after each update.

    `step` takes no notice of the loop's metric, the *validation* accuracy in per cent, and measures the clean training
    set itself. train.py saves an epoch's checkpoint before it calls `step`: a checkpoint holds the weights of the
    epoch's end and a state of its beginning, and the epoch is closed when that is loaded.
    """

    def __init__(
        self,
        scheduler: TPTScheduler,
        inner: Any,
        closer: EpochCloser,
        classifier: Classifier,
        terms: LossTerms | None = None,
    ) -> None:
        self.scheduler, self.closer, self.classifier, self.terms = scheduler, closer, classifier, terms
        self.t_in_epochs = bool(getattr(inner, "t_in_epochs", True))  # train.py shows it
        self.measured: dict[str, float] = {}
        self._updated = False
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
            TerminalPhaseEnded: there is nothing left to train.
        """
        if epoch <= self.scheduler.epoch:
            self.scheduler.step(self.scheduler.epoch)
            return
        self._close(epoch)
        if self.scheduler.finished and epoch < self.scheduler.max_epochs:
            raise TerminalPhaseEnded(
                f"the terminal phase ended with epoch {epoch} of at most {self.scheduler.max_epochs}"
            )

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        """After each optimizer step."""
        self.scheduler.step_update(num_updates)
        if not self._updated:
            self._updated = True
            self._store()

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
        _logger.info("Clean training set after epoch %d: %s (%s)", epoch, shown, self.scheduler.phase)

    def _store(self) -> None:
        self._group[STATE] = {"scheduler": self.scheduler.state_dict(), "updated": self._updated}
        if self.terms is not None:
            self.terms.ramp = self.scheduler.ramp
