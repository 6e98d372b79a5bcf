"""Results as text: what `print` shows of a result object, a line for each number; it imports nothing of ncreg."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

LONGEST = 10
"""Values of a sequence that are written out; of longer ones their number."""


def readable(result: Any) -> str:
    """A table of a dataclass of results: names on the left, numbers, counts and summaries of tensors on the right.

    Meant to be a class's `__str__`; its `repr` stays that of the dataclass. Properties are shown as fields are.
    """
    rows = [row for row in _rows("", result)]
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join([type(result).__name__, *(f"  {name:<{width}}  {text}" for name, text in rows)])


def _rows(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Names with dots, and text; what consists of plain values alone stands in one row if it is part of something."""
    parts = _parts(value)
    if parts is None:
        yield name, _text(value)
    elif name and parts and all(_parts(part) is None for part in parts.values()):
        yield name, "  ".join(f"{key} {_text(part)}" for key, part in parts.items())
    else:
        for key, part in parts.items():
            yield from _rows(f"{name}.{key}" if name else str(key), part)


def _parts(value: Any) -> dict[str, Any] | None:
    """Fields and properties of a dataclass, or the items of a mapping; None for anything else."""
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        names += [name for name in dir(type(value)) if isinstance(getattr(type(value), name), property)]
        return {name: getattr(value, name) for name in names if not name.startswith("_")}
    return {str(key): part for key, part in value.items()} if isinstance(value, Mapping) and value else None


def _text(value: Any) -> str:
    if value is None or (isinstance(value, Mapping | Sequence) and not len(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Tensor):
        return _text(value.item()) if value.ndim == 0 else _summary(value.detach())
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_text, value)) if len(value) <= LONGEST else f"{len(value)} values"
    return str(value)


def _summary(values: Tensor) -> str:
    """Count of what is true; else shape, and mean of what is finite."""
    if values.dtype == torch.bool:
        return f"{int(values.sum())} of {values.numel()}"
    shape = " x ".join(map(str, values.shape))
    values = values.cpu().double()  # some devices have no float64
    finite = values[values.isfinite()]
    return f"{shape} values, mean {float(finite.mean()):.4g}" if len(finite) else f"{shape} values, none finite"
