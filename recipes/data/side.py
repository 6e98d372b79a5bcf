"""The side of images in pixels, and how they are brought to it."""

from __future__ import annotations

from typing import Any


class Side(int):
    """A side in pixels that also says how images are brought to it; a plain number is the way of the recipes.

    Args:
        pixels: side of the square that a model takes.
        shorter: length to which the shorter edge is scaled before the centre is cropped; None for `pixels`.
        interpolation: nearest, bilinear or bicubic.
        squash: scale both edges to `pixels` instead, whatever the shape of the image.

    Example:
        >>> Side(224, shorter=256, interpolation="bicubic") == 224, Side.of(28).shorter
        (True, 28)
    """

    shorter: int
    interpolation: str
    squash: bool

    def __new__(
        cls, pixels: int, *, shorter: int | None = None, interpolation: str = "bilinear", squash: bool = False
    ) -> Side:
        """The number with its attributes."""
        side = super().__new__(cls, pixels)
        side.shorter = pixels if shorter is None else shorter
        side.interpolation, side.squash = interpolation, squash
        return side

    @classmethod
    def of(cls, side: int) -> Side:
        """The side itself, or a plain number as one."""
        return side if isinstance(side, Side) else cls(side)

    def __reduce__(self) -> Any:
        return _made, (int(self), self.shorter, self.interpolation, self.squash)


def _made(pixels: int, shorter: int, interpolation: str, squash: bool) -> Side:
    return Side(pixels, shorter=shorter, interpolation=interpolation, squash=squash)
