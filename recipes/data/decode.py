"""From an opened image, a tensor or an array to its bytes: modes, bits, the meaning of gray levels."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
"""Tags of TIFF 6.0, section 8: bits of a sample, and what 0 means."""
SAMPLE_FORMAT, SIGNED = 339, 2
"""A tag of section 19: what the bits of a sample stand for."""

ONLY_TO = {"La": "LA", "LAB": "RGB"}
"""Modes of TIFF (gray times its alpha, CIELAB) that Pillow converts to one other alone."""

WRONG_IMAGE = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, RuntimeError, EOFError),
    *(struct.error, Image.DecompressionBombError),
)
"""What Pillow raises for a file that is no image, or a damaged one."""


def has_more_pages(image: Image.Image) -> bool:
    """Whether an opened file has a second image: pages of a TIFF, frames of a GIF or WebP, no small copies of cameras.

    What is damaged behind the first image does not count. The opened image stands at its second page then.
    """
    if image.format == "MPO":
        return False
    try:
        with warnings.catch_warnings(action="ignore"):
            image.seek(1)
    except Exception:  # EOFError where there is none; a damaged second page may raise anything, and is never read
        return False
    return True


def pages_notes(paged: Sequence[Path], looked_at: int) -> list[str]:
    """A sentence where some of the files that were looked at hold several images.

    Example:
        >>> pages_notes([Path("scan.tif")], 36)
        ['scan.tif holds several images (pages or frames): the first one is read (1 such of 36 files looked at)']
        >>> pages_notes([], 36)
        []
    """
    if not paged:
        return []
    return [
        f"{paged[0]} holds several images (pages or frames): the first one is read ({len(paged)} such of {looked_at} "
        "files looked at)"
    ]


def decoded(image: Image.Image, channels: int) -> Tensor:
    """An opened image as uint8 (channels, height, width), RGB or gray.

    Gray of 12 or 16 bits is scaled to 8, rounded, and a TIFF whose 0 is white is inverted. Pillow keeps the upper 8
    bits of 16-bit colour and of 16-bit gray with alpha. Alpha is dropped.

    Raises:
        ValueError: signed pixels, or of 32 bits: they have no known range; other errors, `WRONG_IMAGE`, are Pillow's.
    """
    return pil_to_tensor(_of_bytes(image).convert("RGB" if channels == 3 else "L"))


def _of_bytes(image: Image.Image) -> Image.Image:
    """The image with 8 bits a channel; Pillow's own conversion would clip wide gray at 255."""
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        return image.convert("RGBA")  # the same colours, and no warning of Pillow's for every such file
    if image.mode in ONLY_TO:
        return image.convert(ONLY_TO[image.mode])
    tags = image.tag_v2 if hasattr(image, "tag_v2") else {}
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))  # never 32 bits
    signed = SIGNED in tags.get(SAMPLE_FORMAT, ())  # of 8 bits Pillow's mode L, where -1 is 255
    if signed or (image.mode in ("I", "F") and not wide):
        raise ValueError(
            f"signed, wide or real pixels (Pillow's mode {image.mode}) have no known range; unsigned 8 or 16 bits do"
        )
    if not wide:
        return image
    most = 2 ** tags.get(BITS, (16,))[0] - 1
    levels = np.rint(np.asarray(image) / (most / 255)).astype(np.uint8)
    # Pillow itself inverts gray of up to 8 bits
    return Image.fromarray(255 - levels if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else levels)


def pixels_of(image: Any, channels: int | None) -> Tensor:
    """An image as uint8 (channels, height, width).

    Args:
        image: of Pillow; a tensor (channels, height, width) or (height, width), or an array (height, width, channels)
            or (height, width), of bytes or of floats in [0, 1].
        channels: 1 or 3; None takes the image's own.

    Raises:
        ValueError: another type, shape or range, or colour where 1 channel is wanted.

    Example:
        >>> pixels_of(np.ones((2, 3), np.float32), 3)[:, 0, 0].tolist()
        [255, 255, 255]
    """
    if isinstance(image, Image.Image):
        own = 1 if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16") else 3
        return _with_channels(decoded(image, own), channels)
    given, place = image, "first"
    if isinstance(image, np.ndarray):
        place = "last"
        image = torch.from_numpy(np.ascontiguousarray(image if image.ndim == 2 else image.transpose(2, 0, 1)))
    if not isinstance(image, Tensor) or image.ndim not in (2, 3):
        raise ValueError(f"{_described(given)} is no image: Pillow's, a tensor (C, H, W) or an array (H, W, C) is one")
    image = image if image.ndim == 3 else image[None]
    if image.shape[0] not in (1, 3):
        raise ValueError(f"{_described(given)} has {image.shape[0]} channels: 1 (gray) or 3 (RGB) come {place}")
    if not image.numel():
        raise ValueError(f"{_described(given)} has no pixels")
    if image.is_floating_point():
        if bool(image.isnan().any()):
            raise ValueError("some of its values are NaN")
        if not bool(((image >= 0) & (image <= 1)).all()):
            raise ValueError(
                f"its values leave [0, 1], as they run from {float(image.min()):g} to {float(image.max()):g}: divide "
                "levels of 0 to 255 by 255; take Normalize out, the classifier normalises by itself"
            )
        image = image.mul(255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise ValueError(f"its values are {image.dtype}: uint8, or floats in [0, 1]")
    return _with_channels(image, channels)


def _with_channels(image: Tensor, channels: int | None) -> Tensor:
    """Bytes (C, H, W) with 1 or 3 channels, if that loses nothing.

    Raises:
        ValueError: colours would be lost.
    """
    if channels == 1 and bool((image != image[:1]).any()):
        raise ValueError(
            "it has colours, and the first images that were looked at had none: give all images in one form, such as "
            'image.convert("RGB") of Pillow'
        )
    return image[:1] if channels == 1 else image if channels is None else image.expand(channels, -1, -1)


def _described(image: Any) -> str:
    shape = getattr(image, "shape", None)
    return type(image).__name__ if shape is None else f"{type(image).__name__} of shape {tuple(shape)}"
