"""The end of an epoch in a loop that is not ours: measure the clean training set, then step the scheduler."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from ncreg._checks import check_choice, check_integer, described
from ncreg._wrappers import unwrapped
from ncreg.heads import NearestETFHead
from ncreg.integrations._following import updates_seen
from ncreg.integrations._training_set import find_classifier, measure_training_set
from ncreg.tpt import TPTScheduler

WATCHED = ("nc1", "nc2_equiangularity", "nc3", "etf_distance")


class EpochCloser:
    """`close(scheduler, classifier, epoch)` once an epoch, or later: an epoch is measured once, and stepped once.

    A checkpoint that was written before its epoch was closed (during validation, say) holds the weights of the epoch's
    end and the scheduler's state of its beginning. Closing the epoch after the checkpoint was loaded gives what the
    uninterrupted run had. A NearestETFHead that has been handed no batch by then is warned of once.

    Args:
        batches: the clean training set, see `measure_training_set`.
        watch: the measure that goes to `TPTScheduler.step(watch=)`.
        keep_features: see `measure_training_set`.

    Raises:
        TypeError: batches that can be read only once.
        ValueError: an unknown measure to watch.

    Example:
        >>> import torch
        >>> from ncreg import Classifier
        >>> model = Classifier(nn.Flatten(), nn.Identity(), nn.Linear(4, 2))
        >>> scheduler = TPTScheduler(torch.optim.SGD(model.parameters(), lr=0.1), max_epochs=9)
        >>> closer = EpochCloser([(torch.rand(8, 1, 2, 2), torch.arange(8) % 2)])  # a loader of one batch
        >>> measured = closer.close(scheduler, model, 1)  # accuracy, nc1, nc3, ...
        >>> scheduler.epoch, closer.close(scheduler, model, 1)  # that epoch is closed
        (1, None)
    """

    def __init__(self, batches: Iterable[Any], *, watch: str = "nc1", keep_features: bool = True) -> None:
        if not hasattr(batches, "__iter__") or hasattr(batches, "__next__"):
            raise TypeError(
                f"batches must be a loader that can be read again every epoch, not {described(batches)}: "
                "a DataLoader of clean training images"
            )
        self.batches, self.keep_features = batches, keep_features
        self.watch = check_choice("watch", watch, WATCHED)
        self._warned = False

    def close(self, scheduler: TPTScheduler | None, classifier: nn.Module, epoch: int) -> dict[str, float] | None:
        """What was measured at the end of epoch `epoch`, counted from 1; None if it has been closed before.

        Raises:
            TypeError: no `Classifier`, nor a wrapper of one.
            ValueError: the scheduler has missed an epoch before this one, or its `stop_patience` waits for a measure
                that this classifier does not have.
        """
        epoch = check_integer("epoch", epoch, 0)
        if scheduler is not None and epoch <= scheduler.epoch:
            return None
        if scheduler is not None and epoch != scheduler.epoch + 1:
            raise ValueError(
                f"epoch {epoch} ends, the TPTScheduler stands at epoch {scheduler.epoch}: its state was not restored "
                "with the weights; resume with the optimizer's state, or begin again at epoch 0"
            )
        measured = measure_training_set(classifier, self.batches, keep_features=self.keep_features)
        if epoch:  # epoch 0 is a look before training
            self._warn_of_idle_head(find_classifier(classifier).head)
        if scheduler is not None:
            waits = scheduler.stop_patience is not None and scheduler.extend is not None
            if waits and self.watch not in measured:
                raise ValueError(
                    f"watch={self.watch!r} is not measured, for the head has no class vectors to read, and "
                    f"TPTScheduler(stop_patience={scheduler.stop_patience}) would wait for ever: watch "
                    f"{' or '.join(repr(name) for name in WATCHED if name in measured)}, or give the head a weight"
                )
            scheduler.step(epoch, measured["accuracy"], watch=measured.get(self.watch))
        return measured

    def _warn_of_idle_head(self, head: nn.Module) -> None:
        """Say once that a head that should follow the class means has not been told of any batch."""
        if isinstance(unwrapped(head), NearestETFHead) and not updates_seen(head) and not self._warned:
            self._warned = True
            warnings.warn(
                "NearestETFHead has been handed no batch, so it stays the simplex that it began with: call "
                "head.update(features.detach(), target) after each forward pass in training, or take head 'etf'",
                UserWarning,
                stacklevel=3,
            )
