"""Results of a metric as torchmetrics' figures take them: the same measures in each, one number each, none dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Result = Mapping[str, Tensor | float]
Drawable = dict[str, Tensor]

MARKERS = "osD^vPX<>p*"
DASHES = ("-", (0, (6, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
"""Their number and that of the markers have no common factor: 44 curves differ without colour."""


def drawable(val: Result | Sequence[Result]) -> Drawable | list[Drawable]:
    """The measures that are one number; a name says so where the figure has nothing to show for it.

    Raises:
        TypeError: no dict of measures, and no list of such dicts.
        ValueError: nothing to draw, results with different measures, or a value that is no number.
    """
    results = val if isinstance(val, Sequence) else [val]
    if not all(isinstance(result, Mapping) for result in results):
        raise TypeError(f"val must be a dict of measures, as compute() gives it, or a list of such dicts: {val!r:.80}")
    for step, result in enumerate(results):
        if result.keys() != results[0].keys():
            differing = sorted(result.keys() ^ results[0].keys())
            raise ValueError(
                f"val[{step}] and val[0] differ in {differing}: pass results that hold the measures of all steps alone"
            )
    numbers = [_numbers(result) for result in results]
    if not numbers or not numbers[0]:
        raise ValueError(
            f"val={val!r:.80} holds no measure that is one number: pass a result, or a list of results, one a step"
        )
    names = {key: _name(key, [found[key] for found in numbers]) for key in numbers[0]}
    named = [{names[key]: value for key, value in found.items()} for found in numbers]
    return named if isinstance(val, Sequence) else named[0]


def tell_apart(axis: Any, first: int = 0) -> None:
    """Give each line of an axis from the `first` on a marker and dashes of its own, in the legend too."""
    named = {}
    for index, line in enumerate(axis.get_lines()[first:], start=first):
        named[line.get_label()] = line
        line.set_marker(MARKERS[index % len(MARKERS)])
        if len(line.get_xdata()) > 1:
            line.set_linestyle(DASHES[index % len(DASHES)])
    legend = axis.get_legend()
    for shown, text in [] if legend is None else zip(legend.legend_handles, legend.get_texts(), strict=True):
        if (drawn := named.get(text.get_text())) is not None:
            shown.set_marker(drawn.get_marker())
            shown.set_linestyle(drawn.get_linestyle())


def _numbers(result: Result) -> Drawable:
    """The result without values of classes, which are no one number."""
    tensors = {key: _tensor(key, value) for key, value in result.items()}
    return {key: value for key, value in tensors.items() if value.numel() == 1}


def _tensor(key: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"val[{key!r}]={value!r:.80} must be a number") from None


def _name(key: str, values: list[Tensor]) -> str:
    """The measure's name, with what of it no axis can show."""
    missing = [value.item() for value in values if not value.isfinite()]
    if not missing:
        return key
    return f"{key} ({missing[0]})" if len(values) == 1 else f"{key} ({len(missing)} of {len(values)} not finite)"
