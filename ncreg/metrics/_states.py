"""States from elsewhere, to be merged or loaded: refused where a metric of these sizes cannot have made them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def check_cached(doing: str, state: Mapping[str, Any], num_classes: int, num_features: int) -> None:
    """`features`, a list of (n, d), and `target`, a list of (n,), as far as the state holds them.

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
    """Tensors of the same shape as here, as far as the state holds them.

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
