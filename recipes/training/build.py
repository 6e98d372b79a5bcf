"""From the configuration to the classifier, its optimizer and its schedule."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import timm
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from ncreg.heads import HEADS
from ncreg.models import Classifier, Normalize, match_weights, swap_head
from ncreg.norms import NORMS
from ncreg.optim import param_groups
from ncreg.tpt import TPTScheduler
from recipes.core.config import ModelConfig, OptimConfig, TPTConfig
from recipes.core.errors import UserError
from recipes.core.memory import is_out_of_memory
from recipes.core.own_code import is_own, raised
from recipes.core.suggestions import did_you_mean
from recipes.data.load import SMALLEST, Dataset
from recipes.training.image_side import local_config, native_size, side_args
from recipes.training.metrics import measure_names
from recipes.training.own_parts import check_own_head, register_own_parts
from recipes.training.start import check_run, describe, keep_head, moments_beside, read_weights, start_of


def image_size(native: int | None, *, backbone: str, requested: int | None = None) -> int:
    """Side of the images in pixels: as requested, else what a backbone of fixed size needs, else the data set's own."""
    if requested is not None:
        return requested
    expected, fixed = native_size(backbone)
    return expected if native is None or fixed else max(native, SMALLEST)


def build_model(
    model: ModelConfig,
    data: Dataset,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    note: Callable[[str], None] = lambda text: None,
) -> Classifier:
    """The classifier, with the normalisation of its images inside; initial weights are drawn with the seed.

    Args:
        model: the configuration.
        data: the images.
        seed: of the initial weights.
        dtype: of the weights.
        note: takes a sentence on what of `model.weights` or `model.start_from` is used, and what is not.

    Raises:
        UserError: no such backbone, arguments that it does not take, an image size that it cannot take, or weights
            that do not cover it.
    """
    torch.manual_seed(seed)
    sample, _ = next(data.train[torch.arange(2)].in_batches(2))
    check_backbone(model.backbone)
    check_head(model.head)
    check_norm(model.norm)
    register_own_parts(model)
    start, argument = start_of(model)
    weights, args = read_weights(start, argument), classifier_args(model, data, seed=seed)
    if weights is not None and model.start_from is not None:
        check_run(weights, args, argument)
    classifier = new_classifier(model, args, weights, argument)
    check_own_head(model.head, classifier.head, classifier.num_classes, classifier.head_hidden_size)
    mean, std = data.moments()
    if weights is not None:
        found = match_weights(weights, classifier.backbone)
        head = "" if model.start_from is None else f"; {keep_head(classifier, weights, args, data.class_names)}"
        note(f"{argument}: {describe(found, kept=bool(head))}{head}")
        mean, std = moments_beside(weights, found.prefix) or pretrained_moments(classifier)
    elif model.pretrained:
        mean, std = pretrained_moments(classifier)
    channels = sample.shape[1]
    classifier.preprocess = Normalize(for_channels(mean, channels), for_channels(std, channels))
    try:
        with torch.no_grad():
            classifier.eval()(sample.to(next(classifier.parameters()).device))
    except (RuntimeError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        reason, side = " ".join(str(error).split()), sample.shape[-1]
        built_for = model.model_args.get("img_size", native_size(model.backbone)[0])
        way = "set --data.image_size" if side == built_for else f"--data.image_size {built_for} fits"
        raise UserError(f"{model.backbone} cannot take images of {side} pixels ({reason}): {way}") from None
    return classifier.to(dtype).to(memory_format=torch.channels_last)


def new_classifier(
    model: ModelConfig, args: dict[str, Any], weights: Mapping[str, Any] | None, argument: str
) -> Classifier:
    """The classifier of these arguments of `swap_head`, on pretrained weights where the configuration wants some."""
    pretrained = model.pretrained and weights is None
    model_args = {**args["model_args"], **model.model_args, "pretrained": pretrained}
    args = args | {"model": model.backbone, "model_args": model_args}
    own = model.head if is_own(model.head) else model.norm
    try:
        return swap_head(**args, weights=weights)
    except ConnectionError as error:
        reason = str(error).partition("; ")[0]
        raise UserError(
            f"{reason}: --model.weights FILE takes weights on this disk, "
            "--model.backbone local-dir:FOLDER a folder that timm wrote"
        ) from None
    except raised(own, ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        if weights is not None:
            raise UserError(f"{argument}: {' '.join(str(error).split())}") from None
        reason = " ".join(str(error).split()).replace("swap_head's project=", "--model.project ")
        raise UserError(f"{model.backbone} with head {model.head}: {reason}") from None


def classifier_args(model: ModelConfig, data: Dataset, *, seed: int) -> dict[str, Any]:
    """Arguments of `swap_head` that build the classifier again, without its pretrained weights."""
    local = local_config(model.backbone) or {"architecture": model.backbone, "model_args": {}}
    args = {key: value for key, value in local["model_args"].items() if key != "num_classes"}
    own = {key: value for key, value in model.model_args.items() if key != "checkpoint_path"}
    images = data.train.images
    fitting = side_args(model.backbone, images.shape[-1], {"in_chans": images.shape[1], **own})
    return {
        "model": local["architecture"],  # the folder of a local-dir: backbone may be gone by then
        "head": model.head,
        "num_classes": len(data.class_names),
        "norm": model.norm,
        "project": model.project,
        "model_args": {**args, "in_chans": images.shape[1], **fitting, **own},
        "head_args": {"seed": seed, **model.head_args},
    }


def check_backbone(name: str) -> None:
    """Refuse a name that timm does not know, and suggest similar ones."""
    if ":" in name or timm.is_model(name):
        return
    near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists all"
    raise UserError(f"model.backbone={name!r} is no timm model: {hint}")


def check_head(name: str) -> None:
    """Refuse a head that does not exist, and suggest a similar one."""
    _check_part("model.head", name, HEADS)


def check_norm(name: str) -> None:
    """The same for the last norm."""
    _check_part("model.norm", name, NORMS)


def _check_part(key: str, name: str, known: Collection[str]) -> None:
    if name not in known and not is_own(name):
        near = did_you_mean(name, known)
        raise UserError(f"{key}={name!r} is unknown: one of {', '.join(known)}, or FILE.py:NAME{near}")


def pretrained_moments(model: Classifier) -> tuple[list[float], list[float]]:
    """Mean and standard deviation that timm knows for the backbone's weights."""
    found: Any = model.backbone.pretrained_cfg
    return list(found["mean"]), list(found["std"])


def for_channels(values: list[float], channels: int) -> list[float]:
    """One number a channel: as they are, or their mean where they are of another number of channels."""
    return values if len(values) == channels else [float(np.mean(values))] * channels


def build_optimizer(optim: OptimConfig, model: Classifier) -> Optimizer:
    """SGD with coupled weight decay, or AdamW, on the parameter groups that the theory assumes."""
    groups = param_groups(model, optim.weight_decay)
    if optim.head_lr_factor != 1:
        groups = with_head_rate(groups, model, optim.lr * optim.head_lr_factor)
    if optim.name == "sgd":
        return SGD(groups, lr=optim.lr, momentum=optim.momentum)
    return AdamW(groups, lr=optim.lr)


def with_head_rate(groups: list[dict[str, Any]], model: Classifier, rate: float) -> list[dict[str, Any]]:
    """Every group split in two: the backbone's parameters, and those after the backbone with their own rate."""
    backbone = {id(parameter) for parameter in model.backbone.parameters()}
    split = []
    for group in groups:
        for inside in (True, False):
            parameters = [parameter for parameter in group["params"] if (id(parameter) in backbone) == inside]
            split += [group | {"params": parameters} | ({} if inside else {"lr": rate})] if parameters else []
    return split


def freeze(model: Classifier, optimizer: Optimizer, frozen: bool) -> None:
    """Freeze the backbone with the statistics of its BatchNorms, or train it again; call it in training mode."""
    learned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for parameter in model.backbone.parameters():
        if id(parameter) in learned:
            parameter.requires_grad_(not frozen)
    model.backbone.train(not frozen)


def check_freeze(model: Classifier, epochs: int) -> None:
    """Refuse epochs with a frozen backbone where nothing else is learned."""
    backbone = {id(parameter) for parameter in model.backbone.parameters()}
    if epochs and not any(found.requires_grad and id(found) not in backbone for found in model.parameters()):
        raise UserError(
            f"model.freeze_epochs={epochs}: nothing after the backbone is learned; set it to 0, or norm or project"
        )


class _Warmup(Scheduler):  # type: ignore[misc, unused-ignore]
    """Linear warm-up in which each group of parameters rises to its own rate; timm's own begins with one for all."""

    warmup_t: int

    def __init__(self, optimizer: Optimizer, **args: Any) -> None:
        super().__init__(optimizer, **args)
        if self.warmup_t:
            self.update_groups(self._get_lr(0))

    def _get_lr(self, t: int) -> list[float]:
        if t >= self.warmup_t:
            return list(super()._get_lr(t))  # type: ignore[safe-super, unused-ignore]
        starts = [(peak / (self.warmup_t + 1), peak) for peak in self.base_values]
        return [start + t * ((peak - start) / self.warmup_t) for start, peak in starts]


class _Cosine(_Warmup, CosineLRScheduler):  # type: ignore[misc, unused-ignore]
    """timm's cosine."""


class _Steps(_Warmup, MultiStepLRScheduler):  # type: ignore[misc, unused-ignore]
    """timm's steps."""


def build_scheduler(tpt: TPTConfig, optim: OptimConfig, optimizer: Optimizer) -> TPTScheduler:
    """The scheduler of the terminal phase, around the schedule of the fitting phase."""
    if tpt.stop_patience is not None and tpt.stop_measure not in (known := measure_names()):
        near = did_you_mean(tpt.stop_measure, known)
        raise UserError(f"tpt.stop_measure={tpt.stop_measure!r} is unknown: one of {', '.join(known)}{near}")
    length = tpt.max_epochs
    warmup: dict[str, Any] = {"warmup_t": optim.warmup_epochs, "warmup_prefix": False}
    drops = [length // 3, 2 * length // 3] if optim.schedule == "step" else []
    try:
        if optim.schedule == "cosine" and length > 1:
            schedule: Scheduler = _Cosine(optimizer, t_initial=length, **warmup)
        else:
            schedule = _Steps(optimizer, decay_t=drops, decay_rate=0.1, **warmup)
        not_scheduler_args = ("stop_measure", "target")
        args = {key: value for key, value in asdict(tpt).items() if key not in not_scheduler_args}
        args["min_terminal"] = min(tpt.min_terminal, length)
        return TPTScheduler(optimizer, schedule, **args)
    except (ValueError, AssertionError) as error:
        said = str(error).replace("None", "null")
        raise UserError(f"tpt.{said}" if re.match(r"\w+=", said) else f"tpt: {said}") from None


def stop_value(measures: Mapping[str, float], tpt: TPTConfig) -> float | None:
    """The measure that ends the terminal phase when it stops falling; None without stop_patience."""
    return None if tpt.stop_patience is None else measures[tpt.stop_measure]


def class_vectors(model: Classifier) -> Tensor:
    """The head's weight (C, d), for losses that read it.

    Raises:
        UserError: the head has no weight.
    """
    weight = getattr(model.head, "weight", None)
    if not isinstance(weight, Tensor):
        raise UserError(f"a loss reads the class vectors, but head {type(model.head).__name__} has no weight")
    return weight
