"""The figures and the closing lines of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

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
        lines = [f"zero error at epoch {summary['onset_epoch']}, terminal phase to epoch {summary['epochs']}"]
        heads = ["", f"epoch {summary['onset_epoch']}", f"epoch {summary['epochs']}"]
    columns = [part for part in (onset, end) if part is not None]
    lines.append(f"{heads[0]:<38}" + "".join(f"{head:>14}" for head in heads[1:]))
    for label, part, key, form in ROWS:
        cells = [column[part].get(key, math.nan) for column in columns]
        lines.append(f"{label:<38}" + "".join(f"{form.format(cell):>14}" for cell in cells))
    return "\n".join([*lines, f"run folder: {path}"])
