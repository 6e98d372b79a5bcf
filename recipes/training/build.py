"""From a configuration to the parts of a run: device, model, optimizer, schedule."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models import get_pretrained_cfg
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from ncreg.models import Classifier, Normalize, swap_head
from ncreg.optim import param_groups
from ncreg.tpt import TPTScheduler
from recipes.core.config import ModelConfig, OptimConfig, TPTConfig, TrainConfig
from recipes.core.errors import UserError
from recipes.data.load import SMALLEST, Dataset
from recipes.training.metrics import measure_names


def pick_device(name: str) -> torch.device:
    """The device that `name` asks for; auto takes a GPU where there is one."""
    local = os.environ.get("LOCAL_RANK", "0")  # torchrun gives each process its own GPU
    if name in ("auto", "cuda"):
        name = f"cuda:{local}" if name == "cuda" or torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name!r} cannot be used: {str(error).splitlines()[0]}; cpu always works") from None


def image_size(config: TrainConfig, native: int | None) -> int:
    """Side of the images in pixels: asked for, the backbone's own where it is fixed, or the set's where it is not."""
    if config.data.image_size is not None:
        return config.data.image_size
    expected, fixed = native_size(config.model.backbone)
    return expected if native is None or fixed else max(native, SMALLEST)


def native_size(backbone: str) -> tuple[int, bool]:
    """Side of the images that a backbone was made for, and whether it takes no other; 224 where nothing says."""
    local = local_config(backbone)
    if local is not None:  # timm writes img_size where a backbone was built for one, but no fixed_input_size
        made_for, args = local.get("pretrained_cfg", local), local["model_args"]
        fixed = "img_size" in args and not args.get("dynamic_img_size")
        return int(np.ravel(args.get("img_size", made_for.get("input_size", 224)))[-1]), fixed
    found = get_pretrained_cfg(backbone, allow_unregistered=True)
    return (224, False) if found is None else (int(found.input_size[-1]), found.fixed_input_size)


def build_model(config: TrainConfig, data: Dataset) -> Classifier:
    """The classifier, with the normalisation of its images inside."""
    torch.manual_seed(config.seed)
    asked, (sample, _) = config.model, next(data.train[torch.arange(2)].in_batches(2))
    check_backbone(asked)
    how = build_args(config, data)
    try:
        how |= {"model": asked.backbone, "model_args": {**how["model_args"], "pretrained": asked.pretrained}}
        model = swap_head(**how)
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        raise UserError(f"{asked.backbone} with head {asked.head}: {' '.join(str(error).split())}") from None
    mean, std = data.moments()
    if asked.pretrained:
        mean, std = pretrained_moments(model, sample.shape[1])
    model.preprocess = Normalize(mean, std)
    try:
        with torch.no_grad():
            model.eval()(sample.to(next(model.parameters()).device))
    except (RuntimeError, AssertionError) as error:
        side = sample.shape[-1]
        reason = " ".join(str(error).split())
        raise UserError(
            f"{asked.backbone} cannot take images of {side} pixels ({reason}): set --data.image_size"
        ) from None
    model.to(torch.float64 if config.precision == "float64" else torch.float32)
    return model.to(memory_format=torch.channels_last)


def build_args(config: TrainConfig, data: Dataset) -> dict[str, Any]:
    """What `swap_head` is called with, pretrained weights aside: enough to build the classifier again."""
    asked = config.model
    local = local_config(asked.backbone) or {"architecture": asked.backbone, "model_args": {}}
    args = {key: value for key, value in local["model_args"].items() if key != "num_classes"}
    return {
        "model": local["architecture"],  # not its folder, which may go
        "head": asked.head,
        "num_classes": len(data.class_names),
        "norm": asked.norm,
        "project": asked.project,
        "model_args": {**args, "in_chans": data.train.images.shape[1], **asked.model_args},
        "head_args": {"seed": config.seed, **asked.head_args},
    }


def local_config(backbone: str) -> dict[str, Any] | None:
    """The config.json behind a backbone local-dir:FOLDER, with model_args, where there is a good one."""
    kind, _, folder = backbone.partition(":")
    if kind.lower() != "local-dir":
        return None
    try:
        found = json.loads((Path(folder) / "config.json").read_text())
        return found | {"model_args": found.get("model_args") or {}, "architecture": found["architecture"]}
    except (OSError, ValueError, KeyError, AttributeError):
        return None  # timm says what is wrong with it


def check_backbone(asked: ModelConfig) -> None:
    """Refuse a name that timm does not know, naming those that come near."""
    if ":" in asked.backbone or timm.is_model(asked.backbone):
        return
    near = difflib.get_close_matches(asked.backbone.split(".")[0], timm.list_models(), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists all"
    raise UserError(f"model.backbone={asked.backbone!r} is no timm model: {hint}")


def pretrained_moments(model: Classifier, channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation that the backbone was pretrained with; their average for gray images."""
    found: Any = model.backbone.pretrained_cfg
    moments = [list(found["mean"]), list(found["std"])]
    mean, std = ([float(np.mean(values))] * channels if channels != len(values) else values for values in moments)
    return mean, std


def build_optimizer(asked: OptimConfig, model: Classifier) -> Optimizer:
    """SGD with coupled decay, or AdamW, on the groups in which the theory holds."""
    groups = param_groups(model, asked.weight_decay)
    if asked.head_lr_factor != 1:
        groups = with_head_rate(groups, model, asked.lr * asked.head_lr_factor)
    if asked.name == "sgd":
        return SGD(groups, lr=asked.lr, momentum=asked.momentum)
    return AdamW(groups, lr=asked.lr)


def with_head_rate(groups: list[dict[str, Any]], model: Classifier, rate: float) -> list[dict[str, Any]]:
    """The groups, each cut in two: the backbone's parameters, and those after it with a rate of their own."""
    within = {id(parameter) for parameter in model.backbone.parameters()}
    cut = []
    for group in groups:
        for inside in (True, False):
            parameters = [parameter for parameter in group["params"] if (id(parameter) in within) == inside]
            cut += [group | {"params": parameters} | ({} if inside else {"lr": rate})] if parameters else []
    return cut


def freeze(model: Classifier, optimizer: Optimizer, frozen: bool) -> None:
    """Let the backbone learn, or keep it as it is, the statistics of its BatchNorms too; called in training mode."""
    learned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for parameter in model.backbone.parameters():
        if id(parameter) in learned:
            parameter.requires_grad_(not frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("model.freeze_epochs: nothing after the backbone is learned; set it to 0, or norm or project")
    model.backbone.train(not frozen)


def build_scheduler(config: TrainConfig, optimizer: Optimizer) -> TPTScheduler:
    """The schedule of the fitting phase inside the scheduler of the terminal phase."""
    if config.tpt.stop_patience is not None and config.tpt.stop_measure not in (known := measure_names()):
        raise UserError(f"tpt.stop_measure={config.tpt.stop_measure!r} is unknown: one of {', '.join(known)}")
    asked, length = config.optim, config.tpt.max_epochs
    warmup: dict[str, Any] = {"warmup_t": asked.warmup_epochs, "warmup_lr_init": asked.lr / (asked.warmup_epochs + 1)}
    drops = [length // 3, 2 * length // 3] if asked.schedule == "step" else []
    try:
        if asked.schedule == "cosine" and length > 1:
            schedule: Scheduler = CosineLRScheduler(optimizer, t_initial=length, **warmup)
        else:
            schedule = MultiStepLRScheduler(optimizer, decay_t=drops, decay_rate=0.1, **warmup)
        ours = ("stop_measure", "target")
        return TPTScheduler(optimizer, schedule, **{k: v for k, v in asdict(config.tpt).items() if k not in ours})
    except (ValueError, AssertionError) as error:
        raise UserError(f"tpt: {error}") from None


def watched(values: Mapping[str, float], asked: TPTConfig) -> float | None:
    """The measure whose standstill ends the terminal phase, where one is to."""
    return None if asked.stop_patience is None else values[asked.stop_measure]


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """Half precision where the configuration asks for it."""
    half = config.precision in ("bfloat16", "float16")
    return torch.autocast(device.type, dtype=getattr(torch, config.precision) if half else torch.bfloat16, enabled=half)


def full(tensor: Tensor) -> Tensor:
    """Losses are computed in float32 at least."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def class_vectors(model: Classifier) -> Tensor:
    """The head's weight (C, d), for the losses that read it."""
    weight = getattr(model.head, "weight", None)
    if not isinstance(weight, Tensor):
        raise UserError(f"a loss reads the class vectors, but head {type(model.head).__name__} has no weight")
    return weight
