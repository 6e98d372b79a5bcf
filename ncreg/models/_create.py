"""A backbone from timm by its name, with timm's pretrained weights or those of a file."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import (
    get_model_input_config,
    is_model,
    load_state_dict,
    parse_model_name,
    resolve_pretrained_cfg,
    split_model_name_tag,
)
from torch import Tensor, nn

from ncreg._hub import check_hub
from ncreg.models._arguments import unknown_argument
from ncreg.models._weights import MatchedWeights, complete_loading, match_weights

NORMS_WITH_ACTIVATION = (
    "frn, frntlu and the evonorms hold an activation too: backbones such as regnetx_002, efficientnet_b0 or "
    "resnetv2_50 take them, others batchnorm, groupnorm, layernorm2d …"
)


def from_timm_name(
    name: str,
    model_args: Mapping[str, Any],
    weights: Mapping[str, Any] | None = None,
    *,
    num_classes: int | None = None,
    with_head: bool = False,
) -> nn.Module:
    """A timm model built without classifier, or with its own.

    Args:
        name: what `timm.create_model` takes.
        model_args: its further arguments.
        weights: tensors by name, as a file holds them, in place of timm's pretrained ones.
        num_classes: C of its own classifier; None takes that of the weights, or the model's usual number.
        with_head: whether the model keeps its own classifier, and the weights must hold it.

    Raises:
        ValueError: for a name that timm does not know, an encoder, `num_classes` or `features_only` among
            `model_args`, or weights that do not cover the backbone.
        FileNotFoundError: `model_args` names a checkpoint_path that does not exist.
        ConnectionError: weights that are not on this disk, and a hub that is out of reach.
    """
    if "num_classes" in model_args:
        raise ValueError("model_args holds num_classes: pass it to swap_head itself, swap_head(…, num_classes=…)")
    if model_args.get("features_only"):
        raise ValueError(
            f"model_args['features_only']={model_args['features_only']!r}: {name!r} would return a list of "
            "feature maps, a head takes pooled features (batch, width); leave it out (ncreg.LayerwiseCollapse measures "
            "inner layers)"
        )
    _check_name(name)
    args = dict(model_args)
    path = args.pop("checkpoint_path", None)
    if path and weights is not None:
        raise ValueError(f"weights and model_args['checkpoint_path']={str(path)!r} are both given: leave one out")
    if path and not Path(path).is_file():
        raise FileNotFoundError(f"model_args['checkpoint_path']={str(path)!r} does not exist")
    if path:
        weights = load_state_dict(str(path))
    if weights is None:
        return _created(name, args, num_classes if with_head else 0)
    plain = _on_meta(name, args, None if with_head else 0)
    found = match_weights(weights, plain)
    classes: int | None = 0
    if with_head:
        channels = _channels_of(found.tensors, plain)
        if channels is not None and hasattr(plain, "in_chans"):  # a model that stays as it is takes its own images
            args.setdefault("in_chans", channels)
        classes = _classes_of(found.tensors, plain) if num_classes is None else num_classes
        plain = _on_meta(name, args, classes)
    if not found.tensors:
        raise ValueError(f"weights hold no tensor: their keys are {', '.join(map(str, weights)) or 'none'}")
    backbone = _created(name, args | _as_pretrained(found, plain, args), classes)
    backbone.pretrained_cfg = backbone.default_cfg = plain.pretrained_cfg  # the other one holds the tensors
    return backbone


def _check_name(name: str) -> None:
    architecture = name.partition(".")[0]
    if architecture.endswith("_enc"):
        way_out = architecture.removesuffix("_enc")
        hint = f"; {way_out!r} has the same backbone" if is_model(way_out) else ""
        raise ValueError(f"model={name!r} is an encoder: it returns feature maps and has no classifier{hint}")
    if ":" not in name and not is_model(name):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"; close: {', '.join(near)}" if near else ""
        hub = f"; a repository of the hub is 'hf-hub:{name}'" if "/" in name else ""
        raise ValueError(f"model={name!r} is no timm model (timm.list_models() lists them){hint}{hub}")


def _created(name: str, args: Mapping[str, Any], num_classes: int | None) -> Any:
    """`timm.create_model`, with weights that cover the whole of it; None leaves the number of classes to timm."""
    source = _source_of_weights(name, args)
    try:
        with complete_loading(f"model={name!r}: {source or 'pretrained weights'}", strict=source is not None):
            classes: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
            return timm.create_model(name, **args, **classes)
    except TypeError as error:
        words = unknown_argument(error, args, lambda: timm.create_model(name))
        if words is None:
            raise
        raise ValueError(f"model={name!r}: {words}") from None
    except KeyError as error:
        named = [
            key for key, value in args.items() if isinstance(value, str) and error.args[0] in (value, value.lower())
        ]
        if not named:
            raise
        hint = f"; {NORMS_WITH_ACTIVATION}" if named[0] == "norm_layer" else ""
        raise ValueError(
            f"model={name!r}: model_args[{named[0]!r}]={args[named[0]]!r} is no name that it knows{hint}"
        ) from None
    except RuntimeError as error:
        if "ncreg.Classifier" in str(error):
            raise ValueError(
                f"model={name!r} holds a Classifier: Classifier.from_pretrained reads it, and "
                "swap_head(…, weights=ncreg.load_weights(FOLDER)) starts from its backbone"
            ) from None
        if "Invalid pretrained tag" not in str(error):
            raise
        architecture = name.partition(".")[0]
        known = ", ".join(timm.list_models(f"{architecture}.*", pretrained=True)) or f"none, use {architecture!r}"
        raise ValueError(f"model={name!r} has a tag that timm does not know; known: {known}") from error


def _on_meta(name: str, args: Mapping[str, Any], num_classes: int | None) -> Any:
    """The model without memory for its weights."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return _created(name, {**args, "pretrained": False}, num_classes)


def _classes_of(tensors: Mapping[str, Tensor], plain: Any) -> int | None:
    """Rows of the classifier in the weights; None, timm's own number, where it is not there under its usual name."""
    path = plain.pretrained_cfg.get("classifier")
    path = path[0] if isinstance(path, list | tuple) else path
    own = [name for name in plain.state_dict() if f"{name}".startswith(f"{path}.") and name.endswith("weight")]
    rows = [len(tensors[name]) for name in own if name in tensors and tensors[name].ndim > 1]
    return rows[-1] if rows else None


def _as_pretrained(found: MatchedWeights, plain: Any, args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with which timm loads these weights: it fits the first convolution and position embeddings itself."""
    overlay = dict(args.get("pretrained_cfg_overlay") or {})
    overlay |= {"state_dict": found.tensors, "source": None, "file": None, "custom_load": False}
    if plain.num_classes:  # timm leaves out the classifier of weights of another number of classes
        overlay["num_classes"] = plain.num_classes
    channels = _channels_of(found.tensors, plain)
    if channels is not None:
        overlay["input_size"] = (channels, *plain.pretrained_cfg["input_size"][1:])
    given = {"in_chans": plain.in_chans} if hasattr(plain, "in_chans") else {}
    return {"pretrained": True, "pretrained_cfg_overlay": overlay, **given}


def _channels_of(tensors: Mapping[str, Tensor], plain: Any) -> int | None:
    """Channels of the images that the weights were trained on, from their first convolution; None if it is not one."""
    first = plain.pretrained_cfg.get("first_conv")
    first = first[0] if isinstance(first, list | tuple) else first
    weight = tensors.get(f"{first}.weight")
    try:
        layer = plain.get_submodule(first or "")
    except AttributeError:
        return None
    if weight is None or weight.ndim != 4 or not isinstance(layer, nn.Conv2d):
        return None
    own = get_model_input_config(plain)["input_size"][0]
    return weight.shape[1] * layer.groups * own // layer.in_channels  # a stem may fold pixels into channels


def _source_of_weights(name: str, args: Mapping[str, Any]) -> str | None:
    """In words, the file or folder that the weights come from; None where there are none or they are timm's own.

    Raises:
        ConnectionError: they are on the hub, not on this disk, and the hub is out of reach.
    """
    kind, model_id = parse_model_name(name)
    cache = args.get("cache_dir")
    if kind == "hf-hub":
        _check_hub(model_id, ["config.json"], name, cache)
    if not args.get("pretrained") or kind == "hf-hub":
        return None
    if kind == "local-dir":
        return f"the weights in {model_id}"
    architecture, tag = split_model_name_tag(model_id)
    try:
        cfg = resolve_pretrained_cfg(
            architecture, args.get("pretrained_cfg") or tag, args.get("pretrained_cfg_overlay")
        )
    except RuntimeError:  # an unknown tag: create_model says so
        return None
    if cfg.state_dict:
        return "weights"
    if cfg.file:
        return f"the weights in {cfg.file}"
    if cfg.hf_hub_id:
        files = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
        _check_hub(cfg.hf_hub_id, files, name, cache)
    return None


def _check_hub(repository: str, files: list[str], name: str, cache: Any) -> None:
    try:
        check_hub(repository, files, cache=cache)
    except ConnectionError as error:
        raise ConnectionError(
            f"model={name!r}: {error}; swap_head takes weights on this disk by weights=ncreg.load_weights(FILE), a "
            "folder that timm wrote by model='local-dir:FOLDER'"
        ) from None
