"""NeuralCollapse: the measures of last-layer features and the classifier, from one object for both passes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn
from torchmetrics.utilities.distributed import gather_all_tensors

from ncreg._checks import check_choice, check_flag, check_integer, check_num_classes
from ncreg.metrics import _first_pass, _formulas, _reduce
from ncreg.metrics._base import Float64Metric, check_cached, check_shapes, first_of, mark_of
from ncreg.metrics._geometry import Geometry
from ncreg.metrics._inputs import check_batch
from ncreg.metrics._last_layer import LastLayer
from ncreg.metrics._second_pass import SecondPassTables, new_second, view_second
from ncreg.numerics import float64_device


class NeuralCollapse(Float64Metric):
    """Measures of neural collapse of last-layer features (Papyan, Han & Donoho, PNAS 2020, and later work).

    Some measures need the final class means before they can look at a sample: a second pass. This one object drives
    both. By default `update` keeps the features, and `compute` makes both passes over them. With `cache=False`
    nothing is kept but sums: after one pass over the data `compute` returns what one pass gives, and the loop

        for _ in metric.passes():
            for images, target in loader:
                metric.update(backbone(images), target)
        values = metric.compute()

    feeds the data as often as the metric needs them (once with the cache, twice without) and returns everything.

    `compute` returns a dict of 0-d float64 tensors. From one pass: nc1, nc1_rank, trace_ratio, cdnv, nc2_equinorm,
    nc2_equiangularity, nc2_cosine_std, etf_distance, stable_rank and effective_rank (of the centred class means),
    within_stable_rank and within_effective_rank (of the within-class scatter). With a classifier: nc0,
    nc2_weight_equinorm, nc2_weight_equiangularity, nc2_weight_cosine_std, nc2_weight_gram, nc3, nc3_bias. From the
    second pass: intra_cosine and inter_cosine with _min and _max, ncc_accuracy, and with a classifier nc4,
    classifier_accuracy, margin and normalized_margin with _mean, _min, _q01, _q10, _q50. docs/metrics.md gives
    formulas, ranges, values at collapse and sources.

    Statistics are float64 around the class means, so that NC1 = 1e-10 and features far from the origin cost no
    digits. Products of the second pass run in float32 unless the features are float64. Across ranks only sums (and
    the margins) travel, never features; shards may be uneven or empty.

    Args:
        num_classes: C, at least 2. Classes without samples are left out of the measures, with one warning.
        num_features: d.
        classifier: the last layer: anything with `.weight` (C, d) and optionally `.bias` (C,); `.class_vectors` (C, d)
            comes before `.weight` where there is one. It is read when the measures are computed (without the cache:
            when the second pass starts), and is no part of the metric's state; clones share it. One that is spread
            over ranks (FSDP2) is gathered there, so every rank must take part in `passes` and `compute`.
        cache: keep the features (N·d·itemsize bytes) so that one feed gives every measure.
        scatter: keep the d×d within-class scatter. Without it memory is O(Cd + C²), NC1 comes from the second pass,
            and the two within-class ranks are not given: for large d.
        center: what the cosines are taken around: the unweighted mean of class means, or the mean of all features
            (Pan & Cao, arXiv 2309.04644), which is misleading for unbalanced classes.
        convention: "ncreg", or "papyan" for the normalisations of the original notebook: nc1 not divided by C, nc3
            squared, sample standard deviations in the equinorms.
        **kwargs: as for torchmetrics.Metric. With `compute_on_cpu=True` features leave the model's device at each
            update, and all is kept and computed on the CPU.

    Raises:
        TypeError: sizes that are no integers, a classifier without vectors.
        ValueError: fewer than two classes, class vectors of another shape, an unknown center or convention.

    Example:
        >>> import torch
        >>> from ncreg.metrics import NeuralCollapse
        >>> means = torch.tensor([[2.0, 0.0], [-1.0, 3.0**0.5], [-1.0, -(3.0**0.5)]])
        >>> target = torch.arange(300) % 3
        >>> features = means[target] + 1e-3 * torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
        >>> metric = NeuralCollapse(num_classes=3, num_features=2)
        >>> for batch in torch.arange(300).split(64):
        ...     metric.update(features[batch], target[batch])
        >>> values = metric.compute()
        >>> print(f"{values['inter_cosine']:.4f} {values['ncc_accuracy']:.1f} {values['nc1'] < 1e-6}")
        -0.5000 1.0 True
    """

    # states: with the cache
    features: list[Tensor]
    target: list[Tensor]
    # and without; the lists are empty until the second pass: class counts and means of all ranks, sums, margins
    moments: Tensor
    reference: list[Tensor]
    second: list[Tensor]
    margins: list[Tensor]
    _on_cpu = False

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        classifier: Any = None,
        *,
        cache: bool = True,
        scatter: bool = True,
        center: Literal["class_means", "features"] = "class_means",
        convention: Literal["ncreg", "papyan"] = "ncreg",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._on_cpu = self.compute_on_cpu  # torchmetrics switches that one off within forward()
        num_classes, num_features = check_num_classes(num_classes), check_integer("num_features", num_features, 1)
        check_flag("cache", cache)
        check_flag("scatter", scatter)
        check_choice("center", center, ("class_means", "features"))
        check_choice("convention", convention, ("ncreg", "papyan"))
        self.num_classes, self.num_features = num_classes, num_features
        self.cache, self.scatter, self.center, self.convention = cache, scatter, center, convention
        self._classifier = None if classifier is None else LastLayer(classifier, num_classes, num_features)
        self._synced: _reduce.Statistics | None = None
        self._warned = False
        if cache:
            self.add_state("features", [], dist_reduce_fx="cat")
            self.add_state("target", [], dist_reduce_fx="cat")
            return
        zero = _first_pass.new(num_classes, num_features, scatter=scatter, device=self.home)
        self.add_state("moments", zero, functools.partial(_first_pass.merge, num_classes=num_classes, dim=num_features))
        self.add_state("reference", [], dist_reduce_fx="cat")
        self.add_state("second", [], dist_reduce_fx="cat")
        self.add_state("margins", [], dist_reduce_fx="cat")
        # Sums of the second pass depend on these, those of the first do not: a collection must keep such metrics apart.
        mark = mark_of(self._classifier and self._classifier.module, center == "features")
        self.add_state("mark", mark.to(self.home), first_of)

    def update(self, features: Float[Tensor, "batch dim"], target: Integer[Tensor, " batch"]) -> None:
        """Take in a batch of features (B, d) and class labels (B,).

        Raises:
            TypeError: features are not floating point, or target is not integer.
            ValueError: a wrong shape, a label out of range, NaN or infinite features.
        """
        check_batch(features, target, self.num_classes, self.num_features)
        self._leave_inference_mode()
        features, target = features.detach().to(self.home), target.detach().to(self.home, torch.int64)
        if self.cache:
            # copies: what the caller does to its tensors later must not reach the cache
            self.features.append(features.clone())
            self.target.append(target.clone())
        elif self.reference:
            self._update_second(features, target)
        else:
            moments = _first_pass.view(self.moments, self.num_classes, self.num_features)
            for rows, labels in _reduce.blocks([features], [target]):
                _first_pass.add(moments, rows.double(), labels)

    def _leave_inference_mode(self) -> None:
        """Sums made under inference_mode cannot be added to outside of it: go on with copies."""
        if self.cache or torch.is_inference_mode_enabled():
            return
        if self.moments.is_inference():
            self.moments = self.moments.clone()
        self.second[:] = [sums.clone() if sums.is_inference() else sums for sums in self.second]

    def _update_second(self, features: Tensor, target: Tensor) -> None:
        dtype = _reduce.product_dtype([features])
        if self._tables is None or self._tables.requested_dtype != dtype:
            classifier = self._gathered or self._read_classifier(on_every_rank=False)
            self._tables = self._make_tables(_reduce.geometry_of(self.reference[0]), classifier, dtype)
        sums = view_second(self.second[-1], self.num_classes, self.num_features)
        margins = self._tables.add(sums, _reduce.blocks([features], [target]))
        if margins is not None:
            self.margins.append(margins)

    def compute(self) -> dict[str, Tensor]:
        """All measures that the passes made so far give, as 0-d float64 tensors; every rank must call.

        Raises:
            ValueError: no sample has been seen, the classifier is not finite, or the second pass was not fed the
                samples of the first.
        """
        found = self._synced if self._is_synced and self._synced else self._reduce(_reduce.only_this_rank)
        self._warn_absent(found.geometry.present)
        values = _formulas.of_statistics(found, self._read_classifier(on_every_rank=True))
        if self.convention == "papyan":
            values = _formulas.as_published(values, int(found.geometry.present.sum()))
        return values

    def passes(self) -> Iterator[int]:
        """Reset, then yield 1, 2 once per pass over the data that the metric needs to give every measure.

        Feed the same samples in each pass, in eval mode and without augmentation; their order is free. Every rank
        must take part.
        """
        self.reset()
        yield 1
        if not self.cache:
            moments = _reduce.merged_moments(self.moments, self.num_classes, self.num_features, self._gather)
            self.reference.append(_reduce.pack(moments))
            self.second.append(new_second(self.num_classes, self.num_features, self.home))
            self._gathered = self._read_classifier(on_every_rank=True)
            yield 2

    def class_means(self) -> Float[Tensor, "classes dim"]:
        """Class means (C, d) over all ranks in float64, NaN for classes without samples; every rank must call."""
        size = (self.num_classes, self.num_features)
        if self.cache:
            geometry = _reduce.cached_geometry(self.features, self.target, *size, self.home, self._gather)
        else:
            geometry = _reduce.geometry_of(_reduce.pack(_reduce.merged_moments(self.moments, *size, self._gather)))
        return geometry.mean.masked_fill(~geometry.present[:, None], torch.nan)

    def within_class_covariance(self) -> Float[Tensor, "dim dim"]:
        """Σ_W = (1/N) Σ (h − μ_y)(h − μ_y)ᵀ (d, d) over all ranks in float64; every rank must call.

        Raises:
            ValueError: the metric was made with scatter=False, or no sample has been seen.

        Example:
            >>> metric = NeuralCollapse(2, 1)
            >>> metric.update(torch.tensor([[0.0], [2.0], [5.0], [7.0]]), torch.tensor([0, 0, 1, 1]))
            >>> metric.within_class_covariance()
            tensor([[1.]], dtype=torch.float64)
        """
        if not self.scatter:
            raise ValueError("within_class_covariance needs the scatter: NeuralCollapse(…, scatter=True)")
        found = self._reduce(self._gather)
        assert found.scatter is not None
        return found.scatter / found.geometry.counts.sum()

    @property
    def home(self) -> torch.device:
        """Where the states live, and where all is computed: with `compute_on_cpu` the CPU, wherever the model is."""
        return torch.device("cpu") if self._on_cpu else super().home

    def _apply(self, fn: Callable, exclude_state: Any = "") -> Module:
        return super()._apply(fn, tuple(self._defaults) if self._on_cpu else exclude_state)

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every rank, by the rules that compute() follows."""
        if not (self.sync_on_compute and self.distributed_available_fn()):
            return [tensor]
        return self._of_ranks(tensor, self.dist_sync_fn or gather_all_tensors, self.process_group)

    def _of_ranks(self, tensor: Tensor, gather: Callable, group: Any) -> list[Tensor]:
        """The tensor of every rank, sent from the metric's device: the ranks of GPUs have no other way."""
        sent = tensor.to(float64_device(self.device))
        return [part.to(tensor.device) for part in gather(sent, group=group)]

    def _make_tables(
        self, geometry: Geometry, classifier: tuple[Tensor, Tensor] | None, dtype: torch.dtype
    ) -> SecondPassTables:
        centre = geometry.global_mean
        if self.center == "features":
            centre = (geometry.counts / geometry.counts.sum()) @ geometry.mean
        return SecondPassTables(geometry, centre, classifier, dtype)

    def _reduce(self, gather: _reduce.Gather) -> _reduce.Statistics:
        size = (self.num_classes, self.num_features)
        if self.cache:
            geometry = _reduce.cached_geometry(self.features, self.target, *size, self.home, gather)
            classifier = self._read_classifier(on_every_rank=True)
            tables = self._make_tables(geometry, classifier, _reduce.product_dtype(self.features))
            return _reduce.cached_statistics(self.features, self.target, tables, gather, scatter=self.scatter)
        decides = self._classifier is not None
        return _reduce.streamed_statistics(self.moments, self.second, self.margins, *size, gather, decides=decides)

    def _warn_absent(self, present: Tensor) -> None:
        absent = (~present).nonzero().squeeze(1).tolist()
        if absent and not self._warned:
            self._warned = True
            named = ", ".join(map(str, absent[:10])) + (", …" if len(absent) > 10 else "")
            rank_zero_warn(
                f"{len(absent)} of {self.num_classes} classes have no samples ({named}): "
                "measured over the classes present",
                UserWarning,
            )

    # Hooks into torchmetrics: only sums cross ranks, and states that do not fit are not merged.

    def _sync_dist(self, dist_sync_fn: Callable = gather_all_tensors, process_group: Any = None) -> None:
        group = process_group or self.process_group
        self._synced = self._reduce(lambda tensor: self._of_ranks(tensor, dist_sync_fn, group))

    def unsync(self, should_unsync: bool = True) -> None:
        """Return to this rank's own samples."""
        super().unsync(should_unsync)
        if should_unsync:
            self._synced = None

    def _copy_state_dict(self) -> dict[str, Any]:
        lists = {key: list(value) for key, value in self.metric_state.items() if isinstance(value, list)}
        tensors = {key: value.clone() for key, value in self.metric_state.items() if isinstance(value, Tensor)}
        return lists | tensors

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Update, and return the measures of this batch alone; a batch that is refused leaves the metric as it was."""
        if not self.cache and self.reference:
            raise RuntimeError("forward() measures one batch alone: use update() in the second pass")
        warned, self._warned = self._warned, True  # a batch seldom holds every class
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._warned = warned

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the samples of another metric of the same settings, or of its state.

        Raises:
            ValueError: the settings differ, or the two are in different passes.
        """
        if isinstance(incoming_state, NeuralCollapse):
            for name in ("num_classes", "num_features", "cache", "scatter", "center"):
                mine, theirs = getattr(self, name), getattr(incoming_state, name)
                if mine != theirs:
                    raise ValueError(f"cannot merge: {name} is {mine} here and {theirs} there")
        elif isinstance(incoming_state, dict):
            here, there = (sorted(set(state) - {"mark"}) for state in (self._defaults, incoming_state))
            if here != there:
                raise ValueError(
                    f"cannot merge: states are {here} here and {there} there; cache must be the same in both"
                )
            self._check_state("merge", incoming_state)
        if not self.cache and isinstance(incoming_state, dict | NeuralCollapse):
            state: dict[str, Any] = incoming_state if isinstance(incoming_state, dict) else incoming_state.metric_state
            if not _reduce.same_pass(self.reference, state["reference"]):
                raise ValueError(
                    "cannot merge: both metrics must be in the first pass, or in the second pass of the same first one"
                )
        super().merge_state(incoming_state)

    def _check_state(self, doing: str, state: Mapping[str, Any]) -> None:
        if self.cache:
            check_cached(doing, state, self.num_classes, self.num_features)
        else:
            check_shapes(doing, state, {"moments": self.moments}, "num_classes, num_features or scatter")
