"""Classify image files with a run, and write the probabilities as CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from ncreg.models import Classifier
from ncreg.numerics import at_least_float32
from recipes.core.errors import PARTIAL, UserError
from recipes.core.memory import check_fits
from recipes.data.decode import WRONG_IMAGE, has_more_pages, pages_notes
from recipes.data.image_folder import LOOKED_AT, hidden_images, image_files, other_files, read_image
from recipes.training.metrics import images_at_once

MOST_NAMED = 10
"""Files that an error names at most."""

PROBABILITY = 100
"""Bytes that one takes in a row, about."""

BYTES = "surrogateescape"
"""How names that are not UTF-8 are written: as the bytes that they are."""


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The image files given, and those in the folders given.

    Raises:
        UserError: a path that does not exist, or no image at all.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += image_files(path)
            if hidden := hidden_images(path):
                print(f"note: hidden images in {path} are left out ({hidden}): name them to have them", file=sys.stderr)
            if others := other_files(path):
                kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
                print(
                    f"note: files in {path} are left out ({kinds}), as folders are searched for "
                    f"{', '.join(IMG_EXTENSIONS)}: name them to have them",
                    file=sys.stderr,
                )
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"IMAGE {path} does not exist: give image files, or folders of them")
    if not found:
        raise UserError(f"no images ({', '.join(IMG_EXTENSIONS)}) in {', '.join(map(str, paths))}")
    return found


def notes_on_pages(files: Sequence[Path]) -> list[str]:
    """A sentence where a few dozen of the files tell that some hold several images, of which one is classified."""
    looked_at = files[:: max(1, len(files) // LOOKED_AT)]
    paged = []
    for file in looked_at:
        with suppress(*WRONG_IMAGE), Image.open(file) as opened:  # unreadable ones are left to `predict`
            paged += [file] if has_more_pages(opened) else []
    return pages_notes(paged, len(looked_at))


@torch.inference_mode()
def predict(model: Classifier, files: Sequence[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """File, predicted class, its probability, and the probability of every class, for each readable image.

    Beside these rows, a sentence on each file that is not a readable image.

    Raises:
        UserError: the probabilities would take more than half of the memory.
    """
    if model.image_shape is None or model.class_names is None:
        raise ValueError("model has no image_shape or class_names: take it from ncreg.load_classifier")
    check_fits(
        f"{len(files):,} images' probabilities of {len(model.class_names):,} classes",
        PROBABILITY * len(files) * len(model.class_names),
        "hand in fewer images at a time",
    )
    channels, _, side = model.image_shape
    like = next(model.parameters())
    batch = images_at_once(side, like.device, model.num_classes)
    rows: list[dict[str, Any]] = []
    unreadable: list[str] = []
    for start in range(0, len(files), batch):
        read: list[tuple[Path, torch.Tensor]] = []
        for file in files[start : start + batch]:
            try:
                read.append((file, read_image(file, side, channels)))
            except UserError as error:
                unreadable.append(str(error))
        if read:
            images = torch.stack([image for _, image in read]).to(like.device).float().div(255)
            probabilities = at_least_float32(model(images.to(like.dtype))).softmax(1).cpu()
            rows += [_row(file, row, model.class_names) for (file, _), row in zip(read, probabilities, strict=True)]
    return rows, unreadable


def check_all_read(unreadable: Sequence[str], rows: int) -> int:
    """The exit code: 0, or `PARTIAL` with a line on standard error that names the files without a row.

    Raises:
        UserError: no image is readable.
    """
    if not unreadable:
        return 0
    more = f"; and {len(unreadable) - MOST_NAMED} more" if len(unreadable) > MOST_NAMED else ""
    said = "; ".join(unreadable[:MOST_NAMED]) + more
    if not rows:
        raise UserError(said)
    print(f"error: {said}; the other {rows} images have their rows", file=sys.stderr)
    return PARTIAL


def _row(file: Path, probabilities: torch.Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    by_class = dict(zip(class_names, probabilities.tolist(), strict=True))
    best = class_names[int(probabilities.argmax())]
    return {"file": str(file), "class": best, "probability": by_class[best], "probabilities": by_class}


def write_predictions(rows: Sequence[dict[str, Any]], form: str, out: Path | None) -> None:
    """Write rows as csv or json into a file, or to the terminal without one.

    Raises:
        UserError: the file cannot be written.
    """
    if out is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", errors=BYTES)  # as in a file, whatever the terminal's is
        _write(rows, form, sys.stdout)
        return
    try:
        with out.open("w", newline="", encoding="utf-8", errors=BYTES) as file:
            _write(rows, form, file)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}") from None


def _write(rows: Sequence[dict[str, Any]], form: str, file: TextIO) -> None:
    """CSV with a header and a column p(NAME) for each class, or a JSON list."""
    if form == "json":
        json.dump(rows, file, indent=1)
        file.write("\n")
        return
    writer = csv.writer(file)
    classes = list(rows[0]["probabilities"])
    writer.writerow(["file", "class", "probability", *(f"p({name})" for name in classes)])
    for row in rows:
        writer.writerow([row["file"], row["class"], row["probability"], *row["probabilities"].values()])
