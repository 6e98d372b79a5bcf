"""Random numbers by counting: image i of a set draws the same ones however the set is batched, on every device.

SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) of a key a (seed, type, severity, image) and a counter a number. Integers
and tables only: the vectorised logarithm of a Box-Muller transform depends on a number's place in its batch.
"""

import functools
import zlib
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1
_QUANTILES = 1 << 16


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return (value & _MASK ^ (1 << 63)) - (1 << 63)


def _xor_shift(z: Tensor, places: int) -> Tensor:
    # >> keeps the sign of int64, so the bits that it brings in are masked out.
    return z.bitwise_xor_((z >> places).bitwise_and_((1 << (64 - places)) - 1))


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser but for its last step, which leaves the upper 31 bits alone; changes z."""
    z = _xor_shift(z, 30).mul_(_signed(_FIRST))
    return _xor_shift(z, 27).mul_(_signed(_SECOND))


@functools.cache
def _normal_table(device: torch.device) -> Tensor:
    """Φ⁻¹ at the middles of 2^16 intervals of equal probability: within ±4.3, variance 1 to 2e-5."""
    middles = (torch.arange(_QUANTILES, dtype=torch.float64, device="cpu") + 0.5) / _QUANTILES
    return torch.special.ndtri(middles).float().to(device)


@dataclass(frozen=True)
class Draws:
    """Random numbers of each image, from the images' keys; each `stream` gives other numbers.

    Attributes:
        keys: one a image, (B,).
    """

    keys: Int[Tensor, " batch"]

    def bits(self, stream: int, *shape: int) -> Int[Tensor, "batch ..."]:
        """int64 whose upper 31 bits are random, (B, *shape)."""
        count = torch.arange(1, prod(shape) + 1, device=self.keys.device) + (stream << 32)
        return _mix(self.keys[:, None] + count * _signed(_GOLDEN)).view(-1, *shape)

    def uniform(self, stream: int, *shape: int) -> Float[Tensor, "batch ..."]:
        """Uniform in [0, 1) on a grid of 2^-24, float32."""
        return (self.bits(stream, *shape) >> 40).bitwise_and_(0xFFFFFF).float().mul_(2.0**-24)

    def normal(self, stream: int, *shape: int) -> Float[Tensor, "batch ..."]:
        """Standard normal, float32."""
        place = (self.bits(stream, *shape) >> 48).bitwise_and_(_QUANTILES - 1)
        return torch.take(_normal_table(place.device), place)

    def choice(self, stream: int, count: int) -> Int[Tensor, " batch"]:
        """One of 0 … count − 1 an image; `count` a power of two."""
        return (self.bits(stream, 1)[:, 0] >> 40).bitwise_and_(count - 1)


def draws(seed: int, name: str, severity: int, index: Int[Tensor, " batch"]) -> Draws:
    """The numbers of images `index` under one corruption."""
    state = 0
    for word in (seed, zlib.crc32(name.encode()), severity):
        state = _scramble(state ^ (word & _MASK))
    start = _mix(index * _signed(_GOLDEN) + _signed(state))
    return Draws(_xor_shift(start, 31))


def _scramble(value: int) -> int:
    """One SplitMix64 step on Python's integers."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ value >> 30) * _FIRST) & _MASK
    value = ((value ^ value >> 27) * _SECOND) & _MASK
    return value ^ value >> 31
