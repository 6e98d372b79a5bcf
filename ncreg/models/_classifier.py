"""Backbone, projection, last norm and head as one module that keeps timm's naming contract."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ClassifierOutput(NamedTuple):
    """What one forward pass gives: logits (B, C) and the features (B, d) that entered the head."""

    logits: Tensor
    features: Tensor


class Normalize(nn.Module):
    """Images in [0, 1] → (x − mean)/std per channel, inside the model so that no loader does it twice.

    Args:
        mean: one number a channel, or a single one for all.
        std: likewise, positive.

    Raises:
        ValueError: if the lengths differ or a standard deviation is not positive.

    Example:
        >>> Normalize([0.5], [0.25])(torch.ones(1, 1, 2, 2)).unique()
        tensor([2.])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not len(mean):
            raise ValueError(f"mean and std need one number a channel each, got {mean} and {std}")
        if not all(s > 0 for s in std):
            raise ValueError(f"std must be positive in every channel, got {std}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch _ _ _"]:
        """Normalise a batch of images."""
        return (images - self.mean) / self.std

    def extra_repr(self) -> str:
        """Mean and standard deviation of every channel."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


class Classifier(nn.Module):
    """images → preprocess → backbone → project → norm → **features** → head → logits.

    Args:
        backbone: images to pooled features (B, width); its own classifier is already taken out.
        norm: the last norm, on (B, d).
        head: features (B, d) to logits (B, C).
        project: (B, width) to (B, d).
        preprocess: images in [0, 1] to what the backbone expects, such as `Normalize`.

    `forward(x)` gives logits; `forward(x, with_features=True)` gives `ClassifierOutput(logits, features)`
    from the same pass, so the hooks of DistributedDataParallel hold.
    """

    def __init__(
        self,
        backbone: nn.Module,
        norm: nn.Module,
        head: nn.Module,
        *,
        project: nn.Module | None = None,
        preprocess: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.preprocess = preprocess if preprocess is not None else nn.Identity()
        self.backbone = backbone
        self.project = project if project is not None else nn.Identity()
        self.norm = norm
        self.head = head

    def forward(self, x: Tensor, with_features: bool = False) -> Any:
        """Logits (B, C), or `ClassifierOutput(logits, features)` when `with_features` is set."""
        features = self.norm(self.project(self.backbone(self.preprocess(x))))
        logits = self.head(features)
        return ClassifierOutput(logits, features) if with_features else logits

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return int(self.head.num_classes)
