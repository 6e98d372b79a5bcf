"""NearestClassCenter: decisions of the nearest class mean, against the labels and against the classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torchmetrics import Metric

from ncreg._checks import check_flag, described
from ncreg.metrics import _reduce
from ncreg.metrics._base import Float64Metric, check_shapes, first_of, mark_of
from ncreg.metrics._geometry import class_geometry
from ncreg.metrics._inputs import check_batch, check_not_meta
from ncreg.metrics._last_layer import LastLayer
from ncreg.metrics._second_pass import SecondPassTables, decisions_alone
from ncreg.numerics import in_float64


class NearestClassCenter(Float64Metric):
    """Decisions of the nearest class centre, argmin_c ‖h − μ_c‖, for given means: of training or test features.

    `compute` returns a dict of 0-d float64 tensors: ncc_accuracy, the fraction of samples whose nearest centre is
    their own class's; with a classifier also classifier_accuracy, the fraction where argmax_c (w_c·h + b_c) is, and
    nc4, the fraction where the two choices differ (Papyan, Han & Donoho, PNAS 2020). `per_class=True` adds, for each,
    a (C,) tensor under the same name with _per_class, by the samples' class, NaN for classes without samples.

    Args:
        means: class means (C, d), such as `NeuralCollapse.class_means()`; a class whose row is NaN has no centre.
        classifier: anything with `.weight` (C, d) and optionally `.bias` (C,); read at the first update after a
            reset. It is no part of the metric's state, and clones share it. One that is spread over ranks (FSDP2) is
            refused: pass whole copies.
        per_class: also return the results of each class.
        **kwargs: as for torchmetrics.Metric.

    Raises:
        TypeError: means that are no tensor, a classifier without vectors.
        ValueError: means of another shape or not finite in part of a row, class vectors of another shape.

    Example:
        >>> import torch
        >>> from ncreg.metrics import NearestClassCenter
        >>> head = torch.nn.Linear(2, 2, bias=False)
        >>> head.weight = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> metric = NearestClassCenter(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), head)
        >>> metric.update(torch.tensor([[0.9, 1.0], [0.1, 2.9]]), torch.tensor([0, 1]))
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'ncc_accuracy': 1.0, 'nc4': 0.5, 'classifier_accuracy': 0.5}
    """

    means: Tensor
    mark: Tensor
    counts: Tensor

    def __init__(
        self,
        means: Float[Tensor, "classes dim"],
        classifier: Any = None,
        *,
        per_class: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(means, Tensor):
            raise TypeError(f"means must be a torch.Tensor (num_classes, num_features), got {described(means)}")
        check_not_meta("means", means)
        if means.ndim != 2 or not means.is_floating_point():
            raise ValueError(
                f"means must be floating point (num_classes, num_features), got {means.dtype} {tuple(means.shape)}"
            )
        finite = means.isfinite()
        if not (finite.all(1) | means.isnan().all(1)).all() or not finite.any():
            raise ValueError("means hold NaN or infinite values: a row must be finite, or NaN throughout (no centre)")
        self.per_class = check_flag("per_class", per_class)
        self._classifier = None if classifier is None else LastLayer(classifier, *means.shape)
        if self._classifier is not None:
            self._classifier.check_not_sharded()
        # A state, not a buffer: metrics with other means must not pass for the same one in a MetricCollection.
        self.add_state("means", means.detach().to(self.home).to(torch.float64, copy=True), dist_reduce_fx=first_of)
        if self._classifier is not None:  # for the same reason: others may decide alike on the first batch alone
            self.add_state("mark", mark_of(self._classifier.module).to(self.home), first_of)
        # per class: samples, nearest centre is their own, classifier chooses their own, the two choices differ
        self.add_state("counts", torch.zeros(len(means), 4, device=self.home, dtype=torch.int64), "sum")

    def update(self, features: Float[Tensor, "batch dim"], target: Integer[Tensor, " batch"]) -> None:
        """Take in a batch of features (B, d) and class labels (B,).

        Raises:
            TypeError: features are not floating point, or target is not integer.
            ValueError: a wrong shape, a label out of range, NaN or infinite features.
        """
        classes, dim = self.means.shape
        check_batch(features, target, classes, dim)
        features, target = features.detach().to(self.home), target.detach().to(self.home, torch.int64)
        dtype = _reduce.product_dtype([features])
        if self._tables is None or self._tables.requested_dtype != dtype:
            self._tables = self._make_tables(dtype)
        sums = decisions_alone(classes, dim, self.home)
        self._tables.add(sums, _reduce.blocks([features], [target]))
        found = torch.stack([sums.counts, sums.nearest, sums.correct, sums.disagree], dim=1)
        self.counts = self.counts + found.to(self.counts)

    def compute(self) -> dict[str, Tensor]:
        """Accuracies and the rate of disagreement over all samples of all ranks; every rank must call.

        Raises:
            ValueError: no sample has been seen.
        """
        counts = in_float64(self.counts)
        if not counts.any():
            raise ValueError("no samples seen: call update(features, target) before compute()")
        total = counts.sum(0)
        names = {"ncc_accuracy": 1} | ({"nc4": 3, "classifier_accuracy": 2} if self._classifier else {})
        values = {name: total[column] / total[0] for name, column in names.items()}
        if self.per_class:
            values |= {f"{name}_per_class": counts[:, column] / counts[:, 0] for name, column in names.items()}
        return values

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the samples of another metric of the same means, or of its state.

        Raises:
            ValueError: the means differ, or the classifiers, or the other samples have met none.
        """
        theirs = incoming_state.means if isinstance(incoming_state, NearestClassCenter) else None
        theirs = incoming_state.get("means") if isinstance(incoming_state, dict) else theirs
        if theirs is not None and not isinstance(theirs, Tensor):
            raise ValueError(f"cannot merge: means in the state must be a tensor, got {described(theirs)}")
        if theirs is not None and not (
            theirs.shape == self.means.shape and torch.allclose(theirs.to(self.means), self.means, 0, 0, equal_nan=True)
        ):
            raise ValueError(
                f"cannot merge: means are {tuple(self.means.shape)} here and {tuple(theirs.shape)} there, "
                "or differ in their values"
            )
        if self._classifier is not None:
            self._check_decided(self._classifier, incoming_state)
        super().merge_state(incoming_state)

    def _check_decided(self, mine: LastLayer, incoming_state: dict[str, Any] | Metric) -> None:
        """Check that the samples to be merged have met the same classifier."""
        if isinstance(incoming_state, NearestClassCenter):
            theirs = incoming_state._classifier
            if theirs is None:
                raise ValueError("cannot merge: the other metric has no classifier, so that its samples have no nc4")
            if not mine.agrees_with(theirs):
                raise ValueError("cannot merge: the two metrics have different classifiers: their weights differ")
        counts = incoming_state.get("counts") if isinstance(incoming_state, dict) else None
        if isinstance(counts, Tensor) and counts.shape == self.counts.shape:
            _, nearest, correct, disagree = counts.sum(0).tolist()
            if correct == disagree == 0 < nearest:  # no classifier that always agrees with the nearest centre is wrong
                raise ValueError(
                    "cannot merge: the state is of a metric without a classifier, and its samples have no nc4: "
                    "take one of NearestClassCenter(means, classifier)"
                )

    def _check_state(self, doing: str, state: Mapping[str, Any]) -> None:
        check_shapes(doing, state, {"means": self.means, "counts": self.counts}, "num_classes or num_features")

    def _make_tables(self, dtype: torch.dtype) -> SecondPassTables:
        has_centre = self.means.isfinite().all(1)
        geometry = class_geometry(has_centre.double(), self.means)
        return SecondPassTables(geometry, geometry.global_mean, self._read_classifier(on_every_rank=False), dtype)
