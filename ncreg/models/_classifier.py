"""Backbone, projection, last norm and head as one module that keeps timm's naming contract."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from timm.models import get_model_input_config
from torch import Tensor, nn

from ncreg._checks import check_flag, check_integer, check_numbers
from ncreg.models._backbone import Removed, parameter_like


class ClassifierOutput(NamedTuple):
    """What one forward pass gives: logits (B, C) and the features (B, d) that entered the head."""

    logits: Float[Tensor, "batch classes"]
    features: Float[Tensor, "batch dim"]


class Normalize(nn.Module):
    """Images in [0, 1] → (x − mean)/std per channel, inside the model so that no loader does it twice.

    Args:
        mean: a sequence of numbers, one a channel or a single one for all.
        std: likewise, positive.

    The numbers are kept in float64 beside the buffers: `.double()` gives them back as they were given.

    Raises:
        ValueError: if the lengths differ, a mean is not finite, or a standard deviation not positive and finite.
        TypeError: if one is no sequence of numbers.

    Example:
        >>> Normalize([0.5], [0.25])(torch.ones(1, 1, 2, 2)).unique()
        tensor([2.])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        mean, std = check_numbers("mean", mean), check_numbers("std", std)
        if len(mean) != len(std) or not mean:
            raise ValueError(f"mean and std need one number a channel each, got {mean} and {std}")
        if not all(math.isfinite(m) for m in mean):
            raise ValueError(f"mean must be finite in every channel, got {mean}")
        if not all(0 < s < math.inf for s in std):
            raise ValueError(f"std must be positive and finite in every channel, got {std}")
        self._given = {"mean": mean, "std": std}
        for name, numbers in self._given.items():
            self.register_buffer(name, torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """After a change of dtype the buffers are the numbers given, rounded once, unless others were written there."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, numbers in self._given.items():
            old, new = before[name], self._buffers[name]
            if old is not None and new is not None and old.dtype != new.dtype and not (old.is_meta or new.is_meta):
                given = torch.tensor(numbers, dtype=torch.float64, device="cpu").view(-1, 1, 1)
                if torch.equal(old.cpu(), given.to(old.dtype)):
                    self._buffers[name] = given.to(new)
        return self

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch _ _ _"]:
        """Normalise a batch of images."""
        return (images - self.mean) / self.std

    def extra_repr(self) -> str:
        """Mean and standard deviation of every channel."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


class Classifier(nn.Module):
    """images → preprocess → backbone → project → norm → **features** → head → logits.

    `forward(x)` gives logits; `forward(x, with_features=True)` gives `ClassifierOutput(logits, features)`
    from the same pass, so the hooks of DistributedDataParallel hold. Over a timm backbone it keeps timm's
    contract: num_features, forward_features, forward_head, forward_intermediates, group_matcher, ….

    Args:
        backbone: images to pooled features (B, width); its own classifier is already taken out.
        norm: the last norm, on (B, d).
        head: features (B, d) to logits (B, C).
        project: (B, width) to (B, d).
        preprocess: images in [0, 1] to what the backbone expects, such as `Normalize`.
        num_classes: C; None takes the head's num_classes or out_features.
        head_hidden_size: d; None takes the head's in_features.

    Raises:
        ValueError: if neither the caller nor the head says C and d.
    """

    class_names: tuple[str, ...] | None = None  # both are filled in by ncreg.load_classifier
    image_shape: tuple[int, ...] | None = None

    def __init__(
        self,
        backbone: nn.Module,
        norm: nn.Module,
        head: nn.Module,
        *,
        project: nn.Module | None = None,
        preprocess: nn.Module | None = None,
        num_classes: int | None = None,
        head_hidden_size: int | None = None,
    ) -> None:
        super().__init__()
        self.preprocess = preprocess if preprocess is not None else nn.Identity()
        self.backbone = backbone
        self.project = project if project is not None else nn.Identity()
        self.norm = norm
        self.head = head
        self.num_classes = _size("num_classes", num_classes, head, "num_classes", "out_features")
        self.head_hidden_size = _size("head_hidden_size", head_hidden_size, head, "in_features")
        self._removed: Removed | None = None
        self._new_head: Callable[..., nn.Module] | None = None

    def forward(
        self, x: Float[Tensor, "batch ..."], with_features: bool = False
    ) -> Float[Tensor, "batch classes"] | ClassifierOutput:
        """Logits (B, C), or `ClassifierOutput(logits, features)` when `with_features` is set."""
        check_flag("with_features", with_features)
        features = self.norm(self.project(self.backbone(self.preprocess(x))))
        logits = self.head(features)
        return ClassifierOutput(logits, features) if with_features else logits

    def forward_features(self, x: Tensor) -> Any:
        """The backbone's features before pooling, as timm's method of that name gives them."""
        return self._timm("forward_features")(self.preprocess(x))

    def forward_head(self, x: Any, pre_logits: bool = False) -> Float[Tensor, "batch _"]:
        """Logits from `forward_features`' result, or with `pre_logits` the features (B, d) that enter the head."""
        check_flag("pre_logits", pre_logits)
        features = self.norm(self.project(self._timm("forward_head")(x)))
        return features if pre_logits else self.head(features)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The backbone's intermediate feature maps, with timm's arguments."""
        return self._timm("forward_intermediates")(self.preprocess(x), *args, **kwargs)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head of the same kind for `num_classes`; with 0 logits are the features, as in timm.

        Raises:
            ValueError: if the head was a module of one's own, of which no other can be made.
        """
        if num_classes and self._new_head is None:
            raise ValueError("the head was given as a module: set .head and .num_classes yourself")
        if global_pool is not None:
            self._timm("reset_classifier")(0, global_pool)
        new: nn.Module = nn.Identity()
        if num_classes and self._new_head is not None:
            new = self._new_head(self.head_hidden_size, num_classes=num_classes)
        self.head = new.to(parameter_like(self.backbone)).train(self.training)
        self.num_classes = num_classes

    @property
    def num_features(self) -> int:
        """Channels of `forward_features`; the features that enter the head are `head_hidden_size` wide."""
        return int(getattr(self.backbone, "num_features", self.head_hidden_size))

    @property
    def backbone_width(self) -> int:
        """Width of the pooled features, before any projection."""
        return self.project.in_features if isinstance(self.project, nn.Linear) else self.head_hidden_size

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The backbone's, with the new head's sizes; mean 0 and std 1 where `preprocess` normalises already."""
        cfg = dict(self._timm("pretrained_cfg"))
        first = cfg.get("first_conv")
        if first:
            cfg["first_conv"] = f"backbone.{first}" if isinstance(first, str) else [f"backbone.{f}" for f in first]
        cfg |= {"num_classes": self.num_classes, "classifier": "head"}
        cfg["input_size"] = get_model_input_config(self.backbone)["input_size"]
        if isinstance(self.preprocess, Normalize):
            channels = cfg["input_size"][0]
            cfg |= {"mean": (0.0,) * channels, "std": (1.0,) * channels}
        return cfg

    default_cfg = pretrained_cfg  # timm's older name

    def no_weight_decay(self) -> set[str]:
        """Names that the backbone exempts from weight decay."""
        exempt = getattr(self.backbone, "no_weight_decay", set)
        return {f"backbone.{name}" for name in exempt()}

    def group_matcher(self, coarse: bool = False) -> Any:
        """The backbone's layer groups; projection, last norm and head come after all of them."""
        groups = self._timm("group_matcher")(coarse=coarse)
        if callable(groups):  # cait's is a function of the name
            return lambda n: groups(n.removeprefix("backbone.")) if n.startswith("backbone.") else (math.inf,)
        return {
            group: [(_within_backbone(s[0]), *s[1:]) for s in spec]
            if isinstance(spec, list | tuple)
            else spec and _within_backbone(spec)
            for group, spec in groups.items()
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in the backbone."""
        self._timm("set_grad_checkpointing")(enable)

    def _timm(self, name: str) -> Any:
        if not hasattr(self.backbone, name):
            raise AttributeError(f"{name} is timm's: the backbone {type(self.backbone).__name__} has none")
        return getattr(self.backbone, name)


def _size(name: str, value: int | None, head: nn.Module, *attributes: str) -> int:
    if value is not None:
        return check_integer(name, value, 0)
    known = (getattr(head, attribute, None) for attribute in attributes)
    size = next((v for v in known if isinstance(v, int)), None)
    if size is None:
        raise ValueError(f"{name} is required: the head {type(head).__name__} has no {' or '.join(attributes)}")
    return size


def _within_backbone(pattern: str) -> str:
    """Patterns are matched from a name's start, so every anchor moves in front of the prefix."""
    unanchored = re.sub(r"(?<![\[\\])\^", "", pattern)
    return rf"^backbone\.(?:{unanchored})"
