"""Linear filters of images, as sums of shifted copies: every image's bits are the same in any batch.

A matrix product or a convolution may add in another order for another batch size. Here each product and each sum is an
operation of its own, which IEEE arithmetic rounds in one way only.
"""

import functools
from math import ceil, exp
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Border = Literal["nearest", "reflect", "mirror"]  # aaa|abc, cba|abc, dcb|abcd: scipy's names


def inside(index: Tensor, size: int, border: Border) -> Tensor:
    """Indices of any size, brought into [0, size) as the border says."""
    if border == "nearest" or size == 1:
        return index.clamp(0, size - 1)
    period = 2 * size if border == "reflect" else 2 * size - 2
    index = index.remainder(period)
    return torch.minimum(index, period - 1 - index if border == "reflect" else period - index)


def _sparse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Column and weight of each row's entries that are not zero: two (rows, taps), padded with weight 0."""
    used = matrix != 0
    taps = int(used.sum(1).max())
    column = used.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :taps]
    return column, matrix.gather(1, column)


@functools.lru_cache(maxsize=256)
def zoom_rows(size: int, factor: float) -> tuple[Tensor, Tensor]:
    """Rows that enlarge the middle ceil(size/factor) samples by `factor`, linearly, ends on ends, cut to `size`."""
    kept = ceil(size / factor)
    start, grown = (size - kept) // 2, round(kept * factor)
    place = torch.arange(size, dtype=torch.float64, device="cpu") + (grown - size) // 2
    place = (place * ((kept - 1) / max(grown - 1, 1))).clamp(0, kept - 1)
    low = place.floor().long().clamp_max(max(kept - 2, 0))
    right = place - low
    matrix = torch.zeros(size, size, dtype=torch.float64, device="cpu")
    matrix.scatter_add_(1, start + low[:, None], 1 - right[:, None])
    matrix.scatter_add_(1, start + (low[:, None] + 1).clamp_max(kept - 1), right[:, None])
    return _sparse(matrix)


@functools.lru_cache(maxsize=256)
def box_rows(size: int, wanted: int) -> tuple[Tensor, Tensor]:
    """Rows that resize to `wanted` samples, each the mean of the samples whose middles it covers, as in Pillow."""
    scale = size / wanted
    reach = max(scale, 1.0)
    middle = ((torch.arange(wanted, dtype=torch.float64, device="cpu") + 0.5) * scale)[:, None]
    sample = torch.arange(size, dtype=torch.float64, device="cpu")
    # Middles that fall on an end are common, and Pillow's own rounding decides them.
    place = (sample - middle + 0.5) * (1 / reach)
    inner = (sample >= (middle - 0.5 * reach + 0.5).floor()) & (sample < (middle + 0.5 * reach + 0.5).floor())
    matrix = (inner & (place > -0.5) & (place <= 0.5)).double()
    return _sparse(matrix / matrix.sum(1, keepdim=True))


def apply_rows(x: Tensor, rows: tuple[Tensor, Tensor], dim: int) -> Tensor:
    """Σ_t weight[:, t]·x[column[:, t]] along one axis."""
    column, weight = rows[0].to(x.device), rows[1].to(x)
    shape = [1] * x.ndim
    shape[dim] = -1
    total = None
    for tap in range(column.shape[1]):
        part = x.index_select(dim, column[:, tap]).mul_(weight[:, tap].view(shape))
        total = part if total is None else total.add_(part)
    assert total is not None  # every row has an entry
    return total


def both_axes(
    x: Tensor, vertical: tuple[Tensor, Tensor], horizontal: tuple[Tensor, Tensor]
) -> Float[Tensor, "*rest height width"]:
    """Rows applied to the last two axes."""
    return apply_rows(apply_rows(x, vertical, x.ndim - 2), horizontal, x.ndim - 1)


def _padded(x: Tensor, dim: int, margin: int, border: Border) -> Tensor:
    """The image with a border of `margin` at both ends of one axis."""
    size = x.shape[dim]
    return x.index_select(dim, inside(torch.arange(-margin, size + margin, device=x.device), size, border))


def gaussian(x: Tensor, sigma: float, *, truncate: float = 4.0, border: Border = "nearest") -> Tensor:
    """Gaussian blur of the last two axes, cut off at `truncate` sigmas."""
    radius = int(truncate * sigma + 0.5)
    weight = [exp(-0.5 * (k / sigma) ** 2) for k in range(radius + 1)]
    norm = 2 * sum(weight) - weight[0]
    for dim in (x.ndim - 2, x.ndim - 1):
        size, wide = x.shape[dim], _padded(x, dim, radius, border)
        x = x * (weight[0] / norm)
        for k in range(1, radius + 1):
            both = wide.narrow(dim, radius - k, size) + wide.narrow(dim, radius + k, size)
            x += both.mul_(weight[k] / norm)
    return x


def stencil(x: Tensor, kernel: Float[Tensor, "rows columns"], border: Border) -> Tensor:
    """Correlation of the last two axes with a kernel of odd sides."""
    (height, width), (rows, columns) = x.shape[-2:], kernel.shape
    x = _padded(_padded(x, x.ndim - 2, rows // 2, border), x.ndim - 1, columns // 2, border)
    total = None
    for weight in kernel.unique().tolist():  # taps of equal weight are added first and weighted once
        if weight == 0:
            continue
        same = None
        for row, column in (kernel == weight).nonzero().tolist():
            part = x[..., row : row + height, column : column + width]
            same = part.clone() if same is None else same.add_(part)
        assert same is not None  # the weight is one of the kernel's
        total = same.mul_(weight) if total is None else total.add_(same.mul_(weight))
    assert total is not None  # the kernel sums to 1
    return total


def pick(
    x: Float[Tensor, "batch channels height width"],
    row: Int[Tensor, "batch h w"],
    column: Int[Tensor, "batch h w"],
) -> Float[Tensor, "batch channels h w"]:
    """The image at one place a pixel, the same in every channel."""
    place = (row * x.shape[-1] + column).flatten(1)[:, None].expand(-1, x.shape[1], -1)
    return x.flatten(2).gather(2, place).view(*x.shape[:2], *row.shape[1:])


def bilinear(
    x: Float[Tensor, "batch channels height width"],
    y_at: Float[Tensor, "batch height width"],
    x_at: Float[Tensor, "batch height width"],
    border: Border,
) -> Float[Tensor, "batch channels height width"]:
    """The image between its pixels, at coordinates in pixels."""
    height, width = x.shape[-2:]
    top, left = y_at.floor(), x_at.floor()
    down, right = (y_at - top)[:, None], (x_at - left)[:, None]
    rows = [inside(top.long() + k, height, border) for k in (0, 1)]
    columns = [inside(left.long() + k, width, border) for k in (0, 1)]
    upper, lower = (pick(x, row, columns[0]) * (1 - right) + pick(x, row, columns[1]) * right for row in rows)
    return upper * (1 - down) + lower * down


@functools.lru_cache(maxsize=64)
def _motion(radius: int, sigma: float, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Offsets (1024 angles, taps, 2) of a one-sided Gaussian streak, and the taps' weights."""
    taps = 2 * radius + 1
    weight = torch.tensor([exp(-0.5 * (k / sigma) ** 2) for k in range(taps)], dtype=torch.float64, device="cpu")
    weight = weight / weight.sum()
    weight = weight[weight > 1e-9]  # those are below float32's rounding
    angle = torch.deg2rad(low + (high - low) * (torch.arange(1024, dtype=torch.float64, device="cpu") + 0.5) / 1024)
    step = torch.arange(len(weight), dtype=torch.float64, device="cpu")[:, None]
    along = torch.stack([angle.sin(), angle.cos()], 1)[:, None] * step
    return (along - 0.5).ceil().long(), weight


def motion(
    x: Float[Tensor, "batch channels height width"],
    choice: Int[Tensor, " batch"],
    radius: int,
    sigma: float,
    low: float,
    high: float,
) -> Float[Tensor, "batch channels height width"]:
    """Each image smeared along a line, at one of 1024 angles between `low` and `high` degrees; edges are repeated."""
    height, width = x.shape[-2:]
    offsets, weight = _motion(radius, sigma, low, high)
    offset = offsets.to(x.device)[choice]
    total = torch.zeros_like(x)
    for tap, factor in enumerate(weight.tolist()):
        row = torch.arange(height, device=x.device) + offset[:, tap, :1]
        column = torch.arange(width, device=x.device) + offset[:, tap, 1:]
        place = row.clamp_(0, height - 1)[:, :, None], column.clamp_(0, width - 1)[:, None, :]
        total += pick(x, *torch.broadcast_tensors(*place)).mul_(factor)
    return total
