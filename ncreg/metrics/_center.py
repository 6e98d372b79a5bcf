"""NearestClassCenter: what the nearest class mean decides, against the truth and against the classifier."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from . import _moments, _second
from ._base import Float64Metric
from ._inputs import Reference, check_batch, check_classifier, read_classifier


class NearestClassCenter(Float64Metric):
    """NC4 and accuracy of the nearest class centre."""

    def __init__(self, means: Float[Tensor, "classes dim"], classifier: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if means.ndim != 2:
            raise ValueError(f"means must have shape (num_classes, num_features), got {tuple(means.shape)}")
        if classifier is not None:
            check_classifier(classifier)
        self._classifier = None if classifier is None else Reference(classifier)
        self._means = means.detach().to(self.home, torch.float64)
        # per class: samples, nearest centre is theirs, classifier chooses theirs, the two choices differ
        self.add_state("counts", torch.zeros(len(means), 4, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, features: Float[Tensor, "batch dim"], target: Integer[Tensor, " batch"]) -> None:
        """Take in a batch of features and their labels."""
        classes, dim = self._means.shape
        check_batch(features, target, classes, dim)
        features, target = features.detach().to(self.home), target.detach().to(self.home, torch.int64)
        shape = _second.geometry(torch.ones_like(self._means[:, 0]), self._means)
        classifier = (
            (None, None)
            if self._classifier is None
            else read_classifier(self._classifier.module, classes, dim, self.home)
        )
        frame = _second.Frame(shape, shape.global_mean, *classifier)
        flat = _second.new_second(classes, dim, self.home)
        sums = _second.view_second(flat, classes, dim)
        for rows, labels in _moments.blocks(features, target, max(64, 2**19 // dim)):
            frame.add(sums, rows, labels)
        new = torch.stack([sums.count, sums.nearest, sums.correct, sums.disagree], dim=1)
        self.counts += new.to(self.counts)

    def compute(self) -> dict[str, Tensor]:
        """NC4, the nearest centre's accuracy and the classifier's."""
        total, nearest, correct, disagree = self.counts.sum(0).double().unbind()
        if not total:
            raise ValueError("NearestClassCenter has seen no samples: call update(features, target) first")
        values = {"ncc_accuracy": nearest / total}
        if self._classifier is not None:
            values |= {"nc4": disagree / total, "accuracy": correct / total}
        return values
