"""The base class of the metrics: float64 states, silence about an empty shard, and checks of states from elsewhere."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.metric import CompositionalMetric

from ncreg._checks import described
from ncreg.metrics._last_layer import LastLayer
from ncreg.metrics._plot import Result, drawable, tell_apart
from ncreg.metrics._second_pass import SecondPassTables
from ncreg.numerics import float64_device

CHANGED = (
    "the classifier has changed since compute() measured these samples, and none came since: features of before meet "
    "class vectors of now; keep the first result, or make the metric with compute_with_cache=True"
)


def first_of(stacked: Tensor) -> Tensor:
    """The reduction of a state that is the same everywhere."""
    return stacked[0]


def mark_of(*things: object) -> Tensor:
    """A state of 0 and 1 that differs between metrics of other things, so that a MetricCollection keeps them apart.

    Metrics whose states agree after the first batch share them there. Bits, since large numbers may be equal but for
    rounding.
    """
    return torch.tensor([id(thing) >> place & 1 for thing in things for place in range(64)], device="cpu")


class _Entry:
    """One entry of a result, as an operation that can be pickled; torchmetrics takes a lambda."""

    def __init__(self, key: Any) -> None:
        self.key, self.__name__ = key, repr(key)

    def __call__(self, result: Any) -> Any:
        return result[self.key]


class Float64Metric(Metric):
    """A torchmetrics.Metric whose states are float64 sums, and whose result is read anew at every compute()."""

    is_differentiable = False
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        # The classifier is read at compute time: a cached result would be stale after a training step.
        kwargs.setdefault("compute_with_cache", False)
        super().__init__(**kwargs)
        self._classifier: LastLayer | None = None
        self._tables: SecondPassTables | None = None  # made from the final class means when first needed
        self._gathered: tuple[Tensor, Tensor] | None = None  # the classifier as all ranks read it for the second pass
        self._measured: tuple[Any, ...] | None = None  # updates and version of the classifier at the last compute()

    @property
    def home(self) -> torch.device:
        """Where the states live: the metric's device, or the CPU where that has no float64."""
        return float64_device(self.device)

    def _wrap_compute(self, compute: Callable) -> Callable:
        wrapped = super()._wrap_compute(compute)

        @functools.wraps(compute)
        def quiet(*args: Any, **kwargs: Any) -> Any:
            synced, measured = self._is_synced, self._computed is None and self._warn_changed()
            # A rank with an empty shard has nothing to update; without any sample at all compute() raises.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The ``compute`` method of metric", category=UserWarning)
                try:
                    found = wrapped(*args, **kwargs)
                except BaseException:
                    if self._is_synced and not synced:  # torchmetrics would leave the metric synced, of no more use
                        self.unsync()
                    raise
            self._measured = measured or self._measured
            return found

        return quiet

    def _warn_changed(self) -> tuple[Any, ...] | None:
        """Warn where a training step came between two measurements of the same samples; what to compare with later."""
        if self._classifier is None:
            return None
        now, before = (self._update_count, self._classifier.version()), self._measured
        if before is not None and before[0] == now[0] and before[1] != now[1]:
            warnings.warn(CHANGED, UserWarning, stacklevel=4)
        return now

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Update, and return the measures of this batch alone; a batch that is refused leaves the metric as it was."""
        before = dict(vars(self)) | self._copy_state_dict()  # torchmetrics resets the metric on the way
        self._measured = None
        try:
            return super().forward(*args, **kwargs)
        except BaseException:
            vars(self).update(before)
            raise
        finally:
            self._measured = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_measured": None}  # the copy's classifier may be another object

    def __getitem__(self, key: Any) -> CompositionalMetric:
        """One measure of the result, for a MetricCollection or a log."""
        return CompositionalMetric(_Entry(key), self, None)

    def reset(self) -> None:
        """Forget all samples; the classifier is read again when it is next needed."""
        for name, default in self._defaults.items():
            if isinstance(default, list):  # torchmetrics empties the lists that its Running wrapper keeps
                setattr(self, name, [])
        super().reset()
        self._tables = self._gathered = self._measured = None

    def plot(self, val: Result | Sequence[Result] | None = None, ax: Any = None) -> tuple[Any, Any]:
        """Figure and axis (torchmetrics' protocol): a point for each measure, or its curve over several results.

        Args:
            val: a result of compute() or forward(), or a list of them, one a step; None calls compute(). To show some
                of the measures, pass results that hold those alone. Values of classes are left out; the label of a
                measure that is NaN or infinite says so.
            ax: matplotlib's axis to draw on; None makes a figure.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            TypeError: `val` is no dict of measures and no list of them.
            ValueError: nothing to draw, or results of a list with different measures.

        Example:
            >>> import matplotlib
            >>> from ncreg.metrics import NearestClassCenter
            >>> matplotlib.use("agg")
            >>> metric = NearestClassCenter(torch.eye(2))
            >>> results = [metric(torch.eye(2), torch.tensor([0, target])) for target in (0, 1)]
            >>> figure, axis = metric.plot(results)
            >>> axis.get_lines()[0].get_label(), axis.get_lines()[0].get_ydata().tolist()
            ('ncc_accuracy', [0.5, 1.0])
        """
        first = 0 if ax is None else len(ax.get_lines())
        figure, axis = self._plot(drawable(self.compute() if val is None else val), ax)
        tell_apart(axis, first)
        return figure, axis

    def _read_classifier(self, *, on_every_rank: bool) -> tuple[Tensor, Tensor] | None:
        """Weight and bias of the classifier as they are now, where there is one."""
        return None if self._classifier is None else self._classifier.read(self.home, on_every_rank=on_every_rank)

    def _check_state(self, doing: str, state: Mapping[str, Any]) -> None:
        """Refuse a state that a metric of these sizes cannot have made; `doing` is "merge" or "load"."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A state of other sizes is refused here: compute() would not know what is wrong with it.
        found = {name: state_dict[prefix + name] for name in self._defaults if prefix + name in state_dict}
        self._check_state("load", found)
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, value in found.items():
            setattr(self, name, self._own_copy(name, value))
        self._tables = self._gathered = self._measured = self._computed = None

    def _own_copy(self, name: str, value: Any) -> Any:
        """A state from elsewhere in the place and dtype of those here; sums grow in place, so nobody may share them."""
        if name == "mark":  # of this metric, whoever wrote the state
            return torch.as_tensor(self._defaults[name]).to(self.home, copy=True)
        if isinstance(value, list):
            return [self._own_copy(name, part) for part in value]
        if not isinstance(value, Tensor):
            raise ValueError(f"cannot load: {name} must hold tensors, as metric_state does, got {described(value)}")
        exact = value.is_floating_point() and name != "features"
        moved = value.detach().to(self.home)  # before it is cast: Apple's GPUs know no float64
        return moved.to(torch.float64 if exact else value.dtype, copy=True)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the samples of another metric, or of its state."""
        if isinstance(incoming_state, type(self)):
            incoming_state = incoming_state.metric_state
        if isinstance(incoming_state, dict) and "mark" in self._defaults:  # states of earlier versions have none
            incoming_state = incoming_state | {"mark": self.metric_state["mark"]}
        super().merge_state(incoming_state)
        self._computed = None  # torchmetrics would give the result of before once more

    def _apply(self, fn: Callable, exclude_state: Any = "") -> nn.Module:
        def keep_float64(tensor: Tensor) -> Tensor:  # and integers: labels and counts
            if tensor.is_floating_point() and tensor.dtype != torch.float64:
                return fn(tensor)
            device = fn(torch.empty(0, device=tensor.device)).device
            if not tensor.is_floating_point():
                return tensor.to(device)
            moved = fn(tensor) if float64_device(device) == device else tensor.cpu()
            return moved if moved.dtype == torch.float64 else tensor.to(moved.device)

        keep_float64.__qualname__ = str(fn)  # torchmetrics tells .half() from .to() by the function's name
        return super()._apply(keep_float64, exclude_state)


def check_cached(doing: str, state: Mapping[str, Any], num_classes: int, num_features: int) -> None:
    """Check the cached `features`, a list of (n, d), and `target`, a list of (n,), as far as the state holds them.

    Raises:
        ValueError: they are of another d or C.
    """
    for name in ("features", "target"):
        parts = state.get(name, [])
        if not (isinstance(parts, list) and all(isinstance(part, Tensor) for part in parts)):
            raise ValueError(f"cannot {doing}: {name} must be a list of tensors, as metric_state holds it")
    features, target = state.get("features", []), state.get("target", [])
    for rows in features:
        if rows.ndim != 2 or rows.shape[1] != num_features:
            raise ValueError(
                f"cannot {doing}: num_features is {num_features} here, and features there are {tuple(rows.shape)}"
            )
    for labels in target:
        if labels.numel() and not (0 <= labels.amin() and labels.amax() < num_classes):
            raise ValueError(
                f"cannot {doing}: num_classes is {num_classes} here, and labels there go from {int(labels.amin())} to "
                f"{int(labels.amax())}"
            )
    if "features" in state and "target" in state and list(map(len, features)) != list(map(len, target)):
        raise ValueError(f"cannot {doing}: there are not as many labels as features")


def check_shapes(doing: str, state: Mapping[str, Any], here: Mapping[str, Tensor], settings: str) -> None:
    """Check that the state's tensors, as far as it holds them, have the shapes that they have here.

    Raises:
        ValueError: one is of another shape; the message names the settings that it follows from.
    """
    for name, mine in here.items():
        theirs = getattr(state.get(name, mine), "shape", None)
        if theirs != mine.shape:
            got = "no tensor" if theirs is None else tuple(theirs)
            raise ValueError(
                f"cannot {doing}: {settings} differ from those of the state ({name} is {tuple(mine.shape)} here and "
                f"{got} there)"
            )
