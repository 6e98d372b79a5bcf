"""From an opened image to its bytes: modes, bits and the meaning of gray levels as the file's header says."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
"""Tags of TIFF 6.0, section 8: bits of a sample, and what 0 means."""

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
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))  # never 32 bits
    if image.mode in ("I", "F") and not wide:
        raise ValueError(
            f"signed, wide or real pixels (Pillow's mode {image.mode}) have no known range; unsigned 8 or 16 bits do"
        )
    if not wide:
        return image
    tags = image.tag_v2 if hasattr(image, "tag_v2") else {}
    most = 2 ** tags.get(BITS, (16,))[0] - 1
    levels = np.rint(np.asarray(image) / (most / 255)).astype(np.uint8)
    # Pillow itself inverts gray of up to 8 bits
    return Image.fromarray(255 - levels if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else levels)
