"""Classify images with a trained run: a line of CSV, or an item of a JSON list, for each image.

    python recipes/predict.py RUN image.png folder_of_images/
    python recipes/predict.py RUN folder_of_images/ --format json --out predictions.json

RUN is a run folder of recipes/train.py, or one of its checkpoint files. Files that are not
readable images are named at the end, and the exit code is then 2; the others have their rows.
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

from recipes.core.script import Parser, run_script


def _parser() -> Parser:
    parser = Parser(
        "predict.py", __doc__, usage="predict.py RUN IMAGE ... [--OPTION VALUE ...]", former={"--output": "--out"}
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, or one of its checkpoint files")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.option("--format", choices=("csv", "json"), default="csv", help="default: csv")
    parser.option("--out", type=Path, metavar="FILE", help="file to write; default: the terminal")
    parser.option("--checkpoint", metavar="NAME", help="last, onset, best or previous; default: the newest whole one")
    parser.option("--device", default="auto", metavar="NAME", help="cpu, cuda, ...; default: auto")
    return parser


def predict(argv: Sequence[str]) -> None:
    """Classify, and write the rows."""
    args = _parser().parse(argv)
    from recipes.evaluation import predictions  # seconds: torch is imported
    from recipes.evaluation.run_under_test import checkpoint_file, read_classifier

    source = args.run if args.checkpoint is None else checkpoint_file(args.run, args.checkpoint)
    model = read_classifier(source, args.device)
    rows, unreadable = predictions.predict(model, predictions.find_images(args.images))
    if rows:
        predictions.write_predictions(rows, args.format, args.out)
    predictions.check_all_read(unreadable, len(rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one line when the user has to change something, such as an unreadable image."""
    return run_script(predict, argv)


if __name__ == "__main__":
    sys.exit(main())
