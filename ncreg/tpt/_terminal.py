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


def part_rates(groups: Sequence[dict[str, Any]]) -> None:
    """Give each parameter group a tensor of its own where several share one, as torch hands its `lr` to all of them.

    Example:
        >>> import torch
        >>> groups = [{"lr": rate} for rate in 2 * [torch.tensor(0.5)]]
        >>> part_rates(groups)
        >>> set_rate(groups[0], 0.25)
        >>> groups
        [{'lr': tensor(0.2500)}, {'lr': tensor(0.5000)}]
    """
    seen: set[int] = set()
    for group in groups:
        if id(group["lr"]) in seen and hasattr(group["lr"], "clone"):
            group["lr"] = group["lr"].clone()
        seen.add(id(group["lr"]))


def scale_rate(group: dict[str, Any], inverse: bool = False) -> None:
    """Multiply the rate of a parameter group by its `lr_scale` where it has one, or divide by it.

    Example:
        >>> group = {"lr": 0.1, "lr_scale": 0.5}
        >>> scale_rate(group)
        >>> group["lr"]
        0.05
    """
    scale = float(group.get("lr_scale", 1.0))
    if inverse:
        scale = 1 / scale if scale else 1.0  # nothing comes back from a scale of 0
    if scale != 1:
        set_rate(group, float(group["lr"]) * scale)


def join(rates: Sequence[float], starts: Sequence[float], peaks: Sequence[float], rate: float) -> tuple[float, float]:
    """Start and peak of a group that is added in the terminal phase: it keeps the ratio that it has now.

    Its rate is compared with that of the group with the greatest peak, or with that peak where the rate is 0.

    Example:
        >>> join(rates=[0.01, 0.005], starts=[0.02, 0.01], peaks=[1.0, 0.5], rate=0.001)
        (0.002, 0.1)
    """
    top = max(range(len(peaks)), key=peaks.__getitem__)
    reference = rates[top] or peaks[top]
    ratio = rate / reference if reference else 1.0
    return ratio * starts[top], ratio * peaks[top]
