"""Forward and backward of each loss against the published pairwise forms and pytorch-metric-learning.

Measured with d = 512, C = 100, one gradient to the features and, where it is learned, to the weight. Peak memory is
what forward and backward allocate beyond their inputs, in units of one B × d plus one B × C float32 matrix.

Each loss of ncreg also stands beside its floor, timed in the same rounds: moving the B × d numbers that forward and
backward cannot do without (features read in both, gradient written: 3), and the products B · C · d that they need.
Times are the process's own, and freed memory is kept between the calls as train.py keeps it: on a busy machine the wall
clock charges a contender of milliseconds for its neighbours' turns, and one of microseconds for none.

    python benchmarks/losses.py [--rounds 15] [--device cpu]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.harness import parser, race, save
from ncreg import losses
from ncreg.heads import CosineHead, ETFHead
from recipes.core.extras import is_installed, pip_install
from recipes.core.memory import keep_freed_memory

BATCHES, DIM, CLASSES, TAU = (256, 1024, 4096), 512, 100, 0.1

# Of each loss: how many matrices B × d go through memory, and how many products B · C · d are made, at least.
FLOORS = {
    ("intra+inter", "ncreg"): (3, 0),
    ("ntce", "ncreg"): (3, 3),
    ("nonl", "ncreg"): (3, 3),
    ("class vectors", "ncreg etf cross-entropy"): (3, 2),
    ("class vectors", "ncreg dot regression"): (3, 0),
    ("class vectors", "ncreg normface"): (3, 3),
}
FLOOR = "floor of "

# What is promised: a group's entry against the group's baseline, at the largest batch.
GOALS = {
    ("intra+inter", "ncreg"): 1 / 50,
    ("ntce", "ncreg"): 1 / 10,
    ("nonl", "ncreg"): 1 / 10,
    ("class vectors", "ncreg etf cross-entropy"): 1.0,
    ("class vectors", "ncreg dot regression"): 1.0,
}


def pairwise_cosines(features: Tensor, target: Tensor) -> Tensor:
    """Both cosine losses from the B × B cosines and masks over pairs of samples."""
    unit = F.normalize(features, dim=1)
    cosines = unit @ unit.T
    share = F.one_hot(target, CLASSES) / target.bincount(minlength=CLASSES)
    same = target[:, None] == target[None, :]
    intra = (cosines * same * share.sum(1)[:, None].square()).sum() / CLASSES
    inter = (share.T @ (cosines * ~same) @ share)[~torch.eye(CLASSES, dtype=torch.bool, device=target.device)]
    return 1 - intra + (inter + 1 / (CLASSES - 1)).square().mean()


def published_ntce(features: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """NTCE as printed: the class vector of every sample against every feature, B × B."""
    scores = F.normalize(weight[target], dim=1) @ F.normalize(features, dim=1).T / TAU
    return F.cross_entropy(scores, torch.arange(len(target), device=target.device))


def published_nonl(features: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """NONL as printed: the same matrix, the class's own samples masked out of the denominator."""
    scores = F.normalize(weight[target], dim=1) @ F.normalize(features, dim=1).T / TAU
    same = target[:, None] == target[None, :]
    return (scores.masked_fill(same, -torch.inf).logsumexp(1) - scores.diagonal()).mean()


def groups(batch: int, device: str) -> dict[str, dict[str, Callable[[], Any]]]:
    """What is raced: a group's first entry is its baseline."""
    from pytorch_metric_learning.losses import ArcFaceLoss, NormalizedSoftmaxLoss
    from pytorch_metric_learning.losses import SupConLoss as PeerSupCon

    generator = torch.Generator().manual_seed(batch)
    features = torch.randn(batch, DIM, generator=generator).to(device).requires_grad_()
    target = torch.randperm(batch, generator=generator).remainder(CLASSES).to(device)
    weight = torch.randn(CLASSES, DIM, generator=generator).to(device).requires_grad_()
    etf = ETFHead(DIM, CLASSES).to(device)
    cosine = CosineHead(DIM, CLASSES, scale=1 / TAU).to(device)
    intra, inter = losses.IntraClassCosineLoss(), losses.InterClassCosineLoss(CLASSES)
    regression, supcon = losses.DotRegressionLoss(), losses.SupConLoss(temperature=TAU)
    ntce, nonl = losses.NTCELoss(temperature=TAU), losses.NONLLoss(temperature=TAU)
    normalized_softmax = NormalizedSoftmaxLoss(CLASSES, DIM, temperature=TAU).to(device)
    arcface = ArcFaceLoss(CLASSES, DIM).to(device)
    peer_supcon = PeerSupCon(temperature=TAU)
    learned = [features, weight, *cosine.parameters(), *normalized_softmax.parameters(), *arcface.parameters()]

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            loss().backward()
            for leaf in learned:
                leaf.grad = None

        return run

    made: dict[str, dict[str, Callable[[], Tensor]]] = {
        "intra+inter": {
            "pairwise form": lambda: pairwise_cosines(features, target),
            "ncreg": lambda: intra(features, target) + inter(features, target),
        },
        "ntce": {
            "published form": lambda: published_ntce(features, target, weight),
            "ncreg": lambda: ntce(features, target, weight),
        },
        "nonl": {
            "published form": lambda: published_nonl(features, target, weight),
            "ncreg": lambda: nonl(features, target, weight),
        },
        "class vectors": {
            "peer normalized softmax": lambda: normalized_softmax(features, target),
            "ncreg etf cross-entropy": lambda: F.cross_entropy(etf(features), target),
            "ncreg dot regression": lambda: regression(features, target, etf.weight),
            "ncreg normface": lambda: F.cross_entropy(cosine(features), target),
            "peer arcface": lambda: arcface(features, target),
        },
        "supcon": {
            "peer supcon": lambda: peer_supcon(features, target),
            "ncreg": lambda: supcon(features, target),
        },
    }
    return {group: {name: step(loss) for name, loss in entries.items()} for group, entries in made.items()}


def floors(group: str, batch: int, device: str) -> dict[str, Callable[[], None]]:
    """For each loss of a group that has a floor, what takes this time: copies and products, into memory at hand."""
    rows = torch.randn(2 * batch, DIM, device=device)
    weight, logits = torch.randn(DIM, CLASSES, device=device), torch.empty(batch, CLASSES, device=device)
    copied = torch.empty_like(rows)

    def run(matrices: int, products: int) -> None:
        moved = matrices * batch // 2  # a copy reads and writes
        copied[:moved].copy_(rows[:moved])
        for _ in range(products):
            torch.mm(rows[:batch], weight, out=logits)

    return {f"{FLOOR}{name}": partial(run, *least) for (of, name), least in FLOORS.items() if of == group}


def peak_bytes(run: Callable[[], None], device: str) -> int:
    """The most that one forward and backward has allocated at a time."""
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        run()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in watch.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    live = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        live += change
        peak = max(peak, live)
    return peak


def growth(rounds: int, device: str) -> dict[str, Any]:
    """Each promised loss at the largest batch against itself at the middle one, in the same rounds."""
    _, middle, most = BATCHES
    small, large = groups(middle, device), groups(most, device)
    return {
        f"{group}, {name}": race(
            {f"B={middle}": small[group][name], f"B={most}": large[group][name]},
            baseline=f"B={middle}",
            rounds=rounds,
            device=device,
            processor_time=True,
        )
        for group, name in GOALS
    }


def verdicts(found: dict[str, dict[str, Any]], grown: dict[str, Any]) -> list[str]:
    """Each goal with what was measured at the largest batch."""
    _, middle, most = BATCHES
    lines = []
    for (group, name), goal in GOALS.items():
        row, rise = found[group][name], grown[f"{group}, {name}"][f"B={most}"]["ratio"]["median"]
        lines += [
            f"{group}, {name}: ratio to the baseline <= {goal:g} at B={most}: {row['ratio']['median']:.3f}",
            f"{group}, {name}: cost linear, x{most / middle:g} from B={middle} to B={most}: x{rise:.1f}",
            f"{group}, {name}: peak memory O(Bd + BC): {row['peak_in_bd_plus_bc']:.1f} x (Bd + BC)",
        ]
    return lines


def main() -> None:
    """Race every group at every batch size and write the result file."""
    made = parser(__doc__.splitlines()[0], rounds=15)
    arguments = made.parse_args()
    if not is_installed("pytorch_metric_learning"):
        made.error(f"pytorch_metric_learning is not installed: {pip_install('bench')}")
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    device = arguments.device
    settings: list[dict[str, Any]] = []
    for batch in BATCHES:
        for group, contenders in groups(batch, device).items():
            baseline = next(iter(contenders))
            raced = contenders | floors(group, batch, device)
            timed = race(
                raced, baseline=baseline, rounds=arguments.rounds, warmup=2, device=device, processor_time=True
            )
            for name, run in contenders.items():
                row = timed[name]
                row["peak_bytes"] = peak_bytes(run, device)
                row["peak_in_bd_plus_bc"] = row["peak_bytes"] / (4 * batch * (DIM + CLASSES))
                if (floor := timed.get(f"{FLOOR}{name}")) is not None:
                    row["over_floor"] = row["seconds"]["median"] / floor["seconds"]["median"]
                print(
                    f"B={batch:5d}  {group:14s} {name:26s} {1e3 * row['seconds']['median']:9.2f} ms"
                    f"  ratio {row['ratio']['median']:7.4f}  peak {row['peak_in_bd_plus_bc']:7.2f} x (Bd+BC)"
                    + (f"  {row['over_floor']:5.1f} x floor" if "over_floor" in row else "")
                )
            settings.append({"batch": batch, "dim": DIM, "classes": CLASSES, "group": group, "results": timed})
    grown = growth(arguments.rounds, device)
    settings.append({"group": "growth with the batch", "dim": DIM, "classes": CLASSES, "results": grown})
    largest = {row["group"]: row["results"] for row in settings if row.get("batch") == BATCHES[-1]}
    goals = verdicts(largest, grown)
    print("\n".join(goals))
    save("losses", settings, goals=goals, device=device, out=arguments.out)


if __name__ == "__main__":
    main()
