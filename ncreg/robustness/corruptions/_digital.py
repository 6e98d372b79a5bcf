"""Digital: contrast, saturation, elastic transform, pixelation."""

import torch
from einops import rearrange
from torch import Tensor

from ncreg.robustness.corruptions._filters import bilinear, both_axes, box_rows, gaussian
from ncreg.robustness.corruptions._random import Draws


def contrast(x: Tensor, kept: float, rng: Draws) -> Tensor:
    """(x − x̄)·c + x̄, x̄ the mean of each channel of each image."""
    # Sums of integers do not depend on their order, unlike those of floats.
    unit = 2.0**-40 if x.dtype == torch.float64 else 2.0**-24
    total = (x / unit).round().long().sum((2, 3), keepdim=True)
    mean = total.to(x) * unit / (x.shape[2] * x.shape[3])
    return (x - mean) * kept + mean


def saturate(x: Tensor, constants: tuple[float, float], rng: Draws) -> Tensor:
    """The saturation S of HSV becomes clip(S·a + b); hue and value are kept. Gray images stay as they are.

    A gray pixel of an RGB image has the hue 0 of HSV's convention: it turns red where b > 0.
    """
    if x.shape[1] == 1:
        return x.clone()
    factor, added = constants
    value = x.amax(1, keepdim=True)
    span = value - x.amin(1, keepdim=True)
    saturation = span / value.clamp_min(1e-30)
    wanted = (saturation * factor + added).clamp_(0, 1)
    # Channels lie below the value by its product with the saturation and a share that the hue fixes.
    share = torch.where(span > 0, (value - x) / span.clamp_min(1e-30), x.new_tensor([0.0, 1.0, 1.0]).view(1, 3, 1, 1))
    return value - (value * wanted) * share


def pixelate(x: Tensor, size: float, rng: Draws) -> Tensor:
    """Shrunk to a share of its sides by means over boxes, and enlarged by repetition."""
    height, width = x.shape[-2:]
    low, narrow = int(height * size), int(width * size)
    coarse = both_axes(x, box_rows(height, low), box_rows(width, narrow))
    return both_axes(coarse, box_rows(low, height), box_rows(narrow, width))


def elastic_transform(x: Tensor, constants: tuple[float, float, float], rng: Draws) -> Tensor:
    """A random affine map, then a smooth random displacement; all in shares of the shorter side."""
    height, width = x.shape[-2:]
    side = min(height, width)
    strength, sigma, spread = (c * side for c in constants)
    grid_y = torch.arange(height, dtype=x.dtype, device=x.device)[:, None]
    grid_x = torch.arange(width, dtype=x.dtype, device=x.device)
    if spread > 0:
        x = bilinear(x, *_affine(x, spread, rng, grid_y, grid_x), "mirror")
    if strength == 0:
        return x
    noise = rng.uniform(1, 2, height, width).to(x) * 2 - 1
    moved = gaussian(noise, sigma, truncate=3.0, border="reflect") * strength
    return bilinear(x, grid_y + moved[:, 0], grid_x + moved[:, 1], "reflect")


def _affine(x: Tensor, spread: float, rng: Draws, grid_y: Tensor, grid_x: Tensor) -> tuple[Tensor, Tensor]:
    """Where each pixel comes from if three points around the middle move by up to `spread` each way."""
    height, width = x.shape[-2:]
    arm = min(height, width) // 3
    centre_y, centre_x = height // 2, width // 2
    # (x, y) of the lower right, the upper right and the upper left; the lower right's place is the origin.
    fixed = ((centre_x + arm, centre_y + arm), (centre_x + arm, centre_y - arm), (centre_x - arm, centre_y - arm))
    shift = (rng.uniform(0, 3, 2).to(x) * 2 - 1) * spread
    to = shift + x.new_tensor(fixed)
    (ax, ay), (bx, by) = ((to[:, k] - to[:, 0]).unbind(1) for k in (1, 2))
    determinant = ax * by - ay * bx
    determinant = torch.where(determinant.abs() < 1e-3, 1e-3, determinant)
    rows = rearrange(grid_y, "h w -> 1 h w") - to[:, 0, 1].view(-1, 1, 1)
    columns = grid_x - to[:, 0, 0].view(-1, 1, 1)
    # (column, row) = s·a + t·b in the moved frame: the same s, t in the fixed one, where a = (0, −2 arm) and
    # b = (−2 arm, −2 arm). Three points on a line would have no inverse.
    s = (columns * (by / determinant).view(-1, 1, 1)) - rows * (bx / determinant).view(-1, 1, 1)
    t = (rows * (ax / determinant).view(-1, 1, 1)) - columns * (ay / determinant).view(-1, 1, 1)
    return fixed[0][1] - (s + t) * (2 * arm), fixed[0][0] - t * (2 * arm)
