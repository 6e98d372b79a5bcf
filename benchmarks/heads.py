"""Forward and backward of every head against nn.Linear on the same features, paired.

Goals (CPU, B = 256): dense without normalisation ≤ 0.75; with it ≤ 0.85 at (1000, 2048) and ≤ 1.5 at (10, 512),
which is memory-bound; grouped ≤ 0.2 at (1000, 2048).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from benchmarks.harness import parser, race, save
from ncreg.heads import CosineHead, ETFHead

GOALS = [
    "dense without normalisation <= 0.75 x nn.Linear",
    "dense with normalisation <= 0.85 at (1000, 2048), <= 1.5 at (10, 512)",
    "grouped <= 0.2 at (1000, 2048)",
]
SIZES = [(10, 512), (100, 512), (1000, 2048)]
LARGE = 21_841  # classes of ImageNet-21k, for the head that needs no frame
BATCH = 256


def step(head: nn.Module, features: Tensor, upstream: Tensor) -> Callable[[], Any]:
    """One forward and backward, gradients written afresh."""

    def run() -> None:
        features.grad = None
        head.zero_grad(set_to_none=True)
        head(features).backward(upstream)

    return run


def contenders(num_classes: int, dim: int, place: dict[str, Any]) -> dict[str, nn.Module]:
    """nn.Linear and the heads that fit."""
    heads: dict[str, nn.Module] = {"linear": nn.Linear(dim, num_classes, **place)}
    if num_classes < LARGE:
        heads["dense"] = ETFHead(dim, num_classes, normalize=False, **place)
        heads["dense normalised"] = ETFHead(dim, num_classes, **place)
        heads["grouped normalised"] = ETFHead(dim, num_classes, structure="grouped", **place)
        heads["cosine"] = CosineHead(dim, num_classes, **place)
    else:
        heads["householder"] = ETFHead(dim, num_classes, structure="householder", normalize=False, **place)
        heads["householder normalised"] = ETFHead(dim, num_classes, structure="householder", **place)
    return heads


def main() -> None:
    """Race all sizes and write the result file."""
    args = parser(__doc__.splitlines()[0], rounds=100).parse_args()
    torch.set_num_threads(args.threads)
    dtypes = [torch.float32, torch.bfloat16] if args.device.startswith("cuda") else [torch.float32]
    settings = []
    for num_classes, dim in [*SIZES, (LARGE, LARGE - 1)]:
        for dtype in dtypes:
            place = {"device": args.device, "dtype": dtype}
            features = torch.randn(BATCH, dim, **place, requires_grad=True)
            upstream = torch.randn(BATCH, num_classes, **place)
            heads = contenders(num_classes, dim, place)
            runs = {name: step(head, features, upstream) for name, head in heads.items()}
            slow = args.device == "cpu" and num_classes >= 1000
            rounds = min(args.rounds, 3 if num_classes == LARGE else 20) if slow else args.rounds
            results = race(runs, baseline="linear", rounds=rounds, warmup=1 if slow else 5, device=args.device)
            size = {"num_classes": num_classes, "dim": dim, "batch": BATCH, "dtype": str(dtype)}
            settings.append(size | {"results": results})
            for name, result in results.items():
                ratio, seconds = result["ratio"], result["seconds"]["median"]
                print(f"{num_classes:6d} {dim:6d} {name:24s} {seconds:.6f} s  x{ratio['median']:.3f}")
    print(save("heads", settings, goals=GOALS, device=args.device, out=args.out))


if __name__ == "__main__":
    main()
