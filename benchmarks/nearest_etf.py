"""nearest_simplex_etf, forward and backward, for 10 to 1000 classes: time against one SVD, and peak memory.

Goal: C = 1000, d = 2048 in under 4 GiB.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.harness import parser, race, save
from ncreg.frames import etf_distance, nearest_simplex_etf

GOALS = ["C = 1000, d = 2048 in under 4 GiB"]
SIZES = [(10, 512), (100, 512), (1000, 2048)]


def contenders(num_classes: int, dim: int, device: str) -> dict[str, Callable[[], Any]]:
    """The closed form with and without its backward, the distance, and the bare SVD underneath."""
    means = torch.randn(num_classes, dim, device=device, requires_grad=True)
    upstream = torch.randn_like(means)
    fixed = means.detach()

    def backward() -> None:
        means.grad = None
        nearest_simplex_etf(means).backward(upstream)

    return {
        "svd in float64": lambda: torch.linalg.svd(fixed.double(), full_matrices=False),
        "nearest": lambda: nearest_simplex_etf(fixed),
        "nearest, forward and backward": backward,
        "etf_distance": lambda: etf_distance(fixed),
    }


def peak_gib(num_classes: int, dim: int, device: str) -> float:
    """Peak memory of one forward and backward, the process and its libraries included, in a process of its own."""
    command = [sys.executable, __file__, "--device", device, "--peak", str(num_classes), str(dim)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_peak(args: argparse.Namespace) -> None:
    """In the process of its own: run once, print GiB."""
    torch.set_num_threads(args.threads)
    num_classes, dim = args.peak
    contenders(num_classes, dim, args.device)["nearest, forward and backward"]()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(torch.cuda.max_memory_allocated() / 2**30 if args.device.startswith("cuda") else resident)


def main() -> None:
    """Race all sizes, measure memory and write the result file."""
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--peak", type=int, nargs=2, help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.peak:
        return measure_peak(args)
    torch.set_num_threads(args.threads)
    settings = []
    for num_classes, dim in SIZES:
        rounds = min(args.rounds, 5) if num_classes >= 1000 and args.device == "cpu" else args.rounds
        runs = contenders(num_classes, dim, args.device)
        results = race(runs, baseline="svd in float64", rounds=rounds, warmup=1, device=args.device)
        peak = peak_gib(num_classes, dim, args.device)
        settings.append({"num_classes": num_classes, "dim": dim, "peak_gib": peak, "results": results})
        for name, result in results.items():
            ratio, seconds = result["ratio"]["median"], result["seconds"]["median"]
            print(f"{num_classes:5d} {dim:5d} {name:30s} {seconds:.5f} s  x{ratio:.2f}  peak {peak:.2f} GiB")
    print(save("nearest_etf", settings, goals=GOALS, device=args.device, out=args.out))


if __name__ == "__main__":
    main()
