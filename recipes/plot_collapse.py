"""Plot the collapse of a run or any classifier: features and class means on the simplex.

    python recipes/plot_collapse.py RUN
    python recipes/plot_collapse.py RUN RUN --split test --images 300
    python recipes/plot_collapse.py timm:resnet50 --weights mine.pth --data.name digits

Of a run, features of the untrained model and of every checkpoint are stored in
RUN/collapse/features-SPLIT.npz; the figure RUN/collapse/simplex-SPLIT.png (and .svg, .pdf) is
made from them, and its points are in view-SPLIT.json. A MODEL that is no run (timm:NAME,
torchvision:NAME, a folder of a model, FILE.py:FUNCTION) is shown as it is, on data named by
--data.KEY VALUE; its figure goes into evaluations/MODEL/collapse. docs/compare.md explains the
figure.
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

from recipes.core.script import Parser, leave_with, run_script, take_keys
from recipes.evaluation.model_options import MODEL_HELP, add_model_options, model_options


def _parser() -> Parser:
    parser = Parser(
        "plot_collapse.py",
        __doc__,
        usage="plot_collapse.py MODEL ... [--data.KEY VALUE ...] [--OPTION VALUE ...]",
        former={"--part": "--split"},
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help=MODEL_HELP)
    parser.option(
        "--split",
        choices=("train", "val", "test", "all"),
        default="train",
        help="split of the data that the images are of; default: train",
    )
    parser.option(
        "--images",
        type=int,
        default=600,
        metavar="N",
        help="number of images, drawn in proportion to the classes; default: 600",
    )
    add_model_options(parser)
    return parser


def plot(argv: Sequence[str]) -> None:
    """Plot run after run, and say in words what the figures show."""
    overrides, rest = take_keys(argv, "data")
    args = _parser().parse(rest)
    options = model_options(args)
    from recipes.data.unreadable import offering_skip
    from recipes.evaluation.model_under_test import is_run
    from recipes.evaluation.simplex_plot import plot_run  # seconds: torch is imported

    for model in args.models:
        with offering_skip(not is_run(Path(model))):
            figure, words = plot_run(model, split=args.split, images=args.images, options=options, overrides=overrides)
        print(f"{figure}\n{words}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one line when the user has to change something."""
    return run_script(plot, argv)


if __name__ == "__main__":
    leave_with(main)
