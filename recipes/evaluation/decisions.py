"""What a classifier decides on a split, added up batch by batch: accuracy, confusions, calibration, margins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ncreg.numerics import in_float64
from recipes.core.memory import check_fits

BINS = 15
"""Of the reliability diagram, and of the expected calibration error."""


@dataclass
class Decisions:
    """Sums over the images seen; of a single image four numbers are kept.

    Args:
        num_classes: outputs C.
        cost: what taking class y for j costs, in row y and column j (C, C) float64; None where nothing says so.

    Raises:
        UserError: the table of confusions (C, C) would take more than half of the memory.
    """

    num_classes: int
    cost: Tensor | None = None
    confusion: Tensor = field(init=False)
    sums: dict[str, float] = field(default_factory=lambda: {"loss": 0.0, "brier": 0.0})
    costs: dict[str, float] = field(default_factory=dict)
    _confidence: list[Tensor] = field(default_factory=list)
    _correct: list[Tensor] = field(default_factory=list)
    _margin: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_fits(
            f"the confusions of {self.num_classes:,} classes",
            8 * self.num_classes**2,
            "the history of a run has its accuracy and loss, predict.py says what a model takes images for",
        )
        self.confusion = torch.zeros(self.num_classes, self.num_classes, dtype=torch.long)

    def add(self, logits: Tensor, target: Tensor) -> None:
        """Take in a batch of logits (B, C) and classes (B,)."""
        target, z = target.cpu(), in_float64(logits.detach()).cpu()
        log_p = z.log_softmax(1)
        own = log_p.gather(1, target[:, None]).squeeze(1)
        confidence, chosen = log_p.exp().max(1)
        chosen = logits.argmax(1).cpu()
        pairs = target * self.num_classes + chosen
        self.confusion += torch.bincount(pairs, minlength=self.num_classes**2).view_as(self.confusion)
        self.sums["loss"] -= float(own.sum())
        self.sums["brier"] += float(log_p.exp().square().sum() - 2 * own.exp().sum() + len(target))
        if self.cost is not None:
            self._add_costs(log_p.exp(), target, chosen)
        rival = z.masked_fill(F.one_hot(target, self.num_classes).bool(), -torch.inf).amax(1)
        self._confidence.append(confidence)
        self._correct.append(chosen == target)
        self._margin.append((z.gather(1, target[:, None]).squeeze(1) - rival).float())

    def _add_costs(self, p: Tensor, target: Tensor, chosen: Tensor) -> None:
        """Costs by probabilities, of the decisions, and of those for j with the least Σ_y p_y·M[y,j]."""
        assert self.cost is not None
        prices, cheapest = self.cost[target], (p @ self.cost).argmin(1)
        found = {
            "expected_cost": (prices * p).sum(),
            "decision_cost": prices.gather(1, chosen[:, None]).sum(),
            "cheapest_decision_cost": prices.gather(1, cheapest[:, None]).sum(),
            "cheapest_decision_accuracy": (cheapest == target).sum(),
        }
        for name, value in found.items():
            self.costs[name] = self.costs.get(name, 0.0) + float(value)

    @property
    def margins(self) -> Tensor:
        """Logit of the true class minus the largest other one, of every image (N,)."""
        return torch.cat(self._margin)

    def measures(self) -> dict[str, float]:
        """Accuracy, cross-entropy in nats, calibration error, Brier score, mean confidence; costs, if known."""
        correct, confidence = torch.cat(self._correct).double(), torch.cat(self._confidence)
        bins = self.reliability()
        gaps = [abs(row["accuracy"] - row["confidence"]) * row["count"] for row in bins if row["count"]]
        count = len(correct)
        return {
            "accuracy": float(correct.mean()),
            "loss": self.sums["loss"] / count,
            "ece": sum(gaps) / count,
            "brier": self.sums["brier"] / count,
            "confidence": float(confidence.mean()),
        } | {name: value / count for name, value in self.costs.items()}

    def reliability(self) -> list[dict[str, Any]]:
        """Images, mean confidence and accuracy of each of BINS bins of confidence, (low, high]; null without images."""
        confidence, correct = torch.cat(self._confidence), torch.cat(self._correct).double()
        edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
        place = torch.bucketize(confidence, edges[1:-1])
        rows: list[dict[str, Any]] = []
        for index in range(BINS):
            inside = place == index
            count = int(inside.sum())
            row: dict[str, Any] = {"low": float(edges[index]), "high": float(edges[index + 1]), "count": count}
            row["confidence"] = float(confidence[inside].mean()) if count else None
            row["accuracy"] = float(correct[inside].mean()) if count else None
            rows.append(row)
        return rows

    def per_class(self) -> list[float | None]:
        """Accuracy of each class; None for one without images."""
        counts = zip(self.confusion.diagonal().tolist(), self.confusion.sum(1).tolist(), strict=True)
        return [right / total if total else None for right, total in counts]


def quantiles(values: Tensor) -> Mapping[str, float]:
    """Least value, 1 %, 10 % and 50 % quantile, and mean."""
    ordered = values.double().sort().values
    at = {"q01": 0.01, "q10": 0.1, "median": 0.5}
    found = {name: float(ordered[int(share * (len(ordered) - 1))]) for name, share in at.items()}
    return {"min": float(ordered[0]), **found, "mean": float(values.double().mean())}
