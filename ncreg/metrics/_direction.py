"""Which way each measure of the metrics goes as the features collapse.

A torchmetrics.Metric has one direction, and the metrics here give many measures: their own `higher_is_better` is None.
A MetricTracker follows one measure, which `metric[key]` picks:

    >>> import torch
    >>> from torchmetrics import MetricTracker
    >>> from ncreg.metrics import HIGHER_IS_BETTER, NeuralCollapse
    >>> tracker = MetricTracker(NeuralCollapse(3, 2)["nc1"], maximize=HIGHER_IS_BETTER["nc1"])
    >>> target = torch.arange(30) % 3
    >>> vertices = torch.tensor([[2.0, 0.0], [-1.0, 3.0**0.5], [-1.0, -(3.0**0.5)]])
    >>> for noise in (1.0, 0.1, 0.5):
    ...     tracker.increment()
    ...     tracker.update(vertices[target] + noise * torch.arange(60.0).sin().view(30, 2), target)
    >>> tracker.best_metric(return_step=True)[1]
    1
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_UP = (
    "nc1_rank stable_rank effective_rank intra_cosine intra_cosine_min intra_cosine_max ncc_accuracy "
    "classifier_accuracy normalized_margin_mean "
    "normalized_margin_min normalized_margin_q01 normalized_margin_q10 normalized_margin_q50"
)
_DOWN = (
    "nc0 nc1 trace_ratio cdnv nc2_equinorm nc2_equiangularity nc2_cosine_std etf_distance inter_cosine "
    "inter_cosine_max nc2_weight_equinorm nc2_weight_equiangularity nc2_weight_cosine_std nc2_weight_gram nc3 nc3_bias "
    "nc4"
)
_NEITHER = (  # raw margins grow with the length of the features, whether these collapse or not
    "inter_cosine_min within_stable_rank within_effective_rank margin_mean margin_min margin_q01 margin_q10 margin_q50"
)

HIGHER_IS_BETTER: Mapping[str, bool | None] = MappingProxyType(
    dict.fromkeys(_UP.split(), True) | dict.fromkeys(_DOWN.split(), False) | dict.fromkeys(_NEITHER.split())
)
"""For each key of a metric's result: True where collapse raises the measure, False where it lowers it, else None."""
