"""Classify images with a run or any classifier: a line of CSV, or of a JSON list, for each image.

    python recipes/predict.py RUN image.png folder_of_images/
    python recipes/predict.py timm:resnet50 folder_of_images/ --format json --out predictions.json

MODEL is a run folder of recipes/train.py, or one of its checkpoint files; timm:NAME or
torchvision:NAME, with --weights FILE or pretrained; a folder that fold, save_pretrained or timm
wrote; FILE.py:FUNCTION, a function that returns a module. Files that are not readable images are
named at the end, and the others have their rows.

Exit code: 0; 3 where some images have their rows and others are not readable; 2 where nothing is
written, because an argument is wrong or no image is readable.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
if __name__ == "__main__":
    from recipes.core.extras import require_recipes

    require_recipes()

from recipes.core.files import check_file
from recipes.core.script import Parser, leave_with, run_script
from recipes.evaluation.model_options import MODEL_HELP, add_model_options, model_options


def _parser() -> Parser:
    parser = Parser(
        "predict.py", __doc__, usage="predict.py MODEL IMAGE ... [--OPTION VALUE ...]", former={"--output": "--out"}
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.option("--format", choices=("csv", "json"), default="csv", help="default: csv")
    parser.option("--out", type=Path, metavar="FILE", help="file to write; default: the terminal")
    parser.option("--checkpoint", metavar="NAME", help="last, onset, best or previous; default: the newest")
    parser.option("--device", default="auto", metavar="NAME", help="cpu, cuda, ...; default: auto")
    add_model_options(parser, results=False)
    return parser


def predict(argv: Sequence[str]) -> int:
    """Classify, and write the rows; the exit code."""
    args = _parser().parse(argv)
    if args.out is not None:
        check_file(args.out, "--out")
    from recipes.evaluation import predictions  # seconds: torch is imported
    from recipes.evaluation.model_under_test import open_model, tell

    tested = open_model(
        args.model, model_options(args), checkpoint=args.checkpoint, device=args.device, needs_data=False
    )
    files = predictions.find_images(args.images)
    tell([*tested.notes, *predictions.notes_on_pages(files)])
    rows, unreadable = predictions.predict(tested.named(), files)
    if rows:
        predictions.write_predictions(rows, args.format, args.out)
    return predictions.check_all_read(unreadable, len(rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 3 where some images are not readable, or 2 when the user has to change something."""
    return run_script(predict, argv)


if __name__ == "__main__":
    leave_with(main)
