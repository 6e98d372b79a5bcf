"""`corrupt`: one entry to all corruptions, with checks, constants, random numbers, and blocks that fit the cache."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ncreg._checks import check_choice, check_integer
from ncreg.numerics import at_least_float32
from ncreg.robustness._inputs import check_images
from ncreg.robustness.corruptions import _blur, _digital, _noise, _weather
from ncreg.robustness.corruptions._constants import TABLES, Table
from ncreg.robustness.corruptions._random import Draws, draws

_LARGEST_SMALL = 64  # pixels of the shorter side; the published ImageNet constants were made for 224
_BLOCK = 1 << 18  # values worked on at a time

CORRUPTION_GROUPS: dict[str, tuple[str, ...]] = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "saturate"),  # held out for validation in the paper
}
"""Group (noise, blur, weather, digital, extra) → the corruptions in it."""

CORRUPTIONS: tuple[str, ...] = tuple(name for names in CORRUPTION_GROUPS.values() for name in names)
"""The names of all corruptions, group by group."""

_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "gaussian_noise": _noise.gaussian_noise,
    "shot_noise": _noise.shot_noise,
    "impulse_noise": _noise.impulse_noise,
    "defocus_blur": _blur.defocus_blur,
    "glass_blur": _blur.glass_blur,
    "motion_blur": _blur.motion_blur,
    "zoom_blur": _blur.zoom_blur,
    "snow": _weather.snow,
    "fog": _weather.fog,
    "brightness": _weather.brightness,
    "contrast": _digital.contrast,
    "elastic_transform": _digital.elastic_transform,
    "pixelate": _digital.pixelate,
    "jpeg_compression": _digital.jpeg_compression,
    "speckle_noise": _noise.speckle_noise,
    "gaussian_blur": _blur.gaussian_blur,
    "saturate": _digital.saturate,
}


@torch.no_grad()
def corrupt(
    images: Float[Tensor, "batch channels height width"],
    name: str,
    severity: int,
    *,
    seed: int = 0,
    first_index: int | Int[Tensor, " batch"] = 0,
    constants: Table | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """One of `CORRUPTIONS` at severity 1 (mild) … 5, clipped to [0, 1], without gradients.

    Random numbers depend on (seed, name, severity, index of the image in its set) alone, and every operation rounds in
    one way: an image comes out the same, bit for bit, alone or in any batch. Values are not rounded to 1/255 as 8-bit
    files are (jpeg_compression's are multiples of it); gray images are worked on as such, not as three equal channels.

    Source: Hendrycks & Dietterich, ICLR 2019 (arXiv 1903.12261), and their code's constants.

    Args:
        images: in [0, 1], gray or RGB, both sides at least 8 pixels.
        name: the corruption.
        severity: 1 … 5.
        seed: of all random numbers.
        first_index: index in its set of the first image (the others follow), or of each image.
        constants: "small" (CIFAR-C's), "imagenet" (ImageNet-C's), or by size: small where the shorter side is at most
            64 pixels.

    Raises:
        ValueError: images outside [0, 1], other channels or sides, an unknown name, severity or table, indices of
            another shape.
        TypeError: images that are no floating-point tensor, numbers that are no ints.

    Example:
        >>> images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> foggy = corrupt(images, "fog", 3)
        >>> torch.equal(foggy[2:3], corrupt(images[2:3], "fog", 3, first_index=2))
        True
    """
    _check(images, name, severity, seed, constants)
    index = _indices(first_index, images)
    table = TABLES[constants or ("small" if min(images.shape[2:]) <= _LARGEST_SMALL else "imagenet")]
    level: Any = table[name][severity - 1]
    rng = draws(int(seed), name, int(severity), index)  # numpy's integers overflow
    x = at_least_float32(images).contiguous()
    size = max(1, _BLOCK // x[0].numel())
    parts = [
        _FUNCTIONS[name](block, level, Draws(keys)).clamp_(0, 1)
        for block, keys in zip(x.split(size), rng.keys.split(size), strict=True)
    ]
    return torch.cat(parts).to(images.dtype)


def check_name(name: str) -> str:
    """A known corruption."""
    if name not in CORRUPTIONS:
        frost = "; frost needs photographs and is left out" if name == "frost" else ""
        raise ValueError(f"name={name!r} is no corruption, choose from {', '.join(CORRUPTIONS)}{frost}")
    return name


def check_severity(severity: int) -> int:
    """1, 2, 3, 4 or 5."""
    return check_integer("severity", severity, 1, 5)


def _check(images: Tensor, name: str, severity: int, seed: int, constants: Table | None) -> None:
    check_images(images)
    channels, height, width = images.shape[1:]
    if channels not in (1, 3):
        raise ValueError(f"images have {channels} channels: corruptions are defined for gray (1) and RGB (3)")
    if min(height, width) < 8:
        raise ValueError(f"images are {height}x{width} pixels: both sides must be at least 8, enlarge them first")
    check_name(name)
    check_severity(severity)
    check_integer("seed", seed)
    if constants is not None:
        check_choice("constants", constants, TABLES)


def _indices(first_index: int | Tensor, images: Tensor) -> Tensor:
    if isinstance(first_index, Tensor):
        if first_index.is_floating_point() or first_index.dtype == torch.bool:
            raise TypeError(f"first_index must hold integers, got {first_index.dtype}")
        if first_index.ndim:
            if first_index.shape != images.shape[:1]:
                raise ValueError(f"first_index must be an int or {len(images)} ints, got {tuple(first_index.shape)}")
            return first_index.to(images.device, torch.int64)
    first_index = check_integer("first_index", first_index)
    return torch.arange(first_index, first_index + len(images), device=images.device)
