"""The collapse report from features alone: arrays of .npz files, with the last layer or without."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipes.core.errors import UserError
from recipes.evaluation.class_order import listed
from recipes.evaluation.collapse import Layer, affine_logits
from recipes.evaluation.collapse_page import page
from recipes.evaluation.collapse_report import MeasuredSplit, measure_split
from recipes.evaluation.decisions import Decisions
from recipes.evaluation.feature_store import FeatureFile
from recipes.evaluation.model_pass import Seen
from recipes.training.reporting import ROWS, shown


@dataclass(frozen=True)
class FeatureReport:
    """What is written and printed."""

    result: dict[str, Any]
    page: str
    table: str


def evaluate_features(path: Path, test: Path | None, *, class_names: tuple[str, ...] | None = None) -> FeatureReport:
    """The report on the features of a file, and of test images in another one.

    Args:
        path: arrays features (N, d) and target (N,); of the last layer, if they are there, weight (C, d) and bias (C,).
        test: likewise; its last layer, if it has one, is not read.
        class_names: of the classes; None for their numbers, or for the array class_names of the file.

    Raises:
        UserError: files that cannot be read, or arrays that do not fit together.
    """
    files = {"train": FeatureFile(path)}
    if test is not None:
        files["test"] = FeatureFile(test, option="--test-features")
        if files["test"].width != files["train"].width:
            raise UserError(
                f"--test-features {test} has {files['test'].width} dimensions, --features {path} "
                f"{files['train'].width}: they are of two layers"
            )
    head = _head(files["train"])
    classes = max(2, *(int(file.target.max()) + 1 for file in files.values()))
    if head is not None:
        if classes > len(head.weight):
            raise UserError(f"--features {path}: weight has {len(head.weight)} rows, target goes up to {classes - 1}")
        classes = len(head.weight)
    names = class_names or _names(files["train"]) or tuple(map(str, range(classes)))
    if len(names) < classes:
        raise UserError(f"--class-names has {listed(names)} names for {classes} classes: one for each")
    measured: list[MeasuredSplit] = []
    for name, file in files.items():
        seen = Seen(file, None if head is None else _decisions(file, head, len(names)))
        train = measured[0].collapse if measured else None
        measured.append(measure_split(name, seen, names, head, train=train))
    facts = [f"{len(file)} {name} features of {file.width} dimensions from {file.path}" for name, file in files.items()]
    if head is None:
        facts.append("The file holds no array weight (C, d), so nothing is said of a last layer and its decisions.")
    if head is None and 0 < (first := min(int(file.target.min()) for file in files.values())):
        facts.append(f"No feature is of class {', '.join(map(str, range(min(first, 3))))}: labels begin at {first}.")
        print(f"note: labels of --features begin at {first}: class 0 has no samples", file=sys.stderr)
    result = {name.name: name.record for name in measured}
    text = page(measured, names, head, title=path.name, facts=facts)
    return FeatureReport({"features": str(path), "report": result}, text, _table(measured))


def _head(file: FeatureFile) -> Layer | None:
    """The last layer in a file; None where it holds no weight."""
    weight, bias = file.array("weight"), file.array("bias")
    if weight is None:
        if bias is not None:
            raise UserError(f"--features {file.path} has an array bias but no weight: add it, or leave both out")
        return None
    if weight.ndim != 2 or weight.shape[1] != file.width or weight.dtype.kind != "f":
        got = f"{weight.dtype} {weight.shape}"
        raise UserError(f"--features {file.path}: weight must be floating point (C, {file.width}), it is {got}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype.kind != "f"):
        raise UserError(
            f"--features {file.path}: bias must be floating point ({len(weight)},), it is {bias.dtype} {bias.shape}"
        )
    tensors = [None if array is None else torch.from_numpy(array.astype(np.float64)) for array in (weight, bias)]
    assert tensors[0] is not None
    return Layer(tensors[0], tensors[1])


def _names(file: FeatureFile) -> tuple[str, ...] | None:
    found = None
    with suppress(UserError):  # an array of objects is not read
        found = file.array("class_names")
    return None if found is None or found.dtype.kind != "U" else tuple(map(str, found))


def _decisions(file: FeatureFile, head: Layer, num_classes: int) -> Decisions:
    decisions = Decisions(num_classes)
    for rows, target in file:
        decisions.add(affine_logits(head, rows), target)
    return decisions


def _table(measured: list[MeasuredSplit]) -> str:
    """The measures of each split beside each other."""
    lines = [f"{'':<38}" + "".join(f"{part.name:>14}" for part in measured)]
    lines.append(f"{'features':<38}" + "".join(f"{part.record['images']:>14}" for part in measured))
    for label, split, key, form in ROWS:
        values = [part.record["measures"].get(key) for part in measured]
        if split == "train" and None not in values:
            name = "accuracy" if key == "accuracy" else label
            lines.append(f"{name:<38}" + "".join(f"{shown(value, form):>14}" for value in values))
    return "\n".join(lines)
