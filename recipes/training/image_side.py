"""Images of another side than a backbone was made for: whether it takes them, and what builds it for them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torchvision
from timm.models import get_pretrained_cfg
from torch import nn

from ncreg.models import match_weights

TORCHVISION = "torchvision:"
MOST_PREFIX_TOKENS = 8
"""Tokens beside those of the image (class, distillation, registers) that a position embedding has at most."""

USUAL_SIDES = (224, 32, 64, 96, 128, 160, 192, 256, 288, 320, 384, 448, 512, 28, 48, 56, 80, 112, 144, 176, 240, 336)
"""Sides that are tried where tensors are of another one than the backbone's own."""

SIDE_ARGUMENTS = ("input_size", "img_size", "val_crop_size")
"""Under which timm's and torchvision's training scripts keep the side of the images they evaluate on."""


def local_config(backbone: str) -> dict[str, Any] | None:
    """config.json of a backbone local-dir:FOLDER with model_args filled in; None for other names and bad files."""
    kind, _, folder = backbone.partition(":")
    if kind.lower() != "local-dir":
        return None
    try:
        found = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return found | {"model_args": found.get("model_args") or {}, "architecture": found["architecture"]}
    except (OSError, ValueError, KeyError, AttributeError):
        return None  # timm reports what is wrong with the file


def native_size(backbone: str) -> tuple[int, bool]:
    """Side of the images that a backbone was made for (224 if unknown), and whether it takes no other."""
    local = local_config(backbone)
    if local is not None:  # timm writes img_size for a backbone built for one size, but no fixed_input_size
        pretrained_cfg, args = local.get("pretrained_cfg", local), local["model_args"]
        fixed = "img_size" in args and not args.get("dynamic_img_size")
        return int(np.ravel(args.get("img_size", pretrained_cfg.get("input_size", 224)))[-1]), fixed
    if backbone.startswith(TORCHVISION):  # its vision transformers alone take no other size
        return 224, backbone.startswith(f"{TORCHVISION}vit_")
    found = get_pretrained_cfg(backbone, allow_unregistered=True)
    return (224, False) if found is None else (int(found.input_size[-1]), found.fixed_input_size)


def built_for(backbone: str, side: int) -> dict[str, int]:
    """The argument that builds a backbone for images of a side: `img_size` of timm's, `image_size` of torchvision's."""
    return {"image_size" if backbone.startswith(TORCHVISION) else "img_size": side}


def side_args(backbone: str, side: int, args: Mapping[str, Any]) -> dict[str, int]:
    """What to add to `model_args` so that a backbone of fixed size takes images of a side; empty where it does so.

    Args:
        backbone: the name that `swap_head` takes.
        side: in pixels.
        args: the `model_args` given.

    Returns:
        `img_size` for a model of timm, `image_size` for one of torchvision; nothing where that does not help.

    Example:
        >>> side_args("vit_tiny_patch16_224", 32, {}), side_args("resnet18", 32, {})
        ({'img_size': 32}, {})
    """
    native, fixed = native_size(backbone)
    more = built_for(backbone, side)
    may_be_fixed = fixed or local_config(backbone) is not None  # whose config.json need not say it
    if not may_be_fixed or side == native or more.keys() & args.keys():
        return {}
    return more if not _takes(backbone, side, args) and _takes(backbone, side, {**args, **more}) else {}


def smallest_side(backbone: str, least: int, most: int, args: Mapping[str, Any]) -> int | None:
    """The smallest side that a backbone takes and that suits it: `least`, or the multiples of 32 above it.

    A backbone of fixed size gets a multiple of 32, for its patches would leave out the rest.

    Args:
        backbone: the name that `swap_head` takes.
        least: in pixels.
        most: sides from here on are left out; None is the answer where no smaller one will do.
        args: the `model_args` given.

    Example:
        >>> smallest_side("resnet18", 28, 224, {}), smallest_side("vit_tiny_patch16_224", 28, 224, {})
        (28, 32)
    """
    multiples = range(32 * math.ceil(least / 32), most, 32)
    for side in multiples if native_size(backbone)[1] else (least, *multiples):
        if side < most and _takes(backbone, side, {**args, **side_args(backbone, side, args)}):
            return side
    return None


class TrainedSide(NamedTuple):
    """The side of the images that weights were trained on, and what tells it, as the beginning of a sentence."""

    pixels: int
    told_by: str


def trained_side(backbone: str, weights: Mapping[str, Any]) -> TrainedSide | None:
    """The side of the images that weights were trained on; None where it cannot be told.

    What stands beside the tensors says it (a checkpoint of ours, the arguments of timm's or torchvision's scripts), or
    tensors whose shape depends on the side, such as a position embedding or the windows of a Swin.

    Args:
        backbone: the name that `swap_head` takes.
        weights: name → tensor, in any container.
    """
    stated, (native, fixed) = _stated_side(weights), native_size(backbone)
    if stated is not None:
        return TrainedSide(stated, "the file says that it was trained on images")
    if not fixed:
        return None
    with _on_meta():
        held = {name: value.shape for name, value in match_weights(weights, _built(backbone, {})).tensors.items()}
    own = _shapes(backbone, native)
    seen = own.items() ^ _shapes(backbone, 2 * native).items()
    for side in _candidates(native, own, held):
        theirs = own if side == native else _shapes(backbone, side)
        if not theirs or (side != native and theirs == own):
            continue  # it cannot be built, or no tensor tells it from the usual side
        seen |= own.items() ^ theirs.items()
        depend = {name for name, _ in seen if name in held}
        if depend and all(held[name] == theirs.get(name) for name in depend):
            position = any("pos_embed" in name for name in depend)
            words = "its position embedding is of images" if position else "its tensors have the shapes for images"
            return TrainedSide(side, words)
    return None


def _stated_side(weights: Mapping[str, Any]) -> int | None:
    """What a file says beside its tensors: `image_shape`, or the arguments of the script that wrote it."""
    args = weights.get("args")
    said = [weights.get("image_shape"), *(getattr(args, name, None) for name in SIDE_ARGUMENTS)]
    for value in said:
        numbers = value if isinstance(value, list | tuple) else [value]
        if numbers and isinstance(numbers[-1], int) and numbers[-1] > 0:
            return numbers[-1]
    return None


def _candidates(native: int, own: Mapping[str, torch.Size], held: Mapping[str, torch.Size]) -> Iterator[int]:
    """Sides to try: the usual one, those that a position embedding tells, and then those that others train at."""
    yield native
    for name, shape in held.items():
        if "pos_embed" in name and name in own and len(shape) == len(own[name]) == 3:
            yield from _sides(native, own[name][1], shape[1])
    if any(name in own and len(shape) == len(own[name]) and shape != own[name] for name, shape in held.items()):
        yield from (side for side in USUAL_SIDES if side != native)


def _sides(native: int, own: int, theirs: int) -> Iterator[int]:
    """Sides at which an embedding of `own` tokens at the native side would have `theirs`."""
    for prefix in range(MOST_PREFIX_TOKENS + 1):
        grids = [math.isqrt(max(0, count - prefix)) for count in (own, theirs)]
        if own != theirs and all(grids) and [grid**2 + prefix for grid in grids] == [own, theirs]:
            yield native * grids[1] // grids[0]


def _shapes(backbone: str, side: int) -> dict[str, torch.Size]:
    """The shapes of a backbone's tensors, built for images of a side without a classifier; empty if it cannot be."""
    args = built_for(backbone, side) | ({} if backbone.startswith(TORCHVISION) else {"num_classes": 0})
    try:
        with _on_meta():
            return {name: value.shape for name, value in _built(backbone, args).state_dict().items()}
    except Exception:  # somebody's model may raise anything
        return {}


def _takes(backbone: str, side: int, args: Mapping[str, Any]) -> bool:
    try:
        with _on_meta(), torch.no_grad():
            _built(backbone, args).eval()(torch.zeros(1, args.get("in_chans", 3), side, side))
    except Exception:  # somebody's model may raise anything
        return False
    return True


@contextmanager
def _on_meta() -> Iterator[None]:
    """Tensors without memory, and random numbers that nobody misses."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        yield


def _built(backbone: str, args: Mapping[str, Any]) -> nn.Module:
    """The backbone with its usual classifier and random weights."""
    left_out = {"pretrained", "checkpoint_path", "features_only"}
    own = {key: value for key, value in args.items() if key not in left_out}
    if backbone.startswith(TORCHVISION):
        own.pop("in_chans", None)
        model: nn.Module = torchvision.models.get_model(backbone.removeprefix(TORCHVISION), weights=None, **own)
        return model
    local = local_config(backbone)
    name = backbone if local is None else local["architecture"]
    return timm.create_model(name, pretrained=False, **({} if local is None else local["model_args"]) | own)
