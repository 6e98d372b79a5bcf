"""Cost of all measures of collapse, against plain two-pass float64 code and the float32 floor.

N = 50,000 features in memory, batches of 256, (d, C) = (512, 100) and (2048, 1000). Contenders:
textbook        two-pass float64 code with an explicit covariance and pinv, all measures
textbook 1st    the same without what needs a second look at the samples
floor           one float32 product of N·d² multiplications (one pass), or N·C·d (two-pass)
one pass        NeuralCollapse(cache=False): streaming, d×d scatter kept; against textbook 1st and the floor
two-pass        NeuralCollapse(scatter=False): no d×d matrix, all measures but the within-class ranks
default         NeuralCollapse(): both, from cached features
re-fed          NeuralCollapse(cache=False, scatter=False) fed twice by passes()

On a busy machine the ratios stand, the times don't; half an hour there, a few minutes on a quiet one.

    python benchmarks/measures.py [--rounds 5] [--samples 50000] [--device cuda]
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import harness
from ncreg.metrics import NeuralCollapse

GOALS = [
    "one pass <= 0.8x the textbook of the same measures, and <= 3x the float32 floor N d^2",
    "two-pass mode <= 0.25x the textbook",
    "cost linear in N",
]


def textbook(features: Tensor, target: Tensor, head: nn.Linear, *, second: bool = True) -> dict[str, Tensor]:
    """Every measure from its definition, all samples at once, float64."""
    samples, classes = features.double(), head.out_features
    weight, bias = head.weight.detach().double(), head.bias.detach().double()
    count = torch.bincount(target, minlength=classes).double()
    means = torch.zeros(classes, samples.shape[1], dtype=torch.float64, device=samples.device)
    means = means.index_add(0, target, samples) / count[:, None]
    centre = means.mean(0)
    centred, deviation = means - centre, samples - means[target]
    within = deviation.T @ deviation / len(samples)
    between = centred.T @ centred / classes
    variance = torch.zeros_like(count).index_add(0, target, deviation.square().sum(1)) / count
    distance = torch.cdist(means, means).square().fill_diagonal_(torch.inf)
    off = ~torch.eye(classes, dtype=torch.bool, device=samples.device)
    unit, weight_unit = (nn.functional.normalize(rows, dim=1) for rows in (centred, weight))
    cosine, weight_cosine = (unit @ unit.T)[off], (weight_unit @ weight_unit.T)[off]
    gram, simplex = weight @ weight.T, torch.eye(classes, device=samples.device) - 1 / classes
    values = torch.linalg.svdvals(centred)
    share = values / values.sum()
    found = {
        "nc0": weight.sum(0).square().sum() / classes,
        "nc1": (within @ torch.linalg.pinv(between)).trace() / classes,
        "nc1_rank": torch.linalg.matrix_rank(between),
        "trace_ratio": within.trace() / between.trace(),
        "cdnv": ((variance[:, None] + variance) / (2 * distance))[off].mean(),
        "nc2_equinorm": centred.norm(dim=1).std(correction=0) / centred.norm(dim=1).mean(),
        "nc2_equiangularity": (cosine + 1 / (classes - 1)).abs().mean(),
        "nc2_cosine_std": cosine.std(correction=0),
        "nc2_weight_equinorm": weight.norm(dim=1).std(correction=0) / weight.norm(dim=1).mean(),
        "nc2_weight_equiangularity": (weight_cosine + 1 / (classes - 1)).abs().mean(),
        "nc2_weight_cosine_std": weight_cosine.std(correction=0),
        "nc2_weight_gram": (gram / gram.norm() - simplex / (classes - 1) ** 0.5).norm(),
        "nc3": (weight / weight.norm() - centred / centred.norm()).norm(),
        "nc3_bias": (weight @ centre + bias).norm(),
        "etf_distance": 1 - values.sum() ** 2 / ((classes - 1) * values.square().sum()),
        "stable_rank": values.square().sum() / values[0] ** 2,
        "effective_rank": torch.special.entr(share).sum().exp(),
    }
    if second:
        return found | _textbook_second(samples, target, means, weight, bias, count)
    spectrum = torch.linalg.eigvalsh(within).clamp_min(0)
    found["within_stable_rank"] = spectrum.square().sum() / spectrum[-1] ** 2
    found["within_effective_rank"] = torch.special.entr(spectrum / spectrum.sum()).sum().exp()
    return found


def _textbook_second(
    samples: Tensor, target: Tensor, means: Tensor, weight: Tensor, bias: Tensor, count: Tensor
) -> dict[str, Tensor]:
    classes = len(means)
    unit = nn.functional.normalize(samples - means.mean(0), dim=1)
    unit = torch.zeros_like(means).index_add(0, target, unit) / count[:, None]
    intra, inter = unit.square().sum(1), unit @ unit.T
    inter = inter[~torch.eye(classes, dtype=torch.bool, device=samples.device)]
    logits = samples @ weight.T + bias
    nearest = (means.square().sum(1) - 2 * samples @ means.T).argmin(1)
    chosen = logits.argmax(1)
    own = logits.gather(1, target[:, None])
    margin = own[:, 0] - logits.scatter(1, target[:, None], -torch.inf).amax(1)
    scaled = margin / (samples.norm(dim=1) * weight.square().sum(1).mean().sqrt())
    at = torch.tensor([0, 0.01, 0.1, 0.5], dtype=torch.float64, device=samples.device)
    found = {f"intra_cosine{key}": value for key, value in _ends(intra).items()}
    found |= {f"inter_cosine{key}": value for key, value in _ends(inter).items()}
    for name, column in {"margin": margin, "normalized_margin": scaled}.items():
        found[f"{name}_mean"] = column.mean()
        keys = (f"{name}_{key}" for key in ("min", "q01", "q10", "q50"))
        found |= dict(zip(keys, column.quantile(at), strict=True))
    found["nc4"] = (chosen != nearest).double().mean()
    found["ncc_accuracy"] = (nearest == target).double().mean()
    found["classifier_accuracy"] = (chosen == target).double().mean()
    return found


def _ends(values: Tensor) -> dict[str, Tensor]:
    return {"": values.mean(), "_min": values.amin(), "_max": values.amax()}


def data(samples: int, dim: int, classes: int, device: str) -> tuple[Tensor, Tensor, nn.Linear]:
    """Half-collapsed features: class means of unit length, noise of the same length, an offset of 1."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randperm(samples, generator=generator) % classes
    means = nn.functional.normalize(torch.randn(classes, dim, generator=generator), dim=1)
    features = torch.randn(samples, dim, generator=generator).div_(dim**0.5).add_(means[target]).add_(1 / dim**0.5)
    head = nn.Linear(dim, classes)
    with torch.no_grad():
        head.weight.copy_(means)
        head.bias.zero_()
    return features.to(device), target.to(device), head.to(device)


def ours(
    features: Tensor, target: Tensor, head: nn.Linear, *, twice: bool = False, **options: Any
) -> dict[str, Tensor]:
    """NeuralCollapse over batches of 256: fed once, or as often as it asks to be."""
    metric = NeuralCollapse(head.out_features, head.in_features, head, **options).to(features.device)
    for _ in metric.passes() if twice else (1,):
        for rows, labels in zip(features.split(256), target.split(256), strict=True):
            metric.update(rows, labels)
    return metric.compute()


def agreement(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of a measure from the textbook's, relative beyond 1."""
    return max(float((found[k] - expected[k]).abs() / expected[k].abs().clamp_min(1)) for k in expected if k in found)


def peak(run: Callable[[], Any], device: str) -> float:
    """Peak memory of one run beyond what was there before, in MiB; on a CPU in a fork, whose peak starts anew."""
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            run()
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
            os.write(writer, str(grown).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        return float(answer.read())


def measure(samples: int, dim: int, classes: int, args: Any) -> dict[str, Any]:
    """Race one setting; half the samples tell whether cost is linear in N."""
    features, target, head = data(samples, dim, classes, args.device)
    square, half = torch.randn(dim, dim, device=args.device), samples // 2
    contenders: dict[str, Callable[[], Any]] = {
        "textbook": lambda: textbook(features, target, head),
        "textbook 1st": lambda: textbook(features, target, head, second=False),
    }
    modes: dict[str, dict[str, bool]] = {
        "one pass": {"cache": False},
        "two-pass": {"scatter": False},
        "re-fed": {"cache": False, "scatter": False, "twice": True},
        "default": {},
    }
    for name, options in modes.items():
        contenders[name] = partial(ours, features, target, head, **options)
    memory = {name: peak(run, args.device) for name, run in contenders.items()}
    expected = contenders["textbook"]()
    worst = {name: agreement(contenders[name](), expected) for name in modes}
    for name in ("one pass", "two-pass"):
        contenders[f"{name}, N/2"] = partial(ours, features[:half], target[:half], head, **modes[name])
    contenders["floor N d^2"] = lambda: features @ square
    contenders["floor N C d"] = lambda: features @ head.weight.detach().T
    timed = harness.race(contenders, baseline="textbook", rounds=args.rounds, warmup=0, device=args.device)
    seconds = {name: entry["seconds"]["median"] for name, entry in timed.items()}
    pairs = [("one pass", "textbook 1st"), ("one pass", "floor N d^2"), ("two-pass", "floor N C d")]
    pairs += [(name, "textbook") for name in ("two-pass", "re-fed", "default")]
    pairs += [(name, f"{name}, N/2") for name in ("one pass", "two-pass")]
    return {
        "N": samples,
        "d": dim,
        "C": classes,
        "ratios": {f"{mine} / {other}": seconds[mine] / seconds[other] for mine, other in pairs},
        "timed": timed,
        "peak_mib": memory,
        "worst_difference": worst,
    }


def main() -> None:
    """Race every setting, print a table, write the result file."""
    parser = harness.parser(__doc__.splitlines()[0], rounds=5)
    parser.add_argument("--samples", type=int, default=50_000)
    args = parser.parse_args()
    if args.threads > 1 and not args.device.startswith("cuda"):  # the fork has one thread, and waits for ever
        parser.error(f"--threads {args.threads}: memory is measured in a fork, which has one thread: --threads 1")
    torch.set_num_threads(args.threads)
    settings = []
    for dim, classes in ((512, 100), (2048, 1000)):
        settings.append(measure(args.samples, dim, classes, args))
        print(f"N={args.samples} d={dim} C={classes}")
        for name, entry in settings[-1]["timed"].items():
            memory = settings[-1]["peak_mib"].get(name)
            seen = "" if memory is None else f"  +{memory:.0f} MiB"
            seconds, ratio = entry["seconds"]["median"], entry["ratio"]["median"]
            print(f"  {name:14s} {seconds:8.3f} s  {ratio:6.3f} x textbook{seen}")
        for name, ratio in settings[-1]["ratios"].items():
            print(f"  {name:28s} {ratio:.3f}")
        print(f"  largest difference from the textbook: {settings[-1]['worst_difference']}", flush=True)
    print(harness.save("measures", settings, goals=GOALS, device=args.device, out=args.out))


if __name__ == "__main__":
    main()
