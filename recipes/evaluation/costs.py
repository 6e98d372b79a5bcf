"""What mistakes cost a model under test: the matrix in the order of its outputs, and the dearest confusions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ncreg import robustness
from recipes.core.costs import read_costs
from recipes.evaluation.presets import Settings
from recipes.evaluation.run_under_test import RunUnderTest

MOST_PAIRS = 10
"""Confusions that a result names at most."""


def costs_of(run: RunUnderTest, settings: Settings) -> Tensor | None:
    """The costs (C, C) of --cost, else those that the run was trained with; None without any.

    Raises:
        UserError: the file of costs cannot be used.
    """
    if settings.cost is not None:
        return read_costs(settings.cost, run.data.class_names)
    own = run.config.data.cost
    return None if own is None else read_costs(own, run.data.class_names, key="data.cost")


def digest_of(cost: Tensor | None) -> str | None:
    """A hash of the costs, whatever file they come from."""
    return None if cost is None else hashlib.sha256(cost.numpy().tobytes()).hexdigest()[:16]


def costly_confusions(confusion: Tensor, cost: Tensor, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """The dearest confusions, with the share of the class's images that withstand them; at most `MOST_PAIRS`.

    Args:
        confusion: images of class y that became class j, in row y and column j (C, C).
        cost: of taking class y for j (C, C).
        class_names: of the classes.

    Example:
        >>> import torch
        >>> confusion = torch.tensor([[6, 1, 3], [0, 9, 1], [0, 0, 0]])
        >>> cost = torch.tensor([[0.0, 1.0, 9.0], [1.0, 0.0, 5.0], [1.0, 1.0, 0.0]])
        >>> rows = costly_confusions(confusion, cost, ["cat", "dog", "car"])
        >>> [(row["true"], row["predicted"], row["cost"], row["robust"]) for row in rows]
        [('cat', 'car', 9.0, 0.7), ('dog', 'car', 5.0, 0.9)]
    """
    images = confusion.sum(1)
    dear = [(y, j) for y, j in (cost > cost[cost > 0].min()).nonzero().tolist() if images[y]]
    same_price = [(y, j) for y, j in (cost > 0).nonzero().tolist() if images[y]] if not dear else []
    pairs = sorted(dear or same_price, key=lambda pair: (-float(cost[pair]), -int(confusion[pair])))
    rows = []
    for y, j in pairs[:MOST_PAIRS]:
        count, held = int(images[y]), int(images[y] - confusion[y, j])
        rows.append(
            {
                "true": class_names[y],
                "predicted": class_names[j],
                "cost": float(cost[y, j]),
                "images": count,
                "robust": held / count,
                "interval": robustness.binomial_interval(held, count),
            }
        )
    return rows
