"""Lightning: a callback that measures collapse after every epoch and drives the terminal phase."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("ncreg.integrations.lightning needs lightning: pip install 'ncreg[lightning]'") from error
from torch.optim import Optimizer

from ncreg.integrations._epochs import EpochCloser
from ncreg.integrations._training_set import find_classifier
from ncreg.models import Classifier
from ncreg.tpt import TPTScheduler


class CollapseCallback(Callback):
    """After every training epoch: measure the clean training set, step the TPTScheduler, stop at its end.

    The scheduler is made by `scheduler=`, or it is the one that `configure_optimizers` returns (Lightning then keeps
    its state and wants `lr_scheduler_step` overridden: `pass`, since the callback steps it). All measures are logged
    as `collapse/…` and kept in `history`. A run that is resumed from a checkpoint goes on to the bit, also from one
    that ModelCheckpoint wrote before the epoch was over (`save_on_train_epoch_end=False`). So does a second `fit()` of
    the same Trainer, for which Lightning makes the optimizer anew.

    Args:
        batches: loader of the training images without augmentation; in a distributed run each process reads every
            n-th batch of it.
        scheduler: optimizer → TPTScheduler; None for the module's own, or to measure only.
        watch: the measure that `stop_patience` looks at.
        keep_features: whether all features are kept for the measures that need two passes.
        classifier: LightningModule → the `Classifier` to measure; by default the only one in it.

    Raises:
        TypeError: `batches` can't be read again, or the module holds no `Classifier`.
        ValueError: not exactly one optimizer, a scheduler both here and in the module, or several in the module.

    Example:
        >>> import torch
        >>> from ncreg import TPTScheduler
        >>> images = torch.utils.data.TensorDataset(torch.rand(8, 3, 32, 32), torch.arange(8) % 2)
        >>> callback = CollapseCallback(
        ...     torch.utils.data.DataLoader(images, 4), lambda optimizer: TPTScheduler(optimizer, max_epochs=50)
        ... )
    """

    def __init__(
        self,
        batches: Iterable[Any],
        scheduler: Callable[[Optimizer], TPTScheduler] | None = None,
        *,
        watch: str = "nc1",
        keep_features: bool = True,
        classifier: Callable[[LightningModule], Classifier] = find_classifier,
    ) -> None:
        self.closer = EpochCloser(batches, watch=watch, keep_features=keep_features)
        self.make_scheduler, self.find = scheduler, classifier
        self.scheduler: TPTScheduler | None = None
        self.history: list[dict[str, float]] = []
        self._restored: dict[str, Any] | None = None
        self._closed: int | None = None  # the last epoch that was measured here
        self._updates = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make or find the scheduler, give it its state back, close an epoch that the checkpoint left open."""
        self.find(pl_module)
        former, self.scheduler = self.scheduler, self._scheduler_of(trainer)
        if self.scheduler is not None:
            if self._restored is not None and self.make_scheduler is not None:
                self.scheduler.load_state_dict(self._restored)
            elif former is not None and self.scheduler.epoch < former.epoch == trainer.current_epoch:
                self.scheduler.load_state_dict(former.state_dict())  # a second fit() of the same Trainer
        self._restored = None
        if self._closed is None:  # nothing restored: epochs of a run before were not measured here
            self._closed = trainer.current_epoch
        self._close_left_open(trainer, pl_module)
        if self.scheduler is None:
            return
        bound, planned = trainer.max_epochs, self.scheduler.max_epochs
        if bound is not None and 0 <= bound < planned:
            warnings.warn(
                f"Trainer(max_epochs={bound}) ends before TPTScheduler(max_epochs={planned}): "
                "give the Trainer max_epochs=-1 or as many",
                UserWarning,
                stacklevel=2,
            )
        self._updates = trainer.global_step
        trainer.should_stop |= self.scheduler.finished

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the epoch before this one, where a checkpoint was written before that was done."""
        self._close_left_open(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """After an update: an inner schedule that counts updates follows."""
        if self.scheduler is not None and trainer.global_step > self._updates:
            self._updates = trainer.global_step
            self.scheduler.step_update(self._updates)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, log, step; this comes before ModelCheckpoint's own hook."""
        self._close(trainer, pl_module, trainer.current_epoch + 1)
        for name, value in self.history[-1].items():
            pl_module.log(f"collapse/{name}", value, on_epoch=True, rank_zero_only=False, sync_dist=False)

    def state_dict(self) -> dict[str, Any]:
        """The history, and the state of a scheduler that was made here."""
        own = self.scheduler is not None and self.make_scheduler is not None
        scheduler = self.scheduler.state_dict() if own and self.scheduler else None
        return {"history": self.history, "closed": self._closed, "scheduler": scheduler}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep what a checkpoint holds until there is an optimizer to build the scheduler on."""
        self.history, self._restored = list(state["history"]), state["scheduler"]
        self._closed = state.get("closed", len(self.history))

    def _scheduler_of(self, trainer: Trainer) -> TPTScheduler | None:
        returned = [c.scheduler for c in trainer.lr_scheduler_configs if isinstance(c.scheduler, TPTScheduler)]
        if self.make_scheduler is None:
            if len(returned) > 1:
                raise ValueError(
                    f"the module's configure_optimizers returns {len(returned)} TPTSchedulers, and the callback steps "
                    "one: return one of them, on the optimizer that has all parameters as groups"
                )
            return returned[0] if returned else None
        if trainer.lr_scheduler_configs:
            raise ValueError(
                "the module's configure_optimizers returns a schedule and the callback makes another: return the "
                "optimizer alone, and put the schedule inside, TPTScheduler(optimizer, schedule, ...)"
            )
        if len(trainer.optimizers) != 1:
            raise ValueError(f"a TPTScheduler drives one optimizer, the module has {len(trainer.optimizers)}")
        optimizer = trainer.optimizers[0]
        return self.make_scheduler(getattr(optimizer, "optimizer", optimizer))

    def _close_left_open(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a checkpoint of an epoch's last step Trainer begins the next epoch without its hook."""
        if (self._closed or 0) < trainer.current_epoch:
            self._close(trainer, pl_module, trainer.current_epoch)

    def _close(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        self._closed = epoch
        measured = self.closer.close(self.scheduler, self.find(pl_module), epoch)
        if measured is not None:
            self.history.append(measured)
        if self.scheduler is not None and self.scheduler.finished:
            trainer.should_stop = True
