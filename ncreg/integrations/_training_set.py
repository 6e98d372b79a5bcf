"""Measure a classifier on its clean training set between two epochs, and leave no trace in the training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from ncreg.distributed import all_reduce_sum, world_size
from ncreg.metrics import NeuralCollapse
from ncreg.models import Classifier


def find_classifier(module: nn.Module) -> Classifier:
    """The one `Classifier` in a module: itself, or what a wrapper, a task or a LightningModule holds.

    Raises:
        TypeError: there is none.
        ValueError: there are several.

    Example:
        >>> from ncreg import swap_head
        >>> classifier = swap_head("test_resnet", "etf", num_classes=10)
        >>> find_classifier(nn.Sequential(classifier)) is classifier
        True
    """
    found = [part for part in module.modules() if isinstance(part, Classifier)]
    if not found:
        raise TypeError(
            f"{type(module).__name__} holds no ncreg.Classifier, whose features could be measured: "
            "build the model by ncreg.swap_head"
        )
    if len(found) > 1:
        raise ValueError(
            f"{type(module).__name__} holds {len(found)} ncreg.Classifiers: hand in the one to measure, classifier="
        )
    return found[0]


def measure_training_set(
    classifier: Classifier, batches: Iterable[Any], *, keep_features: bool = True
) -> dict[str, float]:
    """Accuracy in [0, 1] and the measures of `NeuralCollapse` in eval mode; training goes on as if nothing had been.

    Modes of all submodules and the random generators come back, so that a run with measurements has the same batches
    and weights as one without. In a distributed run each process takes every n-th batch (all of its own batches
    where the loader has a DistributedSampler), the buffers are those of rank 0, which is what checkpoints hold, and
    all processes get the same numbers.

    Args:
        classifier: not wrapped in DistributedDataParallel.
        batches: (images, target) or {"pixel_values": images, "labels": target}, without augmentation.
        keep_features: for the measures that need two passes, N·d numbers; without them these are left out.

    Raises:
        ValueError: no images, or a batch of another form.
    """
    head = classifier.head
    readable = hasattr(head, "weight") or hasattr(head, "class_vectors")
    like = next(classifier.parameters())
    collapse = NeuralCollapse(
        classifier.num_classes,
        classifier.head_hidden_size,
        classifier=head if readable else None,
        cache=keep_features,
    ).to(like.device)
    counts = torch.zeros(2, dtype=torch.int64, device=like.device)  # right, all
    with _as_rank_zero(classifier), _unnoticed(classifier):
        for images, target in _share(batches):
            target = target.to(like.device)
            images = images.to(like.device, like.dtype if images.is_floating_point() else None)
            logits, features = classifier(images, with_features=True)
            collapse.update(features, target)
            counts += torch.stack([(logits.argmax(1) == target).sum(), torch.tensor(len(target), device=like.device)])
        right, total = all_reduce_sum(counts).tolist()
        if not total:
            raise ValueError("no batch to measure: the loader of clean training images is empty")
        measures = {name: float(value) for name, value in collapse.compute().items()}
    return {"accuracy": right / total} | measures


def _share(batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's batches as pairs."""
    divided = isinstance(getattr(batches, "sampler", None), DistributedSampler)
    ranks = 1 if divided else world_size()
    rank = dist.get_rank() if ranks > 1 else 0
    return (_pair(batch) for batch in islice(batches, rank, None, ranks))


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, Mapping) and {"pixel_values", "labels"} <= batch.keys():
        return batch["pixel_values"], batch["labels"]
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[0], batch[1]
    got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
    raise ValueError(f"a batch must be (images, target) or hold pixel_values and labels, got {got}")


@contextmanager
def _unnoticed(module: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, the random generators forked; every submodule's own mode comes back."""
    modes = [(part, part.training) for part in module.modules()]
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    try:
        module.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _as_rank_zero(module: nn.Module) -> Iterator[None]:
    """The buffers of rank 0 in every process; afterwards each has its own again."""
    if world_size() == 1:
        yield
        return
    own = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        for buffer, _ in own:
            dist.broadcast(buffer, 0)
        yield
    finally:
        for buffer, before in own:
            buffer.copy_(before)
