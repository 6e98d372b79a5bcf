"""Clients with skewed labels: is a last BatchNorm, a fixed frame or local logit adjustment worth something there?

    python benchmarks/studies/federated.py [--workers 2]

Runs examples/federated.py, FedAvg over ten clients for 20 rounds, for every head (linear, cosine, etf), last norm
(none, layer, batch) and loss (cross-entropy, adjusted by the client's class counts) at Dirichlet parameters 0.05, 0.1
and 0.5, ten seeds each, which draw the test images, the division and the weights. Runs that are there already are not
made again. Writes benchmarks/results/studies/federated-cpu.json and the table in docs/evidence.md.

Rules, written before the first run. The rate of each of the 18 arms is the one of 0.02, 0.05, 0.1, 0.2 with the highest
mean accuracy on validation images (a fifth of the training images) at parameter 0.1 over seeds 500 to 502; the ten
seeds are 400 to 409. Measure: accuracy on 360 test images after the last round. Family: the five contrasts below at
each of the three parameters, fifteen paired t tests, Holm, 5 %. "better" or "worse" where the adjusted p is below 0.05,
else "not shown". A rate at an edge of its grid is named. Nothing else carries a claim.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch

from benchmarks import harness
from benchmarks.studies.cells import fill
from recipes.study.paired_tests import holm, paired_p, subtract, t_interval

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("federated_example", ROOT / "examples" / "federated.py")
assert spec is not None and spec.loader is not None
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)

ALPHAS = (0.05, 0.1, 0.5)
RATES, SEARCHED_AT = (0.02, 0.05, 0.1, 0.2), 0.1
SEARCH_SEEDS, SEEDS = range(500, 503), range(400, 410)
ROUNDS = 20
ARMS = [f"{head}, {norm}, {loss}" for head, norm, loss in product(example.HEADS, example.NORMS, ("plain", "adjusted"))]
CONTRASTS = {
    "last BatchNorm against no last norm": ("linear, batch, plain", "linear, none, plain"),
    "last BatchNorm against LayerNorm": ("linear, batch, plain", "linear, layer, plain"),
    "fixed frame against a learned head": ("etf, none, plain", "linear, none, plain"),
    "adjusted loss against cross-entropy": ("linear, none, adjusted", "linear, none, plain"),
    "last BatchNorm beside the adjusted loss": ("linear, batch, adjusted", "linear, none, adjusted"),
}


def run(job: tuple[str, float, int, float, bool]) -> float:
    """Accuracy of the shared model after the last round."""
    torch.set_num_threads(1)
    arm, alpha, seed, rate, validate = job
    head, norm, loss = arm.split(", ")
    settings = {"alpha": alpha, "seed": seed, "rate": rate, "validate": validate, "rounds": ROUNDS}
    return list(example.federated_averaging(head, norm, adjusted=loss == "adjusted", **settings))[-1]


def run_all(jobs: list[tuple[str, float, int, float, bool]], known: dict[str, float], path: Path, workers: int) -> None:
    """Add the accuracies of those jobs that are not known yet; the file holds what has ended."""
    missing = [job for job in jobs if str(job) not in known]
    # a fork would copy torch's pool of threads without its threads, and may hang
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for number, (job, found) in enumerate(zip(missing, pool.map(run, missing), strict=True), 1):
            known[str(job)] = found
            path.write_text(json.dumps(known, indent=0))
            print(f"[{number}/{len(missing)}] {job}: {found:.4f}", flush=True)


def chosen_rates(known: dict[str, float]) -> dict[str, float]:
    """Of each arm the rate with the highest mean validation accuracy; the lower of two equal ones."""
    mean = {
        (arm, rate): np.mean([known[str((arm, SEARCHED_AT, seed, rate, True))] for seed in SEARCH_SEEDS])
        for arm, rate in product(ARMS, RATES)
    }
    return {arm: max(RATES, key=lambda rate: mean[arm, rate]) for arm in ARMS}


def tests(accuracy: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """The fifteen contrasts: mean difference in points, interval, p and the word."""
    rows: list[dict[str, Any]] = []
    for name, alpha in product(CONTRASTS, ALPHAS):
        ours, theirs = CONTRASTS[name]
        differences = 100 * subtract(accuracy[str(alpha)][ours], accuracy[str(alpha)][theirs])
        low, high = t_interval(differences)
        p = paired_p(differences)
        rows.append({"contrast": name, "alpha": alpha, "difference": float(differences.mean()), "p": p})
        rows[-1] |= {"low": low, "high": high, "n": len(differences)}
    adjusted = holm({str(number): row["p"] for number, row in enumerate(rows)})
    for number, row in enumerate(rows):
        row["p_holm"] = adjusted[str(number)]
        shown = row["p_holm"] < 0.05
        row["verdict"] = ("better" if row["difference"] > 0 else "worse") if shown else "not shown"
    return rows


def table(content: dict[str, Any]) -> str:
    """The two tables of docs/evidence.md in Markdown."""
    lines = ["| contrast (points of accuracy) | " + " | ".join(f"alpha {alpha:g}" for alpha in ALPHAS) + " |"]
    lines += ["| --- " * (len(ALPHAS) + 1) + "|"]
    sign = {"better": " ▲", "worse": " ▼", "not shown": ""}
    for name in CONTRASTS:
        rows = [row for row in content["tests"] if row["contrast"] == name]
        cells = [f"{r['difference']:+.1f} [{r['low']:+.1f}, {r['high']:+.1f}]{sign[r['verdict']]}" for r in rows]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    lines += ["", "| head, last norm, loss | rate | " + " | ".join(f"alpha {alpha:g}" for alpha in ALPHAS) + " |"]
    lines += ["| --- " * (len(ALPHAS) + 2) + "|"]
    for arm in ARMS:
        values = [100 * np.array(content["accuracy"][str(alpha)][arm]) for alpha in ALPHAS]
        cells = [f"{value.mean():.1f} ± {value.std(ddof=1):.1f}" for value in values]
        lines.append(f"| {arm} | {content['rates'][arm]:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Search, run, test, save."""
    parser = harness.parser(
        "FedAvg with skewed labels: norms, heads, adjustment.", rounds=None, threads=False, device=False
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/federated.json"), help="accuracies that are known")
    args = parser.parse_args()
    args.runs.parent.mkdir(parents=True, exist_ok=True)
    known: dict[str, float] = json.loads(args.runs.read_text()) if args.runs.is_file() else {}
    searched = [(arm, SEARCHED_AT, seed, rate, True) for seed in SEARCH_SEEDS for arm in ARMS for rate in RATES]
    run_all(searched, known, args.runs, args.workers)
    rates = chosen_rates(known)
    compared = [(arm, alpha, seed, rates[arm], False) for seed in SEEDS for alpha in ALPHAS for arm in ARMS]
    run_all(compared, known, args.runs, args.workers)
    accuracy = {
        str(alpha): {arm: [known[str((arm, alpha, seed, rates[arm], False))] for seed in SEEDS] for arm in ARMS}
        for alpha in ALPHAS
    }
    search = {str(job): known[str(job)] for job in searched}
    content = {"rates": rates, "accuracy": accuracy, "tests": tests(accuracy), "search": search}
    goals = ["fifteen contrasts, Holm at 5 %; no direction was expected"]
    print(harness.save("studies/federated", [content], goals=goals, out=args.out))
    fill("federated", table(content))
    print(table(content))


if __name__ == "__main__":
    main()
