"""How many images a forward pass should take at once: the recipes' rule against other numbers.

Without gradients nothing is kept between layers, so a larger batch saves calls and loses the caches: activations of 512
images of 64 by 64 pixels are read from memory again in every layer. `images_at_once` (recipes/training/metrics.py)
gives the recipes' number for a side and a device; ratios are of times, to that number.

    python benchmarks/forward_batches.py [--rounds 5] [--device cpu]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import harness
from recipes.core.memory import keep_freed_memory
from recipes.training.metrics import images_at_once

GOALS = ["no other number of images is faster by more than a tenth"]
SETTINGS = [
    ("test_resnet", 28, 512),
    ("resnet18", 32, 512),
    ("tf_efficientnet_lite0", 64, 512),
    ("tf_efficientnet_lite0", 224, 64),
    ("resnet18", 224, 64),
    ("vit_tiny_patch16_224", 224, 64),
]
"""Backbone, side in pixels, images of a round."""


def setting(backbone: str, side: int, count: int, args: argparse.Namespace) -> dict[str, Any]:
    """The same images through one backbone, the rule's number at a time and others."""
    model = timm.create_model(backbone).eval().to(args.device).to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, side, side, generator=generator).to(args.device, memory_format=torch.channels_last)

    def in_batches(size: int) -> Callable[[], None]:
        @torch.inference_mode()
        def run() -> None:
            for part in images.split(size):
                model(part)

        return run

    rule = min(count, images_at_once(side, images.device))
    sizes = sorted({count, count // 4, rule, max(1, rule // 4)}, reverse=True)
    contenders = {str(size): in_batches(size) for size in sizes}
    raced = harness.race(contenders, baseline=str(rule), rounds=args.rounds, warmup=1, device=args.device)
    return {"backbone": backbone, "side": side, "images": count, "rule": rule, "contenders": raced}


def main() -> None:
    """Race every setting and write benchmarks/results/forward_batches-<device>.json."""
    args = harness.parser(__doc__ or "", rounds=5).parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    settings = [setting(*each, args) for each in SETTINGS]
    for found in settings:
        ratios = {size: round(result["ratio"]["median"], 2) for size, result in found["contenders"].items()}
        print(f"{found['backbone']:<24}{found['side']:>4} px, {found['rule']} at once: {ratios}")
    print(harness.save("forward_batches", settings, goals=GOALS, device=args.device, out=args.out))


if __name__ == "__main__":
    main()
