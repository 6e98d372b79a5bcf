"""Does the standard AutoAttack find more than the shorter suite of the study heads_and_losses?

    python benchmarks/studies/standard_attack.py --runs RUNS [--arms etf default --seeds 0 1 2] [--workers 2]

The study attacks with the first two of AutoAttack's four, APGD on cross-entropy and targeted APGD. Here the same runs,
on the same test images and at the same radius, go through all four (targeted FAB and Square after them). RUNS is the
folder that the study's runs are in. Writes benchmarks/results/studies/standard_attack-cpu.json: for each run the
fraction of images that withstand each attack, and the accuracy that the study reports.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from benchmarks import harness
from ncreg.robustness import autoattack
from recipes.evaluation.run_under_test import RunUnderTest

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "benchmarks" / "studies" / "heads_and_losses" / "results.json"


def attacked(folder: Path, arm: str, seed: int, known: dict[str, Any], threads: int) -> dict[str, Any]:
    """One run under the standard suite, on the images that the study attacked."""
    torch.set_num_threads(threads)
    (run,) = (path.parent for path in folder.glob("*/summary.json"))
    tested = RunUnderTest.open(run, device="cpu", seed=known["seed"])
    images, target = tested.images(tested.held_out(known["images"]))
    found = autoattack(tested.model, images, target, epsilon=known["epsilon"], norm=known["norm"], seed=known["seed"])
    row = {"arm": arm, "seed": seed, "images": len(images), "epsilon": known["epsilon"], "norm": known["norm"]}
    left = {name: float(mask.double().mean()) for name, mask in found.after.items()}
    low, high = found.interval
    study = known["headline"]["accuracy"]
    clean = float(found.clean_correct.double().mean())
    return row | {"clean": clean, "after": left, "standard": found.accuracy, "low": low, "high": high, "study": study}


def main() -> None:
    """Attack and save."""
    parser = harness.parser("The standard AutoAttack on runs of heads_and_losses.", rounds=1)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the study's runs")
    parser.add_argument("--arms", nargs="+", default=["baseline", "etf", "default"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="processes, of --threads each")
    args = parser.parse_args()
    content = json.loads(STUDY.read_text())
    jobs = []
    for cell in content["cells"]:
        if cell["arm"] in args.arms and cell["seed"] in args.seeds:
            known = content["runs"][cell["key"]]["robustness"]["last"]["parts"]["adversarial"]
            jobs.append((args.runs / cell["key"], cell["arm"], cell["seed"], known, args.threads))
    if not jobs:
        parser.error(f"no run of {STUDY.parent.name} has an arm of {args.arms} and a seed of {args.seeds}")
    # a fork would copy torch's pool of threads without its threads, and may hang
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(attacked, *zip(*jobs, strict=True)))
    goals = ["the four attacks of the standard suite leave what the first two of them leave, in every arm alike"]
    (args.out / "studies").mkdir(parents=True, exist_ok=True)
    print(harness.save("studies/standard_attack", rows, goals=goals, device=args.device, out=args.out))


if __name__ == "__main__":
    main()
