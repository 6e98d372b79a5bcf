"""Which backbone for my images: candidates scored by one pass of features, nothing trained.

    python recipes/rank_backbones.py timm:resnet18 timm:resnet50=mine.pth RUN --data.name mnist5k
    python recipes/rank_backbones.py candidates.yaml --data.name folder --data.root my_images

MODELS are what evaluate.py takes: run folders or their checkpoint files; timm:NAME or
torchvision:NAME, pretrained, NAME=FILE with the weights of a file, NAME=untrained with random ones;
folders that fold, save_pretrained or timm wrote; FILE.py:FUNCTION; a YAML list of these, where an
entry can also say image_size, mean, std and the like. --data.KEY VALUE names the images, by the
keys of recipes/train.py, with its rules for splits. Prints a table and writes rank_backbones.json,
.png and .svg. A candidate that fails is named; the others are scored all the same, and the exit
code is then 3. docs/robustness.md explains the scores.
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

from recipes.core.errors import PARTIAL, UserError
from recipes.core.files import check_folder, environment, file_name, path_of_its_own, write_json
from recipes.core.script import Parser, leave_with, run_script, take_keys
from recipes.evaluation.candidates import CANDIDATE_HELP, read_candidates


def _parser() -> Parser:
    parser = Parser(
        "rank_backbones.py", __doc__, usage="rank_backbones.py MODEL ... --data.KEY VALUE ... [--OPTION VALUE ...]"
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help=CANDIDATE_HELP)
    parser.option(
        "--split",
        choices=("val", "test"),
        default="val",
        help="images that the linear probe is judged on; default: val, so that test images choose nothing",
    )
    parser.option("--images", type=int, default=5000, metavar="N", help="of each split, at most; default: 5000")
    parser.option("--seed", type=int, default=0, metavar="N", help="of splits, draws and random weights; default: 0")
    parser.option("--device", default="auto", metavar="NAME", help="cpu, cuda, ...; default: auto")
    parser.option("--out-dir", type=Path, metavar="DIR", help="of the results; default: evaluations/rank-DATA")
    return parser


def rank(argv: Sequence[str]) -> int:
    """Score, write, print; the exit code."""
    overrides, rest = take_keys(argv, "data")
    args = _parser().parse(rest)
    if args.out_dir is not None:
        check_folder(args.out_dir, "--out-dir")
    if args.images < 1:
        raise UserError(f"--images {args.images}: must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed}: must be a whole number, not negative and below 2^32")
    candidates = read_candidates(args.models, seed=args.seed)
    from recipes.evaluation.backbone_ranking import rank_backbones  # seconds: torch is imported
    from recipes.evaluation.backbone_table import draw_ranking, ranking_table

    ranking = rank_backbones(
        candidates,
        overrides,
        held_out=args.split,
        images=args.images,
        seed=args.seed,
        device=args.device,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    out = args.out_dir or Path("evaluations") / f"rank-{file_name(ranking.data)}"
    out.mkdir(parents=True, exist_ok=True)
    path = path_of_its_own(out, "rank_backbones", {"data_keys": ranking.data_keys, "held_out": ranking.held_out})
    write_json(path, ranking.record() | {"environment": environment(["recipes/rank_backbones.py", *argv])})
    figure, _ = draw_ranking(ranking, path)
    for note in ranking.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{ranking_table(ranking)}\n\nall numbers: {path}; figure: {figure} and .svg")
    if not ranking.failed:
        return 0
    failed = f"{len(ranking.failed)} of {len(candidates)} candidates could not be scored"
    print(f"error: {failed}: {', '.join(ranking.failed)}", file=sys.stderr)
    return PARTIAL


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 3 where some candidates failed, or 2 when the user has to change something."""
    return run_script(rank, argv)


if __name__ == "__main__":
    leave_with(main)
