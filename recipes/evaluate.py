"""Evaluate a finished run: accuracy, each class, confusion, measures of collapse.

    python recipes/evaluate.py RUN [--part test] [--data.name folder --data.root my_images [--part all]]

Writes evaluation-<data>-<part>.json into the run folder and prints the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from ncreg.checkpoint import load_classifier
from ncreg.models import Classifier
from recipes.build import pick_device
from recipes.config import UserError, parse
from recipes.data import load
from recipes.measure import BATCH, measure
from recipes.report import ROWS
from recipes.run_folder import RunFolder
from recipes.split import Split, joined
from recipes.unread import lost_workers_told

OWN = {"train_size": None, "imbalance": 1.0, "label_noise": 0.0}
"""What the run did to its own training images, and its value for other data: nothing."""

MEASURES = (
    ("accuracy", "accuracy", "{:.2%}"),
    ("cross-entropy (nats)", "loss", "{:.4f}"),
    *((label, key, form) for label, part, key, form in ROWS if part == "train" and key != "accuracy"),
)
"""What is printed: name, key in the result, form; the measures of collapse as at the end of a run."""


@torch.inference_mode()
def confusion(model: Classifier, split: Split) -> torch.Tensor:
    """Counts (C, C): row the true class, column the predicted one."""
    classes = model.num_classes
    counts = torch.zeros(classes * classes, dtype=torch.long, device=split.target.device)
    for images, target in split.in_turn(BATCH):
        pairs = target * classes + model(images).argmax(1)
        counts += torch.bincount(pairs, minlength=classes * classes)
    return counts.view(classes, classes).cpu()


def evaluate(source: Path, *, part: str, overrides: Sequence[str], device: str) -> dict[str, Any]:
    """The evaluation of a run on a part of its own data, or of the data that `overrides` name."""
    model = from_run(source, device)
    config = parse(["--config", str(folder_of(source) / "config.yaml"), *overrides])
    side = model.image_shape[-1] if model.image_shape else 0
    loose = dataclasses.replace(config.data, batch_size=2)  # any number of images will do here
    other = any(word.startswith(("--data.name", "--data.root")) for word in overrides)
    for key, none in OWN.items():
        if other and not any(word.startswith(f"--data.{key}") for word in overrides):
            setattr(loose, key, none)
    data = load(loose, seed=config.seed, image_size=lambda native: side)
    if data.class_names != model.class_names:
        raise UserError(f"classes differ: the run knows {model.class_names}, the data has {data.class_names}")
    channels = data.train.images.shape[1]
    if model.image_shape and channels != model.image_shape[0]:
        raise UserError(f"the run takes images of {model.image_shape[0]} channels, the data has {channels}")
    for note in data.notes:
        print(f"note: {note}", file=sys.stderr)
    if other and part == "test" and data.test_drawn:
        print("note: this data has no test part: a fifth was drawn; --part all takes every image", file=sys.stderr)
    split = joined((data.train, data.val, data.test)) if part == "all" else getattr(data, part)
    split = split.to(next(model.parameters()).device)
    counts = confusion(model, split)
    per_class = (counts.diagonal() / counts.sum(1).clamp_min(1)).tolist()
    return {
        "run": str(source),
        "data": config.data.name,
        "part": part,
        "images": len(split),
        **measure(model, split),
        "per_class": dict(zip(data.class_names, per_class, strict=True)),
        "confusion": counts.tolist(),
    }


def folder_of(source: Path) -> Path:
    """The run folder, also of one of its checkpoints.

    Raises:
        UserError: it is none.
    """
    folder = source.parent.parent if source.suffix == ".pt" else source
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run folder: it has no config.yaml")
    return folder


def from_run(source: Path, device: str) -> Classifier:
    """The classifier of a run folder."""
    try:
        return load_classifier(source, device=pick_device(device))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None


def table(result: dict[str, Any]) -> str:
    """The evaluation as lines to print."""
    lines = [f"{result['images']} images, {result['data']} {result['part']}"]
    lines += [f"{label:<38}{form.format(result[key]):>14}" for label, key, form in MEASURES]
    lines += ["", "accuracy of each class, lowest first, and what it is taken for most often:"]
    names = list(result["per_class"])
    for name, value in sorted(result["per_class"].items(), key=lambda item: item[1]):
        row = list(result["confusion"][names.index(name)])
        row[names.index(name)] = 0
        rival = f"   {names[row.index(max(row))]} ({max(row)})" if max(row) else ""
        lines.append(f"  {name:<36}{value:>14.2%}{rival}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0, or 2 with one line when something is to be put right."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.epilog = "--data.KEY VALUE names other data, e.g. --data.name folder --data.root my_images"
    parser.add_argument("run", type=Path, help="a run folder of recipes/train.py, or one of its checkpoints")
    parser.add_argument("--part", choices=("train", "val", "test", "all"), default="test",
                        help="all: every image of the set; default: test")  # fmt: skip
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; default: auto")
    args, overrides = parser.parse_known_args(argv)
    try:
        strange = [word for word in overrides if word.startswith("--") and not word.startswith("--data.")]
        if strange:
            raise UserError(f"{strange[0]} is unknown: besides --part and --device, --data.KEY names other data")
        folder = folder_of(args.run)
        with lost_workers_told():
            result = evaluate(args.run, part=args.part, overrides=overrides, device=args.device)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    which = f"-{args.run.stem}" if args.run.suffix == ".pt" else ""
    name = f"evaluation-{result['data']}-{args.part}{which}.json"
    RunFolder(folder).write(name, result)
    print(table(result))
    print(f"\nmore measures and the confusion matrix: {folder / name} (docs/metrics.md explains them)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
