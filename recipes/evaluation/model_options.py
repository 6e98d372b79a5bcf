"""The options that say what a MODEL on a command line is and which images it takes; torch is not needed for them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from recipes.core.errors import UserError
from recipes.core.files import check_folder
from recipes.core.script import Parser

OTHER_MODELS = (
    "timm:NAME or torchvision:NAME; a folder that fold, save_pretrained or timm wrote; FILE.py:FUNCTION, a function "
    "that returns a module"
)
MODEL_HELP = f"a run folder or one of its checkpoint files; {OTHER_MODELS}"
"""What the word MODEL can be."""

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True)
class ModelOptions:
    """What a command line says of a model that is no run; None leaves it to the model.

    Attributes:
        weights: file of its weights.
        image_size: side of its images in pixels.
        channels: of its images.
        mean: of each channel, for images in [0, 1].
        std: likewise.
        interpolation: with which images are scaled.
        crop_pct: share of the scaled image that the crop keeps.
        num_classes: its outputs.
        class_names: of its outputs, in their order.
        classifier: path of its last layer.
        untrained: seed of random weights in place of pretrained ones.
        out_dir: folder of the results.
    """

    weights: Path | None = None
    image_size: int | None = None
    channels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    classifier: str | None = None
    untrained: int | None = None
    out_dir: Path | None = None

    def given(self) -> dict[str, Any]:
        """Those that were given, without `out_dir`, which every MODEL takes."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "out_dir"}
        return {name: value for name, value in values.items() if value is not None}


def add_model_options(parser: Parser, *, results: bool = True) -> None:
    """Add the options of `ModelOptions` to a script's command line, `--out-dir` where it writes `results`."""
    parser.option("--weights", type=Path, metavar="FILE", help="weights of MODEL; default: pretrained ones")
    parser.option("--image-size", type=int, metavar="N", help="side of MODEL's images; default: what MODEL says")
    parser.option("--channels", type=int, metavar="N", help="channels of MODEL's images; default: what MODEL says")
    parser.option("--mean", type=numbers, metavar="X,X,X", help="of its channels, images in [0, 1]; likewise")
    parser.option("--std", type=numbers, metavar="X,X,X", help="likewise")
    parser.option("--interpolation", choices=INTERPOLATIONS, help="with which images are scaled; likewise")
    parser.option("--crop-pct", type=float, metavar="X", help="share of the scaled image that is kept; likewise")
    parser.option("--num-classes", type=int, metavar="C", help="outputs of MODEL; default: those of its weights")
    parser.option("--class-names", metavar="NAMES", help="of its outputs, with commas, or a file with one a line")
    parser.option("--classifier", metavar="PATH", help="its last layer, such as head.fc, where it is not found")
    if results:
        parser.option("--out-dir", type=Path, metavar="DIR", help="of the results; default: RUN, or evaluations/MODEL")


def model_options(args: argparse.Namespace) -> ModelOptions:
    """The checked values of these options.

    Raises:
        UserError: a value out of range, or a folder that cannot take results.
    """
    values: Mapping[str, Any] = {item.name: getattr(args, item.name, None) for item in fields(ModelOptions)}
    for name, least in (("image_size", 1), ("channels", 1), ("num_classes", 1)):
        if values[name] is not None and values[name] < least:
            raise UserError(f"--{name.replace('_', '-')} {values[name]}: must be at least {least}")
    crop = values["crop_pct"]
    if crop is not None and not 0 < crop <= 1:
        raise UserError(f"--crop-pct {crop}: must be a share in (0, 1], such as 0.875")
    for name in ("mean", "std"):
        if values[name] is not None and not all(map(math.isfinite, values[name])):
            raise UserError(f"--{name} {values[name]}: must be finite numbers")
    if values["std"] is not None and min(values["std"]) <= 0:
        raise UserError(f"--std {values['std']}: must be positive")
    if values["out_dir"] is not None:
        check_folder(values["out_dir"], "--out-dir")
    return ModelOptions(**{**values, "class_names": read_names(values["class_names"])})


def numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between them.

    Example:
        >>> numbers("0.5,0.25")
        (0.5, 0.25)
    """
    return tuple(float(word) for word in text.split(","))


def read_names(text: str | None) -> tuple[str, ...] | None:
    """Class names of a file with one a line, or with commas between them.

    Raises:
        UserError: the file cannot be read, or a name comes twice.

    Example:
        >>> read_names("cat, dog")
        ('cat', 'dog')
    """
    if text is None:
        return None
    path = Path(text)
    try:
        words = path.read_text(encoding="utf-8-sig").splitlines() if path.is_file() else text.split(",")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class-names {text} cannot be read: {error}") from None
    names = tuple(word.strip() for word in words if word.strip())
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--class-names names {', '.join(twice[:5])} twice: each output needs a name of its own")
    if not names:
        raise UserError(f"--class-names {text!r} holds no name")
    return names
