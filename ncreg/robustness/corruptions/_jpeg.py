"""JPEG's loss without a file: the integer arithmetic of libjpeg, batched, so that the pixels are those of a decoder.

Baseline, 4:2:0 chroma for RGB, the accurate integer DCT of Loeffler, Ligtenberg & Moschytz (ICASSP 1989), smooth chroma
upsampling: the defaults of libjpeg(-turbo) and Pillow. Huffman coding loses nothing and is left out.
"""

import functools

import torch
from einops import rearrange
from torch import Tensor

from ncreg.robustness.corruptions._random import Draws

# Annex K of ITU-T T.81.
_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
) + ((99,) * 8,) * 4


@functools.lru_cache(maxsize=32)
def _steps(quality: int, chroma: bool, device: torch.device) -> Tensor:
    """Quantisation steps (8, 8, 1)."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    table = torch.tensor(_CHROMA if chroma else _LUMA, dtype=torch.int32, device=device)
    return ((table * scale + 50) // 100).clamp_(1, 255)[:, :, None]


def _descale(x: Tensor, bits: int) -> Tensor:
    return (x + (1 << (bits - 1))) >> bits


def _odd(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The odd half that both directions share; constants in units of 2^-13."""
    last = (a + b + c + d) * 9633
    first, second = (a + d) * -7373, (b + c) * -20995
    third, fourth = (a + c) * -16069 + last, (b + d) * -3196 + last
    return (
        a * 2446 + first + third,
        b * 16819 + second + fourth,
        c * 25172 + second + third,
        d * 12299 + first + fourth,
    )


def _forward(x: Tensor, dim: int, second: bool) -> Tensor:
    """Eight-point DCT along `dim`, times √8 and, between the passes, 4."""
    x0, x1, x2, x3, x4, x5, x6, x7 = x.unbind(dim)
    s0, s1, s2, s3 = x0 + x7, x1 + x6, x2 + x5, x3 + x4
    e0, e1, e2, e3 = s0 + s3, s1 + s2, s1 - s2, s0 - s3
    o4, o5, o6, o7 = _odd(x3 - x4, x2 - x5, x1 - x6, x0 - x7)
    bits = 15 if second else 11
    turn = (e2 + e3) * 4433
    e2, e6 = _descale(turn + e3 * 6270, bits), _descale(turn - e2 * 15137, bits)
    e0, e4 = (_descale(e, 2) if second else e << 2 for e in (e0 + e1, e0 - e1))
    o1, o3, o5, o7 = (_descale(o, bits) for o in (o7, o6, o5, o4))
    return torch.stack([e0, o1, e2, o3, e4, o5, e6, o7], dim)


def _backward(x: Tensor, dim: int, bits: int) -> Tensor:
    """The inverse along `dim`."""
    x0, x1, x2, x3, x4, x5, x6, x7 = x.unbind(dim)
    turn = (x2 + x6) * 4433
    low, high = turn - x6 * 15137, turn + x2 * 6270
    plus, minus = (x0 + x4) << 13, (x0 - x4) << 13
    even = (plus + high, minus + low, minus - low, plus - high)
    odd = _odd(x7, x5, x3, x1)[::-1]
    first = [_descale(e + o, bits) for e, o in zip(even, odd, strict=True)]
    last = [_descale(e - o, bits) for e, o in zip(even, odd, strict=True)]
    return torch.stack(first + last[::-1], dim)


def _extend(x: Tensor, dim: int, multiple: int) -> Tensor:
    """The last row or column repeated up to a multiple."""
    size = x.shape[dim]
    wanted = -(-size // multiple) * multiple
    if wanted == size:
        return x
    return x.index_select(dim, torch.arange(wanted, device=x.device).clamp_max(size - 1))


def _coded(x: Tensor, steps: Tensor) -> Tensor:
    """A plane (B, H, W) of integers in 0 … 255 through DCT, quantisation and back."""
    height, width = x.shape[1:]
    x = _extend(_extend(x, 1, 8), 2, 8)
    rows = x.shape[1] // 8
    blocks = rearrange(x - 128, "b (i y) (j x) -> y x (b i j)", y=8, x=8).contiguous()
    found = _forward(_forward(blocks, 1, second=False), 0, second=True)
    level = (found.abs() + (steps << 2)).div(steps << 3, rounding_mode="floor") * found.sign()
    blocks = _backward(_backward(level * steps, 0, 11), 1, 18)
    x = rearrange(blocks, "y x (b i j) -> b (i y) (j x)", b=len(x), i=rows)
    return (x + 128).clamp_(0, 255)[:, :height, :width]


def _halved(x: Tensor) -> Tensor:
    """Means over 2×2 pixels, rounded down and up in turn."""
    rows = -(-x.shape[1] // 2)
    x = _extend(_extend(x, 1, 2), 2, 16)
    total = x[:, ::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, ::2] + x[:, 1::2, 1::2]
    turn = torch.arange(total.shape[2], device=x.device, dtype=x.dtype).remainder_(2).add_(1)
    return ((total + turn) >> 2)[:, :rows]


def _doubled(x: Tensor, height: int, width: int) -> Tensor:
    """Twice the size, each pixel ¾ the nearest and ¼ the next nearest, along both axes."""
    above = torch.cat([x[:, :1], x[:, :-1]], 1)
    below = torch.cat([x[:, 1:], x[:, -1:]], 1)
    tall = torch.stack([x * 3 + above, x * 3 + below], 2).flatten(1, 2)
    left = torch.cat([tall[:, :, :1], tall[:, :, :-1]], 2)
    right = torch.cat([tall[:, :, 1:], tall[:, :, -1:]], 2)
    wide = torch.stack([(tall * 3 + left + 8) >> 4, (tall * 3 + right + 7) >> 4], 3).flatten(2, 3)
    return wide[:, :height, :width]


def jpeg_compression(x: Tensor, quality: int, rng: Draws) -> Tensor:
    """Encoded at a quality in 1 … 100 and decoded."""
    height, width = x.shape[-2:]
    planes = (x * 255).round().to(torch.int32)
    luma, chroma = (_steps(quality, which, x.device) for which in (False, True))
    if x.shape[1] == 1:
        return _coded(planes[:, 0], luma)[:, None].to(x) / 255
    r, g, b = planes.unbind(1)
    half, middle = 1 << 15, 128 << 16
    y = (r * 19595 + g * 38470 + b * 7471 + half) >> 16
    cb = (b * 32768 - r * 11059 - g * 21709 + (middle + half - 1)) >> 16
    cr = (r * 32768 - g * 27439 - b * 5329 + (middle + half - 1)) >> 16
    y = _coded(y, luma)
    columns = -(-width // 2)
    cb, cr = (_doubled(_coded(_halved(c), chroma)[:, :, :columns], height, width) - 128 for c in (cb, cr))
    r = y + ((cr * 91881 + half) >> 16)
    g = y + ((cb * -22554 - cr * 46802 + half) >> 16)
    b = y + ((cb * 116130 + half) >> 16)
    return torch.stack([r, g, b], 1).clamp_(0, 255).to(x) / 255
