"""Blur: out of focus, frosted glass, motion, zoom, Gaussian."""

import functools
from math import ceil, exp, log2

import torch
from torch import Tensor

from ncreg.robustness.corruptions._filters import both_axes, gaussian, motion, stencil, zoom_rows
from ncreg.robustness.corruptions._random import Draws


def gaussian_blur(x: Tensor, sigma: float, rng: Draws) -> Tensor:
    """Gaussian of σ pixels."""
    return gaussian(x, sigma)


@functools.lru_cache(maxsize=32)
def _disk(radius: float, smoothing: float) -> Tensor:
    """A disk of equal weights with a softened rim."""
    half, reach = (8, 1) if radius <= 8 else (int(radius), 2)
    place = torch.arange(-half, half + 1, dtype=torch.float64, device="cpu")
    disk = (place[:, None] ** 2 + place**2 <= radius**2).double()
    rim = torch.tensor(
        [exp(-0.5 * (k / smoothing) ** 2) for k in range(-reach, reach + 1)], dtype=torch.float64, device="cpu"
    )
    rim = rim / rim.sum()
    disk = stencil(disk / disk.sum(), rim[:, None] * rim, "mirror")
    disk[disk < 1e-9] = 0
    disk = disk.float()  # equal weights are then equal to the bit
    margin = int((disk.sum(1) > 0).double().argmax())  # empty rows and columns around it
    return disk[margin : len(disk) - margin, margin : len(disk) - margin]


def defocus_blur(x: Tensor, constants: tuple[float, float], rng: Draws) -> Tensor:
    """Mean over a disk."""
    return stencil(x, _disk(*constants), "mirror")


def motion_blur(x: Tensor, constants: tuple[int, float], rng: Draws) -> Tensor:
    """A one-sided Gaussian streak at an angle in ±45°."""
    return motion(x, rng.choice(0, 1024), *constants, -45.0, 45.0)


def zoom_blur(x: Tensor, factors: tuple[float, ...], rng: Draws) -> Tensor:
    """Mean of the image and its enlargements."""
    height, width = x.shape[-2:]
    total = x.clone()
    for factor in factors:
        total += both_axes(x, zoom_rows(height, factor), zoom_rows(width, factor))
    return total / (len(factors) + 1)


def glass_blur(x: Tensor, constants: tuple[float, int, int], rng: Draws) -> Tensor:
    """Gaussian, pixels moved by up to `reach`, Gaussian.

    The original goes from the lower right to the upper left and "swaps" each pixel with a random neighbour. Its numpy
    views make that a copy of the neighbour, already moved if it lies ahead in that order. So every pixel points at one
    source, and chains of pointers are followed by doubling instead of a loop over pixels.
    """
    sigma, reach, rounds = constants
    x = gaussian(x, sigma)
    height, width = x.shape[-2:]
    pixels = height * width
    inner = torch.zeros(height, width, dtype=torch.bool, device=x.device)
    inner[reach + 1 : height - reach + 1, reach + 1 : width - reach + 1] = True
    place = torch.arange(pixels, device=x.device)
    for turn in range(rounds):
        shift = rng.uniform(turn, 2, pixels).mul_(2 * reach).long().sub_(reach)
        source = torch.where(inner.flatten(), place + shift[:, 0] + width * shift[:, 1], place)
        moved = inner.flatten()[source] & (source > place)
        # A pixel that has moved is a node of its own, 0 … n − 1; one as it was is n … 2n − 1 and points at itself.
        old = (place + pixels).expand(len(x), -1)
        jump = torch.cat([torch.where(moved, source, source + pixels), old], 1)
        for _ in range(ceil(log2(pixels))):
            jump = jump.gather(1, jump)
        source = (jump[:, :pixels] - pixels)[:, None].expand(-1, x.shape[1], -1)
        x = x.flatten(2).gather(2, source).view_as(x)
    return gaussian(x, sigma)
