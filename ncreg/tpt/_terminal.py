"""Learning rates of the terminal phase: where they start, how they fall."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

Terminal = Literal["cosine", "constant", "step"]

FLOOR = 0.01
"""The terminal phase starts at this fraction of the peak rate at least: an annealed rate would stand still. It is the
rate of the last third of Papyan, Han & Donoho's protocol."""

SCALED = "scaled_lr"
"""Key of a parameter group: the rate that a TPTScheduler left in it, which has the group's `lr_scale`."""

TOLERANCE = 1e-5
"""Rates may be float32."""


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


def scale_once(groups: Sequence[dict[str, Any]]) -> None:
    """Multiply each rate by its `lr_scale`, but for those that have it: `note_scaled` says so, or they are timm's.

    The rate without it stays in the group as `initial_lr`, where schedules of torch and timm that come later begin.

    Example:
        >>> groups = [{"lr": 0.1, "lr_scale": 0.5}, {"lr": 0.1}]
        >>> for _ in range(2):
        ...     scale_once(groups)
        ...     note_scaled(groups)
        >>> [group["lr"] for group in groups]
        [0.05, 0.1]
    """
    if _left_by_timm(groups):
        return
    for group in groups:
        if "lr_scale" in group and group.get(SCALED) != float(group["lr"]):
            group.setdefault("initial_lr", float(group["lr"]))
            scale_rate(group)


def note_scaled(groups: Sequence[dict[str, Any]]) -> None:
    """Write into the groups, and so into the optimizer's state, that the rates now in force have their `lr_scale`."""
    for group in groups:
        if "lr_scale" in group:
            group[SCALED] = float(group["lr"])


def _left_by_timm(groups: Sequence[dict[str, Any]]) -> bool:
    """Whether the rates, as fractions of `initial_lr`, differ as the scales do: timm's schedules leave them so.

    Example:
        >>> _left_by_timm([{"lr": 0.02, "initial_lr": 0.1, "lr_scale": 0.5}, {"lr": 0.04, "initial_lr": 0.1}])
        True
    """
    if not all(group.get("initial_lr") for group in groups):
        return False
    fractions = [float(group["lr"]) / float(group["initial_lr"]) for group in groups]
    scales = [float(group.get("lr_scale", 1.0)) for group in groups]
    if max(fractions) <= min(fractions) * (1 + TOLERANCE):
        return False
    top = max(range(len(scales)), key=scales.__getitem__)
    return all(
        math.isclose(fraction * scales[top], fractions[top] * scale, rel_tol=TOLERANCE)
        for fraction, scale in zip(fractions, scales, strict=True)
    )


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
