"""Hugging Face's Trainer: train a swapped model of transformers through a terminal phase, stop it and go on.

python examples/integrations/trainer_digits.py [--out FOLDER] [--quick] [--stop-after EPOCH] [--resume]
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from digits import accuracy, datasets, report
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ncreg import TPTScheduler, param_groups, swap_head
from ncreg.integrations.transformers import CollapseTrainerCallback, ModelWithLoss, TrainerSchedule

BATCH = 50


class StopAfter(TrainerCallback):
    """End the run after the checkpoint of an epoch, as if it had been killed."""

    def __init__(self, epoch: int | None) -> None:
        self.epoch = epoch

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After each checkpoint."""
        if state.epoch is not None and round(state.epoch) == self.epoch:
            control.should_training_stop = True


def collate(rows: list) -> dict[str, torch.Tensor]:
    """Rows of a TensorDataset as the keywords of the model."""
    return {"pixel_values": torch.stack([row[0] for row in rows]), "labels": torch.stack([row[1] for row in rows])}


def main(argv: list[str] | None = None) -> None:
    """Train, print both ends of the terminal phase."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/trainer_digits"), help="folder of the checkpoints")
    parser.add_argument("--quick", action="store_true", help="few images, few epochs")
    parser.add_argument("--stop-after", type=int, help="end after so many epochs, as if killed")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args(argv)
    train_size, epochs, threshold = (400, 10, 0.9) if args.quick else (1400, 40, 0.999)
    train, test = datasets(train_size)
    torch.manual_seed(0)
    small = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    network = ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=10, **small))
    model = ModelWithLoss(swap_head(network, "etf", num_classes=10, input_size=(1, 32, 32)))
    optimizer = torch.optim.SGD(param_groups(model, 5e-4), lr=0.05, momentum=0.9)
    updates = epochs // 2 * (train_size // BATCH)
    scheduler = TPTScheduler(
        optimizer,
        CosineAnnealingLR(optimizer, updates),
        interval="update",
        max_epochs=epochs,
        min_terminal=2,
        threshold=threshold,
    )
    trainer = Trainer(
        model,
        TrainingArguments(
            str(args.out),
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH,
            save_strategy="epoch",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=train,
        data_collator=collate,
        optimizers=(optimizer, TrainerSchedule(scheduler)),
        callbacks=[CollapseTrainerCallback(DataLoader(train, batch_size=256)), StopAfter(args.stop_after)],
    )
    trainer.train(resume_from_checkpoint=args.resume)
    rows = [row for row in trainer.state.log_history if "collapse_nc1" in row]
    history = [{name.removeprefix("collapse_"): value for name, value in row.items()} for row in rows]
    report(scheduler.onset_epoch, history, accuracy(model.classifier.cpu(), test))


if __name__ == "__main__":
    main()
