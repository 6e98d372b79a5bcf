"""Does the standard AutoAttack find more than the shorter suite that the studies attack with?

    python benchmarks/studies/standard_attack.py --runs RUNS [--study attacks_alike --seeds 700 701 702 --images 200]

A study attacks with the first two of AutoAttack's four, APGD on cross-entropy and targeted APGD. Here the same runs, on
the same test images or the first of them, and at the same radius, go through all four (targeted FAB and Square after
them). RUNS is the folder that the study's runs are in. Writes benchmarks/results/studies/standard_attack-cpu.json for
heads_and_losses, standard_attack_STUDY-cpu.json for another study: for each run the fraction of images that withstand
each attack, and the accuracy that the study reports, on all of its images. The line at the end of each arm is how many
points the four find beyond the first two, mean over its runs. The file is written after every run, and runs that it
holds already, on as many images, are not attacked again: what was stopped goes on. Its machine and commit are those of
the last call.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from benchmarks import harness
from ncreg.robustness import autoattack
from recipes.evaluation.run_under_test import RunUnderTest

ROOT = Path(__file__).resolve().parents[2]
STUDIES = ROOT / "benchmarks" / "studies"
FIRST = "heads_and_losses"
GOALS = ["the four attacks of the standard suite leave what the first two of them leave, in every arm alike"]

Row = dict[str, Any]
Job = tuple[Path, Mapping[str, Any], Mapping[str, Any]]


def attacked(
    folder: Path, cell: Mapping[str, Any], known: Mapping[str, Any], *, count: int | None, threads: int
) -> Row:
    """One run under the standard suite, on the first `count` of the images that the study attacked."""
    torch.set_num_threads(threads)
    (run,) = (path.parent for path in folder.glob("*/summary.json"))
    tested = RunUnderTest.open(run, device="cpu", seed=known["seed"])
    images, target = (rows[:count] for rows in tested.images(tested.held_out(known["images"])))
    found = autoattack(tested.model, images, target, epsilon=known["epsilon"], norm=known["norm"], seed=known["seed"])
    row = {name: cell[name] for name in ("data", "arm", "seed")}
    row |= {"images": len(images), "epsilon": known["epsilon"], "norm": known["norm"]}
    left = {name: float(mask.double().mean()) for name, mask in found.after.items()}
    low, high = found.interval
    study = known["headline"]["accuracy"]
    clean = float(found.clean_correct.double().mean())
    return row | {"clean": clean, "after": left, "standard": found.accuracy, "low": low, "high": high, "study": study}


def jobs(folder: Path, study: str, arms: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """The runs of a study, each with its cell and what the study attacked it with."""
    content = json.loads((STUDIES / study / "results.json").read_text())
    cells = [cell for cell in content["cells"] if cell["arm"] in arms and cell["seed"] in seeds]
    if missing := [f"{cell['arm']} seed {cell['seed']}" for cell in cells if cell["key"] not in content["runs"]]:
        raise SystemExit(f"{study} has not run yet: {', '.join(missing)}")
    known = [content["runs"][cell["key"]]["robustness"]["last"]["parts"]["adversarial"] for cell in cells]
    return [(folder / cell["key"], cell, attack) for cell, attack in zip(cells, known, strict=True)]


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Which run was attacked, and how."""
    return tuple(row.get(name) for name in ("data", "arm", "seed", "images", "epsilon", "norm"))


def asked_for(job: Job, count: int | None) -> tuple[Any, ...]:
    """The `identity` of the row that a job will give."""
    _, cell, known = job
    images = known["images"] if count is None else min(count, known["images"])
    return identity({**cell, "images": images, "epsilon": known["epsilon"], "norm": known["norm"]})


def found_beyond(rows: Sequence[Row]) -> dict[str, float]:
    """Share of images of each arm that fall to the four attacks and not to the first two, mean over its runs.

    Example:
        >>> row = {"arm": "etf", "after": {"apgd-ce": 0.5, "apgd-t": 0.45}, "standard": 0.4375}
        >>> found_beyond([row, {**row, "standard": 0.45}])
        {'etf': 0.00625}
    """
    beyond: dict[str, list[float]] = {}
    for row in rows:
        beyond.setdefault(row["arm"], []).append(row["after"]["apgd-t"] - row["standard"])
    return {arm: round(fmean(shares), 6) for arm, shares in beyond.items()}


def main() -> None:
    """Attack and save."""
    parser = harness.parser("The standard AutoAttack on runs of a study.", rounds=None, device=False)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the study's runs")
    parser.add_argument("--study", default=FIRST, help=f"folder of its results.json beside this script; {FIRST}")
    parser.add_argument("--arms", nargs="+", default=["baseline", "etf", "default"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, help="the first of each run's attacked images; default: all")
    parser.add_argument("--workers", type=int, default=2, help="processes, of --threads each")
    args = parser.parse_args()
    chosen = jobs(args.runs, args.study, args.arms, args.seeds)
    if not chosen:
        parser.error(f"no run of {args.study} has an arm of {args.arms} and a seed of {args.seeds}")
    name = "studies/standard_attack" + ("" if args.study == FIRST else f"_{args.study}")
    written = args.out / f"{name}-cpu.json"
    rows: list[Row] = json.loads(written.read_text())["settings"] if written.is_file() else []
    held = {identity(row) for row in rows}
    coming = [job for job in chosen if asked_for(job, args.images) not in held]
    # a fork would copy torch's pool of threads without its threads, and may hang
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        attack = partial(attacked, count=args.images, threads=args.threads)
        for row in pool.map(attack, *zip(*coming, strict=True)) if coming else ():
            rows.append(row)
            harness.save(name, rows, goals=GOALS, out=args.out, script="studies/standard_attack")
    for arm, share in found_beyond(rows).items():
        print(f"{arm}: {100 * share:.2f} points more than the first two attacks")
    print(written)


if __name__ == "__main__":
    main()
