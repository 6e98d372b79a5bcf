"""Where a layer's map of four axes has its channels: (B, C, H, W) or (B, H, W, C)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

FIRST, LAST = 1, 3

_OF_MAPS = (
    *(nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.PixelShuffle, nn.Upsample),
    *(nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd),
    *(nn.modules.pooling._AdaptiveMaxPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd),
)


def channel_axis(module: nn.Module, around: Sequence[nn.Module], shape: Sequence[int]) -> int | None:
    """The axis of the channels, 1 or 3, in a module's output of this shape; None where nothing tells which.

    The first that tells: its own `output_fmt`, as timm has it; its kind (convolutions, batch norms, poolings: 1; linear
    layers, layer norms: 3); of a chain (nn.Sequential) its last part; batch norms, convolutions and poolings alone
    inside: 1, or 3 where a single one of them, or linear layers beside them, fit that axis alone; the channel counts
    inside, where they fit one axis; layer norms alone inside: 3; `output_fmt` of a model around it. A module that has
    nothing inside goes by what stands before it in a chain, or is around it. What else is timm's, or fits neither axis,
    is torch's 1.

    Args:
        module: whose output it is.
        around: the modules that hold it, from the inside out.
        shape: of the output, (B, ·, ·, ·).

    Example:
        >>> channel_axis(nn.Conv2d(3, 8, 1), [], (4, 8, 8, 8)), channel_axis(nn.LayerNorm(8), [], (4, 8, 8, 8))
        (1, 3)
    """
    stated = next((said for part in around if (said := _said(part)) is not None), None)
    for inner, part in zip((None, module, *around), (module, *around), strict=False):
        axes = _axes(part, shape, stated, inner)
        if len(axes) == 1:
            return axes.pop()
        if axes:
            of_timm = any(type(outer).__module__.startswith("timm.") for outer in (module, *around))
            linear_alone = list(part.children()) and not _kinds(part)
            return stated or (FIRST if of_timm and not linear_alone else None)
    return FIRST


def holders(model: nn.Module, module: nn.Module) -> list[nn.Module]:
    """The modules of a model that hold one of its submodules, from the inside out.

    Example:
        >>> model = nn.Sequential(nn.Sequential(nn.ReLU()))
        >>> holders(model, model[0][0]) == [model[0], model]
        True
    """
    path = next(path for path, part in model.named_modules(remove_duplicate=False) if part is module)
    steps = path.split(".")[:-1] if path else []
    outer = [model.get_submodule(".".join(steps[:depth])) for depth in range(len(steps), -1, -1)]
    return [part for part in outer if part is not module]


def _axes(module: nn.Module, shape: Sequence[int], stated: int | None, before: nn.Module | None = None) -> set[int]:
    """The axes that may hold the channels by what a module is and holds; none if that says nothing.

    In a chain what comes `before` one of its parts alone counts.
    """
    own, widths = _said(module) or _kind(module), _widths(module)
    fits = {axis for axis in (FIRST, LAST) if shape[axis] in widths}
    if own is not None:
        return fits if own == LAST and fits == {FIRST} else {own}  # a layer norm that permutes
    kinds = _kinds(module)
    parts = list(module.children())
    chain = getattr(type(module), "forward", None) is nn.Sequential.forward
    if chain and before is not None:
        parts = parts[: next(place for place, part in enumerate(parts) if part is before)]
    telling = [part for part in parts if _kinds(part) or _widths(part) or _kind(part)]
    if chain:
        return _axes(telling[-1], shape, stated) if telling else set()
    if kinds == {FIRST}:
        linear = {part.out_features for part in module.modules() if isinstance(part, nn.Linear)}
        alone = sum(_kind(part) is not None for part in module.modules()) == 1  # may stand between two permutations
        return {LAST} if fits == {LAST} and (stated == LAST or alone or shape[LAST] in linear) else {FIRST}
    if len(fits) == 1:
        return fits
    if kinds == {LAST}:
        return {LAST}
    if fits and len(telling) == 1:  # a single branch, added to the input
        return _axes(telling[0], shape, stated)
    return fits or ({stated or FIRST} if kinds or widths else set())


def _said(module: nn.Module) -> int | None:
    """What timm's modules say of themselves."""
    said = getattr(module, "output_fmt", None)
    return {"NCHW": FIRST, "NHWC": LAST}.get(str(getattr(said, "value", said)))


def _kind(module: nn.Module) -> int | None:
    """The axis that a kind of layer takes for the channels; of a permutation the one that it leads to."""
    if not list(module.children()) and isinstance(dims := getattr(module, "dims", None), list | tuple):
        return FIRST if list(dims) == [0, 3, 1, 2] else LAST if list(dims) == [0, 2, 3, 1] else None
    width = _normalized(module)
    of_maps = "2d" in type(module).__name__ and (width or not list(module.children()))
    if of_maps or isinstance(module, _OF_MAPS) or getattr(module, "data_format", None) == "channels_first":
        return FIRST
    return LAST if isinstance(module, nn.Linear) or width else None


def _kinds(module: nn.Module) -> set[int]:
    """The axes of all layers inside, but for linear ones: gates and classifiers behind a pooling have these too."""
    parts = [part for part in module.modules() if not (isinstance(part, nn.Linear) or hasattr(part, "dims"))]
    return {axis for part in parts if (axis := _kind(part)) is not None}


def _widths(module: nn.Module) -> set[int]:
    """The numbers of channels that the layers inside give."""
    widths: set[int] = set()
    for part in module.modules():
        known = [getattr(part, name, None) for name in ("out_channels", "out_features", "num_features", "num_channels")]
        said = [width for width in (*known, _normalized(part)) if isinstance(width, int)]
        own = [parameter.numel() for parameter in part.parameters(recurse=False) if parameter.ndim == 1]
        widths.update(said or own if own or _kind(part) else ())
    return widths


def _normalized(module: nn.Module) -> int | None:
    """The width of a layer norm over one axis."""
    shape: Any = getattr(module, "normalized_shape", None)
    return int(shape[0]) if isinstance(shape, tuple | list) and len(shape) == 1 else None
