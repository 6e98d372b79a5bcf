"""Accuracy of a run on a split of its own data or of other data: of all images, of each class, and its confusions."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ncreg.models import Classifier
from recipes.core import files
from recipes.core.cli import parse
from recipes.core.config import DataConfig
from recipes.core.errors import UserError
from recipes.data.lazy_images import report_lost_workers
from recipes.data.load import in_memory_if_small, read_source, split_source
from recipes.data.split import Source, Split, concatenate
from recipes.evaluation.run_under_test import read_classifier, run_config, run_dir_of
from recipes.training.metrics import BATCH, measure
from recipes.training.reporting import ROWS, shown

UNCHANGED = {"train_size": None, "imbalance": 1.0, "label_noise": 0.0}
"""Keys of data that change the training images, and the values with which they change nothing."""

IDENTIFYING = ("name", "root", "val_share", *UNCHANGED)
"""Keys of data that say which images of which set are evaluated."""

MEASURES = (
    ("accuracy", "accuracy", "{:.2%}"),
    ("cross-entropy (nats)", "loss", "{:.4f}"),
    *((label, key, form) for label, split, key, form in ROWS if split == "train" and key != "accuracy"),
)
"""What is printed: label, key in the result, format; the measures of collapse as at the end of a run."""


def evaluate_accuracy(source: Path, *, split: str, overrides: Sequence[str], device: str) -> dict[str, Any]:
    """Accuracy, confusion matrix and measures of collapse of a run.

    Args:
        source: the run folder, or one of its checkpoint files.
        split: train, val, test or all.
        overrides: `--data.KEY VALUE` words that name other data than the run's own.
        device: of the classifier.

    Raises:
        UserError: no run folder, a key without effect, or data that does not fit the classifier.
    """
    model = read_classifier(source, device)
    config = parse(["--config", str(run_dir_of(source) / "config.yaml"), *overrides])
    side = model.image_shape[-1] if model.image_shape else 0
    data, is_other = _data_config(config.data, overrides, split, side)
    with report_lost_workers():
        data_set = read_source(data, lambda native: side, class_names=model.class_names)
        _check_fit(model, data_set)
        images, notes = _images(data_set, data, split, seed=config.seed, is_other=is_other)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        images = images.to(next(model.parameters()).device)
        counts = confusion(model, images)
        with warnings.catch_warnings():  # the table says so too
            warnings.filterwarnings("ignore", message=".*classes have no samples")
            measures = measure(model, images)
    by_class = zip(data_set.class_names, counts.diagonal().tolist(), counts.sum(1).tolist(), strict=True)
    return {
        "run": str(source),
        "data": data.name,
        "data_keys": _data_keys(data),
        "part": split,
        "images": len(images),
        **measures,
        "per_class": {name: right / total if total else None for name, right, total in by_class},
        "confusion": counts.tolist(),
    }


@torch.inference_mode()
def confusion(model: Classifier, split: Split) -> torch.Tensor:
    """Counts (C, C): row the true class, column the predicted one."""
    classes = model.num_classes
    counts = torch.zeros(classes * classes, dtype=torch.long, device=split.target.device)
    for images, target in split.in_batches(BATCH):
        pairs = target * classes + model(images).argmax(1)
        counts += torch.bincount(pairs, minlength=classes * classes)
    return counts.view(classes, classes).cpu()


def _data_config(config: DataConfig, overrides: Sequence[str], split: str, side: int) -> tuple[DataConfig, bool]:
    """The configuration of the data to evaluate, and whether it is other data than the run's own.

    Raises:
        UserError: a key that would do nothing.
    """
    given = {word.removeprefix("--data.").partition("=")[0] for word in overrides if word.startswith("--data.")}
    data = dataclasses.replace(config, batch_size=2)  # so that any number of images is enough
    is_other = bool(given & {"name", "root"})
    if "image_size" in given and data.image_size not in (None, side):
        raise UserError(
            f"data.image_size={data.image_size}: the run takes images of side {side}, all are brought to it"
        )
    if is_other and split == "all":
        for key in sorted(given & {"val_share", *UNCHANGED}):
            raise UserError(
                f"--data.{key} does nothing with --split all, which takes all images of other data; drop it"
            )
    for key in UNCHANGED.keys() - given if is_other else ():
        setattr(data, key, UNCHANGED[key])
    return data, is_other


def _check_fit(model: Classifier, source: Source) -> None:
    """Refuse data with other classes or channels than the classifier's."""
    if source.class_names != model.class_names:
        raise UserError(f"classes differ: the run knows {model.class_names}, the data has {source.class_names}")
    channels = source.train.images.shape[1]
    if model.image_shape and channels != model.image_shape[0]:
        raise UserError(f"the run takes images of {model.image_shape[0]} channels, the data has {channels}")


def _images(source: Source, config: DataConfig, split: str, *, seed: int, is_other: bool) -> tuple[Split, list[str]]:
    """The images to evaluate, and notes on how they came about."""
    if is_other and split == "all":
        splits = [images for images in (source.train, source.val, source.test) if images is not None]
        return concatenate(in_memory_if_small(splits, config.memory_limit)), list(source.notes)
    data = split_source(source, config, seed=seed)
    notes = list(data.notes)
    if is_other and split == "test" and data.test_drawn:
        notes.append("this data has no test part: a fifth was drawn; --split all takes every image")
    if split != "all":
        return getattr(data, split), notes
    values = {key: getattr(config, key) for key in UNCHANGED}
    changed = ", ".join(f"data.{key}={value}" for key, value in values.items() if value != UNCHANGED[key])
    sizes = f"{len(data.train)} training, {len(data.val)} validation and {len(data.test)} test images"
    if changed:
        notes.append(f"all is what the run had of its data, with {changed}: {sizes}")
    return concatenate((data.train, data.val, data.test)), notes


def _data_keys(config: DataConfig) -> dict[str, Any]:
    """The values that say which images were evaluated, with the folder as an absolute path."""
    return {key: getattr(config, key) for key in IDENTIFYING} | {"root": str(config.root.resolve())}


def file_name(result: dict[str, Any], source: Path) -> str:
    """Name of a result's file in its run folder; other data and other checkpoints have names of their own."""
    keys, own = result["data_keys"], _data_keys(run_config(source).data)
    checksum = f"{zlib.crc32(json.dumps(keys).encode()):08x}"
    data = keys["name"] if keys == own else f"{keys['name']}-{Path(keys['root']).name}-{checksum}"
    checkpoint = f"-{source.stem}" if source.suffix == ".pt" else ""
    return f"evaluation-{files.file_name(data)}-{result['part']}{checkpoint}.json"


def accuracy_table(result: dict[str, Any]) -> str:
    """The result as lines to print."""
    lines = [f"{result['images']} images, {result['data']} {result['part']}"]
    lines += [f"{label:<38}{shown(result[key], form):>14}" for label, key, form in MEASURES]
    lines += ["", "accuracy of each class, lowest first, and what it is taken for most often:"]
    names = list(result["per_class"])
    for name, value in sorted(result["per_class"].items(), key=lambda item: 2 if item[1] is None else item[1]):
        row = list(result["confusion"][names.index(name)])
        row[names.index(name)] = 0
        rival = f"   {names[row.index(max(row))]} ({max(row)})" if max(row) else ""
        lines.append(f"  {name:<36}{'no image' if value is None else f'{value:.2%}':>14}{rival}")
    return "\n".join(lines)
