"""The learning-rate curve of a whole run before it starts, for assumed epochs of zero training error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from torch.optim import SGD  # noqa: E402

from recipes.core.config import TrainConfig
from recipes.core.errors import UserError  # noqa: E402
from recipes.training.build import build_scheduler  # noqa: E402

SHARES = (1 / 10, 1 / 4, 1 / 2)
"""Assumed onsets as shares of tpt.max_epochs."""

LOOKS = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#555555", ":"))


def rates(config: TrainConfig, onset: int | None) -> list[float]:
    """The peak rate of each epoch where zero error comes at `onset`, None for never; the very scheduler of a run."""
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=config.optim.lr)
    scheduler = build_scheduler(config, optimizer)
    found = []
    while not scheduler.finished:
        found.append(max(scheduler.get_last_lr()))
        optimizer.step()
        epoch = scheduler.epoch + 1
        reached = onset is not None and epoch > onset - config.tpt.patience
        scheduler.step(epoch, 1.0 if reached else 0.0)
    return found


def curves(config: TrainConfig) -> dict[int | None, list[float]]:
    """Rates by assumed onset."""
    onsets = sorted({max(config.tpt.patience, round(share * config.tpt.max_epochs)) for share in SHARES})
    return {onset: rates(config, onset) for onset in (*onsets, None)}


def table(planned: Mapping[int | None, list[float]]) -> str:
    """Start, onset, and end of each curve as lines to print."""
    lines = [
        f"{'zero error':>12}{'epochs':>8}{'first rate':>12}{'at zero error':>15}{'one later':>12}{'last rate':>12}"
    ]
    for onset, curve in planned.items():
        cells = ["never", str(len(curve)), f"{curve[0]:.3g}", "-", "-", f"{curve[-1]:.3g}"]
        if onset is not None and onset <= len(curve):
            cells[0], cells[3] = f"epoch {onset}", f"{curve[onset - 1]:.3g}"
            cells[4] = f"{curve[onset]:.3g}" if onset < len(curve) else "-"
        lines.append("".join(f"{cell:>{width}}" for cell, width in zip(cells, (12, 8, 12, 15, 12, 12), strict=True)))
    return "\n".join(lines)


def draw(planned: Mapping[int | None, list[float]], path: Path, *, title: str) -> None:
    """The curves as a figure."""
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for (onset, curve), (color, style) in zip(planned.items(), LOOKS[-len(planned) :], strict=True):
        label = "zero error never found" if onset is None else f"zero error at epoch {onset}"
        axis.plot(range(1, len(curve) + 1), curve, style, color=color, label=label)
    axis.set(xlabel="epoch", ylabel="learning rate", title=title)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise UserError(f"out={path.parent} cannot be written to: {error}; --out FOLDER names another") from None
    finally:
        plt.close(figure)


def show_plan(config: TrainConfig) -> None:
    """Print the table and draw plan-RECIPE.png in the folder of runs."""
    planned = curves(config)
    path = config.out / f"plan-{config.recipe}.png"
    draw(planned, path, title=f"{config.recipe}, at most {config.tpt.max_epochs} epochs")
    print(f"{table(planned)}\nfigure: {path}")
