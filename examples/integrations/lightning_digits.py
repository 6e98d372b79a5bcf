"""Lightning: train digits through a terminal phase; a run that was stopped goes on to the bit.

python examples/integrations/lightning_digits.py [--out FOLDER] [--quick] [--stop-after EPOCH] [--resume]
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import accuracy, datasets, report
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from ncreg import TPTScheduler, param_groups, swap_head
from ncreg.integrations.lightning import CollapseCallback


class Digits(LightningModule):
    """A ResNet with a fixed simplex head; nothing in it knows of the terminal phase."""

    def __init__(self) -> None:
        super().__init__()
        self.model = swap_head("test_resnet", "etf", num_classes=10, model_args={"in_chans": 1})

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer alone: the callback makes the schedule."""
        return torch.optim.SGD(param_groups(self.model, 5e-4), lr=0.05, momentum=0.9)


def main(argv: list[str] | None = None) -> None:
    """Train, print both ends of the terminal phase."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning_digits"), help="folder of the checkpoints")
    parser.add_argument("--quick", action="store_true", help="few images, few epochs")
    parser.add_argument("--stop-after", type=int, default=-1, help="end after so many epochs, as if killed")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args(argv)
    train_size, epochs, threshold = (400, 10, 0.9) if args.quick else (1400, 40, 0.999)
    train, test = datasets(train_size)
    clean = DataLoader(train, batch_size=256)

    def schedule(optimizer: torch.optim.Optimizer) -> TPTScheduler:
        inner = CosineAnnealingLR(optimizer, T_max=epochs // 2)
        return TPTScheduler(optimizer, inner, max_epochs=epochs, min_terminal=2, threshold=threshold)

    seed_everything(0, verbose=False)
    collapse = CollapseCallback(clean, schedule)
    checkpoints = ModelCheckpoint(args.out, save_last=True)
    trainer = Trainer(
        max_epochs=args.stop_after,
        callbacks=[collapse, checkpoints],
        default_root_dir=args.out,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Digits()
    last = args.out / "last.ckpt" if args.resume else None
    trainer.fit(module, DataLoader(train, batch_size=50), ckpt_path=last)
    assert collapse.scheduler is not None  # the fit made it
    report(collapse.scheduler.onset_epoch, collapse.history, accuracy(module.model, test))


if __name__ == "__main__":
    main()
