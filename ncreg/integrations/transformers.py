"""Hugging Face's Trainer: a model with a loss, a schedule, and a callback that drives the terminal phase."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from transformers import PretrainedConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError("ncreg.integrations.transformers needs transformers: pip install 'ncreg[hf]'") from error

from ncreg._checks import described
from ncreg._wrappers import unwrapped
from ncreg.heads import NearestETFHead
from ncreg.integrations._epochs import EpochCloser
from ncreg.integrations._following import follow, updates_seen
from ncreg.integrations._training_set import find_classifier
from ncreg.models import Classifier
from ncreg.tpt import TPTScheduler

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

ROUNDING = 1e-6  # of the number of epochs, a sum of steps over their number in an epoch


def cross_entropy(logits: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of the batch; the features do not matter."""
    return F.cross_entropy(logits, labels)


class ModelWithLoss(nn.Module):
    """A `Classifier` as Trainer calls a model: (pixel_values, labels) → {"loss", "logits"}.

    A NearestETFHead is handed each training batch, unless `loss` does so.

    Args:
        classifier: what `swap_head` gave.
        loss: (logits, features, labels) → a number.

    Raises:
        TypeError: the classifier is another module.
        ValueError: a training step of another loss than cross-entropy, or of a NearestETFHead, without labels. Trainer
            takes them for a loss of its own under `label_smoothing_factor` and `compute_loss_func`, and `loss` would be
            left out, and the head never updated.

    Example:
        >>> import torch
        >>> from ncreg import swap_head
        >>> model = ModelWithLoss(swap_head("test_resnet", "etf", num_classes=10))
        >>> sorted(model(torch.rand(2, 3, 32, 32), torch.tensor([0, 1])))
        ['logits', 'loss']
    """

    def __init__(self, classifier: Classifier, loss: Loss = cross_entropy) -> None:
        super().__init__()
        if not isinstance(classifier, Classifier):
            raise TypeError(f"classifier must be what ncreg.swap_head gives, not {described(classifier)}")
        self.classifier, self.loss = classifier, loss
        self.config = PretrainedConfig(num_labels=classifier.num_classes)  # Trainer asks for it under label smoothing

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Logits, and with labels the loss before them."""
        head = unwrapped(self.classifier.head)
        takes_labels = self.loss is not cross_entropy or isinstance(head, NearestETFHead)
        if labels is None and self.training and torch.is_grad_enabled() and takes_labels:
            raise ValueError(
                "a training step without labels: Trainer takes them for a loss of its own under label_smoothing_factor "
                "or compute_loss_func, and ModelWithLoss(loss=…) would be left out, and NearestETFHead never updated; "
                "switch these off, and smooth labels within the loss (ncreg.functional.smooth_labels)"
            )
        logits, features = self.classifier(pixel_values, with_features=True)
        if labels is None:
            return {"logits": logits}
        before = updates_seen(head)
        loss = self.loss(logits, features, labels)
        follow(head, features, labels, since=before)
        return {"loss": loss, "logits": logits}

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """What Trainer calls under `gradient_checkpointing=True`: the backbone computes parts of its pass again.

        Raises:
            ValueError: for settings, which timm's backbones do not take.
        """
        asked = {key: value for key, value in (activation_checkpointing_kwargs or {}).items() if value is not None}
        if not asked.pop("use_reentrant", False) and not asked and every_n_layers == 1 and not offload:
            return self.classifier.set_grad_checkpointing(True)
        raise ValueError(
            f"gradient checkpointing with {dict(activation_checkpointing_kwargs or {})}, every_n_layers="
            f"{every_n_layers}, offload={offload}: timm's backbones take no such settings; leave them at their defaults"
        )

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **settings: Any
    ) -> None:
        """The same under the name that earlier versions of Trainer call."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **settings)

    def gradient_checkpointing_disable(self) -> None:
        """Back to a pass that keeps everything."""
        self.classifier.set_grad_checkpointing(False)


class TrainerSchedule:
    """A TPTScheduler as Trainer's `optimizers=(optimizer, schedule)` takes it: stepped once an update, kept, restored.

    Trainer calls `step()` after each update, which reaches an inner schedule with interval="update" (build it for
    that), and saves `state_dict()` in every checkpoint. The epochs are closed by `CollapseTrainerCallback`.
    """

    def __init__(self, scheduler: TPTScheduler) -> None:
        if not isinstance(scheduler, TPTScheduler):
            raise TypeError(f"scheduler must be an ncreg.TPTScheduler, not {described(scheduler)}")
        self.scheduler, self.updates = scheduler, 0

    def step(self) -> None:
        """After an optimizer step."""
        self.updates += 1
        self.scheduler.step_update(self.updates)

    def get_last_lr(self) -> list[float]:
        """The rate of each parameter group."""
        return self.scheduler.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """The TPTScheduler's, and the number of updates."""
        return {"updates": self.updates, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.scheduler.load_state_dict(state["scheduler"])
        self.updates = state["updates"]


class CollapseTrainerCallback(TrainerCallback):
    """After every epoch: measure the clean training set, step the TPTScheduler, stop at its end.

    Measures go into `state.log_history` (and so into trainer_state.json and back) as `collapse_…`.

    Args:
        batches: loader of the training images without augmentation, plain (not from `accelerator.prepare`): batches
            of (images, labels), or dicts with pixel_values and labels.
        watch: the measure that `stop_patience` looks at.
        keep_features: whether all features are kept for the measures that need two passes.
        classifier: Trainer's model → the `Classifier` to measure; by default the only one in it.

    Raises:
        TypeError: `batches` can't be read again, or the model holds no `Classifier`.
        ValueError: a TPTScheduler that was not handed to Trainer in a `TrainerSchedule`, a run that has ended, one
            that Trainer begins anew while the TPTScheduler goes on, or several Classifiers without `classifier`.

    Example:
        >>> import torch
        >>> images = torch.utils.data.TensorDataset(torch.rand(8, 3, 32, 32), torch.arange(8) % 2)
        >>> callback = CollapseTrainerCallback(torch.utils.data.DataLoader(images, 4))
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        watch: str = "nc1",
        keep_features: bool = True,
        classifier: Callable[[nn.Module], Classifier] = find_classifier,
    ) -> None:
        self.closer = EpochCloser(batches, watch=watch, keep_features=keep_features)
        self.find = classifier

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what could not be driven, before anything is trained."""
        self.find(kwargs["model"])
        if isinstance(kwargs["lr_scheduler"], TPTScheduler):
            raise ValueError("Trainer(optimizers=(optimizer, TPTScheduler)): hand in TrainerSchedule(TPTScheduler)")
        schedule = kwargs["lr_scheduler"]
        if isinstance(schedule, TrainerSchedule) and schedule.scheduler.finished:  # Trainer would train a step first
            raise ValueError(
                f"the run ended with epoch {schedule.scheduler.epoch}: nothing is left to train; checkpoints of an "
                "earlier run in output_dir count too: empty it, or name one (resume_from_checkpoint=FOLDER)"
            )
        if isinstance(schedule, TrainerSchedule) and schedule.scheduler.epoch and not state.global_step:
            raise ValueError(
                f"Trainer begins at epoch 0, the TPTScheduler stands at epoch {schedule.scheduler.epoch}, and the "
                "epochs between would be neither measured nor counted: go on with resume_from_checkpoint=True, or "
                "build optimizer, TPTScheduler and Trainer anew"
            )
        if state.global_step >= state.max_steps:  # resumed from its last step: no epoch begins or ends any more
            self.on_epoch_begin(args, state, control, **kwargs)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the epoch before this one, where a checkpoint was written at its last step."""
        finished = _whole_epochs(state)
        if finished and not self._closed(state, finished):
            self._close(state, control, finished, **kwargs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure, log, step; Trainer saves after this."""
        epoch = _whole_epochs(state)
        stopped_within = control.should_training_stop or state.global_step >= state.max_steps
        if (state.epoch or 0) - epoch > ROUNDING and not stopped_within:
            epoch += 1  # of a loader without a length Trainer counts parts of max_steps
        if not self._closed(state, epoch):
            self._close(state, control, epoch, **kwargs)

    def _closed(self, state: TrainerState, epoch: int) -> bool:
        return any("collapse_nc1" in row and round(row["epoch"]) == epoch for row in state.log_history)

    def _close(self, state: TrainerState, control: TrainerControl, epoch: int, **kwargs: Any) -> None:
        schedule = kwargs["lr_scheduler"]
        scheduler = schedule.scheduler if isinstance(schedule, TrainerSchedule) else None
        measured = self.closer.close(scheduler, self.find(kwargs["model"]), epoch)
        if measured is not None:
            row = {f"collapse_{name}": value for name, value in measured.items()}
            state.log_history.append({"epoch": float(epoch), "step": state.global_step} | row)
        if scheduler is not None and scheduler.finished:
            control.should_training_stop = True


def _whole_epochs(state: TrainerState) -> int:
    """Epochs that are over; Trainer counts the steps of the one in progress as a part of it."""
    return math.floor((state.epoch or 0) + ROUNDING)
