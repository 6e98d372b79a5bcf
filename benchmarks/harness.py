"""Paired timing: every contender runs once a round in a shuffled order; ratios are taken within a round.

A machine that slows down slows all contenders of a round, so a ratio is trustworthy where a time is not.

A benchmark script builds zero-argument callables, calls `race` once per setting and `save` once at the end:

    python benchmarks/<name>.py [--rounds 30] [--device cpu]    writes benchmarks/results/<name>-<device>.json
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
SCHEMA = 1


def baseline_words(keys: Mapping[str, Any]) -> list[str]:
    """The command line of the recipe `baseline` with some keys of its own."""
    return ["baseline", *(word for key, value in keys.items() for word in (f"--{key}", str(value)))]


def parser(
    description: str, *, rounds: int | None = 30, threads: bool = True, device: bool = True
) -> argparse.ArgumentParser:
    """The arguments that benchmarks share; a script says which of them it has no use for, and they are refused."""
    made = argparse.ArgumentParser(description=description, allow_abbrev=False)
    if rounds is not None:
        made.add_argument("--rounds", type=int, default=rounds, help="paired rounds after the warm-up")
    if threads:
        made.add_argument("--threads", type=int, default=1, help="intra-op threads on CPU")
    if device:
        made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    return made


def _clock(run: Callable[[], Any], device: str, processor_time: bool = False) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    clock = time.process_time if processor_time and not device.startswith("cuda") else time.perf_counter
    start = clock()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return clock() - start


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles and count of a list of numbers."""
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q1": first, "q3": third, "n": len(values)}


def race(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    baseline: str,
    rounds: int,
    warmup: int = 3,
    device: str = "cpu",
    seed: int = 0,
    processor_time: bool = False,
) -> dict[str, dict[str, Any]]:
    """Time all contenders round by round; report seconds and the ratio to `baseline` of the same round.

    `processor_time` counts what this process computes, on a CPU: contenders of very different length on a busy
    machine, where the wall clock charges the longer one for the turns of other processes.
    """
    if rounds < 2:
        raise ValueError(f"rounds={rounds}: a spread needs at least 2")
    order, shuffle = list(contenders), random.Random(seed)
    for _ in range(warmup):
        for run in contenders.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            times[name].append(_clock(contenders[name], device, processor_time))
    return {
        name: {
            "seconds": spread(taken),
            "ratio": spread([mine / base for mine, base in zip(taken, times[baseline], strict=True)]),
        }
        for name, taken in times.items()
    }


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the numbers were measured on."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [row.split(":")[1].strip() for row in cpuinfo.read_text().splitlines() if "model name" in row]
        processor = f"{names[0]} x{len(names)}" if names else processor
    return {
        "processor": processor,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _commit() -> str:
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip() or "unknown"


def _told(words: list[str]) -> list[str]:
    """The command line without --out and with the last part of an absolute path: where a file lies says nothing."""
    after_out = [False, *(word == "--out" for word in words)]
    told = [w for w, skip in zip(words, after_out, strict=False) if not skip and w.split("=")[0] != "--out"]
    return [Path(w).name if w.startswith("/") else w for w in told]


def save(
    name: str,
    settings: list[dict[str, Any]],
    *,
    goals: list[str],
    device: str = "cpu",
    out: Path = RESULTS,
    script: str | None = None,
) -> Path:
    """Write the result file: schema, claim, machine, commit, one entry a setting; `script` where `name` is not it."""
    report = {
        "schema": SCHEMA,
        "benchmark": name,
        "goals": goals,
        "command": " ".join(["python", f"benchmarks/{script or name}.py", *_told(sys.argv[1:])]),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "machine": machine(device),
        "settings": settings,
    }
    path = out / f"{name}-{device.split(':')[0]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return path
