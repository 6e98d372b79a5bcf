"""What the smaller pieces show on scikit-learn's digits: backbone scores, costly mistakes, few bits.

A few seconds on one CPU.

    python benchmarks/field.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from scipy.stats import kendalltau
from sklearn.datasets import load_digits
from torch import Tensor

from ncreg.quantization import round_weight, ternary_head
from ncreg.robustness import LinearProbe, expected_cost, fit_linear_probe, linear_probe, pgd
from ncreg.transferability import leave_one_out_accuracy, logme, ncti

TRAIN, TEST = slice(0, 1200), slice(1200, None)


def accuracy(logits: Tensor, target: Tensor) -> float:
    """Share of rows whose largest logit is the target's."""
    return float((logits.argmax(1) == target).double().mean())


def features_of(x: Tensor) -> dict[str, Tensor]:
    """Seven kinds of features of pixels (n, 64), by name."""
    draw, images = torch.Generator().manual_seed(0), x.reshape(-1, 1, 8, 8)
    return {
        "pixels": x,
        "pooled 2x2": F.avg_pool2d(images, 2).flatten(1),
        "pooled 4x4": F.avg_pool2d(images, 4).flatten(1),
        "8 random directions": x @ torch.randn(64, 8, generator=draw, dtype=torch.float64),
        "256 random ReLU": (x @ torch.randn(64, 256, generator=draw, dtype=torch.float64)).relu(),
        "rows": images.sum(3).flatten(1),
        "columns": images.sum(2).flatten(1),
    }


def backbone_scores(x: Tensor, y: Tensor) -> None:
    """Rank correlation of each score with a linear probe's test accuracy over seven kinds of features."""
    candidates = features_of(x)
    ranked = ncti({name: rows[TRAIN] for name, rows in candidates.items()}, y[TRAIN])
    table = []
    for name, rows in candidates.items():
        probe = linear_probe(rows[TRAIN], y[TRAIN], rows[TEST], y[TEST], l2_grid=(1e-3, 1e-2, 1e-1))
        scores = logme(rows[TRAIN], y[TRAIN]), leave_one_out_accuracy(rows[TRAIN], y[TRAIN]), ranked[name].score
        table.append((probe.accuracy, *scores))
        print(
            f"{name:<20} probe {probe.accuracy:.3f}  LogME {scores[0]:6.3f}  LOO {scores[1]:.3f}  NCTI {scores[2]:4.0f}"
        )
    probes, *columns = zip(*table, strict=True)
    shown = zip(("LogME", "LOO", "NCTI"), columns, strict=True)
    print("Kendall's tau with the probe:", {name: round(float(kendalltau(probes, c)[0]), 2) for name, c in shown})


def costly_mistakes(model: Callable[[Tensor], Tensor], images: Tensor, target: Tensor) -> None:
    """An 8 in the place of another digit costs ten times as much as any other mistake."""
    cost = torch.ones(10, 10, dtype=torch.float64)
    cost[:, 8] = 10
    cost.fill_diagonal_(0)
    print(f"expected cost, clean: {float(expected_cost(model(images), target, cost).mean()):.2f}")
    attacks = {
        "margin": pgd(model, images, target, epsilon=0.1, loss="margin"),
        "cost": pgd(model, images, target, epsilon=0.1, loss="cost", cost=cost),
        "cost_margin": pgd(model, images, target, epsilon=0.1, loss="cost_margin", cost=cost),
    }
    for loss, found in attacks.items():
        logits = model(found.images)
        paid = float(cost[target, logits.argmax(1)].mean())
        price = float(expected_cost(logits, target, cost).mean())
        print(
            f"PGD-20 {loss:<12} expected cost {price:.2f}  cost of predictions {paid:.2f}  robust {found.accuracy:.3f}"
        )


def few_bits(probe: LinearProbe, x: Tensor, y: Tensor) -> None:
    """Test accuracy of the linear probe with rounded weights, and of a head of −1, 0 and 1."""
    widths: tuple[int | Literal["ternary"], ...] = (8, 4, 3, "ternary")
    for bits in widths:
        rounded = replace(probe, weight=round_weight(probe.weight, bits))
        print(f"{bits} bits: {accuracy(rounded(x[TEST]), y[TEST]):.3f}")
    centred = x - x[TRAIN].mean(0)
    head = ternary_head(centred[TRAIN], y[TRAIN], scale=2.0, sweeps=10)
    print(
        f"ternary search: {accuracy(centred[TEST] @ head.weight.double().T, y[TEST]):.3f}, loss {head.losses[-1]:.3f}"
    )


def main() -> None:
    """All of it, printed."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False).parse_args()
    x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    x = x / 16
    probe = fit_linear_probe(x[TRAIN], y[TRAIN], 1e-2)

    def model(images: Tensor) -> Tensor:  # probe(images) gives the same logits without a gradient: no attack moves
        return ((images.flatten(1) - probe.mean) / probe.scale) @ probe.weight.T + probe.bias

    images, target = x[TEST].reshape(-1, 1, 8, 8), y[TEST]
    print(f"linear probe on pixels: {accuracy(model(images), target):.3f}")
    backbone_scores(x, y)
    costly_mistakes(model, images, target)
    few_bits(probe, x, y)


if __name__ == "__main__":
    main()
