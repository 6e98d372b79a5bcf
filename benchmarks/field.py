"""What the smaller pieces show on scikit-learn's digits: backbone scores, costly mistakes, few bits. A minute, one CPU.

python benchmarks/field.py
"""

import torch
import torch.nn.functional as F
from scipy.stats import kendalltau
from sklearn.datasets import load_digits

from ncreg.quantization import round_weight, ternary_head
from ncreg.robustness import expected_cost, fit_linear_probe, linear_probe, pgd
from ncreg.transferability import leave_one_out_accuracy, logme, ncti

TRAIN, TEST = slice(0, 1200), slice(1200, None)


def accuracy(logits, target):
    """Share of rows whose largest logit is the target's."""
    return float((logits.argmax(1) == target).double().mean())


def backbone_scores(x, y):
    """Rank correlation of each score with a linear probe's test accuracy over seven kinds of features."""
    draw, images = torch.Generator().manual_seed(0), x.reshape(-1, 1, 8, 8)
    candidates = {
        "pixels": x,
        "pooled 2x2": F.avg_pool2d(images, 2).flatten(1),
        "pooled 4x4": F.avg_pool2d(images, 4).flatten(1),
        "8 random directions": x @ torch.randn(64, 8, generator=draw, dtype=torch.float64),
        "256 random ReLU": (x @ torch.randn(64, 256, generator=draw, dtype=torch.float64)).relu(),
        "rows": images.sum(3).flatten(1),
        "columns": images.sum(2).flatten(1),
    }
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
    print("Kendall's tau with the probe:", {name: round(kendalltau(probes, column)[0], 2) for name, column in shown})


def costly_mistakes(model, x, y):
    """An 8 in the place of another digit costs ten times as much as any other mistake."""
    cost = torch.ones(10, 10, dtype=torch.float64)
    cost[:, 8] = 10
    cost.fill_diagonal_(0)
    images, target = x[TEST].reshape(-1, 1, 8, 8), y[TEST]
    print(f"expected cost, clean: {float(expected_cost(model(images), target, cost).mean()):.2f}")
    for loss in ("margin", "cost", "cost_margin"):
        how = {"cost": cost} if loss.startswith("cost") else {}
        found = pgd(model, images, target, epsilon=0.1, loss=loss, **how)
        logits = model(found.images)
        paid = float(cost[target, logits.argmax(1)].mean())
        price = float(expected_cost(logits, target, cost).mean())
        print(
            f"PGD-20 {loss:<12} expected cost {price:.2f}  cost of predictions {paid:.2f}  robust {found.accuracy:.3f}"
        )


def few_bits(probe, x, y):
    """Test accuracy of the linear probe with rounded weights, and of a head of −1, 0 and 1."""
    rows = (x[TEST] - probe.mean) / probe.scale
    for bits in (8, 4, 3, "ternary"):
        print(f"{bits} bits: {accuracy(rows @ round_weight(probe.weight, bits).T + probe.bias, y[TEST]):.3f}")
    centred = x - x[TRAIN].mean(0)
    head = ternary_head(centred[TRAIN], y[TRAIN], scale=2.0, sweeps=10)
    print(
        f"ternary search: {accuracy(centred[TEST] @ head.weight.double().T, y[TEST]):.3f}, loss {head.losses[-1]:.3f}"
    )


def main():
    """All of it, printed."""
    x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    x = x / 16
    probe = fit_linear_probe(x[TRAIN], y[TRAIN], 1e-2)

    def model(images):
        return ((images.flatten(1) - probe.mean) / probe.scale) @ probe.weight.T + probe.bias

    print(f"linear probe on pixels: {accuracy(model(x[TEST].reshape(-1, 1, 8, 8)), y[TEST]):.3f}")
    backbone_scores(x, y)
    costly_mistakes(model, x, y)
    few_bits(probe, x, y)


if __name__ == "__main__":
    main()
