"""What rounding the weights of a finished run or of any model does to its decisions, calibration and collapse."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ncreg import robustness
from ncreg.metrics import NeuralCollapse
from ncreg.quantization import round_weights, rounded_names
from recipes.evaluation.collapse import measurable
from recipes.evaluation.presets import NotAvailable, Outcome, Settings
from recipes.evaluation.run_under_test import Outputs, RunUnderTest

LEVELS: tuple[Any, ...] = (8, 6, 4, 3, "ternary")
"""Bits a weight, as `ncreg.quantization.round_weights` takes them."""

FULL = "full"
"""Stands for the weights as they are."""

COLLAPSE = ("nc1", "nc3", "margin_mean", "normalized_margin_mean", "normalized_margin_q10")
"""What is kept of the measures of collapse."""

NO_TRAINING = "NC1, NC3 and margins are those of training images, and there is none"


def bits(run: RunUnderTest, settings: Settings) -> Outcome:
    """Accuracy, ECE and agreement on held-out images, NC1 and margins on training images, at every number of bits.

    The model stays as it is: each level is a rounded copy. Statistics of norms and biases stay as they were trained.
    """
    size = settings.preset.features
    try:
        names = rounded_names(run.model)
    except ValueError as error:
        raise NotAvailable(str(error)) from None
    if not names:
        raise NotAvailable("the model has no weight of two or more axes to round")
    held_out, train = run.held_out(size), run.draw("train", size)
    levels: dict[str, dict[str, Any]] = {}
    before: Tensor | None = None
    for level in (FULL, *LEVELS):
        model = run.model if level == FULL else round_weights(run.model, level)
        copy = replace(run, model=model, cache={})
        tested = copy.outputs(held_out)
        guess = tested.logits.argmax(1)
        before = guess if before is None else before
        levels[str(level)] = of_decisions(tested, before) | of_features(copy.model, copy.outputs(train))
    overflown = [name for name, row in levels.items() if row["ece"] is None]
    outcome = {"levels": levels, "images": len(held_out), "training_images": len(train)} | told(run.model, names)
    said = [f"logits are not finite at {', '.join(overflown)}"] if overflown else []
    return outcome, said if len(train) else [*said, NO_TRAINING]


def of_decisions(tested: Outputs, before: Tensor) -> dict[str, Any]:
    """Accuracy, its change and the agreement with the classes `before` on the same images, with intervals; and ECE."""
    guess, target = tested.logits.argmax(1), tested.target
    change = robustness.paired_accuracy(before, guess, target)
    right, same = int((guess == target).sum()), int((guess == before).sum())
    finite = bool(tested.logits.isfinite().all())
    return {
        "accuracy": change.after,
        "interval": robustness.binomial_interval(right, len(target)),
        "change": change.change,
        "change_interval": change.interval,
        "agreement": same / len(target),
        "agreement_interval": robustness.binomial_interval(same, len(target)),
        "ece": robustness.expected_calibration_error(tested.logits.softmax(1), target) if finite else None,
    }


def of_features(model: Any, train: Outputs) -> dict[str, float | None]:
    """NC1, NC3 and margins of training images; None where they have no value."""
    classes, width = train.logits.shape[1], train.features.shape[1]
    if not len(train.target) or not bool(train.features.isfinite().all()):
        return dict.fromkeys(COLLAPSE)
    head = measurable(model.head, classes, width)
    metric = NeuralCollapse(classes, width, classifier=head).to(next(model.parameters()).device)
    with warnings.catch_warnings():  # classes without training images
        warnings.filterwarnings("ignore", message=".*classes have no samples")
        with torch.no_grad():
            metric.update(train.features.to(metric.device), train.target.to(metric.device))
            measures = metric.compute()
    return {name: float(measures[name]) if name in measures else None for name in COLLAPSE}


def told(model: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
    """Which tensors were rounded and which were left, and how many numbers they hold."""
    tensors = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    left = {name: value.numel() for name, value in tensors.items() if name not in names}
    return {
        "rounded": list(names),
        "left": list(left),
        "numbers_rounded": sum(
            model.get_buffer(name).numel() if name not in tensors else tensors[name].numel() for name in names
        ),
        "numbers_left": sum(left.values()),
        "head_rounded": any(name.startswith("head.") for name in names),
    }
