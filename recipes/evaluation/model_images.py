"""Which images a model takes: side, channels, scaling, normalisation; the last is put inside the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm.data.config import resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms.v2.functional import rgb_to_grayscale

from ncreg.models import Classifier, Normalize
from recipes.core.errors import UserError
from recipes.data.side import Side
from recipes.evaluation.model_options import INTERPOLATIONS, ModelOptions

NEAREST_KIND = {"lanczos": "bicubic", "hamming": "bilinear", "box": "bilinear", "random": "bicubic"}
"""What stands in for interpolations that Pillow alone has."""


@dataclass(frozen=True)
class ModelImages:
    """Images as a model takes them.

    Attributes:
        channels: of an image.
        side: in pixels, and how images are brought to it.
        mean: of each channel, for images in [0, 1].
        std: likewise.
    """

    channels: int
    side: Side
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __str__(self) -> str:
        side = self.side
        scaling = "both edges scaled" if side.squash else f"the shorter edge scaled to {side.shorter}"
        moments = "; ".join(
            f"{name} {', '.join(f'{x:.4g}' for x in values)}"
            for name, values in (("mean", self.mean), ("std", self.std))
        )
        return f"{self.channels} x {int(side)} x {int(side)}, {scaling} ({side.interpolation}); {moments}"


class ToChannels(nn.Module):
    """Images with so many channels: gray repeated, or colour as gray.

    Args:
        channels: 1, or any number for images that have it already.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, channels, height, width)."""
        if images.shape[1] == self.channels:
            return images
        return rgb_to_grayscale(images) if self.channels == 1 else images.expand(-1, self.channels, -1, -1)


def images_of(classifier: Classifier, options: ModelOptions) -> ModelImages:
    """What a model says of its images, as timm's loaders read it, and what the options say instead.

    A model without such a configuration takes timm's usual images: 224 pixels, or those that its `config.image_size`
    names, cut out of 8/7 as many, bicubic, ImageNet's mean and deviation. Where `options` name the size, nothing is
    scaled beyond it and cut off again: whoever trained on small images rarely did that.

    Raises:
        UserError: images that are not square, or numbers of mean and std that do not fit the channels.
    """
    cfg: Mapping[str, Any] = {}
    if hasattr(classifier.backbone, "pretrained_cfg") or classifier.image_shape is not None:
        cfg = resolve_model_data_config(classifier)
    size = cfg.get("input_size", (first_channels(classifier), *(stated_sides(classifier.backbone) or (224, 224))))
    if options.image_size is None and size[1] != size[2]:
        raise UserError(f"MODEL takes images of {size[1]} x {size[2]} pixels; here they are square: --image-size N")
    side = options.image_size or int(size[1])
    channels = options.channels or int(size[0])
    crop = options.crop_pct or cfg.get("crop_pct", 0.875 if options.image_size is None else 1.0)
    asked = options.interpolation or cfg.get("interpolation", "bicubic")
    interpolation = asked if asked in INTERPOLATIONS else NEAREST_KIND.get(asked, "bicubic")
    squash = cfg.get("crop_mode") == "squash" and options.crop_pct is None
    shorter = max(side, math.floor(side / crop + 1e-6))
    mean, std = normalised_by(classifier) or (cfg.get("mean", IMAGENET[0]), cfg.get("std", IMAGENET[1]))
    return ModelImages(
        channels,
        Side(side, shorter=shorter, interpolation=interpolation, squash=squash),
        _per_channel("--mean", options.mean or mean, channels, given=options.mean is not None),
        _per_channel("--std", options.std or std, channels, given=options.std is not None),
    )


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def normalised_by(classifier: Classifier) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of a classifier that normalises its images itself."""
    if not isinstance(classifier.preprocess, Normalize):
        return None
    return tuple(classifier.preprocess.mean.flatten().tolist()), tuple(classifier.preprocess.std.flatten().tolist())


def stated_sides(module: Any) -> tuple[int, int] | None:
    """Height and width that a model's `config.image_size` names, as Hugging Face's models have it."""
    inner = getattr(module, "model", module)  # of a model taken as a whole
    size = getattr(getattr(inner, "config", None), "image_size", None)
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    return sides if len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides) else None


def first_channels(module: nn.Module) -> int:
    """Channels that the first convolution takes; 3 without one."""
    return next((part.in_channels for part in module.modules() if isinstance(part, nn.Conv2d)), 3)


def _per_channel(option: str, values: Any, channels: int, *, given: bool) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) == channels:
        return numbers
    if len(numbers) == 1 or not given:
        return (sum(numbers) / len(numbers),) * channels
    raise UserError(f"{option} {numbers}: MODEL takes {channels} channels, so {channels} numbers or one")


def take_images(classifier: Classifier, images: ModelImages) -> Classifier:
    """The classifier on images in [0, 1] of one or three channels: it repeats gray and normalises inside; in place."""
    preprocess = classifier.preprocess
    if isinstance(preprocess, nn.Identity | Normalize):
        preprocess = Normalize(images.mean, images.std)
    like = next(classifier.parameters())
    classifier.preprocess = nn.Sequential(ToChannels(images.channels), preprocess).to(like.device, like.dtype)
    classifier.image_shape = (images.channels, images.side, images.side)
    return classifier.eval()
