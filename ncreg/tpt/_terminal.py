"""Learning rates of the terminal phase: where they start, how they fall."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

Terminal = Literal["cosine", "constant", "step"]

FLOOR = 0.01
"""The terminal phase starts at this fraction of the peak rate at least: an annealed rate would stand still. It is the
rate of the last third of Papyan, Han & Donoho's protocol."""


def starting_rates(rates: Sequence[float], peaks: Sequence[float], terminal_lr: float | None) -> list[float]:
    """The rate of each group at the onset; `terminal_lr` is that of the group with the greatest peak.

    Example:
        >>> starting_rates([0.0, 0.0], peaks=[1.0, 0.5], terminal_lr=None)
        [0.01, 0.005]
        >>> starting_rates([0.0, 0.0], peaks=[1.0, 0.5], terminal_lr=0.2)
        [0.2, 0.1]
    """
    if terminal_lr is not None:
        top = max(peaks)
        return [terminal_lr * (peak / top if top else 1.0) for peak in peaks]
    return [max(rate, FLOOR * peak) for rate, peak in zip(rates, peaks, strict=True)]


def rate_factor(terminal: Terminal, progress: float) -> float:
    """The rate over the starting rate, where a fraction `progress` of the terminal phase has passed."""
    if terminal == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    if terminal == "step":
        return 0.1 ** min(2, int(3 * progress + 1e-9))
    return 1.0


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set the rate of a parameter group; a tensor (of a capturable optimizer) is filled in place."""
    if hasattr(group["lr"], "fill_"):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
