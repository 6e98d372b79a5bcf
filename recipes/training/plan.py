"""The learning rates of a whole run before it starts, for assumed epochs of zero training error."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.optim import SGD

from recipes.core.config import OptimConfig, TPTConfig
from recipes.training.build import build_scheduler

ONSETS = (1 / 10, 1 / 4, 1 / 2)
"""Assumed epochs of zero error, as fractions of tpt.max_epochs."""


def planned_rates(tpt: TPTConfig, optim: OptimConfig, onset: int | None) -> list[float]:
    """Peak learning rate of each epoch if zero error comes at `onset` (None: never), from a real run's scheduler."""
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=optim.lr)
    scheduler = build_scheduler(tpt, optim, optimizer)
    rates = []
    while not scheduler.finished:
        rates.append(max(scheduler.get_last_lr()))
        optimizer.step()
        epoch = scheduler.epoch + 1
        reached = onset is not None and epoch > onset - tpt.patience
        scheduler.step(epoch, 1.0 if reached else 0.0)
    return rates


def plans(tpt: TPTConfig, optim: OptimConfig) -> dict[int | None, list[float]]:
    """Learning rates by assumed epoch of zero error."""
    onsets = sorted({max(tpt.patience, round(fraction * tpt.max_epochs)) for fraction in ONSETS})
    return {onset: planned_rates(tpt, optim, onset) for onset in (*onsets, None)}


def plan_table(planned: Mapping[int | None, list[float]]) -> str:
    """First rate, rates around zero error and last rate of each plan, as lines to print."""
    lines = [
        f"{'zero error':>12}{'epochs':>8}{'first rate':>12}{'at zero error':>15}{'one later':>12}{'last rate':>12}"
    ]
    for onset, rates in planned.items():
        cells = ["never", str(len(rates)), f"{rates[0]:.3g}", "-", "-", f"{rates[-1]:.3g}"]
        if onset is not None and onset <= len(rates):
            cells[0], cells[3] = f"epoch {onset}", f"{rates[onset - 1]:.3g}"
            cells[4] = f"{rates[onset]:.3g}" if onset < len(rates) else "-"
        lines.append("".join(f"{cell:>{width}}" for cell, width in zip(cells, (12, 8, 12, 15, 12, 12), strict=True)))
    return "\n".join(lines)
