"""Digital corruptions: contrast, saturation, elastic transform, pixelation, JPEG compression.

JPEG's loss comes without a file: the integer arithmetic of libjpeg, batched, so that the pixels are those of a decoder.
Baseline, 4:2:0 chroma for RGB, the accurate integer DCT of Loeffler, Ligtenberg & Moschytz (ICASSP 1989), smooth chroma
upsampling: the defaults of libjpeg(-turbo) and Pillow. Huffman coding loses nothing and is left out.
"""

import functools

import torch
from einops import rearrange
from torch import Tensor

from ncreg.robustness.corruptions._filters import bilinear, both_axes, box_rows, gaussian
from ncreg.robustness.corruptions._random import Draws

# Annex K of ITU-T T.81.
_LUMA_STEPS = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA_STEPS = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
) + ((99,) * 8,) * 4


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
    # Channels lie below the value by its product with the saturation and a factor that the hue fixes.
    factor_of_hue = torch.where(
        span > 0, (value - x) / span.clamp_min(1e-30), x.new_tensor([0.0, 1.0, 1.0]).view(1, 3, 1, 1)
    )
    return value - (value * wanted) * factor_of_hue


def pixelate(x: Tensor, size: float, rng: Draws) -> Tensor:
    """Sides shrunk by the factor `size`, by means over boxes, and enlarged by repetition."""
    height, width = x.shape[-2:]
    low, narrow = int(height * size), int(width * size)
    coarse = both_axes(x, box_rows(height, low), box_rows(width, narrow))
    return both_axes(coarse, box_rows(low, height), box_rows(narrow, width))


def elastic_transform(x: Tensor, constants: tuple[float, float, float], rng: Draws) -> Tensor:
    """A random affine map, then a smooth random displacement; all in fractions of the shorter side."""
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


@functools.lru_cache(maxsize=32)
def _steps(quality: int, chroma: bool, device: torch.device) -> Tensor:
    """Quantisation steps (8, 8, 1)."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    table = torch.tensor(_CHROMA_STEPS if chroma else _LUMA_STEPS, dtype=torch.int32, device=device)
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
