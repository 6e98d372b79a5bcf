"""Detection of out-of-distribution images at the inner layers of a model, beside how far each of them has collapsed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ncreg import robustness
from ncreg.metrics import LayerwiseCollapse, NeuralCollapse
from recipes.core.errors import UserError
from recipes.evaluation.model_pass import ALL_LAYERS, watched
from recipes.evaluation.run_under_test import Outputs, RunUnderTest

SCORES = ("knn", "mahalanobis")
"""Scores that need features alone, so that an inner layer has them."""

LAST = "features"
"""Stands for the features that enter the head."""


@dataclass
class InnerLayers:
    """Watches the stages of a model while `with` lasts, and the encoder's features where something projects them.

    A model whose layers cannot be watched has none, and `reason` says why.
    """

    run: RunUnderTest
    reason: str | None = None
    watch: LayerwiseCollapse | None = None
    stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> InnerLayers:
        names = (ALL_LAYERS,)
        try:
            with watched(self.run.model, names) as found:
                assert found is not None
                names = (*found.modules, *(() if isinstance(self.run.model.project, nn.Identity) else ("backbone",)))
            self.watch = self.stack.enter_context(watched(self.run.model, names))
            self.run.outputs(self.run.draw("train", 2))
            self.activations()
        except (UserError, ValueError) as error:
            self.reason, self.watch = " ".join(str(error).split()), None
            self.stack.close()
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def activations(self) -> dict[str, Tensor]:
        """Pooled features by layer of all images since, in float64 on the CPU; the encoder's are called encoder."""
        seen = self.watch.activations() if self.watch is not None else {}
        return {"encoder" if name == "backbone" else name: rows.cpu().double() for name, rows in seen.items()}


def detection_by_layer(
    inner: Mapping[str, Tensor], train: Outputs, test: Outputs, outside: Mapping[str, Outputs], named: Sequence[str]
) -> dict[str, Any]:
    """NC1 on training images and AUROC at each layer, the features that enter the head last, and a line of advice.

    Args:
        inner: features by layer of the images of `train`, `test` and `outside`, one after the other.
        train: what the scores are fitted to.
        test: in-distribution images.
        outside: the other sets by name.
        named: those of them whose mean AUROC is compared.
    """
    parts = {"train": train, "test": test} | dict(outside)
    sizes = [len(part.target) for part in parts.values()]
    layers: dict[str, dict[str, Any]] = {}
    skipped = {}
    for name, rows in [*inner.items(), (LAST, torch.cat([part.features for part in parts.values()]))]:
        split = dict(zip(parts, rows.split(sizes), strict=True))
        try:
            layers[name] = _layer(split, train, test, outside, named)
        except ValueError as error:
            skipped[name] = " ".join(str(error).split())
    return {"layers": layers, "compared": list(named), "skipped": skipped, "advice": advice(layers)}


def _layer(
    split: Mapping[str, Tensor], train: Outputs, test: Outputs, outside: Mapping[str, Outputs], named: Sequence[str]
) -> dict[str, Any]:
    report = robustness.evaluate_ood(
        split["train"],
        train.target,
        split["test"],
        test.logits,
        {name: (split[name], part.logits) for name, part in outside.items()},
        scores=SCORES,
    )
    collapse = NeuralCollapse(train.logits.shape[1], split["train"].shape[1])
    collapse.update(split["train"], train.target)
    auroc = {name: {score: found.auroc for score, found in row.items()} for name, row in report.detections.items()}
    means = {score: sum(auroc[name][score] for name in named) / len(named) for score in SCORES}
    return {
        "width": split["train"].shape[1],
        "nc1": float(collapse.compute()["nc1"]),
        "auroc": auroc,
        "mean_auroc": means,
    }


def advice(layers: Mapping[str, Mapping[str, Any]]) -> str | None:
    """One sentence: which layer to score, and whether detection follows collapse; None without inner layers.

    Example:
        >>> def layer(nc1, auroc):
        ...     return {"nc1": nc1, "mean_auroc": {"knn": auroc, "mahalanobis": 0.5}}
        >>> advice({"layer1": layer(9.0, 0.7), "layer2": layer(1.0, 0.8), "features": layer(0.1, 0.9)})
        'score the features that enter the head: AUROC 90.0 (knn); over 3 layers it follows collapse, τ = +1.00'
    """
    if len(layers) < 2 or LAST not in layers:
        return None
    best, score = max(((name, score) for name in layers for score in SCORES), key=lambda at: _mean(layers, *at))
    knn = [_mean(layers, name, "knn") for name in layers]
    tau = _kendall([-layer["nc1"] for layer in layers.values()], knn)
    follows = f"over {len(layers)} layers it {'follows' if tau > 0 else 'does not follow'} collapse, τ = {tau:+.2f}"
    place, value = "the features that enter the head" if best == LAST else best, 100 * _mean(layers, best, score)
    instead = "" if best == LAST else f", {100 * max(_mean(layers, LAST, s) for s in SCORES):.1f} where the head is"
    return f"score {place}: AUROC {value:.1f} ({score}){instead}; {follows}"


def _mean(layers: Mapping[str, Mapping[str, Any]], name: str, score: str) -> float:
    return float(layers[name]["mean_auroc"][score])


def _kendall(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's τ-a: pairs in the same order less pairs in the opposite one, over all pairs."""
    pairs = [(i, k) for i in range(len(first)) for k in range(i)]
    products = [(first[i] - first[k]) * (second[i] - second[k]) for i, k in pairs]
    return sum((product > 0) - (product < 0) for product in products) / len(pairs)
