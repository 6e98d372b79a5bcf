"""Noise of sensors: Gaussian, shot (Poisson), impulse (salt and pepper), speckle."""

import functools

import torch
from torch import Tensor

from ncreg.robustness.corruptions._random import Draws

_LEVELS = 255  # rows of the Poisson tables, and finer steps between two of them
_STEPS = 256
_ONE = 1 << 31


def gaussian_noise(x: Tensor, deviation: float, rng: Draws) -> Tensor:
    """The image plus σN."""
    return x + rng.normal(0, *x.shape[1:]).to(x) * deviation


def speckle_noise(x: Tensor, deviation: float, rng: Draws) -> Tensor:
    """The image times 1 + σN."""
    return x + x * (rng.normal(0, *x.shape[1:]).to(x) * deviation)


def impulse_noise(x: Tensor, amount: float, rng: Draws) -> Tensor:
    """A fraction `amount` of the values becomes 0 or 1."""
    hit = rng.uniform(0, *x.shape[1:]) < amount
    salt = rng.uniform(1, *x.shape[1:]) < 0.5
    return torch.where(hit, salt.to(x), x)


@functools.lru_cache(maxsize=32)
def _poisson_table(top: float, rows: int, device: torch.device) -> tuple[Tensor, int]:
    """P(X ≤ k) of rates r·top/(rows − 1) in units of 2^-31, all rows in one ascending vector, and a row's length."""
    length = int(top + 10 * top**0.5 + 20)
    rate = torch.arange(rows, dtype=torch.float64, device="cpu")[:, None] * (top / (rows - 1))
    below = torch.special.gammaincc(torch.arange(1.0, length + 1, dtype=torch.float64, device="cpu"), rate)
    below = (below * _ONE).round().long()
    below[:, -1] = _ONE  # the search ends within its row
    below = below.cummax(1).values
    return (below + (torch.arange(rows, device="cpu")[:, None] << 32)).flatten().to(device), length


def _poisson(row: Tensor, top: float, rows: int, bits: Tensor) -> Tensor:
    """Poisson counts by inversion: the first k with P(X ≤ k) above a uniform number."""
    table, length = _poisson_table(top, rows, row.device)
    uniform = (bits >> 33).bitwise_and_(_ONE - 1)
    return torch.searchsorted(table, (row << 32) + uniform, right=True) - row * length


def shot_noise(x: Tensor, photons: float, rng: Draws) -> Tensor:
    """Poisson(x·c)/c.

    A rate is a multiple of c/255 and a remainder rounded to c/65280, and the count the sum of their two counts.
    """
    level = x * _LEVELS
    row = (level + 1e-3).floor().clamp_(max=_LEVELS)  # 8-bit images have no remainder
    rest = ((level - row) * _STEPS).round().long().clamp_(0, _STEPS)
    count = _poisson(row.long(), photons, _LEVELS + 1, rng.bits(0, *x.shape[1:]))
    if bool(rest.any()):
        count += _poisson(rest, photons / _LEVELS, _STEPS + 1, rng.bits(1, *x.shape[1:]))
    return count.to(x) / photons
