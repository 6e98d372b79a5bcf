"""Procedural codes: class vectors computed from the class index, so that nothing is stored."""

from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from ncreg._checks import check_indices, check_integer, check_num_classes, check_seed
from ncreg.numerics import as_float

ROWS = 4096  # of a Gram matrix at a time
_LOW, _GOLDEN = 0xFFFFFFFF, 0x9E3779B9


def procedural_code(
    num_classes: int,
    dim: int,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "num_classes dim"]:
    """Class vectors ±1/√d whose signs are the bits of a hash of class index and seed.

    The same on every platform and device: the hash is integer arithmetic (Appleby's finaliser of MurmurHash3, public
    domain). Two classes behave as random signs do: cosines have mean 0 and standard deviation 1/√d, and the largest of
    all pairs is near `expected_max_cosine`. `code_rows` gives the vectors of a few classes, with no matrix.

    Args:
        num_classes: C, at least 2.
        dim: d.
        seed: of the hash, at most 64 bits.
        dtype: of the result; torch's default dtype where it is None.
        device: of the result.

    Raises:
        ValueError: fewer than 2 classes, no dimension, a seed of more than 64 bits.

    Example:
        >>> procedural_code(2, 4) * 2
        tensor([[-1.,  1., -1., -1.],
                [ 1.,  1., -1., -1.]])
    """
    rows = torch.arange(check_num_classes(num_classes), device=device)
    return code_rows(rows, dim, seed=seed, dtype=dtype)


def code_rows(
    classes: Tensor, dim: int, *, seed: int = 0, dtype: torch.dtype | None = None
) -> Float[Tensor, "rows dim"]:
    """The vectors of `procedural_code` for these class indices, on their device.

    Args:
        classes: indices (rows,).
        dim: d.
        seed: of the code.
        dtype: of the vectors; None takes torch's default.

    Raises:
        TypeError: classes are no integers.
        ValueError: no dimension, a seed of more than 64 bits, classes that are no list, or negative ones (on the CPU,
            where looking costs no wait).

    Example:
        >>> torch.equal(code_rows(torch.tensor([7, 2]), 64), procedural_code(8, 64)[[7, 2]])
        True
    """
    dim, seed = check_integer("dim", dim, 1), check_seed(seed)
    check_indices(classes)
    dtype = as_float(dtype) or torch.get_default_dtype()
    words = torch.arange((dim + 31) // 32, device=classes.device)
    keys = _mixed((words * _GOLDEN + _mixed_number(seed >> 32)) & _LOW)
    state = _mixed(classes.long() ^ _mixed_number(seed + _GOLDEN))  # seed 0 and class 0 are no fixed point then
    bits = _mixed(_mixed(state[:, None] ^ keys))
    # the function, not the operator >>, which has no ONNX form
    octets = torch.bitwise_right_shift(bits[:, :, None], torch.arange(0, 32, 8, device=bits.device)) & 0xFF
    signs = _signs_of_octets(dtype, octets.device) * dim**-0.5
    return signs[octets].view(classes.shape[0], 32 * words.shape[0])[:, :dim]


def _signs_of_octets(dtype: torch.dtype, device: torch.device) -> Float[Tensor, "256 8"]:
    """±1 for the bits of each octet, the lowest first."""
    octets = torch.arange(256, device=device)
    return ((torch.bitwise_right_shift(octets[:, None], torch.arange(8, device=device)) & 1) * 2 - 1).to(dtype)


def _mixed(words: Integer[Tensor, ...]) -> Integer[Tensor, ...]:
    """MurmurHash3's finaliser, a bijection of 32-bit words, in int64 that never overflows."""
    words = words ^ (words >> 16)
    words = _times(words, 0x85EBCA6B)
    words = words ^ (words >> 13)
    words = _times(words, 0xC2B2AE35)
    return words ^ (words >> 16)


def _times(words: Integer[Tensor, ...], factor: int) -> Integer[Tensor, ...]:
    """The product modulo 2³², by halves of the factor: no product needs more than 48 bits."""
    high = ((words * (factor >> 16)) & 0xFFFF) << 16
    return (words * (factor & 0xFFFF) + high) & _LOW


def _mixed_number(seed: int) -> int:
    """The same hash of the low 32 bits of a number."""
    word = seed & _LOW
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        word = ((word ^ (word >> shift)) * factor) & _LOW
    return word ^ (word >> 16)


def code_max_cosine(num_classes: int, dim: int, *, seed: int = 0, device: torch.device | str | None = None) -> float:
    """The exact largest cosine between two vectors of a procedural code, in tiles: O(C²·d) time, O(C) memory.

    Products of ±1 are whole numbers, exact in float32 up to d = 2²⁴. 10⁵ classes in 512 dimensions are 5·10¹²
    operations, 10⁶ a hundred times that.

    Args:
        num_classes: C.
        dim: d.
        seed: of the code.
        device: where the products are made.

    Raises:
        ValueError: fewer than two classes, no dimension, a seed of more than 64 bits.

    Example:
        >>> code_max_cosine(1000, 512), round(expected_max_cosine(1000, 512), 2)
        (0.20703125, 0.23)
    """
    classes, dim = torch.arange(check_num_classes(num_classes), device=device), check_integer("dim", dim, 1)
    rows_of = functools.partial(code_rows, dim=dim, seed=seed, dtype=torch.float32)
    largest = -math.inf
    tiles = classes.split(ROWS)
    for number, tile in enumerate(tiles):
        rows = rows_of(tile).sign()
        for other in tiles[number:]:
            products = rows @ (rows if other is tile else rows_of(other).sign()).T
            if other is tile:
                products.fill_diagonal_(-math.inf)
            largest = max(largest, products.max().item())
    return largest / dim


def expected_max_cosine(num_classes: int, dim: int) -> float:
    """Where the largest cosine of a procedural code lies: the t with C(C−1)/2 · P(cos ≥ t) = 1, at most 1.

    P by Chernoff's bound for a mean of d random signs, exp(−d·D(½(1 + t) ‖ ½)), so that the true value is a little
    less; √(4 ln C/d) for small t.

    Args:
        num_classes: C.
        dim: d.

    Raises:
        ValueError: fewer than two classes, no dimension.

    Example:
        >>> round(expected_max_cosine(1_000_000, 512), 3)
        0.322
    """
    dim, num_classes = check_integer("dim", dim, 1), check_num_classes(num_classes)
    pairs = math.log(num_classes * (num_classes - 1) / 2)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if dim * _divergence(middle) < pairs else (low, middle)
    return high


def _divergence(cosine: float) -> float:
    """Of a coin of mean t from a fair one, in nats: ½(1+t) ln(1+t) + ½(1−t) ln(1−t)."""
    return sum((1 + t) / 2 * math.log1p(t) for t in (cosine, -cosine) if t > -1)
