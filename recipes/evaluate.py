"""Evaluate a trained run: accuracy, that of each class, confusions, measures of collapse.

    python recipes/evaluate.py RUN
    python recipes/evaluate.py RUN --data.name folder --data.root my_images --split all

RUN is a run folder of recipes/train.py, or one of its checkpoint files. --data.KEY VALUE names
other data than the run's own, by the keys of recipes/train.py. Prints the table and writes
evaluation-DATA-SPLIT.json into the run folder; for other data its name also holds that of the
folder and a checksum of the keys.
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

from recipes.core.files import write_json
from recipes.core.script import Parser, run_script, take_keys


def _parser() -> Parser:
    parser = Parser(
        "evaluate.py",
        __doc__,
        usage="evaluate.py RUN [--data.KEY VALUE ...] [--OPTION VALUE ...]",
        former={"--part": "--split"},
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, or one of its checkpoint files")
    parser.option(
        "--split",
        choices=("train", "val", "test", "all"),
        default="test",
        help="split of the data; all: every image of other data, or all that the run had of its own; default: test",
    )
    parser.option("--checkpoint", metavar="NAME", help="last, onset, best or previous; default: the newest whole one")
    parser.option("--device", default="auto", metavar="NAME", help="cpu, cuda, ...; default: auto")
    return parser


def evaluate(argv: Sequence[str]) -> None:
    """Evaluate, write, print."""
    overrides, rest = take_keys(argv, "data")
    args = _parser().parse(rest)
    from recipes.evaluation.accuracy import accuracy_table, evaluate_accuracy, file_name  # seconds: torch is imported
    from recipes.evaluation.run_under_test import checkpoint_file, run_dir_of

    folder = run_dir_of(args.run)
    source = args.run if args.checkpoint is None else checkpoint_file(args.run, args.checkpoint)
    result = evaluate_accuracy(source, split=args.split, overrides=overrides, device=args.device)
    path = folder / file_name(result, source)
    write_json(path, result)
    print(accuracy_table(result))
    print(f"\nmore measures and the confusion matrix: {path} (docs/metrics.md explains them)")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one line when the user has to change something."""
    return run_script(evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
