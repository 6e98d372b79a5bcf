"""Evaluate a run or any classifier: accuracy, calibration, collapse, and a page that explains them.

    python recipes/evaluate.py RUN
    python recipes/evaluate.py RUN --data.name folder --data.root my_images --split all
    python recipes/evaluate.py timm:resnet50 --weights mine.pth --data.name digits
    python recipes/evaluate.py --features train.npz --test-features test.npz

MODEL is a run folder of recipes/train.py, or one of its checkpoint files; timm:NAME or
torchvision:NAME, with --weights FILE or pretrained; a folder that fold, save_pretrained or timm
wrote; FILE.py:FUNCTION, a function that returns a module. --data.KEY VALUE names the data, by the
keys of recipes/train.py; a run has data of its own. Prints the table and writes
evaluation-DATA-SPLIT.json and .html into the run folder, for other models into evaluations/MODEL;
for other data the name also holds that of the folder and a checksum of the keys, and where a
file there has other --weights, --image-size or the like, a number.
docs/your_model_your_data.md explains it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
if __name__ == "__main__":
    from recipes.core.extras import require_recipes

    require_recipes()

from recipes.core.errors import UserError
from recipes.core.files import check_folder, path_of_its_own, write_atomically, write_json
from recipes.core.script import Parser, leave_with, run_script, take_keys
from recipes.evaluation.model_options import MODEL_HELP, ModelOptions, add_model_options, model_options


def _parser() -> Parser:
    parser = Parser(
        "evaluate.py",
        __doc__,
        usage="evaluate.py MODEL [--data.KEY VALUE ...] [--OPTION VALUE ...]",
        former={"--part": "--split"},
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    parser.option(
        "--split",
        choices=("train", "val", "test", "all"),
        default="test",
        help="split of the data; all: every image of other data, or all that the run had of its own; default: test",
    )
    parser.option("--checkpoint", metavar="NAME", help="last, onset, best or previous; default: the newest")
    parser.option("--device", default="auto", metavar="NAME", help="cpu, cuda, ...; default: auto")
    parser.option(
        "--cost", type=Path, metavar="FILE", help="of what mistakes cost, by class names (.csv, .yaml): measures it too"
    )
    parser.option("--layers", metavar="NAMES", help="inner layers to measure, with commas; all: the model's stages")
    parser.option(
        "--train-images",
        type=int,
        metavar="N",
        help="training images that the others are set against, at most; 0 for none, and no page; default: 50000",
    )
    parser.option("--features", type=Path, metavar="FILE", help="in place of MODEL: .npz, arrays features and target")
    parser.option("--test-features", type=Path, metavar="FILE", help="likewise, of test images")
    add_model_options(parser)
    return parser


def evaluate(argv: Sequence[str]) -> None:
    """Evaluate, write, print."""
    overrides, rest = take_keys(argv, "data")
    args = _parser().parse(rest)
    options = model_options(args)
    if (args.model is None) == (args.features is None):
        word = "one of the following arguments is required" if args.model is None else "give one of them alone"
        raise UserError(f"{word}: MODEL, --features FILE (--help lists the options)")
    if args.features is not None:
        _evaluate_features(args, options, overrides)
        return
    if args.test_features is not None:
        raise UserError("--test-features goes with --features: a MODEL computes its own")
    if args.train_images is not None and args.train_images < 0:
        raise UserError(f"--train-images {args.train_images}: must not be negative")
    from recipes.evaluation.accuracy import TRAIN_IMAGES, accuracy_table, evaluate_model, file_name
    from recipes.evaluation.model_under_test import open_model

    tested = open_model(args.model, options, overrides=overrides, checkpoint=args.checkpoint, device=args.device)
    check_folder(tested.home, "the folder of the results,")
    found = evaluate_model(
        tested,
        split=args.split,
        overrides=overrides,
        layers=[name.strip() for name in args.layers.split(",")] if args.layers else (),
        cost=args.cost,
        train_images=TRAIN_IMAGES if args.train_images is None else args.train_images,
    )
    settings = {key: value for key, value in options.given().items() if key != "weights"}
    about = {
        "run": tested.word,
        "weights": options.weights,
        "model_options": json.loads(json.dumps(settings)) if settings else None,
    }
    name, home = file_name(found.result, tested), tested.home
    own = tested.is_run and options.out_dir is None
    path = home / f"{name}.json" if own else path_of_its_own(home, name, about)
    home.mkdir(parents=True, exist_ok=True)
    said = {} if options.weights is None else {"weights": str(options.weights)}
    write_json(path, found.result | said | ({"model_options": about["model_options"]} if settings else {}))
    if found.page:
        write_atomically(path.with_suffix(".html"), found.page)
    print(accuracy_table(found.result))  # after all files: its reader may go away, as `head` does
    print(f"\nmore measures and the confusion matrix: {path} (docs/metrics.md explains them)")
    if found.page:
        print(f"what they mean, with figures: {path.with_suffix('.html')}")


def _evaluate_features(args: argparse.Namespace, options: ModelOptions, overrides: Sequence[str]) -> None:
    """Evaluate features alone."""
    for word in overrides:
        raise UserError(f"{word.partition('=')[0]} with --features: the file holds the data")
    taken = {name: getattr(args, name) for name in ("layers", "checkpoint", "train_images", "cost")} | options.given()
    for name, value in taken.items():
        if value is not None and name != "class_names":
            raise UserError(f"--{name.replace('_', '-')} with --features: it needs a model")
    from recipes.evaluation.features_alone import evaluate_features

    out = options.out_dir or Path("evaluations") / args.features.stem
    check_folder(out, "the folder of the results,")
    found = evaluate_features(args.features, args.test_features, class_names=options.class_names)
    out.mkdir(parents=True, exist_ok=True)
    path = path_of_its_own(out, "features", {"features": args.features})
    write_json(path, found.result)
    write_atomically(path.with_suffix(".html"), found.page)
    print(found.table)
    print(f"\nmore measures: {path}\nwhat they mean, with figures: {path.with_suffix('.html')}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one line when the user has to change something."""
    return run_script(evaluate, argv)


if __name__ == "__main__":
    leave_with(main)
