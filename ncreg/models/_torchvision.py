"""A classifier of torchvision by the name torchvision:NAME, with the arguments that timm's names take."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from ncreg.models._arguments import unknown_argument
from ncreg.models._weights import load_matched, match_weights

PREFIX = "torchvision:"
WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")


def torchvision_model(
    name: str,
    model_args: Mapping[str, Any],
    weights: Mapping[str, Any] | None = None,
    *,
    num_classes: int | None = None,
    with_head: bool = False,
) -> nn.Module:
    """A torchvision classifier.

    Args:
        name: torchvision:NAME, a classifier of `torchvision.models.list_models(module=torchvision.models)`.
        model_args: pretrained (torchvision's default weights), in_chans, and what the model's builder takes.
        weights: tensors by name, as a file holds them, in place of pretrained ones.
        num_classes: C; None takes that of the weights, or 1000.
        with_head: whether the weights must hold the classifier too, of C classes.

    Raises:
        ValueError: an unknown name, an argument that it does not take, or weights that do not cover the model.
        ConnectionError: pretrained weights that are not on this disk and cannot be downloaded.
    """
    own, args = _checked_name(name), dict(model_args)
    pretrained, channels = bool(args.pop("pretrained", False)), args.pop("in_chans", None)
    if "num_classes" in args:
        raise ValueError("model_args holds num_classes: pass it to swap_head itself, swap_head(…, num_classes=…)")
    if weights is None:
        if pretrained and with_head and num_classes not in (None, 1000):
            raise ValueError(f"num_classes={num_classes}: the pretrained classifier of {name!r} has 1000 outputs")
        model = _pretrained(own, args) if pretrained else _built(own, args, num_classes or 1000)
        return _described(_with_channels(model, channels), own, args, pretrained=pretrained)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        plain = _built(own, args, 1000, init_weights=False)
    found, last = match_weights(weights, plain), _last_layer(plain)
    if num_classes is None or not with_head:
        there = found.tensors.get(f"{last}.weight")
        num_classes = 1000 if there is None else len(there)
    model = _with_channels(_built(own, args, num_classes, init_weights=False), channels or _channels_of(found, plain))
    tensors = _fitted(found.tensors, model)
    load_matched(model, tensors, source=f"model={name!r}: weights", optional=() if with_head else (f"{last}.",))
    return _described(model, own, args, pretrained=False)


def _described(model: Any, own: str, args: Mapping[str, Any], *, pretrained: bool) -> nn.Module:
    """The model with a `pretrained_cfg` as timm's have it: the images of torchvision's default or first weights."""
    entries = _torchvision().get_model_weights(own)
    images = (entries.DEFAULT if pretrained else next(iter(entries))).transforms()
    side, last = images.crop_size[0], _last_layer(model)
    layer, sized = model.get_submodule(last), own.startswith("vit_")
    channels = _first_conv(model)[1].in_channels
    model._model_args = {**args, "in_chans": channels}  # what builds it again
    model.pretrained_cfg = model.default_cfg = {
        "architecture": f"{PREFIX}{own}",
        "num_classes": getattr(layer, "out_features", getattr(layer, "out_channels", None)),
        "input_size": (channels, *(2 * [args.get("image_size", side)])),
        "fixed_input_size": sized,
        "interpolation": images.interpolation.value,
        "crop_pct": side / images.resize_size[0],
        "crop_mode": "center",
        "mean": tuple(images.mean),
        "std": tuple(images.std),
        "first_conv": _first_conv(model)[0],
        "classifier": last,
    }
    return model


def _torchvision() -> Any:
    """torchvision.models, imported when a name of it is given: the library does without it otherwise."""
    try:
        return import_module("torchvision.models")
    except ImportError:
        raise ValueError(f"model='{PREFIX}…' needs the package torchvision: pip install torchvision") from None


def _checked_name(name: str) -> str:
    models = _torchvision()
    own, known = name.removeprefix(PREFIX), models.list_models(module=models)
    if own not in known:
        near = difflib.get_close_matches(own, known, n=3)
        hint = f"; close: {', '.join(near)}" if near else ""
        raise ValueError(f"model={name!r} is no classifier of torchvision (torchvision.models.list_models()){hint}")
    return own


def _built(own: str, args: Mapping[str, Any], num_classes: int, *, init_weights: bool = True) -> nn.Module:
    more = {"init_weights": init_weights, "aux_logits": False} if own in WITH_AUXILIARY_HEADS else {}
    try:
        model: nn.Module = _torchvision().get_model(own, weights=None, num_classes=num_classes, **{**more, **args})
    except TypeError as error:
        words = unknown_argument(error, args, lambda: _torchvision().get_model(own, weights=None, **more))
        raise ValueError(f"model='{PREFIX}{own}' does not take model_args={dict(args)}: {words or error}") from None
    return model


def _pretrained(own: str, args: Mapping[str, Any]) -> nn.Module:
    entry = _torchvision().get_model_weights(own).DEFAULT
    file = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rpartition("/")[2]
    try:
        model: nn.Module = _torchvision().get_model(own, weights=entry, **args)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ConnectionError(
            f"model='{PREFIX}{own}': its pretrained weights are not on this disk ({file}), and the download failed "
            f"({reason}); swap_head takes weights on this disk by weights=ncreg.load_weights(FILE)"
        ) from None
    return model


def _last_layer(model: nn.Module) -> str:
    """Path of the classifier: the last Linear, and of squeezenet, which has none, the last convolution."""
    layers = list(model.named_modules())
    return next(name for kind in (nn.Linear, nn.Conv2d) for name, part in reversed(layers) if isinstance(part, kind))


def _first_conv(model: nn.Module) -> tuple[str, nn.Conv2d]:
    return next((name, part) for name, part in model.named_modules() if isinstance(part, nn.Conv2d))


def _channels_of(found: Any, plain: nn.Module) -> int | None:
    """Channels of the images that the weights were trained on."""
    weight = found.tensors.get(f"{_first_conv(plain)[0]}.weight")
    return None if weight is None or weight.ndim != 4 else int(weight.shape[1])


def _fitted(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors, those of the first convolution adapted to the model's channels as timm does it."""
    name, first = _first_conv(model)
    weight = tensors.get(f"{name}.weight")
    if weight is None or weight.ndim != 4 or weight.shape[1] == first.in_channels:
        return dict(tensors)
    return {**tensors, f"{name}.weight": adapt_input_conv(first.in_channels, weight)}


def _with_channels(model: Any, channels: int | None) -> nn.Module:
    """The model with a first convolution of so many input channels, its weights adapted as timm does it; in place."""
    name, first = _first_conv(model)
    if channels is None or channels == first.in_channels:
        return model
    bias = None if first.bias is None else first.bias.detach()
    weight = adapt_input_conv(channels, first.weight.detach())
    with torch.random.fork_rng(devices=[]):
        shape: Any = {"kernel_size": first.kernel_size, "stride": first.stride, "padding": first.padding}
        layer = nn.Conv2d(channels, first.out_channels, bias=bias is not None, **shape)
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    model.set_submodule(name, layer)
    if hasattr(model, "transform_input"):  # googlenet and inception take three channels apart for it
        model.transform_input = False
    return model
