"""swap_head: take the classifier off a model and put projection, last norm and head in its place."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from ncreg.heads import HEADS
from ncreg.models._classifier import Classifier
from ncreg.norms import last_norm


def swap_head(
    model: str | nn.Module,
    head: str | nn.Module = "etf",
    *,
    num_classes: int | None = None,
    norm: str | nn.Module = "batch",
    project: int | None = None,
    model_args: Mapping[str, Any] | None = None,
    head_args: Mapping[str, Any] | None = None,
) -> Classifier:
    """Replace a model's classifier by projection → last norm → head.

    Args:
        model: a timm name, or a module, which is copied and never changed.
        head: a name of `ncreg.heads.HEADS`, or a module of one's own from features to logits.
        num_classes: C; where None, the model's own number.
        norm: a kind that `ncreg.norms.last_norm` knows, or a module of one's own.
        project: width d of a learned linear map before the norm; None for none.
        model_args: for timm names: what `timm.create_model` takes (pretrained, in_chans, img_size, …).
        head_args: what the head's constructor takes beside in_features and num_classes.

    The result keeps device, dtype and train/eval mode of what it was given. Random numbers: the backbone is
    drawn first, then projection, norm and head in a fork of torch's generator, which is left where the
    backbone left it. Two runs of one seed that differ in the head alone share backbone, projection and all
    later draws.

    Raises:
        ValueError: if the head does not fit or the model says no number of classes.

    Example:
        >>> classifier = swap_head("test_resnet", "etf", num_classes=10)
        >>> classifier(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    if isinstance(model, str):
        backbone = timm.create_model(model, **{**(model_args or {}), "num_classes": 0})
        own_classes = backbone.pretrained_cfg.get("num_classes")
    else:
        backbone = copy.deepcopy(model)
        own_classes = backbone.num_classes
        backbone.reset_classifier(0)
    num_classes = num_classes or own_classes
    if getattr(backbone, "drop_rate", 0):
        warnings.warn(
            f"drop_rate={backbone.drop_rate} puts dropout before the last norm and blurs its statistics",
            stacklevel=2,
        )
    with torch.random.fork_rng(devices=[]):
        features = pooled_features(backbone)
        width = features.shape[1]
        project_layer = nn.Linear(width, project) if project else None
        width = project or width
        norm_layer = last_norm(norm, width) if isinstance(norm, str) else copy.deepcopy(norm)
        if isinstance(head, str):
            head_layer = HEADS[head](width, num_classes, **(head_args or {}))
        else:
            head_layer = copy.deepcopy(head)
    classifier = Classifier(backbone, norm_layer, head_layer, project=project_layer)
    for part in (classifier.project, classifier.norm, classifier.head):
        part.to(device=features.device, dtype=features.dtype)
        part.train(backbone.training)
    classifier.training = backbone.training
    return classifier


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every submodule's own mode restored after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def pooled_features(backbone: nn.Module) -> Tensor:
    """Features (1, width) of one blank image in eval mode: the forward pass alone knows the true width."""
    parameter = next(backbone.parameters())
    size = get_model_input_config(backbone)["input_size"]
    with _evaluating(backbone):
        return backbone(torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype))
