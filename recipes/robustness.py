"""Evaluate classifiers: attacks, corruptions, OOD, calibration, bits, transfer, long tails, noise.

    python recipes/robustness.py --quick                    # the newest finished run under runs/
    python recipes/robustness.py RUN RUN --parts adversarial,calibration --split val
    python recipes/robustness.py timm:resnet50 --weights mine.pth --data.name digits

A MODEL is a run folder of recipes/train.py; timm:NAME or torchvision:NAME, with --weights FILE or
pretrained; a folder that fold, save_pretrained or timm wrote; FILE.py:FUNCTION, a function that
returns a module. One that is no run needs data, by --data.KEY VALUE. Writes results.json and
figures into RUN/robustness, for other models into evaluations/MODEL/robustness, and prints a
table. An evaluation whose result is there already does not run again. docs/robustness.md explains
the numbers.
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

from recipes.core.errors import UserError
from recipes.core.script import INTERRUPTED, leave_with, run_script, take_keys
from recipes.evaluation.model_options import model_options
from recipes.evaluation.options import parse_options, settings_of


def evaluate(argv: Sequence[str]) -> int:
    """Evaluate run after run, and print their tables."""
    overrides, rest = take_keys(argv, "data")
    args = parse_options(rest, __doc__)
    settings, options = settings_of(args), model_options(args)
    from recipes.data.unreadable import offering_skip
    from recipes.evaluation.console_table import table
    from recipes.evaluation.model_under_test import is_run
    from recipes.evaluation.run import evaluate_run  # seconds: torch is imported

    try:
        for run in args.runs or [newest_run(Path("runs"))]:
            with offering_skip(not is_run(Path(run))):
                result, folder = evaluate_run(
                    run,
                    settings,
                    evaluations=args.parts,
                    checkpoint=args.checkpoint,
                    split=args.split,
                    out=args.out,
                    device=args.device,
                    fresh=args.fresh,
                    options=options,
                    overrides=overrides,
                    command=["recipes/robustness.py", *argv],
                    quiet=args.quiet,
                )
            print(table(result, args.parts), flush=True)
            print(f"all of it: {folder / 'results.json'} (docs/robustness.md explains the numbers)\n", flush=True)
    except KeyboardInterrupt:
        print("stopped: the parts that are done are kept, the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    return 0


def newest_run(out: Path) -> Path:
    """The newest finished run in a folder.

    Raises:
        UserError: there is none.
    """
    finished = [path.parent for path in out.glob("*/summary.json")]
    if not finished:
        raise UserError(f"no finished run in {out}: give a run folder, or make one with `python recipes/train.py etf`")
    return max(finished, key=lambda path: (path / "summary.json").stat().st_mtime_ns)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 with one line when the user has to change something, 130 when stopped by hand."""
    return run_script(evaluate, argv)


if __name__ == "__main__":
    leave_with(main)
