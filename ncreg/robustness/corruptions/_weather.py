"""Weather: snow, fog, brightness. Frost needs photographs and is left out."""

import torch
from torch import Tensor

from ncreg.robustness.corruptions._filters import both_axes, motion, zoom_rows
from ncreg.robustness.corruptions._random import Draws


def snow(x: Tensor, constants: tuple[float, float, float, float, int, float, float], rng: Draws) -> Tensor:
    """Noise, enlarged and cut off, falls in streaks over a whitened image, once each way up."""
    mean, deviation, zoom, threshold, radius, sigma, kept = constants
    height, width = x.shape[-2:]
    layer = rng.normal(0, 1, height, width).to(x) * deviation + mean
    layer = both_axes(layer, zoom_rows(height, zoom), zoom_rows(width, zoom))
    layer = layer.masked_fill_(layer < threshold, 0).clamp_(0, 1)
    layer = motion(layer, rng.choice(1, 1024), radius, sigma, -135.0, -45.0)
    gray = x
    if x.shape[1] == 3:
        gray = (x[:, :1] * 0.299 + x[:, 1:2] * 0.587) + x[:, 2:] * 0.114
    white = torch.maximum(x, gray * 1.5 + 0.5)
    return (x * kept + white * (1 - kept)) + (layer + layer.flip(-2, -1))


def _plasma(size: int, decay: float, rng: Draws) -> Tensor:
    """Diamond-square height maps (B, size, size) in [0, 1] on a torus; size is a power of two."""
    heights = torch.zeros(len(rng.keys), size, size, dtype=torch.float32, device=rng.keys.device)
    step, wibble, stream = size, 100.0, 0

    def rough(total: Tensor) -> Tensor:
        nonlocal stream
        stream += 1
        noise = rng.uniform(stream, *total.shape[1:]) * 2 - 1
        return total * 0.25 + noise * (wibble * wibble)

    while step >= 2:
        half = step // 2
        corner = heights[:, ::step, ::step]
        above = corner + corner.roll(-1, 1)
        heights[:, half::step, half::step] = rough(above + above.roll(-1, 2))
        centre = heights[:, half::step, half::step]
        heights[:, ::step, half::step] = rough((centre + centre.roll(1, 1)) + (corner + corner.roll(-1, 2)))
        heights[:, half::step, ::step] = rough((centre + centre.roll(1, 2)) + (corner + corner.roll(-1, 1)))
        step, wibble = half, wibble / decay
    heights -= heights.amin((1, 2), keepdim=True)
    return heights / heights.amax((1, 2), keepdim=True)


def fog(x: Tensor, constants: tuple[float, float], rng: Draws) -> Tensor:
    """(x + c·plasma)·m/(m + c), m the image's largest value."""
    strength, decay = constants
    height, width = x.shape[-2:]
    size = 1 << (max(height, width) - 1).bit_length()
    layer = _plasma(size, decay, rng)[:, None, :height, :width].to(x)
    largest = x.amax((1, 2, 3), keepdim=True)
    return (x + layer * strength) * (largest / (largest + strength))


def brightness(x: Tensor, added: float, rng: Draws) -> Tensor:
    """The value of HSV (of one channel: the image) raised by c, hue and saturation kept."""
    value = x.amax(1, keepdim=True)
    raised = (value + added).clamp_(max=1)
    # Black has no hue: it becomes gray.
    return torch.where(value > 0, x * (raised / value.clamp_min(1e-30)), raised)
