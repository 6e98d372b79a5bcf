"""Accelerate: a plain loop with prepare, save_state and load_state, through a terminal phase.

python examples/integrations/accelerate_digits.py [--out FOLDER] [--quick] [--stop-after EPOCH] [--resume]
accelerate launch --cpu --num_processes 2 examples/integrations/accelerate_digits.py
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from digits import accuracy, datasets, report
from timm.scheduler import CosineLRScheduler
from torch.utils.data import DataLoader

from ncreg import TPTScheduler, param_groups, swap_head
from ncreg.integrations import EpochCloser


class History:
    """What was measured, in the checkpoint too."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, list]:
        """For save_state."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, list]) -> None:
        """For load_state."""
        self.rows = state["rows"]


def main(argv: list[str] | None = None) -> None:
    """Train, print both ends of the terminal phase."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate_digits"), help="folder of the checkpoint")
    parser.add_argument("--quick", action="store_true", help="few images, few epochs")
    parser.add_argument("--stop-after", type=int, help="end after so many epochs, as if killed")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    args = parser.parse_args(argv)
    train_size, epochs, threshold = (400, 10, 0.9) if args.quick else (1400, 40, 0.999)
    train, test = datasets(train_size)
    set_seed(0)
    accelerator = Accelerator()
    classifier = swap_head("test_resnet", "etf", num_classes=10, model_args={"in_chans": 1})
    optimizer = torch.optim.SGD(param_groups(classifier, 5e-4), lr=0.05, momentum=0.9)
    inner = CosineLRScheduler(optimizer, t_initial=epochs // 2)
    scheduler = TPTScheduler(
        optimizer, inner, max_epochs=epochs, min_terminal=2, threshold=threshold
    )  # on the optimizer before prepare
    closer, history = EpochCloser(DataLoader(train, batch_size=256)), History()
    loader = DataLoader(train, batch_size=50, shuffle=True)
    model, wrapped, loader = accelerator.prepare(classifier, optimizer, loader)
    accelerator.register_for_checkpointing(scheduler, history)  # prepare() would not keep them, and says nothing
    if args.resume:
        accelerator.load_state(str(args.out))
    while not scheduler.finished and scheduler.epoch != args.stop_after:
        model.train()
        for images, labels in loader:
            wrapped.zero_grad()
            accelerator.backward(F.cross_entropy(model(images), labels))
            wrapped.step()
        row = closer.close(scheduler, accelerator.unwrap_model(model), scheduler.epoch + 1)
        assert row is not None  # it is None only for an epoch that has been closed before
        history.rows.append(row)
        accelerator.save_state(str(args.out))
    if accelerator.is_main_process:
        report(scheduler.onset_epoch, history.rows, accuracy(accelerator.unwrap_model(model).cpu(), test))
    accelerator.end_training()


if __name__ == "__main__":
    main()
