"""Time of an epoch whose images are read from files by 0, 1 and 2 workers, against the same images held in memory.

Photographs of sorts are made anew (320 x 240 pixels, JPEG and PNG), brought to 64 pixels, and trained on for an epoch:
forward, backward, step. Every contender gives the same batches bit for bit; decoding comes on top of the step, or
beside it. The decoding alone, without a step, is timed too, as a step that takes longer hides it, and raced with timm's
loader: the same files, side, interpolation and number of workers.

    python benchmarks/large_sets.py [--rounds 5] [--images 1024] [--backbone test_resnet] [--threads 1]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.dataset import ImageDataset
from timm.data.loader import create_loader

from benchmarks.harness import parser, race, save
from recipes.core.cli import parse
from recipes.core.errors import UserError
from recipes.data.load import load
from recipes.data.split import Split
from recipes.training.build import build_model, build_optimizer

GOALS = [
    "with a core to spare, workers hide the decoding behind the training step wherever the step takes longer",
    "as many images a second are decoded as by timm's loader with the same workers",
]
WORKERS = range(3)


def photographs(root: Path, count: int, kind: str) -> None:
    """Smooth colours with a little grain, in ten classes."""
    draw = np.random.default_rng(0)
    for number in range(count):
        colours = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        coarse = colours.resize((320, 240), Image.Resampling.BICUBIC)
        grain = draw.integers(-8, 9, (240, 320, 1))
        pixels = (np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)
        folder = root / str(number % 10)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.{kind}", quality=90)


def epoch(split: Split, batch: int, step: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
    """One pass over whole batches in a fixed shuffled order."""
    turn = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    for images, target in split.batches(turn[: len(split) // batch * batch].view(-1, batch)):
        step(images, target)


def contenders(words: list[str], args: argparse.Namespace) -> tuple[dict[str, Callable[[], None]], int]:
    """An epoch of the same batches out of memory and out of files, and of the files without a step; its images."""
    device = torch.device(args.device)
    limits: dict[str, list[str]] = {"in memory": []}
    limits |= {f"{n} workers": ["--data.memory_limit=0", f"--data.workers={n}"] for n in WORKERS}
    splits, config = {}, parse(["baseline", *words])
    for name, more in limits.items():
        made = load(parse(["baseline", *words, *more]).data, seed=0, image_size=lambda own: args.side)
        splits[name] = made.to(device).train
    model = build_model(config.model, made, seed=config.seed).to(device).train()
    optimizer = build_optimizer(config.optim, model)

    def step(images: torch.Tensor, target: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), target).backward()
        optimizer.step()

    runs: dict[str, Callable[[], None]] = {
        name: partial(epoch, split, args.batch, step) for name, split in splits.items()
    }
    alone = {f"{n} workers, no step": splits[f"{n} workers"] for n in WORKERS}
    runs |= {name: partial(epoch, split, args.batch, lambda *batch: None) for name, split in alone.items()}
    return runs, len(made.train) // args.batch * args.batch


class FirstImages(ImageDataset):
    """The first images of a folder, as timm reads them."""

    def __init__(self, root: str, images: int) -> None:
        super().__init__(root)
        self.images = images

    def __len__(self) -> int:
        return self.images


def timm_epoch(dataset: ImageDataset, workers: int, args: argparse.Namespace) -> None:
    """One pass of timm's loader: the shorter edge brought to the side, the centre cropped, bilinear."""
    loader = create_loader(
        dataset,
        input_size=(3, args.side, args.side),
        batch_size=args.batch,
        crop_pct=1.0,
        interpolation="bilinear",
        num_workers=workers,
        persistent_workers=False,
        device=torch.device(args.device),
    )
    for _ in loader:
        pass


def show(kind: str, found: dict[str, dict], baseline: str) -> None:
    """A line for each contender."""
    for name, row in found.items():
        ratio = row["ratio"]
        print(
            f"{kind}  {name:<22}{row['seconds']['median']:>7.2f} s   in units of {baseline} "
            f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]",
            flush=True,
        )


def main() -> None:
    """Race, print, save."""
    arguments = parser((__doc__ or "").splitlines()[0], rounds=5)
    arguments.add_argument("--images", type=int, default=1024)
    arguments.add_argument("--batch", type=int, default=64)
    arguments.add_argument("--side", type=int, default=64)
    arguments.add_argument("--backbone", default="test_resnet")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    settings = []
    for kind in ("jpg", "png"):
        with tempfile.TemporaryDirectory() as root:
            photographs(Path(root), args.images, kind)
            words = ["--data.name", "folder", "--data.root", root, "--data.image_size", str(args.side)]
            words += ["--data.batch_size", str(args.batch), "--model.backbone", args.backbone]
            try:
                ours, images = contenders(words, args)
            except UserError as error:  # too few for the parts or for a batch
                arguments.error(f"--images {args.images} --batch {args.batch}: {error}")
            timed = partial(race, rounds=args.rounds, warmup=1, device=args.device)
            found = timed(ours, baseline="in memory")
            show(kind, found, "in memory")
            decoding: dict[str, Any] = {}
            for n in WORKERS:
                name, peer = f"{n} workers, no step", f"timm, {n} workers"
                pair = timed(
                    {name: ours[name], peer: partial(timm_epoch, FirstImages(root, images), n, args)}, baseline=peer
                )
                show(kind, pair, peer)
                decoding |= pair
        kept = {"kind": kind, "images": args.images, "side": args.side, "backbone": args.backbone}
        settings.append({**kept, "contenders": found, "decoding": decoding})
    print(save("large_sets", settings, goals=GOALS, device=args.device, out=args.out))


if __name__ == "__main__":
    main()
