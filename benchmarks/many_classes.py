"""Peak memory and time of a training step over very many classes, against nn.Linear, cross_entropy and SGD momentum.

Each contender runs in a process of its own: what its steps add to the process's resident memory is its peak. Times
stand beside those of the products that its step must make (B·C·d: three for nn.Linear, four for a learned head in
chunks, two for a code), measured in the same process, in the chunk's shape.

Goals at C = 10⁶, d = 512, B = 256: memory <= 1/3 for a learned head, <= 1/50 for a code; time <= 1.3 x the products.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.harness import parser, save, spread
from ncreg.functional import chunked_cross_entropy
from ncreg.heads import CodeHead

GOALS = [
    "learned head in chunks: peak memory <= 1/3 of nn.Linear + cross_entropy + SGD momentum at 10**6 classes",
    "code: peak memory <= 1/50 of it",
    "time <= 1.3 x the products that must be made",
]
CLASSES = (10**3, 10**4, 10**5, 10**6)
DIM, BATCH = 512, 256
ENTRIES = 2**21  # logits of a chunk by default
PRODUCTS = {"linear": 3, "chunked": 4, "chunked without momentum": 4, "code": 2}


def step_of(name: str, classes: int, device: str) -> tuple[Callable[[], Any], torch.Tensor]:
    """One training step, and the features whose gradient it makes."""
    features = torch.randn(BATCH, DIM, device=device, requires_grad=True)
    target = torch.randint(classes, (BATCH,), device=device)
    head: nn.Module = (
        CodeHead(DIM, classes, device=device)
        if name == "code"
        else nn.Linear(DIM, classes, device=device)  # LinearHead's draw in float64 would be the peak
    )
    learned, momentum = list(head.parameters()), 0.9 if name in ("linear", "chunked") else 0.0
    optimizer = torch.optim.SGD(learned, lr=0.1, momentum=momentum) if learned else None

    def step() -> None:
        features.grad = None
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)
        if name == "linear":
            loss = F.cross_entropy(head(features), target)
        else:
            loss = chunked_cross_entropy(features, head, target)
        loss.backward()
        if optimizer is not None:
            optimizer.step()

    return step, features


def product(classes: int, device: str) -> float:
    """Seconds of one product of B·C·d, from chunks of the loss's own shape: the median of three times forward."""
    chunk = min(classes, ENTRIES // BATCH)
    rows, features = torch.randn(chunk, DIM, device=device), torch.randn(BATCH, DIM, device=device)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(max(1, min(20, classes // chunk))):
            F.linear(features, rows)
        seconds.append((time.perf_counter() - start) / max(1, min(20, classes // chunk)) * classes / chunk)
    return statistics.median(seconds)


def resident() -> int:
    """The highest resident memory of this process so far, in bytes (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def alone(name: str, classes: int, rounds: int, threads: int) -> None:
    """One contender in this process; prints what was measured."""
    torch.set_num_threads(threads)
    small, _ = step_of(name, 1000, "cpu")
    small()  # what libraries take at their first call is not the step's
    before = resident()
    step, _ = step_of(name, classes, "cpu")
    step()
    seconds, products = [], []
    for _ in range(rounds):
        products.append(product(classes, "cpu"))
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"bytes": resident() - before, "seconds": seconds, "product_seconds": products}))


def measured(name: str, classes: int, rounds: int, threads: int) -> dict[str, Any]:
    """One contender in a fresh process."""
    words = [sys.executable, __file__, "--alone", name, "--classes", str(classes), "--rounds", str(rounds)]
    run = subprocess.run([*words, "--threads", str(threads)], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure every contender at every size and write the result file."""
    made = parser(__doc__.splitlines()[0], rounds=5, device=False)
    made.add_argument("--alone", help="(internal) one contender in this process")
    made.add_argument("--classes", type=int, nargs="+", default=CLASSES)
    args = made.parse_args()
    if args.alone:
        alone(args.alone, args.classes[0], args.rounds, args.threads)
        return
    settings = []
    for classes in args.classes:
        rounds = max(2, min(args.rounds, 2 * 10**6 // classes))
        results: dict[str, Any] = {}
        for name, products in PRODUCTS.items():
            found = measured(name, classes, rounds, args.threads)
            over = [a / (products * b) for a, b in zip(found["seconds"], found["product_seconds"], strict=True)]
            results[name] = {
                "bytes": found["bytes"],
                "seconds": spread(found["seconds"]),
                "over_products": spread(over),
            }
            memory = found["bytes"] / results["linear"]["bytes"]
            results[name]["memory_ratio"] = memory
            said = f"x{results[name]['over_products']['median']:.2f} of its products"
            print(
                f"{classes:8d} {name:26s} {found['bytes'] / 2**20:8.0f} MiB x{memory:.3f}  "
                f"{results[name]['seconds']['median']:.3f} s {said}",
                flush=True,
            )
        settings.append({"num_classes": classes, "dim": DIM, "batch": BATCH, "results": results})
    print(save("many_classes", settings, goals=GOALS, out=args.out))


if __name__ == "__main__":
    main()
