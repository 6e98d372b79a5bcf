"""The command line of recipes/robustness.py, also for studies that evaluate their runs; torch is not needed for it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from recipes.core.errors import UserError
from recipes.core.script import Parser
from recipes.core.suggestions import did_you_mean
from recipes.evaluation.model_options import MODEL_HELP, add_model_options
from recipes.evaluation.presets import EVALUATION_NAMES, PRESETS, SPLITS, Settings


def parse_options(argv: Sequence[str], doc: str | None = None) -> argparse.Namespace:
    """The values of a command line; `doc` is shown by --help.

    Raises:
        UserError: an unknown option, or a value that it cannot have.
    """
    args = _parser(doc).parse(argv)
    args.parts = _names(args.parts)
    for name in args.parts:
        if name not in EVALUATION_NAMES:
            near = did_you_mean(name, EVALUATION_NAMES)
            raise UserError(f"--parts {name} is unknown: one of {', '.join(EVALUATION_NAMES)}{near}")
    args.sets = None if args.sets is None else tuple(_names(args.sets))
    if args.sets:
        from recipes.data.load import check_set  # takes seconds to import, and few command lines need it

        for name in args.sets:
            check_set("--sets ", name)
    if args.cost is not None and "adversarial" not in args.parts:
        raise UserError(f"--cost {args.cost}: the part adversarial alone uses it, and --parts leaves it out")
    if args.out is not None:
        check_name(args.out)
    if args.quick:
        args.preset = "quick"
    return args


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings of an evaluation that a command line asks for.

    Raises:
        UserError: a value out of range.
    """
    return Settings.create(
        PRESETS[args.preset],
        norm=args.norm,
        epsilon=args.epsilon,
        seed=args.seed,
        sets=args.sets,
        root=args.root,
        attacked=args.attacked,
        cost=args.cost,
    )


def _parser(doc: str | None) -> Parser:
    parser = Parser("robustness.py", doc, usage="robustness.py [MODEL ...] [--data.KEY VALUE ...] [--OPTION VALUE ...]")
    parser.add_argument(
        "runs", nargs="*", metavar="MODEL", help=f"{MODEL_HELP}; default: the newest finished run under runs/"
    )
    parser.option("--preset", choices=tuple(PRESETS), default="full", help="numbers of images; default: full")
    parser.flag("--quick", help="the same as --preset quick")
    parser.option(
        "--parts",
        default=",".join(EVALUATION_NAMES),
        metavar="NAMES",
        help=f"evaluations to run, with commas between them; default: all, {', '.join(EVALUATION_NAMES)}",
    )
    parser.option("--checkpoint", default="last", metavar="NAME", help="last, onset, best or previous; default: last")
    parser.option(
        "--split",
        choices=tuple(SPLITS),
        default="test",
        help="split of the data to evaluate on; with val no test image is used; default: test",
    )
    parser.option(
        "--epsilon",
        type=number,
        metavar="X",
        help="radius of the attacks in units of [0, 1], e.g. 8/255; default: 4/255 for linf, 0.5 for l2",
    )
    parser.option("--norm", choices=("linf", "l2"), default="linf", help="of the attacks; default: linf")
    parser.option(
        "--attacked", type=int, metavar="N", help="images that the attacks run on; default: the preset's number"
    )
    parser.option(
        "--cost",
        type=Path,
        metavar="FILE",
        help="of what mistakes cost, by class names (.csv, .yaml), for the part adversarial; default: the run's "
        "data.cost, if it has one",
    )
    parser.option(
        "--sets",
        metavar="NAMES",
        help="image sets for OOD and transfer, with commas between them, torchvision.NAME too; default: those that "
        "are available",
    )
    parser.option("--root", type=Path, default=Path("data"), metavar="PATH", help="their folder; default: data")
    parser.option("--seed", type=int, default=0, metavar="N", help="of every draw; default: 0")
    parser.option("--device", default="auto", metavar="NAME", help="cpu, cuda, ...; default: auto")
    parser.option(
        "--out",
        metavar="NAME",
        help="name of the folder of the results inside the run; default: robustness[-CHECKPOINT][-val]",
    )
    parser.flag(
        "--fresh", help="run the evaluations again; results of other settings, or damaged ones, are replaced as a whole"
    )
    parser.flag("--quiet", help="print the table alone")
    add_model_options(parser)
    return parser


def number(text: str) -> float:
    """A number, also written as a fraction: 8/255."""
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except ZeroDivisionError:
        raise ValueError(f"{text} divides by zero") from None


def folder_name(checkpoint: str, split: str) -> str:
    """Name of the results' folder inside a run: robustness, then the checkpoint and the split that are not usual.

    Example:
        >>> folder_name("onset", "val"), folder_name("last", "test")
        ('robustness-onset-val', 'robustness')
    """
    unusual = [word for word, usual in ((checkpoint, "last"), (split, "test")) if word != usual]
    return "-".join(["robustness", *unusual])


def check_name(name: str) -> None:
    """Refuse a name that is not that of a folder directly inside the run.

    Raises:
        UserError: such a name.
    """
    if name in ("", ".", "..") or Path(name).name != name:
        raise UserError(f"--out {name!r}: must be the name of a folder inside the run, such as robustness-2")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]
