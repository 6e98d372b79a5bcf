"""The learning rates of a whole run before it starts, for assumed epochs of zero training error."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from functools import partial

import torch
from torch.optim import SGD

from recipes.core.config import OptimConfig, TPTConfig, TrainConfig
from recipes.core.distributed import Ranks, pick_device
from recipes.core.errors import NotHere, UserError
from recipes.core.files import file_name
from recipes.data.augment import check_shift
from recipes.data.unreadable import offering_skip
from recipes.training.build import build_scheduler
from recipes.training.layer_measures import curvature_table
from recipes.training.prepare import load_data, prepare
from recipes.training.reporting import hook_code, zero_error_means

ONSETS = (1 / 10, 1 / 4, 1 / 2)
"""Assumed epochs of zero error, as fractions of tpt.max_epochs."""


def planned_rates(
    tpt: TPTConfig, optim: OptimConfig, onset: int | None, peaks: Collection[float] | None = None
) -> list[float]:
    """Peak learning rate of each epoch if zero error comes at `onset` (None: never), from a real run's scheduler.

    `peaks` are the rates of the groups of parameters; None for those of a backbone and of learned parts behind it.
    """
    peaks = {optim.lr, optim.lr * optim.head_lr_factor} if peaks is None else peaks
    optimizer = SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": peak} for peak in peaks])
    scheduler = build_scheduler(tpt, optim, optimizer)
    rates = []
    while not scheduler.finished:
        rates.append(max(scheduler.get_last_lr()))
        optimizer.step()
        epoch = scheduler.epoch + 1
        reached = onset is not None and epoch > onset - tpt.patience
        scheduler.step(epoch, 1.0 if reached else 0.0)
    return rates


def plans(tpt: TPTConfig, optim: OptimConfig, peaks: Collection[float] | None = None) -> dict[int | None, list[float]]:
    """Learning rates by assumed epoch of zero error, see `planned_rates`."""
    onsets = sorted({max(tpt.patience, round(fraction * tpt.max_epochs)) for fraction in ONSETS})
    return {onset: planned_rates(tpt, optim, onset, peaks) for onset in (*onsets, None)}


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


def show_plan(config: TrainConfig) -> None:
    """Print learning rates for assumed epochs of zero error, plotted into the folder of runs too, and the curvature.

    Raises:
        UserError: the run would be refused before its first step.
    """
    from recipes.training.plots import plot_plan

    device, curvature, peaks = pick_device(config.device), None, None
    if config.on_epoch is not None:
        hook_code(config.on_epoch)
    try:
        with offering_skip():
            data = load_data(config, device)
        check_shift(config.augment, data.train)
        _, state = prepare(config, data, device, Ranks())
        peaks = {group["initial_lr"] for group in state.optimizer.param_groups}
        curvature = partial(curvature_table, state.model, data.train, config.optim)
    except NotHere as error:  # the rates need neither images nor a model
        reason = f"{error}; so model and loss were not tried out"
    planned, means = plans(config.tpt, config.optim, peaks), zero_error_means(config.tpt.threshold)
    path = config.out / f"plan-{file_name(config.recipe)}.png"
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        plot_plan(planned, path, title=f"{config.recipe}, at most {config.tpt.max_epochs} epochs\nzero error: {means}")
    except OSError as error:
        raise UserError(f"out={config.out} cannot be written to: {error}; --out FOLDER names another") from None
    print(f"{plan_table(planned)}\nzero error: {means}\nfigure: {path}", flush=True)
    if curvature is not None:
        try:
            print(curvature())
            return
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
    print(f"note: no curvature of the loss by layer: {reason}", file=sys.stderr)
