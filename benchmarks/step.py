"""What ncreg adds to a training step, and what the measures add to the forward pass that feeds them.

Claim: last norm + ETF head + cross-entropy + intra- and inter-class cosine losses cost at most 3 % of a training step
of timm's own model with its linear head and cross-entropy, on the same data; the arithmetic of all measures of
NeuralCollapse costs at most 2 % of the forward pass that gives it its features (resnet18 at 28x28, as many images as
the recipes measure each epoch; some of the cost is fixed, so fewer images pay more).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.optim import SGD

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import harness
from ncreg.losses import InterClassCosineLoss, IntraClassCosineLoss
from ncreg.metrics import NeuralCollapse
from ncreg.models import swap_head
from ncreg.optim import param_groups

CLASSES = 10
GOALS = ["step: ncreg <= 1.03 x timm", "measures <= 0.02 x forward pass (resnet18 at 28x28)"]


def batches(count: int, batch: int, side: int, device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random images in channels-last order with balanced labels."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        images = torch.rand(batch, 3, side, side, generator=generator).to(device, memory_format=torch.channels_last)
        made.append((images, (torch.arange(batch) % CLASSES).to(device)))
    return made


def steps(backbone: str, batch: int, side: int, args: argparse.Namespace) -> dict[str, Any]:
    """Training steps of both, in turn, on the same batch."""
    data = batches(1, batch, side, args.device)[0]
    torch.manual_seed(0)
    plain = timm.create_model(backbone, num_classes=CLASSES).to(args.device).to(memory_format=torch.channels_last)
    ours = swap_head(plain, "etf").to(memory_format=torch.channels_last)
    plain_optimizer = SGD(plain.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    ours_optimizer = SGD(param_groups(ours, 5e-4), lr=0.01, momentum=0.9)
    entropy, intra, inter = nn.CrossEntropyLoss(), IntraClassCosineLoss(), InterClassCosineLoss(CLASSES)

    def timm_step() -> None:
        plain_optimizer.zero_grad(set_to_none=True)
        entropy(plain(data[0]), data[1]).backward()
        plain_optimizer.step()

    def ncreg_step() -> None:
        ours_optimizer.zero_grad(set_to_none=True)
        logits, features = ours(data[0], with_features=True)
        loss = entropy(logits, data[1]) + 0.5 * intra(features, data[1]) + 0.5 * inter(features, data[1])
        loss.backward()
        ours_optimizer.step()

    raced = harness.race(
        {"timm": timm_step, "ncreg": ncreg_step}, baseline="timm", rounds=args.rounds, device=args.device
    )
    return {"what": "training step", "backbone": backbone, "batch": batch, "side": side, "contenders": raced}


def measures(backbone: str, side: int, count: int, args: argparse.Namespace) -> dict[str, Any]:
    """One epoch of measuring: the forward pass alone, and the measures alone on its features."""
    data = batches(count, 512, side, args.device)
    model = swap_head(timm.create_model(backbone, num_classes=CLASSES), "etf").eval()
    model.to(args.device).to(memory_format=torch.channels_last)
    metric = NeuralCollapse(CLASSES, model.head_hidden_size, classifier=model.head).to(args.device)
    with torch.inference_mode():
        features = [model(images, with_features=True).features for images, _ in data]

    @torch.inference_mode()
    def forward() -> None:
        for images, _ in data:
            model(images, with_features=True)

    @torch.inference_mode()
    def measure() -> None:
        metric.reset()
        for rows, (_, target) in zip(features, data, strict=True):
            metric.update(rows, target)
        metric.compute()

    raced = harness.race(
        {"forward pass": forward, "measures": measure},
        baseline="forward pass",
        rounds=max(3, args.rounds // 3),
        warmup=1,
        device=args.device,
    )
    return {"what": "measures", "backbone": backbone, "images": 512 * count, "side": side, "contenders": raced}


def main() -> None:
    """Race every setting and write benchmarks/results/step-<device>.json."""
    args = harness.parser((__doc__ or "").splitlines()[0], rounds=15).parse_args()
    torch.set_num_threads(args.threads)
    settings = [
        steps("resnet18", 128, 28, args),
        steps("resnet50", 4 if args.device == "cpu" else 128, 224, args),
        measures("resnet18", 28, 20, args),  # 10,240 images: measure_size of the recipes
    ]
    for setting in settings:
        for name, result in setting["contenders"].items():
            print(f"{setting['what']:<14}{setting['backbone']:<10}{name:<14}{result['ratio']['median']:.4f}")
    print(harness.save("step", settings, goals=GOALS, device=args.device, out=args.out))


if __name__ == "__main__":
    main()
