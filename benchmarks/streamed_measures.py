"""Measures of collapse of sets that no memory holds: features are made anew, block by block, and never kept.

Settings: ImageNet's d = 2048 and C = 1000, one pass with the d × d scatter and two passes without it; and C = 10⁵
classes of d = 64, two samples each, whose C × C tables go by tiles: one pass, and two passes, which also compare each
sample with every class (NC4, cosines, margins: N·C products more). Each is timed beside the making of the same blocks
alone and, at d = 2048, beside the forward pass of a ResNet-50 on images of 224 pixels, which would make such features.
Memory is what a run adds to a process of its own. Seconds for ImageNet's 1,281,167 images are those of a sample,
measured, times their number.

    python benchmarks/streamed_measures.py [--samples 65536] [--rounds 2] [--classes 100000]
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.harness import parser, race, save
from benchmarks.measures import peak
from ncreg.metrics import NeuralCollapse

IMAGENET = 1_281_167
BATCH = 512
FORWARD = 16  # images of the forward pass
GOALS = ["memory does not grow with the number of samples", "time no more than that of the features' own forward pass"]


def stream(samples: int, dim: int, classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of half-collapsed features: a class mean and noise of its length; every class has its turn."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(classes, dim, generator=generator)
    for first in range(0, samples, BATCH):
        target = torch.arange(first, min(first + BATCH, samples)) % classes
        yield torch.randn(len(target), dim, generator=generator).add_(means[target]), target


def made_only(samples: int, dim: int, classes: int) -> None:
    """The blocks alone."""
    for _ in stream(samples, dim, classes):
        pass


def measured(samples: int, dim: int, classes: int, head: nn.Linear | None, **options: Any) -> dict[str, Tensor]:
    """NeuralCollapse, fed once, or twice where it keeps no scatter."""
    metric = NeuralCollapse(classes, dim, head, cache=False, **options)
    for _ in (1,) if options.get("scatter", True) else metric.passes():
        for rows, target in stream(samples, dim, classes):
            metric.update(rows, target)
    return metric.compute()


def forward(images: int) -> Callable[[], Any]:
    """A ResNet-50's forward pass over some images of 224 pixels."""
    model, batch = timm.create_model("resnet50", num_classes=0).eval(), torch.randn(images, 3, 224, 224)

    def run() -> None:
        with torch.inference_mode():
            model(batch)

    return run


def timed(name: str, contenders: dict[str, Callable[[], Any]], rounds: int, about: dict[str, Any]) -> dict[str, Any]:
    """Memory and processor time of each."""
    memory = {entry: peak(run, "cpu") for entry, run in contenders.items()}
    found = race(contenders, baseline="made only", rounds=rounds, warmup=0, processor_time=True)
    for entry, row in found.items():
        samples = FORWARD if entry == "forward" else about["samples"]
        row["peak_mib"] = memory[entry]
        row["microseconds_a_sample"] = 1e6 * row["seconds"]["median"] / samples
        row["seconds_at_imagenet"] = row["microseconds_a_sample"] / 1e6 * IMAGENET
        print(
            f"{name}  {entry:<24}{row['seconds']['median']:>8.1f} s{row['microseconds_a_sample']:>10.1f} us a sample  "
            f"+{row['peak_mib']:.0f} MiB",
            flush=True,
        )
    return {"setting": name, **about, "results": found}


def main() -> None:
    """Measure, print, save."""
    arguments = parser((__doc__ or "").splitlines()[0], rounds=2, threads=False, device=False)  # a fork measures memory
    arguments.add_argument("--samples", type=int, default=65_536)
    arguments.add_argument("--classes", type=int, default=100_000, help="of the second setting")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*once")  # that a second pass would give more
    sizes = (args.samples, 2048, 1000)
    head = nn.Linear(2048, 1000)
    contenders: dict[str, Callable[[], Any]] = {
        "made only": partial(made_only, *sizes),
        "forward": forward(FORWARD),
        "one pass": partial(measured, *sizes, head),
        "two passes, no scatter": partial(measured, *sizes, head, scatter=False),
    }
    half = partial(measured, args.samples // 2, 2048, 1000, head)
    about = dict(zip(("samples", "dim", "classes"), sizes, strict=True))
    about["peak_mib_of_one_pass_over_half"] = peak(half, "cpu")
    settings = [timed("imagenet", contenders, args.rounds, about)]
    if args.classes:
        sizes, head = (2 * args.classes, 64, args.classes), nn.Linear(64, args.classes)
        contenders = {
            "made only": partial(made_only, *sizes),
            "one pass": partial(measured, *sizes, head),
            "two passes, no scatter": partial(measured, *sizes, head, scatter=False),
        }
        about = dict(zip(("samples", "dim", "classes"), sizes, strict=True))
        settings.append(timed("many classes", contenders, args.rounds, about))
    print(save("streamed_measures", settings, goals=GOALS, out=args.out))


if __name__ == "__main__":
    main()
