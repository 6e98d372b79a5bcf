"""Images a second of recipes/train.py against a loop with timm's loader, and against a bare loop on data in memory.

Three ways through the same steps (forward in training mode, cross-entropy, backward, SGD; Fashion-MNIST, one backbone):

- `recipes`: recipes/train.py itself, a process of its own (it sets up malloc, which would help the others as well),
  from its own count of seconds spent in training, measures and saves aside;
- `timm loader`: a loop written to the steps of timm's train.py in its default layout: its create_loader over a dataset
  of PIL images, with its transforms for training (no augmentation), SGD, accuracy left out;
- `timm loader, channels_last`: the same with timm's --channels-last;
- `bare`: forward, backward and step on images that lie in memory as floats, batches cut in a fixed order.

Every contender runs once a round in a shuffled order; ratios are taken within a round.

    python benchmarks/throughput.py [--rounds 5] [--images 4096] [--models test_resnet,resnet18] [--device cpu]
"""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.loader import create_loader
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.harness import baseline_words, parser, save, spread
from ncreg.models import Classifier
from recipes.core.cli import parse
from recipes.core.config import TrainConfig
from recipes.data.load import Dataset, load
from recipes.data.split import as_floats
from recipes.training.build import build_model, build_optimizer

ROOT = Path(__file__).resolve().parents[1]

GOALS = [
    "recipes/train.py gives at least 1.3 times the images a second of a loop with timm's loader",
    "recipes/train.py, measures aside, gives at least 90 % of a bare loop on data in memory",
]


class Pictures(torch.utils.data.Dataset):
    """The training images as timm's readers give them: PIL images and class indices."""

    def __init__(self, data: Dataset) -> None:
        self.images = [Image.fromarray(image[0].numpy()) for image in data.train.read()]
        self.target = data.train.target.tolist()
        self.transform: Callable[[Image.Image], Tensor] | None = None  # create_loader sets it

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        assert self.transform is not None
        return self.transform(self.images[index]), self.target[index]


def pieces(config: TrainConfig, data: Dataset, device: torch.device) -> tuple[Classifier, Optimizer]:
    """The same model and optimizer for every contender."""
    model = build_model(config.model, data, seed=config.seed).to(device).train()
    return model, build_optimizer(config.optim, model)


def steps(
    model: Callable[[Tensor], Tensor],
    optimizer: Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    config: TrainConfig,
    device: torch.device,
) -> int:
    """Forward, backward and step over batches; the images seen."""
    seen = torch.zeros((), device=device)
    count = 0
    half = config.precision == "bfloat16"
    for images, target in batches:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        seen += loss.detach()
        count += len(target)
    float(seen)  # waits for the device
    return count


def timed(run: Callable[[], int]) -> float:
    """Images a second."""
    start = time.perf_counter()
    return run() / (time.perf_counter() - start)


def contenders(
    words: Sequence[str], config: TrainConfig, data: Dataset, device: torch.device, workers: int
) -> dict[str, Callable[[], float]]:
    """Each gives images a second of one epoch."""
    size = config.data.batch_size
    count = len(data.train) // size * size
    there = data.to(device)
    images, target = as_floats(there.train.read()[:count]), there.train.target[:count]
    bare_model, bare_optimizer = pieces(config, data, device)
    timm_model, timm_optimizer = pieces(config, data, device)
    timm_model.preprocess = nn.Identity()  # its loader normalises
    mean, std = data.moments()
    channels, height, width = data.train.images.shape[1:]
    pictures: Any = Pictures(data)  # create_loader takes any dataset with a transform, and asks for one of timm's
    loader = create_loader(
        pictures,
        input_size=(channels, height, width),
        batch_size=size,
        is_training=True,
        no_aug=True,
        use_prefetcher=device.type == "cuda",
        mean=tuple(mean),
        std=tuple(std),
        num_workers=workers,
        device=device,
        persistent_workers=workers > 0,
    )
    bare_steps, timm_steps = (
        partial(steps, torch.compile(model) if config.compile else model, optimizer, config=config, device=device)
        for model, optimizer in ((bare_model, bare_optimizer), (timm_model, timm_optimizer))
    )

    def bare() -> float:
        cut = zip(images.split(size), target.split(size), strict=True)
        return timed(partial(bare_steps, cut))

    def timm_loader(layout: torch.memory_format) -> float:
        timm_model.to(memory_format=layout)
        moved = ((x.to(device).contiguous(memory_format=layout), y.to(device)) for x, y in loader)
        return timed(partial(timm_steps, moved))

    def recipes() -> float:
        command = [sys.executable, str(ROOT / "recipes" / "train.py"), *words]
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | threads)
        newest = max(config.out.glob("*/timing.json"), key=lambda path: path.stat().st_mtime_ns)
        return json.loads(newest.read_text())["train_images_per_second"]

    return {
        "recipes": recipes,
        "timm loader": partial(timm_loader, torch.contiguous_format),
        "timm loader, channels_last": partial(timm_loader, torch.channels_last),
        "bare": bare,
    }


def race(made: dict[str, Callable[[], float]], rounds: int, warmup: int) -> dict[str, dict]:
    """Rates of every contender, and of recipes in units of the others' in the same round."""
    for _ in range(warmup):
        for run in made.values():
            run()
    order, shuffle = list(made), random.Random(0)
    rates: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            rates[name].append(made[name]())
    return {
        name: {
            "images_per_second": spread(taken),
            "recipes_over_this": spread([a / b for a, b in zip(rates["recipes"], taken, strict=True)]),
        }
        for name, taken in rates.items()
    }


def main() -> None:
    """Race, print, save."""
    arguments = parser((__doc__ or "").splitlines()[0], rounds=5)
    arguments.add_argument("--images", type=int, default=4096, help="training images an epoch")
    arguments.add_argument("--models", default="test_resnet,resnet18", help="timm names, a comma between them")
    arguments.add_argument("--batch", type=int, default=128)
    arguments.add_argument("--workers", type=int, default=0, help="processes of timm's loader")
    arguments.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    arguments.add_argument("--compile", action="store_true")
    arguments.add_argument("--root", default="data", help="where Fashion-MNIST lies")
    arguments.add_argument("--epochs", type=int, default=1, help="of recipes/train.py a round")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("timm.scheduler").setLevel(logging.ERROR)  # that a cosine of one epoch anneals nothing
    settings, device = [], torch.device(args.device)
    with tempfile.TemporaryDirectory() as out:
        for name in args.models.split(","):
            asked = {
                "model.backbone": name,
                "data.name": "fashion_mnist",
                "data.root": args.root,
                "data.train_size": args.images,
                "data.batch_size": args.batch,
                "tpt.max_epochs": args.epochs,
                "measure_size": 512,
                "precision": args.precision,
                "compile": str(args.compile).lower(),
                "device": args.device,
                "quiet": "true",
                "out": out,
            }
            words = baseline_words(asked)
            config = parse(words)
            data = load(config.data, seed=config.seed, image_size=lambda native: native or 28)
            found = race(contenders(words, config, data, device, args.workers), args.rounds, warmup=1)
            for contender, row in found.items():
                rate, ratio = row["images_per_second"], row["recipes_over_this"]
                print(
                    f"{name:<14}{contender:<28}{rate['median']:>10.0f} images/s   recipes over it "
                    f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]",
                    flush=True,
                )
            kept = {key: asked[key] for key in ("model.backbone", "data.train_size", "data.batch_size", "precision")}
            settings.append({**kept, "compile": args.compile, "workers": args.workers, "contenders": found})
    print(save("throughput", settings, goals=GOALS, device=args.device, out=args.out))


if __name__ == "__main__":
    main()
