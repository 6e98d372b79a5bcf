"""One forward pass over a split: decisions are added up, features put aside, inner layers measured on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ncreg.metrics import LayerwiseCollapse, ood_orthogonality
from ncreg.models import Classifier
from ncreg.robustness import noise_images
from recipes.core.errors import UserError
from recipes.core.memory import is_out_of_memory
from recipes.data.split import Split
from recipes.evaluation.collapse import Collapse
from recipes.evaluation.decisions import Decisions
from recipes.evaluation.feature_store import FeatureStore
from recipes.training.metrics import images_at_once

ALL_LAYERS = "all"
LAYER_MEASURES = ("nc1", "cdnv", "nc2_equiangularity", "effective_rank", "within_effective_rank")
NOISE_IMAGES = 500
"""Images whose pixels are shuffled for NC5."""


@dataclass
class Seen:
    """What a pass over a split left: features, decisions (None without a last layer), measures of the inner layers."""

    features: Any
    decisions: Decisions | None
    layers: dict[str, dict[str, float]] = field(default_factory=dict)


@torch.no_grad()
def pass_over(
    model: Classifier, split: Split, store: FeatureStore, *, layers: Sequence[str] = (), cost: Tensor | None = None
) -> Seen:
    """One pass of a model over a split.

    Args:
        model: in eval mode.
        split: the images.
        store: takes the features.
        layers: names of inner layers to measure; ("all",) for the stages of the model.
        cost: what mistakes cost (C, C); None where nothing says so.

    Raises:
        UserError: no such layer, or images that the model cannot take.
    """
    seen = Seen(store, Decisions(model.num_classes, cost))
    assert seen.decisions is not None
    with watched(model, layers) as watch:
        for images, target in split.in_batches(images_at_once(split.side, split.target.device, model.num_classes)):
            logits, features = model_outputs(model, images)
            seen.decisions.add(logits, target)
            store.append(features, target)
            if watch is not None:
                watch.update(target.to(features.device))
        if watch is not None:
            seen.layers = {
                name: {key: float(values[key]) for key in LAYER_MEASURES} for name, values in watch.compute().items()
            }
    return seen


def model_outputs(model: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and features of images in [0, 1].

    Raises:
        UserError: the model cannot take images of this size.
    """
    try:
        logits, features = model(images.to(next(model.parameters()).dtype), with_features=True)
    except (RuntimeError, AssertionError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"the model cannot take images of {images.shape[1]} x {images.shape[2]} x {images.shape[3]} ({reason}): "
            "--image-size N"
        ) from None
    return logits, features


@contextmanager
def watched(model: Classifier, layers: Sequence[str]) -> Iterator[LayerwiseCollapse | None]:
    """Watch the named layers, all stages of the model by ("all",); None without a name.

    Raises:
        UserError: no such layer.
    """
    if not layers:
        yield None
        return
    names = None if list(layers) == [ALL_LAYERS] else list(layers)
    if names is None and not any(hasattr(part, "feature_info") for part in model.modules()):
        names = _stages(model.backbone)
    try:
        watch = LayerwiseCollapse(model, names, num_classes=model.num_classes)
    except ValueError as error:
        raise UserError(f"--layers: {error}") from None
    with watch:
        yield watch


def _stages(backbone: nn.Module) -> list[str]:
    """The parts of a model that is not timm's: its children that have parameters, by path."""
    path, part = "backbone", backbone
    while True:
        children = [(name, child) for name, child in part.named_children() if any(True for _ in child.parameters())]
        if len(children) != 1 or not any(True for _ in children[0][1].children()):
            return [f"{path}.{name}" for name, _ in children] or [path]
        path, part = f"{path}.{children[0][0]}", children[0][1]


@torch.no_grad()
def nc5_of(model: Classifier, split: Split, train: Collapse) -> float | None:
    """NC5 with images whose pixels are shuffled in the place of out-of-distribution ones, around the means' centre.

    None where it is not defined, such as for features of length 0.
    """
    count = min(len(split), NOISE_IMAGES)
    chosen = split[torch.linspace(0, len(split) - 1, count, dtype=torch.float64).round().long()]
    rows = []
    for images, _ in chosen.in_batches(images_at_once(split.side, split.target.device)):
        _, features = model_outputs(model, noise_images(images, "shuffle", seed=0))
        rows.append(features.cpu().double())
    means = train.means[train.counts > 0].cpu()
    try:
        return ood_orthogonality(means, torch.arange(len(means)), torch.cat(rows), centre=True)
    except ValueError:
        return None
