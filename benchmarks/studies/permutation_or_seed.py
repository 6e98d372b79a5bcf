"""Fixed simplex: does it matter which class sits on which vertex, and more than the seed does?

    python benchmarks/studies/permutation_or_seed.py --work FOLDER

The rules, fixed before the first run:

- Recipe etf on 1,000 images of Fashion-MNIST, test_resnet, 12 epochs in batches of 50, cosine rate from 0.1 without a
  terminal phase. The frame is the same one in all runs (head_args.seed 600).
- Crossed: seeds 600 to 604 (images, first weights, order of batches) with five assignments of classes to vertices, the
  identity and four permutations drawn from numpy's generator of seed 600. 25 runs.
- Two-way analysis of variance of the test accuracy, one run a cell: accuracy = mean + seed + assignment + rest. The
  rest holds what assignment and seed do together. "The assignment matters" is said if its F test against the rest has
  p < 0.05, "is not shown to matter" otherwise; the same for the seed. Standard deviations are those of the variance
  components, a negative estimate counts as 0. No run is added after looking at results.
- All permutations of a simplex are congruent: a rotation of the features leads from one to another. So theory expects
  an assignment to do what another draw of the first weights does, and no more.

Resumable: every run leaves a folder in FOLDER. Writes benchmarks/results/studies/permutation_or_seed-cpu.json, and its
table between the marks of docs/evidence.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from scipy.stats import f as f_distribution

from benchmarks import harness
from benchmarks.studies.cells import fill
from recipes import train
from recipes.core.files import strict

ROOT = Path(__file__).resolve().parents[2]
CLASSES, FRAME_SEED, SEEDS, ASSIGNMENTS = 10, 600, range(600, 605), 5
WORDS = (
    *("etf", "--data.name=fashion_mnist", "--data.train_size=1000", "--data.batch_size=50", "--tpt.max_epochs=12"),
    *("--tpt.extend=null", "--optim.schedule=cosine", "--optim.lr=0.1", "--measure_size=200", "--device=cpu"),
)


def assignments() -> list[list[int]]:
    """The vertex of each class, for every assignment; the first is the identity."""
    generator = np.random.default_rng(FRAME_SEED)
    return [list(range(CLASSES)), *(generator.permutation(CLASSES).tolist() for _ in range(ASSIGNMENTS - 1))]


def accuracy(work: Path, seed: int, number: int) -> float:
    """Test accuracy of a run, trained if it is not there."""
    place = work / f"seed{seed}-assignment{number}"
    head = json.dumps({"seed": FRAME_SEED, "permutation": assignments()[number]})
    words = [*WORDS, f"--seed={seed}", f"--model.head_args={head}", f"--out={place}", "--quiet"]
    if not list(place.glob("*/summary.json")) and train.main(words) != 0:
        raise SystemExit(f"recipes/train.py {' '.join(words)} failed")
    (summary,) = place.glob("*/summary.json")
    return json.loads(summary.read_text())["at_end"]["test"]["accuracy"]


def two_way(table: np.ndarray) -> dict[str, Any]:
    """Analysis of variance of a table, seeds in rows and assignments in columns, one value a cell.

    Example:
        >>> found = two_way(np.array([[0.0, 1.0, 2.0], [1.0, 2.0, 3.1], [2.0, 3.0, 4.0]]))
        >>> found["seed"]["p"] < 1e-3, round(found["seed"]["sd"], 2)
        (True, 1.0)
    """
    rows, columns = table.shape
    mean = table.mean()
    effects = {"seed": table.mean(1) - mean, "assignment": table.mean(0) - mean}
    rest = table - mean - effects["seed"][:, None] - effects["assignment"]
    free = (rows - 1) * (columns - 1)
    rest_square = float((rest**2).sum() / free)
    found: dict[str, Any] = {"mean": float(mean), "rest": {"sd": rest_square**0.5, "freedom": free}}
    for (name, effect), repeats in zip(effects.items(), (columns, rows), strict=True):
        freedom = len(effect) - 1
        square = float(repeats * (effect**2).sum() / freedom)
        ratio = square / rest_square
        found[name] = {
            "sd": max(0.0, (square - rest_square) / repeats) ** 0.5,
            "F": ratio,
            "freedom": freedom,
            "p": float(f_distribution.sf(ratio, freedom, free)),
        }
    return found


def report(found: Mapping[str, Any]) -> str:
    """Rows of Markdown: standard deviation, F and p of each source of variance."""
    lines = ["| source | standard deviation, points | F | p | verdict |", "|---|---|---|---|---|"]
    for name in ("seed", "assignment"):
        part = found[name]
        verdict = "matters" if part["p"] < 0.05 else "is not shown to matter"
        test = f"{part['F']:.2f} ({part['freedom']}, {found['rest']['freedom']})"
        lines.append(f"| {name} | {100 * part['sd']:.2f} | {test} | {part['p']:.3f} | {verdict} |")
    return "\n".join([*lines, f"| rest | {100 * found['rest']['sd']:.2f} | | | |"])


def main() -> None:
    """Run what is missing and save."""
    parser = harness.parser("Variance of accuracy between seeds and between assignments.", rounds=None, device=False)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = np.array([[accuracy(args.work, seed, number) for number in range(ASSIGNMENTS)] for seed in SEEDS])
    found = {"seeds": list(SEEDS), "assignments": assignments(), "accuracy": table.tolist()} | two_way(table)
    fill("permutation_or_seed", report(found))
    goals = ["two sources of variance of the test accuracy, told apart by their F tests against the rest"]
    print(harness.save("studies/permutation_or_seed", strict([found]), goals=goals, out=args.out))


if __name__ == "__main__":
    main()
