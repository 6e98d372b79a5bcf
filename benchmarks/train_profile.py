"""Where a training step of recipes/train.py spends its time: the convolutions, other layers, the optimizer, the rest.

One epoch of the recipe `baseline` on Fashion-MNIST, measures and saves aside, is taken twice a round: once by the clock
alone, and once under torch's profiler, which adds up each operator's own time. What the clock saw beyond all operators
is Python and the dispatch of operators. The profiler itself slows a step down; shares are in units of the time that it
saw.

    python benchmarks/train_profile.py [--rounds 3] [--images 4096] [--models test_resnet,resnet18]
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import baseline_words, parser, save, spread
from recipes.core.cli import parse
from recipes.core.config import TrainConfig
from recipes.core.distributed import joined_ranks
from recipes.core.memory import keep_freed_memory
from recipes.data.augment import batches, epoch_order
from recipes.data.load import Dataset
from recipes.training.prepare import build_state, load_data
from recipes.training.step import check_losses, forward_backward, update

GOALS = ["what is neither a convolution nor another layer takes at most 10 % of a step"]
KINDS = {
    "convolutions": ("convolution",),
    "norms, activations, pooling, sums": ("batch_norm", "threshold", "relu", "clamp", "pool", "silu", "add_", "mean"),
    "products": ("addmm", "::mm", "bmm", "linear"),
}


def kind_of(event: FunctionEvent) -> str:
    """What an operator is for."""
    above: FunctionEvent | None = event
    while above is not None:
        if above.name.startswith("Optimizer."):
            return "optimizer"
        above = above.cpu_parent
    return next((kind for kind, names in KINDS.items() if any(name in event.name for name in names)), "other operators")


def one_epoch(config: TrainConfig, data: Dataset) -> Callable[[], None]:
    """An epoch as run_epochs takes it, without what comes after its steps."""
    ranks, device = joined_ranks(), torch.device("cpu")
    state = build_state(config, data, device, ranks)
    size = config.data.batch_size
    steps = len(data.train) // size
    order = epoch_order(config.seed, 1, len(data.train))[: steps * size].view(steps, -1)
    weights = {term.name: term.weight(0.0) for term in state.terms}

    def run() -> None:
        state.losses = []
        state.model.train()
        taken = batches(
            data.train, order, config.augment, ranks=ranks, seed=0, epoch=1, num_classes=state.model.num_classes
        )
        for batch in taken:
            features = forward_backward(batch, state.model, state, weights, chunks=1, precision=config.precision)
            check_losses(state, steps, Path("none"), last=1)
            update(state, config.optim, features, batch.labels, steps_per_epoch=steps)

    return run


def seconds_of(run: Callable[[], None]) -> float:
    """By the clock."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def shares_of(run: Callable[[], None]) -> dict[str, float]:
    """The share of each kind of operator in the time that the clock saw under the profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as watch:
        whole = seconds_of(run)
    taken: Counter[str] = Counter()
    for event in watch.events():
        taken[kind_of(event)] += event.self_cpu_time_total / 1e6 / whole
    return {**taken, "between operators": 1 - taken.total()}


def profiled(run: Callable[[], None], rounds: int) -> dict[str, Any]:
    """Seconds without the profiler, and shares with it, over rounds."""
    run()
    seconds, shares = [], []
    for _ in range(rounds):
        seconds.append(seconds_of(run))
        shares.append(shares_of(run))
    kinds = [*KINDS, "optimizer", "other operators", "between operators"]
    return {
        "seconds": spread(seconds),
        "shares": {kind: spread([found.get(kind, 0.0) for found in shares]) for kind in kinds},
    }


def main() -> None:
    """Profile, print, save."""
    arguments = parser((__doc__ or "").splitlines()[0], rounds=3, device=False)
    arguments.add_argument("--images", type=int, default=4096, help="training images an epoch")
    arguments.add_argument("--models", default="test_resnet,resnet18", help="timm names, a comma between them")
    arguments.add_argument("--batch", type=int, default=128)
    arguments.add_argument("--root", default="data", help="where Fashion-MNIST lies")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    settings = []
    for name in args.models.split(","):
        asked = {
            "model.backbone": name,
            "data.name": "fashion_mnist",
            "data.root": args.root,
            "data.train_size": args.images,
            "data.batch_size": args.batch,
        }
        config = parse(baseline_words(asked))
        found = profiled(one_epoch(config, load_data(config, torch.device("cpu"))), args.rounds)
        print(f"{name}  {args.images / found['seconds']['median']:.0f} images/s")
        for kind, share in found["shares"].items():
            print(f"  {kind:<30}{share['median']:>7.1%} [{share['q1']:.1%}, {share['q3']:.1%}]", flush=True)
        settings.append({**asked, "data.root": None, **found})
    print(save("train_profile", settings, goals=GOALS, out=args.out))


if __name__ == "__main__":
    main()
