"""Evaluate finished runs: adversarial, corruptions, out of distribution, calibration, transfer, long tail, noise.

    python recipes/robustness.py --quick                    # the newest finished run under runs/
    python recipes/robustness.py RUN RUN ... [--parts adversarial,calibration] [--checkpoint onset] [--split val]

Writes RUN/robustness/results.json and figures, prints a table. A part that is there already is not done again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])


from recipes.core.errors import UserError
from recipes.evaluation.console_table import table
from recipes.evaluation.presets import PRESETS, Settings
from recipes.evaluation.run import assess, parse


def newest(out: Path) -> Path:
    """The newest finished run.

    Raises:
        UserError: there is none.
    """
    finished = [path.parent for path in out.glob("*/summary.json")]
    if not finished:
        raise UserError(f"no finished run in {out}: give a run folder, or make one with `python recipes/train.py etf`")
    return max(finished, key=lambda path: (path / "summary.json").stat().st_mtime_ns)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0, or 2 with one line when something is to be put right, 130 when stopped by hand."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parse(argv)
        settings = Settings.made(
            PRESETS[args.preset],
            norm=args.norm,
            epsilon=args.epsilon,
            seed=args.seed,
            sets=args.sets,
            root=args.root,
            attacked=args.attacked,
        )
        for run in args.runs or [newest(Path("runs"))]:
            result, folder = assess(
                run,
                settings,
                parts=args.parts,
                checkpoint=args.checkpoint,
                split=args.split,
                out=args.out,
                device=args.device,
                fresh=args.fresh,
                command=["recipes/robustness.py", *argv],
                quiet=args.quiet,
            )
            print(table(result, args.parts))
            print(f"all of it: {folder / 'results.json'} (docs/robustness.md explains the numbers)\n")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the parts that are done are kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
