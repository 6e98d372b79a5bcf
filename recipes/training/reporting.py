"""What a run shows: its progress, its figures and its closing lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from tqdm import tqdm  # noqa: E402

from ncreg.models import Classifier  # noqa: E402
from ncreg.tpt import TPTScheduler  # noqa: E402
from recipes.core.config import TrainConfig  # noqa: E402
from recipes.core.distributed import (
    Ranks,  # noqa: E402
)
from recipes.data.load import (
    Dataset,  # noqa: E402
)
from recipes.training.metrics import (
    Clock,  # noqa: E402
    measure_all,
)
from recipes.training.state import TrainState  # noqa: E402

ACCURACY, LOSS, ONSET = "#0072B2", "#D55E00", "#555555"  # Okabe & Ito's colours: safe for the colour-blind
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


def draw(folder: Path, history: Sequence[Mapping[str, Any]], onset: int | None, *, title: str) -> None:
    """accuracy.png and collapse.png in `folder`, from a run's history."""
    epochs = [entry["epoch"] for entry in history]
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        for key, label, style in (("train_accuracy", "training", "-"), ("val_accuracy", "validation", "--")):
            left.plot(epochs, [100 * entry[key] for entry in history], style, color=ACCURACY, label=label)
        left.set(xlabel="epoch", ylabel="accuracy (%)")
        for key, label, style in (("train_loss", "training", "-"), ("val_loss", "validation", "--")):
            right.plot(epochs, [entry[key] for entry in history], style, color=LOSS, label=label)
        right.set(xlabel="epoch", ylabel="cross-entropy (nats)", yscale="log")
        _finish(figure, (left, right), onset, title, folder / "accuracy.png")

        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        curves = {"nc1": "NC1", "nc2_equiangularity": "NC2 (angles)", "nc2_equinorm": "NC2 (lengths)", "nc3": "NC3"}
        for color, (key, label) in zip(LINES, curves.items(), strict=False):
            values = [entry["measures"].get(key, math.nan) for entry in history]
            left.plot(
                epochs, [value if value and value > 0 else math.nan for value in values], color=color, label=label
            )
        left.set(xlabel="epoch", ylabel="distance from collapse", yscale="log")
        gaps = {"intra_cosine": "1 − intra-class cosine", "inter_cosine": "|inter-class cosine + 1/(C−1)|"}
        for color, (key, label) in zip(LINES, gaps.items(), strict=False):
            values = [entry["measures"].get(f"{key}_gap", math.nan) for entry in history]
            right.plot(epochs, [value if value > 0 else math.nan for value in values], color=color, label=label)
        right.set(xlabel="epoch", ylabel="distance from collapse", yscale="log")
        _finish(figure, (left, right), onset, title, folder / "collapse.png")


def _finish(figure: Any, panels: Sequence[Axes], onset: int | None, title: str, path: Path) -> None:
    for panel in panels:
        if onset is not None:
            panel.axvline(onset, color=ONSET, linewidth=1, linestyle=":")
            panel.annotate(
                " zero error", (onset, 1), xycoords=("data", "axes fraction"), va="top", color=ONSET, fontsize=8
            )
        panel.grid(alpha=0.25)
        panel.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def opening_line(config: TrainConfig, data: Dataset, model: Classifier) -> str:
    """What a run is about to train, on what, and where."""
    parts = {"training": data.train, "validation": data.val, "test": data.test}
    images = ", ".join(f"{len(split):,} {name}" for name, split in parts.items())
    shape = " x ".join(map(str, data.train.images.shape[1:]))
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return (
        f"{config.data.name}: {images} images of {len(data.class_names)} classes, {shape}; {config.model.backbone}, "
        f"{size:.3g} million parameters, on {next(model.parameters()).device}"
    )


ROWS = (
    ("test accuracy", "test", "accuracy", "{:.2%}"),
    ("train accuracy", "train", "accuracy", "{:.2%}"),
    ("val accuracy", "val", "accuracy", "{:.2%}"),
    ("NC1  within-class variability", "train", "nc1", "{:.3e}"),
    ("NC2  std/mean of the lengths", "train", "nc2_equinorm", "{:.3e}"),
    ("NC2  |cosine + 1/(C-1)|", "train", "nc2_equiangularity", "{:.3e}"),
    ("NC3  means against class vectors", "train", "nc3", "{:.3e}"),
    ("NC4  disagreement with nearest mean", "train", "nc4", "{:.2%}"),
    ("mean intra-class cosine (to 1)", "train", "intra_cosine", "{:+.4f}"),
    ("mean inter-class cosine (to -1/(C-1))", "train", "inter_cosine", "{:+.4f}"),
)


def shown(value: float, form: str) -> str:
    """A number, or that there is none: NC measures of a class without images, the accuracy of an empty split."""
    return "not defined" if math.isnan(value) else form.format(value)


def closing_lines(summary: Mapping[str, Any], path: Path) -> str:
    """The last lines that a run prints: both ends of the terminal phase side by side."""
    onset, end = summary["at_onset"], summary["at_end"]
    if onset is None:
        lines = [
            f"zero error not found in {summary['epochs']} epochs (best clean training accuracy "
            f"{summary['best_train_accuracy']:.2%}): raise --tpt.max_epochs or lower --tpt.threshold"
        ]
        heads = ["", f"epoch {summary['epochs']}"]
    else:
        lines = [
            f"zero error (training accuracy of {summary['threshold']:.1%} or more) at epoch {summary['onset_epoch']}, "
            f"terminal phase to epoch {summary['epochs']}"
        ]
        heads = ["", f"epoch {summary['onset_epoch']}", f"epoch {summary['epochs']}"]
    columns = [part for part in (onset, end) if part is not None]
    lines.append(f"{heads[0]:<38}" + "".join(f"{head:>14}" for head in heads[1:]))
    for label, part, key, form in ROWS:
        cells = [column[part].get(key, math.nan) for column in columns]
        lines.append(f"{label:<38}" + "".join(f"{shown(cell, form):>14}" for cell in cells))
    return "\n".join([*lines, f"run folder: {path}"])


def progress_bar(config: TrainConfig, state: TrainState, steps: int) -> tqdm:
    """Steps of the whole run; silent where there is no terminal, or on request."""
    last = state.scheduler.last_epoch or config.tpt.max_epochs
    done = state.scheduler.epoch * steps + len(state.taken)
    silent = config.quiet or not state.ranks.main
    return tqdm(total=steps * last, initial=done, unit="step", disable=True if silent else None)


def epoch_record(
    planned: Mapping[str, Any], values: Mapping[str, float], val: Mapping[str, float], num_classes: int
) -> dict[str, Any]:
    """What history.jsonl keeps of an epoch: what it was to be, and what came of it."""
    ideal = -1 / (num_classes - 1)
    gaps = {"intra_cosine_gap": 1 - values["intra_cosine"], "inter_cosine_gap": abs(values["inter_cosine"] - ideal)}
    return {
        **planned,
        "train_accuracy": values["accuracy"],
        "train_loss": values["loss"],
        "val_accuracy": val["accuracy"],
        "val_loss": val["loss"],
        "measures": {name: value for name, value in values.items() if name not in ("accuracy", "loss")} | gaps,
    }


def show(bar: tqdm, entry: dict[str, Any], scheduler: TPTScheduler, config: TrainConfig, ranks: Ranks) -> None:
    """The state of the run beside the progress bar, or a line now and then where there is no terminal."""
    shown = {
        "loss": f"{entry['loss']:.4f}",
        "acc": f"{entry['train_accuracy']:.2%}",
        "nc1": f"{entry['measures']['nc1']:.2e}",
        "phase": scheduler.phase,
    }
    bar.set_postfix(shown)
    every = max(1, config.tpt.max_epochs // 20)
    news = entry["epoch"] in (1, scheduler.onset_epoch) or scheduler.finished or entry["epoch"] % every == 0
    if bar.disable and news and ranks.main and not config.quiet:
        print(f"epoch {entry['epoch']:>4}  " + "  ".join(f"{key} {value}" for key, value in shown.items()), flush=True)


def timing_line(clock: Clock, images_per_second: float) -> str:
    """Where the time went."""
    total = sum(clock.seconds.values())
    shares = {name: clock.seconds.get(name, 0.0) / total for name in ("measure_forward", "measure_collapse")}
    return (
        f"{total:.0f} s, {images_per_second:.0f} training images/s; measuring took {sum(shares.values()):.0%} "
        f"({shares['measure_forward']:.0%} forward pass, {shares['measure_collapse']:.0%} measures)"
    )


def run_summary(config: TrainConfig, state: TrainState, data: Dataset) -> dict[str, Any]:
    """What summary.json says: what was run, and the measures at zero error and at the end."""
    scheduler, measured_all = state.scheduler, partial(measure_all, data=data, ranks=state.ranks, clock=state.clock)
    summary = {
        "recipe": config.recipe,
        "threshold": config.tpt.threshold,
        "data": config.data.name,
        "backbone": config.model.backbone,
        "seed": config.seed,
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "class_counts": data.class_counts().tolist(),
        "onset_epoch": scheduler.onset_epoch,
        "epochs": scheduler.epoch,
        "regressions": scheduler.regressions,
        "best_train_accuracy": max(entry["train_accuracy"] for entry in state.history),
        "at_onset": state.at_onset,
        "at_end": measured_all(state.model),
    }
    if state.ema is not None:
        summary["at_end_ema"] = measured_all(state.ema.module)
    return summary
