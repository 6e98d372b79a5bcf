"""Classify images with a finished run: a line of CSV (or a JSON list) with the probabilities of each image.

python recipes/predict.py RUN image.png folder_of_images/ [--format json] [--output predictions.csv]
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from ncreg.models import Classifier
from recipes.core.errors import UserError
from recipes.data.image_folder import hidden_images, image_files, read_image
from recipes.evaluate import from_run
from recipes.training.metrics import BATCH

SHOWN = 10  # files named that cannot be read
BYTES = "surrogateescape"
"""How names that are not UTF-8 are written: as the bytes that they are."""


def files_of(paths: Sequence[Path]) -> list[Path]:
    """The images named, and those in the folders named."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += image_files(path)
            if hidden := hidden_images(path):
                print(f"note: hidden images in {path} are left out ({hidden}): name them to have them", file=sys.stderr)
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path} does not exist")
    if not found:
        raise UserError(f"no images ({', '.join(IMG_EXTENSIONS)}) in {', '.join(map(str, paths))}")
    return found


@torch.inference_mode()
def predict(model: Classifier, files: Sequence[Path]) -> list[dict[str, Any]]:
    """File, predicted class, its probability, and the probability of every class."""
    if model.image_shape is None or model.class_names is None:
        raise ValueError("model has no image_shape or class_names: take it from ncreg.load_classifier")
    channels, _, side = model.image_shape
    parameter = next(model.parameters())
    rows: list[dict[str, Any]] = []
    refused: list[str] = []
    for start in range(0, len(files), BATCH):
        chunk, read = files[start : start + BATCH], []
        for file in chunk:
            try:
                read.append(read_image(file, side, channels))
            except UserError as error:  # the rest is looked at, so that all that is wrong is said at once
                refused.append(str(error))
        if refused:
            continue
        images = torch.stack(read)
        shares = model(images.to(parameter.device).float().div(255)).softmax(1).cpu()
        for file, row in zip(chunk, shares, strict=True):
            probabilities = dict(zip(model.class_names, row.tolist(), strict=True))
            best = model.class_names[int(row.argmax())]
            chosen = {"file": str(file), "class": best, "probability": probabilities[best]}
            rows.append({**chosen, "probabilities": probabilities})
    if refused:
        more = f"; and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
        raise UserError("; ".join(refused[:SHOWN]) + more)
    return rows


def write(rows: Sequence[dict[str, Any]], form: str, file: TextIO) -> None:
    """Rows as CSV with a header (a column p(NAME) a class), or as a JSON list."""
    if form == "json":
        json.dump(rows, file, indent=1)
        file.write("\n")
        return
    writer = csv.writer(file)
    classes = list(rows[0]["probabilities"])
    writer.writerow(["file", "class", "probability", *(f"p({name})" for name in classes)])
    for row in rows:
        writer.writerow([row["file"], row["class"], row["probability"], *row["probabilities"].values()])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0, or 2 with one line when something is to be put right."""
    parser = argparse.ArgumentParser(prog="predict.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, help="a run folder of recipes/train.py")
    parser.add_argument("images", type=Path, nargs="+", help="image files, or folders of them")
    parser.add_argument("--format", choices=("csv", "json"), default="csv")
    parser.add_argument("--output", type=Path, help="file to write; without it, to the terminal")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    try:
        rows = predict(from_run(args.run, args.device), files_of(args.images))
        if args.output is None:
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(errors=BYTES)
            write(rows, args.format, sys.stdout)
        else:
            with args.output.open("w", newline="", encoding="utf-8", errors=BYTES) as file:
                write(rows, args.format, file)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: output={args.output} cannot be written: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
