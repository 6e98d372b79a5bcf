"""The collapse report: what is measured on each split, as it stands in results and on the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recipes.core.errors import UserError
from recipes.evaluation.collapse import Collapse, collapse_of, measurable, on_means_of
from recipes.evaluation.decisions import quantiles
from recipes.evaluation.model_pass import Seen

MOST_VALUES = 256
"""Eigenvalues of a spectrum that are written down."""

MOST_PAIRS = 10
SHOWN = 40
"""Images of a class in the simplex view, at most."""

MOST_SHOWN = 600
"""Images in the simplex view, at most, unless one of each class is more."""

MARGIN_BINS = 40


@dataclass(frozen=True)
class MeasuredSplit:
    """A split with its collapse; `record` is what is written down of it."""

    name: str
    seen: Seen
    collapse: Collapse
    record: dict[str, Any]


def measure_split(
    name: str, seen: Seen, class_names: Sequence[str], head: Any, *, train: Collapse | None = None
) -> MeasuredSplit:
    """Every measure of a split.

    Args:
        name: train, test ...
        seen: its features and decisions.
        class_names: of the outputs.
        head: the last layer.
        train: the collapse of the training features, against whose class means NC4 of other images is taken too.

    Raises:
        UserError: features that cannot be measured.
    """
    classes = len(class_names)
    head = measurable(head, classes, seen.features.width)
    counts = torch.bincount(seen.features.target, minlength=classes)
    try:
        found = collapse_of(seen.features, classes, head)
        beside = {} if train is None else on_means_of(train, seen.features, head)
    except ValueError as error:
        raise UserError(f"the features of the {name} images: {error}") from None
    record: dict[str, Any] = {
        "images": len(seen.features),
        "classes": int((counts > 0).sum()),
        "dimensions": seen.features.width,
        "measures": dict(found.measures),
        "closest": closest_pairs(found, class_names),
        "per_class": _per_class(found, seen, class_names),
        "spectrum": {"within": found.within[:MOST_VALUES].tolist(), "between": found.between[:MOST_VALUES].tolist()},
    }
    if beside:
        record["on_training_means"] = beside
    if seen.decisions is not None:
        margins = seen.decisions.margins
        record["measures"] |= seen.decisions.measures()
        record["margins"] = {**quantiles(margins), "histogram": _histogram(margins)}
        record["reliability"] = seen.decisions.reliability()
    if seen.layers:
        record["layers"] = seen.layers
    return MeasuredSplit(name, seen, found, record)


def closest_pairs(found: Collapse, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """The pairs of classes whose centred means have the largest cosines, the largest first."""
    cosines = found.cosines().nan_to_num(-2.0).triu(1) - 4 * torch.ones(len(class_names), len(class_names)).tril()
    values, places = cosines.flatten().topk(min(MOST_PAIRS, len(class_names) * (len(class_names) - 1) // 2))
    pairs = [divmod(place, len(class_names)) for place in places.tolist()]
    return [
        {"classes": [class_names[a], class_names[b]], "cosine": value}
        for (a, b), value in zip(pairs, values.tolist(), strict=True)
        if value >= -1.5
    ]


def _per_class(found: Collapse, seen: Seen, class_names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Images, accuracy, and the class whose mean is nearest in angle; null for a class without images."""
    cosines = found.cosines().fill_diagonal_(-torch.inf).nan_to_num(-torch.inf)
    nearest = cosines.max(1)
    accuracy = [None] * len(class_names) if seen.decisions is None else seen.decisions.per_class()
    lengths = found.centred.norm(dim=1)
    rows = {}
    for label, name in enumerate(class_names):
        here = bool(found.counts[label])
        rows[name] = {
            "images": int(found.counts[label]),
            "accuracy": accuracy[label],
            "nearest": class_names[int(nearest.indices[label])] if here else None,
            "cosine": float(nearest.values[label]) if here else None,
            "length": float(lengths[label]) if here else None,
        }
    return rows


def _histogram(values: Tensor) -> dict[str, Any]:
    low, high = float(values.min()), float(values.max())
    counts = torch.histc(values.float(), MARGIN_BINS, low, high) if high > low else torch.tensor([float(len(values))])
    return {"ends": [low, high], "counts": [int(count) for count in counts]}


def shown_features(seen: Seen, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The first images of each class, enough for the simplex view: features and classes."""
    each = max(1, min(SHOWN, MOST_SHOWN // max(1, int((counts > 0).sum()))))
    left = counts.clamp_max(each).clone()
    rows, labels = [], []
    for block, target in seen.features:
        for label in target.unique().tolist():
            taken = (target == label).nonzero().flatten()[: int(left[label])]
            left[label] -= len(taken)
            rows.append(block[taken])
            labels.append(target[taken])
        if not int(left.sum()):
            break
    return torch.cat(rows), torch.cat(labels)
