"""Evaluate a finished run: accuracy, each class, confusion, measures of collapse.

    python recipes/evaluate.py RUN [--part test] [--data.name folder --data.root my_images [--part all]]

Writes evaluation-<data>-<part>.json into the run folder and prints the table; <data> is the name of the set, and for
other data than the run's the name of its folder too and a checksum of the keys that say which data it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from ncreg.checkpoint import load_classifier
from ncreg.models import Classifier
from recipes.core.cli import parse
from recipes.core.config import DataConfig
from recipes.core.distributed import pick_device
from recipes.core.errors import UserError
from recipes.data.lazy_images import report_lost_workers
from recipes.data.load import in_memory_if_small, read_source, split_source
from recipes.data.split import Source, Split, concatenate
from recipes.training.metrics import BATCH, measure
from recipes.training.reporting import ROWS, shown
from recipes.training.run_dir import RunDir

OWN = {"train_size": None, "imbalance": 1.0, "label_noise": 0.0}
"""What the run did to its own training images, and its value for other data: nothing."""

WHICH = ("name", "root", "val_share", *OWN)
"""Keys of data that say which images of which set are evaluated."""

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
    for images, target in split.in_batches(BATCH):
        pairs = target * classes + model(images).argmax(1)
        counts += torch.bincount(pairs, minlength=classes * classes)
    return counts.view(classes, classes).cpu()


def evaluate(source: Path, *, part: str, overrides: Sequence[str], device: str) -> dict[str, Any]:
    """The evaluation of a run on a part of its own data, or of the data that `overrides` name."""
    model = from_run(source, device)
    config = parse(["--config", str(folder_of(source) / "config.yaml"), *overrides])
    side = model.image_shape[-1] if model.image_shape else 0
    data, other = _asked(config.data, overrides, part, side)
    found = read_source(data, lambda native: side)
    names = _fitting(model, found)
    if other and part == "all":
        split, notes = _everything(found, data), list(found.notes)
    else:
        split, notes = _part(found, data, part, seed=config.seed, other=other)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    split = split.to(next(model.parameters()).device)
    counts = confusion(model, split)
    shares = zip(names, counts.diagonal().tolist(), counts.sum(1).tolist(), strict=True)
    with warnings.catch_warnings():  # the table says so too
        warnings.filterwarnings("ignore", message=".*classes have no samples")
        measures = measure(model, split)
    return {
        "run": str(source),
        "data": data.name,
        "data_keys": keys_of(data),
        "part": part,
        "images": len(split),
        **measures,
        "per_class": {name: right / there if there else None for name, right, there in shares},
        "confusion": counts.tolist(),
    }


def _asked(config: DataConfig, overrides: Sequence[str], part: str, side: int) -> tuple[DataConfig, bool]:
    """The data that is asked for, and whether it is other than the run's own.

    Raises:
        UserError: a key that would do nothing.
    """
    given = {word.removeprefix("--data.").partition("=")[0] for word in overrides if word.startswith("--data.")}
    data, other = dataclasses.replace(config, batch_size=2), bool(given & {"name", "root"})  # any number of images do
    if "image_size" in given and data.image_size not in (None, side):
        raise UserError(
            f"data.image_size={data.image_size}: the run takes images of side {side}, all are brought to it"
        )
    if other and part == "all":
        for key in sorted(given & {"val_share", *OWN}):
            raise UserError(f"--data.{key} does nothing with --part all, which takes all images of other data; drop it")
    for key in OWN.keys() - given if other else ():
        setattr(data, key, OWN[key])
    return data, other


def _fitting(model: Classifier, source: Source) -> Sequence[str]:
    """The names of the classes, which are the model's too."""
    if source.class_names != model.class_names:
        raise UserError(f"classes differ: the run knows {model.class_names}, the data has {source.class_names}")
    channels = source.train.images.shape[1]
    if model.image_shape and channels != model.image_shape[0]:
        raise UserError(f"the run takes images of {model.image_shape[0]} channels, the data has {channels}")
    return source.class_names


def _everything(source: Source, config: DataConfig) -> Split:
    """All images of a set, whatever part they are in."""
    parts = [part for part in (source.train, source.val, source.test) if part is not None]
    return concatenate(in_memory_if_small(parts, config.memory_limit))


def _part(source: Source, config: DataConfig, part: str, *, seed: int, other: bool) -> tuple[Split, list[str]]:
    """A part of a set, or its parts together as the run had them, and what is to be known of it."""
    data = split_source(source, config, seed=seed)
    notes = list(data.notes)
    if other and part == "test" and data.test_drawn:
        notes.append("this data has no test part: a fifth was drawn; --part all takes every image")
    if part != "all":
        return getattr(data, part), notes
    made = ", ".join(f"data.{key}={getattr(config, key)}" for key, no in OWN.items() if getattr(config, key) != no)
    sizes = f"{len(data.train)} training, {len(data.val)} validation and {len(data.test)} test images"
    if made:
        notes.append(f"all is what the run had of its data, with {made}: {sizes}")
    return concatenate((data.train, data.val, data.test)), notes


def keys_of(config: DataConfig) -> dict[str, Any]:
    """The values that say which images these are, the folder by its whole path."""
    return {key: getattr(config, key) for key in WHICH} | {"root": str(config.root.resolve())}


def file_name(result: dict[str, Any], run: Path) -> str:
    """Where a result is written in its run folder: other data or another checkpoint has a name of its own."""
    keys, own = result["data_keys"], parse(["--config", str(folder_of(run) / "config.yaml")]).data
    mark = f"{zlib.crc32(json.dumps(keys).encode()):08x}"
    data = keys["name"] if keys == keys_of(own) else f"{keys['name']}-{Path(keys['root']).name}-{mark}"
    which = f"-{run.stem}" if run.suffix == ".pt" else ""
    return f"evaluation-{data}-{result['part']}{which}.json"


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
    lines += [f"{label:<38}{shown(result[key], form):>14}" for label, key, form in MEASURES]
    lines += ["", "accuracy of each class, lowest first, and what it is taken for most often:"]
    names = list(result["per_class"])
    for name, value in sorted(result["per_class"].items(), key=lambda item: 2 if item[1] is None else item[1]):
        row = list(result["confusion"][names.index(name)])
        row[names.index(name)] = 0
        rival = f"   {names[row.index(max(row))]} ({max(row)})" if max(row) else ""
        lines.append(f"  {name:<36}{'no image' if value is None else f'{value:.2%}':>14}{rival}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0, or 2 with one line when something is to be put right."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.epilog = "--data.KEY VALUE names other data, e.g. --data.name folder --data.root my_images"
    parser.add_argument("run", type=Path, help="a run folder of recipes/train.py, or one of its checkpoints")
    parser.add_argument("--part", choices=("train", "val", "test", "all"), default="test", help="all: every image of "
                        "other data; of the run's own data all that the run had; default: test")  # fmt: skip
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; default: auto")
    args, overrides = parser.parse_known_args(argv)
    try:
        strange = [word for word in overrides if word.startswith("--") and not word.startswith("--data.")]
        if strange:
            raise UserError(f"{strange[0]} is unknown: besides --part and --device, --data.KEY names other data")
        folder = folder_of(args.run)
        with report_lost_workers():
            result = evaluate(args.run, part=args.part, overrides=overrides, device=args.device)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    name = file_name(result, args.run)
    RunDir(folder).write(name, result)
    print(table(result))
    print(f"\nmore measures and the confusion matrix: {folder / name} (docs/metrics.md explains them)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
