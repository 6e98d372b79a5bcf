"""What it takes that the C library gives freed memory back: forward passes and training steps with and without.

recipes have glibc keep freed blocks of up to 256 MiB (`keep_freed_memory`, recipes/core/memory.py). Here the same
passes run in three processes: glibc as it is, blocks of up to 32 MiB kept, and up to 256 MiB, by environment variables
that any program can be started with. Ratios are of times, to the last one; `peak` is the most memory that a process
held.

    python benchmarks/kept_memory.py [--rounds 5]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import harness

GOALS = ["blocks of up to 256 MiB kept: no setting is slower than with glibc as it is, by more than a twentieth"]
KEPT = "256 MiB"
CONTENDERS = {
    "glibc": {},
    "32 MiB": {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)},
    KEPT: {"MALLOC_MMAP_THRESHOLD_": str(2**28), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)},
}
SETTINGS = [
    ("test_resnet", 28, 128, True),
    ("resnet18", 32, 128, True),
    ("resnet50", 64, 64, True),
    ("tf_efficientnet_lite0", 64, 32, True),
    ("test_resnet", 28, 512, False),
    ("tf_efficientnet_lite0", 64, 128, False),
    ("tf_efficientnet_lite0", 224, 10, False),
    ("vit_tiny_patch16_224", 224, 10, False),
]
"""Backbone, side in pixels, images at once, whether it trains."""
BATCHES = 4


def serve(end: Connection, backbone: str, side: int, count: int, trains: bool) -> None:
    """In a process of its own: for each request `BATCHES` batches; at None the most memory held, in KiB."""
    import resource

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(backbone, num_classes=10).train(trains).to(memory_format=torch.channels_last)
    images = torch.rand(count, 3, side, side).contiguous(memory_format=torch.channels_last)
    target = torch.arange(count) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    while end.recv() is not None:
        for _ in range(BATCHES):
            with torch.set_grad_enabled(trains):
                loss = F.cross_entropy(model(images), target)
            if trains:
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        end.send(None)
    end.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables that processes started meanwhile have."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def ask(end: Connection, request: object) -> Any:
    """Send a request and wait for the answer."""
    end.send(request)
    return end.recv()


def setting(backbone: str, side: int, count: int, trains: bool, rounds: int) -> dict[str, Any]:
    """The same batches in a process of each kind."""
    ends, processes = {}, []
    for name, variables in CONTENDERS.items():
        ends[name], theirs = get_context("spawn").Pipe()
        with environment(variables):
            processes.append(
                get_context("spawn").Process(target=serve, args=(theirs, backbone, side, count, trains), daemon=True)
            )
            processes[-1].start()
    raced = harness.race({name: partial(ask, end, True) for name, end in ends.items()}, baseline=KEPT, rounds=rounds)
    for name, end in ends.items():
        raced[name]["peak"] = ask(end, None) * 1024
    for process in processes:
        process.join()
    return {"backbone": backbone, "side": side, "images": count, "trains": trains, "contenders": raced}


def main() -> None:
    """Race every setting and write benchmarks/results/kept_memory-cpu.json."""
    args = harness.parser(__doc__ or "", rounds=5, threads=False, device=False).parse_args()
    torch.set_num_threads(1)
    settings = [setting(*each, rounds=args.rounds) for each in SETTINGS]
    for found in settings:
        ratios = {name: round(result["ratio"]["median"], 2) for name, result in found["contenders"].items()}
        print(f"{found['backbone']:<24}{found['side']:>4} px, {'training' if found['trains'] else 'forward'}: {ratios}")
    print(harness.save("kept_memory", settings, goals=GOALS, out=args.out))


if __name__ == "__main__":
    main()
