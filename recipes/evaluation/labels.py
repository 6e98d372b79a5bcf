"""Parts about the training labels: how many images each class had, and how many of the labels were wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ncreg import robustness
from recipes.data.load import load
from recipes.evaluation.presets import Found, NotHere, Settings
from recipes.evaluation.run_under_test import Subject


def long_tail(subject: Subject, settings: Settings) -> Found:
    """Accuracy of many-, medium- and few-shot classes, and the angles between classes beside the theory's threshold.

    A class is as large as the images that truly belong to it: wrong labels, drawn evenly, would lift the rare classes
    over the bounds of the groups. Class means and the threshold go by the labels that were trained on.
    """
    counts = torch.bincount(true_classes(subject), minlength=subject.model.num_classes)
    if counts.max() < 2 * counts.min():
        raise NotHere(f"the training classes are of about one size ({counts.min()} to {counts.max()} images)")
    train, test, labels = subject.of_part("train"), subject.of_part(subject.split), subject.data.class_counts()
    groups = robustness.class_groups(counts)
    scheme: Any = "counts" if sum(bool(classes) for classes in groups.values()) > 1 or len(counts) < 3 else "thirds"
    groups = robustness.class_groups(counts, scheme)
    means = torch.stack([train.features[train.target == label].mean(0) for label in range(len(counts))])
    vectors = numbers(getattr(subject.model.head, "weight", None))
    decay, reason = subject.config.optim.weight_decay, no_threshold(subject)
    return {
        "scheme": scheme,
        "class_counts": counts,
        "label_counts": labels,
        subject.split: robustness.long_tail_accuracy(test.logits.argmax(1), test.target, counts, scheme=scheme),
        "mean_angles": robustness.minority_angles(means, groups, centre=True),
        "vector_angles": None if vectors is None else robustness.minority_angles(vectors, groups),
        "minority_collapse": robustness.minority_collapse(labels, weight_decay=decay, gamma_decay=decay)
        if reason is None
        else None,
        "no_threshold": reason,
    }, []


def no_threshold(subject: Subject) -> str | None:
    """Why the theory of minority collapse says nothing about this run; None where it does."""
    config = subject.config
    if not isinstance(subject.model.head, nn.Linear):
        return f"only for a learned linear head, whose class vectors can merge; this run's is {config.model.head}"
    if config.model.norm != "batch":
        return f"only with a last BatchNorm, whose decay bounds the features; this run's norm is {config.model.norm}"
    if config.optim.name != "sgd" or not config.optim.weight_decay > 0:
        return "only with coupled weight decay: SGD, optim.weight_decay above 0"
    return None


def label_noise(subject: Subject, settings: Settings) -> Found:
    """What became of the training images whose label the run was given wrong."""
    asked = subject.config.data
    if not asked.label_noise:
        raise NotHere("the run was trained on the labels as they are (data.label_noise=0)")
    train = subject.of_part("train")
    found = robustness.memorization(train.logits.argmax(1), train.target, true_classes(subject))
    return vars(found) | {"asked": asked.label_noise}, []


def true_classes(subject: Subject) -> Tensor:
    """The classes of the training images before any label was made wrong, (N,)."""
    asked = subject.config.data
    if not asked.label_noise:
        return subject.data.train.target.cpu()
    clean = replace(asked, label_noise=0.0)
    return load(clean, seed=subject.config.seed, image_size=lambda native: subject.shape[-1]).train.target.cpu()


def numbers(tensor: Any) -> Tensor | None:
    """A tensor in float64 on the CPU; None for what is none."""
    return tensor.detach().cpu().double() if isinstance(tensor, Tensor) else None
