"""Seconds until a command says something, beside the imports that it cannot do without.

    python benchmarks/start.py [--rounds 10]

Every contender is a process of its own: the import of torch and timm, which every training run needs; the import of
ncreg, which brings torchmetrics; `train.py --help`; and the job of `make train` up to its first line.
The peer is torch and timm of the same round.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import harness

ROOT = Path(__file__).resolve().parents[1]
GOALS = ["train.py says its first line in at most 1.1 times the time that the import of torch and timm takes"]
PEER = "import torch, timm"


def python(*words: str) -> None:
    """A process from start to end."""
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def first_line(*words: str) -> None:
    """A process until its first line, which must not be empty."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, *words, "--out", out]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        line = process.stdout.readline()
        process.kill()
        process.communicate()
    if "training" not in line:
        raise RuntimeError(f"the first line of {' '.join(words)} was {line!r}")


def contenders() -> dict[str, Callable[[], Any]]:
    """What is timed."""
    return {
        "import torch": partial(python, "-c", "import torch"),
        PEER: partial(python, "-c", PEER),
        "import ncreg": partial(
            python, "-c", "import ncreg.heads, ncreg.losses, ncreg.models; from ncreg.metrics import NeuralCollapse"
        ),
        "train.py --help": partial(python, "recipes/train.py", "--help"),
        "train.py, first line": partial(first_line, "recipes/train.py"),
    }


def main() -> None:
    """Time and save."""
    args = harness.parser(
        "Seconds until a command says something.", rounds=10, threads=False, device=False
    ).parse_args()
    results = harness.race(contenders(), baseline=PEER, rounds=args.rounds, warmup=1)
    for name, found in results.items():
        print(f"{name:22s} {found['seconds']['median']:6.2f} s  x {found['ratio']['median']:.2f}")
    print(harness.save("start", [{"results": results}], goals=GOALS, out=args.out))


if __name__ == "__main__":
    main()
