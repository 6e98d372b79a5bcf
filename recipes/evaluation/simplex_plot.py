"""Collapse to look at: features, class means and class vectors in the plane of the nearest simplex.

For C classes the view is y = P·W(h − μ_G)/(a²·r): W the simplex nearest to the class means (Markou, Ajanthan & Gould
2024), P the plane in which its vertices form a regular polygon, P[:, k] = (cos 2πk/C, sin 2πk/C), a² = C/(C−1), and
r the mean length of the centred class means. A collapsed class is one point on its corner. For C = 3 the plane is all
there is, and the triangle exact; for more classes the polygon spreads them evenly, and the rest of the space is unseen.
One class alone has no simplex: its images are shown about their mean, in units of the mean's length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from ncreg.frames import nearest_simplex_etf
from recipes.core.errors import UserError
from recipes.core.files import write_json
from recipes.core.fonts import drawable
from recipes.core.plot_style import COLORS, GRAY, MARKERS, STYLE
from recipes.evaluation.model_options import ModelOptions
from recipes.evaluation.snapshots import Array, Snapshot, take_snapshots

MOST_LABELS = 20
OUTLINE = (0, (2, 2))
"""The dashes of the polygon, which class vectors do not have."""


@dataclass(frozen=True)
class View:
    """The plane's coordinates: samples (N, 2), class means (C, 2), class vectors (C, 2); collapsed corners at length 1.

    `title` and `target` are the snapshot's; `share` is the part of the between-class variance that lies in the plane,
    None for one class alone, which has none.
    """

    title: str
    target: Array
    samples: Array
    means: Array
    vectors: Array
    share: float | None

    def plain(self) -> dict[str, Any]:
        """As JSON holds it, to three digits: a point on a page has no more."""
        rounded = {name: getattr(self, name).round(3).tolist() for name in ("samples", "means", "vectors")}
        share = None if self.share is None else round(self.share, 3)
        return {"title": self.title, "target": self.target.tolist(), "share": share, **rounded}

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> View:
        """What `plain` gave."""
        arrays = {name: np.array(content[name]) for name in ("target", "samples", "means", "vectors")}
        return cls(title=content["title"], share=content["share"], **arrays)


def plot_run(
    run: str | Path,
    *,
    split: str,
    images: int,
    options: ModelOptions | None = None,
    overrides: Sequence[str] = (),
) -> tuple[Path, str]:
    """Write the figure of a run or model and its points into its folder; the figure's path, and in words what it shows.

    Raises:
        UserError: no run or model, no checkpoint, too few images, or features that hold no simplex.
    """
    home, snapshots, class_names = take_snapshots(run, split=split, images=images, options=options, overrides=overrides)
    views = [project(snapshot) for snapshot in snapshots]
    figure, words = draw(views, class_names, title=home.name)
    folder = home / "collapse"
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "svg", "pdf"):
        with plt.rc_context({"pdf.fonttype": 42}):  # TrueType: publishers refuse matplotlib's own kind of fonts
            figure.savefig(folder / f"simplex-{split}.{kind}", dpi=130)
    plt.close(figure)
    content = {"class_names": class_names, "views": [view.plain() for view in views]}
    write_json(folder / f"view-{split}.json", content)
    return folder / f"simplex-{split}.png", words


def corners(num_classes: int) -> Array:
    """The regular polygon (C, 2) on which the simplex's vertices fall; two ends of a line for C = 2.

    Example:
        >>> corners(4).round(3).tolist()
        [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [-0.0, -1.0]]
    """
    angle = 2 * np.pi * np.arange(num_classes) / num_classes
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def project(snapshot: Snapshot) -> View:
    """A snapshot in the plane of its own nearest simplex.

    Raises:
        UserError: a class without features, or fewer than C − 1 dimensions.
    """
    features, target = snapshot.features.astype(np.float64), snapshot.target
    classes, dim = snapshot.weight.shape
    if dim < classes - 1:
        raise UserError(f"features of {dim} dimensions hold no simplex of {classes} classes: nothing to project on")
    absent = sorted(set(range(classes)) - set(target.tolist()))
    if absent:
        raise UserError(f"no image of class {absent[0]} among the {len(target)} shown: raise --images")
    means = np.stack([features[target == label].mean(0) for label in range(classes)])
    if classes == 1:
        return _one_class(snapshot, features - means[0], float(np.linalg.norm(means[0])))
    centre = means.mean(0)
    means, features = means - centre, features - centre
    simplex = nearest_simplex_etf(torch.from_numpy(means)).numpy()
    stretch = classes / (classes - 1)
    plane = corners(classes).T @ simplex / stretch  # (2, d)
    if classes == 2:  # the simplex is a line: across it, the direction in which samples vary most
        plane[1] = _across(features - means[target], simplex[0])
    length = float(np.linalg.norm(means, axis=1).mean()) or 1.0
    vectors = snapshot.weight.astype(np.float64) - snapshot.weight.mean(0)
    own = float(np.linalg.norm(vectors, axis=1).mean()) or 1.0
    unit = plane / np.maximum(np.linalg.norm(plane, axis=1, keepdims=True), 1e-300)
    share = float((means @ unit.T).var(0).sum() / max(means.var(0).sum(), 1e-300))
    places = (features @ plane.T / length, means @ plane.T / length, vectors @ plane.T / own)
    return View(snapshot.title, target, *places, share)


def _one_class(snapshot: Snapshot, residuals: Array, length: float) -> View:
    """Images of one class about their mean, in the two directions in which they vary most."""
    directions = np.linalg.svd(residuals, full_matrices=False)[2][:2]
    samples = np.zeros((len(residuals), 2))
    samples[:, : len(directions)] = residuals @ directions.T / (length or 1.0)
    return View(snapshot.title, snapshot.target, samples, np.zeros((1, 2)), np.zeros((1, 2)), None)


def _across(residuals: Array, line: Array) -> Array:
    """The direction at right angles to `line` in which samples vary most; none where they do not."""
    rest = residuals - np.outer(residuals @ line, line)
    _, lengths, directions = np.linalg.svd(rest, full_matrices=False)
    if lengths[0] <= 1e-9 * max(float(np.linalg.norm(residuals)), 1.0):
        return np.zeros_like(line)
    return directions[0]


def draw(views: Sequence[View], class_names: Sequence[str], *, title: str = "") -> tuple[Figure, str]:
    """Small multiples, one panel a view, and what they show in words."""
    columns = min(4, len(views))
    rows = -(-len(views) // columns)
    names, style = drawable(class_names, STYLE)
    with plt.rc_context(style):
        figure, panels = plt.subplots(
            rows,
            columns,
            figsize=(2.9 * columns, 2.95 * rows + 0.6),
            layout=ConstrainedLayoutEngine(h_pad=0.07),
            squeeze=False,
        )
        for panel in panels.flat[len(views) :]:
            panel.axis("off")
        for panel, view in zip(panels.flat, views, strict=False):
            _panel(panel, view, names)
        figure.legend(
            handles=_legend(),
            loc="outside lower center",
            ncols=4 if columns > 2 else columns,
            frameon=False,
            fontsize=8,
        )
        if title:
            figure.suptitle(title, fontsize=10)
    return figure, _in_words(views, class_names)


def _in_words(views: Sequence[View], class_names: Sequence[str]) -> str:
    """What the panels show."""
    ideal, said = corners(len(class_names)), []
    for view in views:
        far = np.linalg.norm(view.means - ideal, axis=1).mean()
        near = np.linalg.norm(view.samples - view.means[view.target], axis=1).mean()
        corner = "" if view.share is None else f"class means {far:.2f} from their corners, "
        said.append(f"{view.title}: {corner}samples {near:.2f} from their mean")
    what = f"Features of {len(class_names)} classes in the plane of the nearest simplex, mean distances."
    if len(class_names) == 1:
        what = f"Features of one class ({class_names[0]}), which has no simplex, in units of their mean's length."
    return f"{what} {'; '.join(said)}."


def _legend() -> list[Line2D]:
    """What a sign stands for, whatever the class."""
    return [
        Line2D(
            [],
            [],
            linestyle="",
            marker="o",
            markersize=2.5,
            color=GRAY,
            label="feature of an image (sign and colour: its class)",
        ),
        Line2D([], [], linestyle="", marker="o", markersize=7, color=GRAY, markeredgecolor="white", label="class mean"),
        Line2D([], [], color=GRAY, linewidth=1, label="class vector of the head"),
        Line2D([], [], color=GRAY, linewidth=0.8, linestyle=OUTLINE, label="where collapse ends: the simplex"),
    ]


def _panel(panel: Axes, view: View, class_names: Sequence[str]) -> None:
    outline = corners(len(class_names))
    closed = np.concatenate([outline, outline[:1]])
    if view.share is not None:
        panel.plot(*closed.T, color=GRAY, linewidth=0.8, linestyle=OUTLINE, zorder=1)
    for label, name in enumerate(class_names):
        color, marker = COLORS[label % len(COLORS)], MARKERS[label % len(MARKERS)]
        own = view.samples[view.target == label]
        panel.plot(*own.T, marker, color=color, markersize=2, alpha=0.35, markeredgewidth=0, zorder=2)
        panel.plot([0, view.vectors[label, 0]], [0, view.vectors[label, 1]], color=color, linewidth=1, zorder=3)
        panel.plot(*view.means[label], marker, color=color, markersize=7, markeredgecolor="white", zorder=4)
        if len(class_names) <= MOST_LABELS:
            box = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1}
            panel.annotate(name, 1.5 * outline[label], ha="center", va="center", fontsize=7, bbox=box, zorder=5)
    panel.set(xlim=(-1.85, 1.85), ylim=(-1.75, 1.75), aspect="equal", xticks=[], yticks=[])
    share = "one class: no simplex" if view.share is None else f"{100 * view.share:.0f} % of the means' variance"
    panel.set_title(f"{view.title}\n{share}", fontsize=9)
    for spine in panel.spines.values():
        spine.set_visible(False)
