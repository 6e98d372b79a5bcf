"""What a run writes about itself: the record of an epoch (history.jsonl) and the summary (summary.json)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recipes.data.load import Dataset
from recipes.training.metrics import measure_all
from recipes.training.state import TrainState


def epoch_record(plan: Mapping[str, Any], train: Mapping[str, float], val: Mapping[str, float]) -> dict[str, Any]:
    """A line of history.jsonl.

    Args:
        plan: number, phase, ramp and learning rate of the epoch, and its mean training loss.
        train: measures on clean training images after the epoch.
        val: accuracy and loss on validation images.
    """
    return {
        **plan,
        "train_accuracy": train["accuracy"],
        "train_loss": train["loss"],
        "val_accuracy": val["accuracy"],
        "val_loss": val["loss"],
        "measures": {name: value for name, value in train.items() if name not in ("accuracy", "loss")},
    }


def run_summary(identity: Mapping[str, Any], state: TrainState, data: Dataset) -> dict[str, Any]:
    """summary.json: `identity` (recipe, data, backbone, seed …), then the measures at zero error and at the end."""
    scheduler = state.scheduler
    summary = {
        **identity,
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "class_counts": data.class_counts().tolist(),
        "onset_epoch": scheduler.onset_epoch,
        "epochs": scheduler.epoch,
        "regressions": scheduler.regressions,
        "best_train_accuracy": max(record["train_accuracy"] for record in state.history),
        "at_onset": state.at_onset,
        "at_end": measure_all(state.model, data, ranks=state.ranks, clock=state.clock),
    }
    if state.ema is not None:
        summary["at_end_ema"] = measure_all(state.ema.module, data, ranks=state.ranks, clock=state.clock)
    return summary
