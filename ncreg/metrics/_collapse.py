"""NeuralCollapse: one object for both passes over the features."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torchmetrics.utilities import rank_zero_warn
from torchmetrics.utilities.distributed import gather_all_tensors

from . import _measures, _moments, _second
from ._base import Float64Metric
from ._inputs import Reference, check_batch, check_classifier, read_classifier

Gather = Callable[[Tensor], list[Tensor]]


class _Statistics(NamedTuple):
    """Everything compute() needs, over all samples of all ranks."""

    moments: _moments.Moments
    second: _second.SecondPass | None
    margins: Tensor | None


def _alone(tensor: Tensor) -> list[Tensor]:
    return [tensor]


class NeuralCollapse(Float64Metric):
    """Measures of neural collapse of last-layer features."""

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        classifier: Any = None,
        *,
        cache: bool = True,
        scatter: bool = True,
        center: Literal["class_means", "features"] = "class_means",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes}: collapse is about at least 2 classes")
        if num_features < 1:
            raise ValueError(f"num_features={num_features} must be at least 1")
        if center not in ("class_means", "features"):
            raise ValueError(f"center={center!r} must be 'class_means' or 'features'")
        if classifier is not None:
            check_classifier(classifier)
        self.num_classes, self.num_features = num_classes, num_features
        self.cache, self.scatter, self.center = cache, scatter, center
        self._classifier = None if classifier is None else Reference(classifier)
        self._statistics: _Statistics | None = None
        self._warned = False
        if cache:
            self.add_state("features", [], dist_reduce_fx="cat")
            self.add_state("target", [], dist_reduce_fx="cat")
        else:
            zero = _moments.new(num_classes, num_features, scatter=scatter, device=self.home)
            merge = functools.partial(_moments.merge, num_classes=num_classes, dim=num_features)
            self.add_state("moments", zero, dist_reduce_fx=merge)
            # Lists, so that they take no room before the second pass: global (count, mean), sums, margins.
            self.add_state("reference", [], dist_reduce_fx="cat")
            self.add_state("second", [], dist_reduce_fx="cat")
            self.add_state("margins", [], dist_reduce_fx="cat")

    def update(self, features: Float[Tensor, "batch dim"], target: Integer[Tensor, " batch"]) -> None:
        """Take in a batch of features and their labels."""
        check_batch(features, target, self.num_classes, self.num_features)
        features = features.detach().to(self.home)
        target = target.detach().to(self.home, torch.int64)
        if self.cache:
            self.features.append(features.clone())
            self.target.append(target.clone())
        elif self.reference:
            frame = self._frame
            sums = _second.view_second(self.second[0], self.num_classes, self.num_features)
            for rows, labels in _moments.blocks(features, target, self._rows):
                margins = frame.add(sums, rows, labels)
                if margins is not None:
                    self.margins.append(margins)
        else:
            moments = _moments.view(self.moments, self.num_classes, self.num_features)
            for rows, labels in _moments.blocks(features, target, self._rows):
                _moments.add(moments, _moments.anchored(moments, rows.double(), labels), labels)

    def compute(self) -> dict[str, Tensor]:
        """All measures as 0-d tensors."""
        found = self._statistics if self._is_synced else self._reduce(_alone)
        self._statistics = None
        assert found is not None
        moments, second, margins = found
        shape = _second.geometry(moments.count, moments.mean)
        values = _measures.of_means(shape, moments.trace)
        if moments.scatter.numel():
            values |= _measures.of_scatter(shape, moments.scatter)
        if self._classifier is not None:
            values |= _measures.of_classifier(shape, *self._read_classifier())
        if second is not None:
            if not moments.scatter.numel():
                values["nc1"] = _measures.nc1(shape, second.spread[: len(shape.basis)])
            values |= _measures.of_second_pass(shape, second)
            if margins is not None:
                values |= _measures.of_decisions(second, margins)
        self._warn_absent(moments.count)
        return values

    @property
    def _rows(self) -> int:
        return max(64, 2**19 // self.num_features)

    def _read_classifier(self) -> tuple[Tensor, Tensor]:
        assert self._classifier is not None
        return read_classifier(self._classifier.module, self.num_classes, self.num_features, self.home)

    def _make_frame(self, count: Tensor, mean: Tensor) -> _second.Frame:
        shape = _second.geometry(count, mean)
        centre = shape.global_mean
        if self.center == "features":
            centre = (mean * (count / count.sum())[:, None]).sum(0)
        return _second.Frame(shape, centre, *((None, None) if self._classifier is None else self._read_classifier()))

    def _reduce(self, gather: Gather) -> _Statistics:
        return self._reduce_cached(gather)

    def _reduce_cached(self, gather: Gather) -> _Statistics:
        """Two passes over the cached features; only sums cross ranks."""
        size = (self.num_classes, self.num_features)
        pairs = [
            block
            for features, target in zip(self.features, self.target, strict=True)
            for block in _moments.blocks(features, target, self._rows)
        ]
        flat = _moments.new(*size, scatter=False, device=self.home)
        first = _moments.view(flat, *size)
        for features, target in pairs:
            _moments.add(first, _moments.anchored(first, features.double(), target), target)
        total = _moments.view(_moments.merge(torch.stack(gather(flat)), *size), *size)
        self._require_samples(total.count)
        frame = self._make_frame(total.count, total.mean)
        flat, margins = _second.new_second(*size, self.home), []
        sums = _second.view_second(flat, *size)
        scatter = torch.zeros(self.num_features, self.num_features, dtype=torch.float64, device=self.home)
        for features, target in pairs:
            margins.append(frame.add(sums, features, target))
            if self.scatter:
                _moments.add_gram(scatter, features.double() - total.mean[target])
        second = _second.view_second(torch.stack(gather(flat)).sum(0), *size)
        if self.scatter:
            scatter = _moments.fill_lower(torch.stack(gather(scatter)).sum(0))
        else:
            scatter = scatter[:0, :0]
        margin = torch.cat(gather(torch.cat(margins))) if self._classifier is not None else None
        return _Statistics(total._replace(scatter=scatter), second, margin)

    def _require_samples(self, count: Tensor) -> None:
        if not count.sum():
            raise ValueError("NeuralCollapse has seen no samples: call update(features, target) before compute()")

    def _warn_absent(self, count: Tensor) -> None:
        absent = (count == 0).nonzero().squeeze(1).tolist()
        if absent and not self._warned:
            self._warned = True
            named = ", ".join(map(str, absent[:10])) + (", …" if len(absent) > 10 else "")
            rank_zero_warn(
                f"{len(absent)} of {self.num_classes} classes have no samples ({named}): "
                "measured over the classes present",
                UserWarning,
            )

    def _sync_dist(self, dist_sync_fn: Callable = gather_all_tensors, process_group: Any = None) -> None:
        group = process_group or self.process_group
        self._statistics = self._reduce(lambda tensor: list(dist_sync_fn(tensor, group=group)))

    def passes(self) -> Iterator[int]:
        """Reset, then yield once per pass over the data that the metric needs."""
        self.reset()
        yield 1
