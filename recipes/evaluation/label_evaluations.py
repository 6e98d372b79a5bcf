"""Evaluations of what training labels did: classes with few images, and labels that were wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ncreg import robustness
from recipes.data.load import load
from recipes.evaluation.presets import NotAvailable, Outcome, Settings
from recipes.evaluation.run_under_test import RunUnderTest


def long_tail(run: RunUnderTest, settings: Settings) -> Outcome:
    """Accuracy of many-, medium- and few-shot classes, and the angles between classes beside the theory's threshold.

    The size of a class is the number of images that truly belong to it: wrong labels, drawn evenly, would lift the
    rare classes over the bounds of the groups. Class means and the threshold use the labels of the training.
    """
    counts = torch.bincount(true_classes(run), minlength=run.model.num_classes)
    if not bool((counts > 0).all()):
        raise NotAvailable(f"{int((counts == 0).sum())} of the {len(counts)} classes have no training image")
    if counts.max() < 2 * counts.min():
        raise NotAvailable(f"the training classes are of about one size ({counts.min()} to {counts.max()} images)")
    train, test, labels = run.outputs_on("train"), run.outputs_on(run.split), run.data.class_counts()
    groups = robustness.class_groups(counts)
    scheme: Any = "counts" if sum(bool(classes) for classes in groups.values()) > 1 or len(counts) < 3 else "thirds"
    groups = robustness.class_groups(counts, scheme)
    means = torch.stack([train.features[train.target == label].mean(0) for label in range(len(counts))])
    vectors = numbers(getattr(run.model.head, "weight", None))
    decay, reason = run.config.optim.weight_decay, no_threshold(run)
    return {
        "scheme": scheme,
        "class_counts": counts,
        "label_counts": labels,
        run.split: robustness.long_tail_accuracy(test.logits.argmax(1), test.target, counts, scheme=scheme),
        "mean_angles": robustness.minority_angles(means, groups, centre=True),
        "vector_angles": None if vectors is None else robustness.minority_angles(vectors, groups),
        "minority_collapse": robustness.minority_collapse(labels, weight_decay=decay, gamma_decay=decay)
        if reason is None
        else None,
        "no_threshold": reason,
    }, []


def no_threshold(run: RunUnderTest) -> str | None:
    """Why the theory of minority collapse says nothing about this run; None where it does."""
    config = run.config
    if not run.is_run:
        return "only where the weight decay of the training is known, and that of MODEL is not"
    if not isinstance(run.model.head, nn.Linear):
        return f"only for a learned linear head, whose class vectors can merge; this run's is {config.model.head}"
    if config.model.norm != "batch":
        return f"only with a last BatchNorm, whose decay bounds the features; this run's norm is {config.model.norm}"
    if config.optim.name != "sgd" or not config.optim.weight_decay > 0:
        return "only with coupled weight decay: SGD, optim.weight_decay above 0"
    return None


def label_noise(run: RunUnderTest, settings: Settings) -> Outcome:
    """Fractions of the wrong training labels that the classifier memorised or corrected."""
    fraction = run.config.data.label_noise
    if not fraction:
        raise NotAvailable("the run was trained on the labels as they are (data.label_noise=0)")
    train = run.outputs_on("train")
    report = robustness.memorization(train.logits.argmax(1), train.target, true_classes(run))
    return vars(report) | {"asked": fraction}, []


def true_classes(run: RunUnderTest) -> Tensor:
    """The classes of the training images before any label was made wrong, (N,)."""
    config = run.config.data
    if not config.label_noise:
        return run.data.train.target.cpu()
    clean = replace(config, label_noise=0.0)
    return load(clean, seed=run.config.seed, image_size=lambda native: run.image_shape[-1]).train.target.cpu()


def numbers(tensor: Any) -> Tensor | None:
    """A tensor in float64 on the CPU; None for anything else."""
    return tensor.detach().cpu().double() if isinstance(tensor, Tensor) else None
