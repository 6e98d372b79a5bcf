"""Backbone, projection, last norm and head as one module that keeps timm's naming contract."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from jaxtyping import Float
from timm.models import get_model_input_config
from torch import Tensor, nn

from ncreg._checks import check_flag, check_integer, check_numbers
from ncreg._copies import copied
from ncreg._transforms import fx_leaf, jit_tracing
from ncreg._wrappers import unwrapped
from ncreg.models._backbone import Removed, example_image, parameter_like, pooled_features
from ncreg.models._data_config import classifier_cfg
from ncreg.numerics import drawn_for


class ClassifierOutput(NamedTuple):
    """What one forward pass gives: logits (B, C) and the features (B, d) that entered the head."""

    logits: Float[Tensor, "batch classes"]
    features: Float[Tensor, "batch dim"]


class EncoderOutput(NamedTuple):
    """A `ClassifierOutput` and the backbone's pooled features (B, width) of the same pass, before any projection."""

    logits: Float[Tensor, "batch classes"]
    features: Float[Tensor, "batch dim"]
    encoder: Float[Tensor, "batch width"]


class FeaturesOutput(NamedTuple):
    """The features (B, d) that would enter the head, which is not called, and the backbone's own (B, width)."""

    features: Float[Tensor, "batch dim"]
    encoder: Float[Tensor, "batch width"]


WithFeatures = bool | Literal["encoder", "alone"]


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

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Write the given numbers again (after deferred initialisation)."""
        for name, numbers in self._given.items():
            self.get_buffer(name).copy_(torch.tensor(numbers, dtype=torch.float64, device="cpu").view(-1, 1, 1))

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

    @fx_leaf
    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch _ _ _"]:
        """Normalise a batch of images.

        Raises:
            TypeError: images are no floats.
            ValueError: they have another number of channels, of which broadcasting would make up the rest.
        """
        if not images.is_floating_point():
            raise TypeError(
                f"images must be floats in [0, 1], got {images.dtype}: images.float() / 255 makes them of bytes"
            )
        channels = len(self._given["mean"])
        if images.ndim < 3 or (not jit_tracing() and channels not in (1, images.shape[-3])):
            raise ValueError(f"images must be (batch, {channels}, height, width), got {tuple(images.shape)}")
        return (images - self.mean) / self.std

    def extra_repr(self) -> str:
        """Mean and standard deviation of every channel."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


class Classifier(nn.Module):
    """images → preprocess → backbone → project → norm → **features** → head → logits.

    `forward(x)` gives logits; `forward(x, with_features=True)` gives `ClassifierOutput(logits, features)`
    from the same pass, so the hooks of DistributedDataParallel hold; `with_features="encoder"` gives
    `EncoderOutput(logits, features, encoder)`, with what enters the projection; `with_features="alone"` gives
    `FeaturesOutput(features, encoder)` without calling the head, for `ncreg.losses.ChunkedCrossEntropyLoss`, which
    reads the head itself. Over a timm backbone it keeps timm's contract: num_features, forward_features, forward_head,
    forward_intermediates, group_matcher, ….

    Args:
        backbone: images to pooled features (B, width); its own classifier is already taken out.
        norm: the last norm, on (B, d).
        head: features (B, d) to logits (B, C).
        project: (B, width) to (B, d).
        preprocess: images in [0, 1] to what the backbone expects, such as `Normalize`.
        num_classes: C; None takes the head's num_classes or out_features.
        head_hidden_size: d; None takes the head's in_features.

    Attributes:
        class_names: one for each class; None if unknown, as the next two. `ncreg.load_classifier` fills them in.
        image_shape: (channels, height, width) of the images that it was trained on.
        data_config: how they were brought to that size, in timm's words (interpolation, crop_pct, crop_mode); None
            is the way of the recipes: the shorter edge is scaled bilinearly, then the centre is cropped. Also `mean`
            and `std` of images that are normalised before the model, where `preprocess` does not do it.

    Raises:
        ValueError: if neither the caller nor the head says C and d.

    Example:
        >>> model = Classifier(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3))
        >>> logits, features = model(torch.rand(8, 1, 2, 2), with_features=True)
        >>> logits.shape, features.shape
        (torch.Size([8, 3]), torch.Size([8, 4]))
    """

    class_names: tuple[str, ...] | None = None
    image_shape: tuple[int, ...] | None = None
    data_config: Mapping[str, Any] | None = None
    head: Any  # any module: to type checkers, nn.Module's own attributes are Tensor or Module, never an int or a method
    # timm.models.save_for_hf refuses arguments that no JSON file can hold, by their name: it would write the
    # architecture of the backbone alone
    _model_args: Mapping[str, Any] = {
        "ncreg.Classifier (its save_pretrained writes it; ncreg.fold gives a model of timm)": frozenset()
    }

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
        self.built_by: dict[str, Any] | None = None  # swap_head's arguments, where it was given names

    if TYPE_CHECKING:  # nn.Module says of a call that it gives Any

        @overload
        def __call__(self, x: Tensor, with_features: Literal[False] = False) -> Tensor: ...

        @overload
        def __call__(self, x: Tensor, with_features: Literal[True]) -> ClassifierOutput: ...

        @overload
        def __call__(self, x: Tensor, with_features: Literal["encoder"]) -> EncoderOutput: ...

        @overload
        def __call__(self, x: Tensor, with_features: Literal["alone"]) -> FeaturesOutput: ...

        @overload
        def __call__(
            self, x: Tensor, with_features: WithFeatures
        ) -> Tensor | ClassifierOutput | EncoderOutput | FeaturesOutput: ...

        def __call__(self, x: Tensor, with_features: WithFeatures = False) -> Any: ...

    def forward(
        self, x: Float[Tensor, "batch ..."], with_features: WithFeatures = False
    ) -> Float[Tensor, "batch classes"] | ClassifierOutput | EncoderOutput | FeaturesOutput:
        """Logits (B, C), or what `with_features` asks for: True, "encoder" or "alone"."""
        encoder = self.backbone(self.preprocess(x))
        features = self.norm(self.project(encoder))
        if isinstance(with_features, str) and with_features == "alone":
            return FeaturesOutput(features, encoder)
        return output_of(self.head(features), features, encoder, with_features)

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
        """A new head of the same kind and dtype for `num_classes`; with 0 logits are the features, as in timm.

        Raises:
            ValueError: if the head was a module of one's own, of which no other can be made, or if `global_pool` gives
                features of another shape; the classifier is then as before.
        """
        if num_classes and self._new_head is None:
            raise ValueError("the head was given as a module: set .head and .num_classes yourself")
        floats = (tensor for tensor in (*self.head.parameters(), *self.head.buffers()) if tensor.is_floating_point())
        former = next(floats, parameter_like(self.backbone))
        new: nn.Module = nn.Identity()
        if num_classes and self._new_head is not None:
            with drawn_for(former):
                new = self._new_head(self.head_hidden_size, num_classes=num_classes)
        if global_pool is not None:
            self._check_pool(global_pool)
            self._timm("reset_classifier")(0, global_pool)
        self.head = new.to(former).train(self.training)
        self.num_classes = num_classes
        self.class_names = None

    @property
    def num_features(self) -> int:
        """Channels of `forward_features`; the features that enter the head are `head_hidden_size` wide."""
        return int(getattr(self._named_backbone[1], "num_features", self.head_hidden_size))

    @property
    def backbone_width(self) -> int:
        """Width of the pooled features, before any projection."""
        known = self.head_hidden_size if isinstance(self.project, nn.Identity) else None
        width = getattr(self.project, "in_features", known)
        if width is None:  # a projection of one's own
            size = None if self._removed is None else self._removed.input_size
            width = pooled_features(self.backbone, example_image(self.backbone, size)).shape[1]
        return int(width)

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        if self.image_shape is not None:
            return self.image_shape[0]
        return int(self._timm("in_chans"))

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What timm's loaders read: the images that it takes, its classes, and where its head is.

        Mean is 0 and std is 1 where `preprocess` normalises already. Where `image_shape` is known, size and resize are
        those of its own training, else those of the backbone.
        """
        return classifier_cfg(self)

    default_cfg = pretrained_cfg  # timm's older name

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Change the size of the images of a backbone made for one size, with timm's arguments (img_size, …)."""
        self._timm("set_input_size")(*args, **kwargs)
        if self.image_shape is not None:
            self.image_shape = tuple(get_model_input_config(self.backbone)["input_size"])

    def no_weight_decay(self) -> set[str]:
        """Names that the backbone exempts from weight decay."""
        prefix, backbone = self._named_backbone
        exempt = getattr(unwrapped(backbone), "no_weight_decay", set)
        return {f"{prefix}{name}" for name in exempt()}

    def group_matcher(self, coarse: bool = False) -> Any:
        """The backbone's layer groups; projection, last norm and head come after all of them."""
        prefix, backbone = self._named_backbone
        backbone = unwrapped(backbone)
        if not hasattr(backbone, "group_matcher"):
            raise AttributeError(f"group_matcher is timm's: the backbone {type(backbone).__name__} has none")
        groups = backbone.group_matcher(coarse=coarse)  # type: ignore[operator]
        if callable(groups):  # cait's is a function of the name
            return lambda n: groups(n.removeprefix(prefix)) if n.startswith(prefix) else (math.inf,)
        return {
            group: [(_within(prefix, s[0]), *s[1:]) for s in spec]
            if isinstance(spec, list | tuple)
            else spec and _within(prefix, spec)
            for group, spec in groups.items()
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in the backbone."""
        self._timm("set_grad_checkpointing")(enable)

    @property
    def feature_info(self) -> Any:
        """The backbone's feature maps: channels, reduction and module of each."""
        return self._timm("feature_info")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors and config.json into a folder, for `from_pretrained` and for the hub.

        Raises:
            ValueError: a part that was given as a module, which no file can describe.

        Example:
            >>> from ncreg.models import swap_head
            >>> classifier = swap_head("test_resnet", "etf", num_classes=10).eval()
            >>> folder, images = getfixture("tmp_path") / "mine", torch.rand(2, 3, 32, 32)
            >>> classifier.save_pretrained(folder)
            >>> torch.equal(Classifier.from_pretrained(folder)(images), classifier(images))
            True
        """
        import_module("ncreg.pretrained").save_pretrained(self, folder)  # files are for modules above this one

    @staticmethod
    def from_pretrained(source: str | Path, *, device: str | torch.device = "cpu") -> Classifier:
        """A classifier that `save_pretrained` wrote, in eval mode.

        Args:
            source: a folder, or the name of a repository of the hub, owner/name or owner/name@revision.
            device: where the classifier goes.

        Raises:
            FileNotFoundError: no such folder, or no classifier in it.
            ValueError: files that cannot be read, or that do not fit together.
            ConnectionError: a repository that is not on this disk, with the hub out of reach.
        """
        classifier: Classifier = import_module("ncreg.pretrained").from_pretrained(source, device=device)
        return classifier

    def _check_pool(self, global_pool: str) -> None:
        """Try a pool on a copy: norm and projection stay, so that features must keep their width.

        Raises:
            ValueError: timm refuses the pool, or features are no longer (batch, width).
        """
        self._timm("reset_classifier")
        trial: Any = copied(self.backbone)
        try:
            trial.reset_classifier(0, global_pool)
            width = pooled_features(trial, example_image(trial)).shape[1]
        except Exception as error:
            raise ValueError(f"global_pool={global_pool!r} does not go with this backbone: {error}") from error
        if width != self.backbone_width:
            raise ValueError(
                f"global_pool={global_pool!r} gives features of width {width}, norm and projection take "
                f"{self.backbone_width}: build the classifier with it, swap_head(…, model_args={{'global_pool': …}})"
            )

    @property
    def _named_backbone(self) -> tuple[str, nn.Module]:
        """What stands before the names of the backbone's parameters, and the backbone, whose contract is timm's."""
        return "backbone.", self.backbone

    def _timm(self, name: str) -> Any:
        _, backbone = self._named_backbone
        if not hasattr(backbone, name):
            raise AttributeError(f"{name} is timm's: the backbone {type(backbone).__name__} has none")
        return getattr(backbone, name)


def output_of(
    logits: Tensor, features: Tensor, encoder: Tensor, with_features: WithFeatures
) -> Tensor | ClassifierOutput | EncoderOutput:
    """The logits, or what the flag asks for beside them."""
    if torch.onnx.is_in_onnx_export() and isinstance(with_features, Tensor):
        with warnings.catch_warnings():  # the exporter makes tensors of default values and warns of reading them
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            with_features = bool(with_features)
    if isinstance(with_features, str):
        if with_features != "encoder":
            raise TypeError(f"with_features={with_features!r} must be True or False, 'encoder' or 'alone'")
        return EncoderOutput(logits, features, encoder)
    return ClassifierOutput(logits, features) if check_flag("with_features", with_features) else logits


torch.fx.wrap("output_of")  # one node of a torch.fx graph, which takes the flag for an input too


def _size(name: str, value: int | None, head: nn.Module, *attributes: str) -> int:
    if value is not None:
        return check_integer(name, value, 0)
    known = (getattr(head, attribute, None) for attribute in attributes)
    size = next((v for v in known if isinstance(v, int)), None)
    if size is None:
        raise ValueError(f"{name} is required: the head {type(head).__name__} has no {' or '.join(attributes)}")
    return size


def _within(prefix: str, pattern: str) -> str:
    """Patterns are matched from a name's start, so every anchor moves in front of the prefix."""
    unanchored = re.sub(r"(?<![\[\\])\^", "", pattern)
    return rf"^{re.escape(prefix)}(?:{unanchored})"
