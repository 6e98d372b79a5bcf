"""Measure a classifier on its clean training set between two epochs, and leave no trace in the training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from timm.data.distributed_sampler import OrderedDistributedSampler
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from ncreg._modes import evaluating, generators_kept, own_generators
from ncreg.distributed import all_reduce_sum, broadcast, world_size
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
        names = [name for name, part in module.named_modules() if isinstance(part, Classifier)]
        raise ValueError(
            f"{type(module).__name__} holds {len(found)} ncreg.Classifiers ({', '.join(map(repr, names))}): hand "
            "in the one to measure; to a callback of Lightning's or Hugging Face's Trainer as "
            f"classifier=lambda module: module.get_submodule({names[0]!r})"
        )
    return found[0]


def measure_training_set(
    classifier: nn.Module, batches: Iterable[Any], *, keep_features: bool = True
) -> dict[str, float]:
    """Accuracy in [0, 1] and the measures of `NeuralCollapse` in eval mode; training goes on as if nothing had been.

    Computed in the dtype of the weights, also within autocast and where Accelerate's mixed precision has put it into
    `forward`: features in bfloat16 hide a small NC1.

    Modes of all submodules and the random generators come back (torch's, Python's, numpy's, and those of the loader and
    its samplers), so that a run with measurements has the same batches and weights as one without. In a distributed run
    each process takes every n-th batch (its own images where the loader has a DistributedSampler, those left out that
    it repeats to give all processes equally many), a loader that shuffles draws the order of rank 0 on all of them, the
    buffers are those of rank 0, which is what checkpoints hold, and all processes get the same numbers.

    Args:
        classifier: what `swap_head` gave, also after `fully_shard` (FSDP2); of DataParallel, DistributedDataParallel
            and other wrappers the `Classifier` inside is measured, of torch.compile the compiled one.
        batches: (images, target) or {"pixel_values": images, "labels": target}, without augmentation.
        keep_features: for the measures that need two passes, N·d numbers; without them these are left out.

    Raises:
        TypeError: no `Classifier`.
        ValueError: no images, a batch of another form, or a loader that Accelerate divided over processes.

    Example:
        >>> from ncreg import Classifier
        >>> model = Classifier(nn.Flatten(), nn.Identity(), nn.Linear(4, 2))
        >>> images, target = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> measured = measure_training_set(model, [(images, target)])  # a loader of one batch
        >>> measured["accuracy"] == float((model(images).argmax(1) == target).double().mean()), measured["nc1"] > 0
        (True, True)
    """
    model = _without_wrappers(classifier)
    head = model.head
    readable = hasattr(head, "weight") or hasattr(head, "class_vectors")
    like = next(model.parameters())
    collapse = NeuralCollapse(
        model.num_classes,
        model.head_hidden_size,
        classifier=head if readable else None,
        cache=keep_features,
    ).to(like.device)
    counts = torch.zeros(2, dtype=torch.int64, device=like.device)  # right, all
    with _as_rank_zero(model), evaluating(model), generators_kept(batches), _without_autocast(model, like):
        _draw_as_rank_zero(batches, like.device)
        for images, target in _share(batches):
            target = target.to(like.device)
            # A copy: the model may change its input in place.
            images = images.to(like.device, like.dtype if images.is_floating_point() else None, copy=True)
            logits, features = (rows[: len(target)] for rows in model(images, with_features=True))
            collapse.update(features, target)
            counts += torch.stack([(logits.argmax(1) == target).sum(), torch.tensor(len(target), device=like.device)])
        right, total = all_reduce_sum(counts).tolist()
        if not total:
            raise ValueError("no batch to measure: the loader of clean training images is empty")
        measures = {name: float(value) for name, value in collapse.compute().items()}
    return {"accuracy": right / total} | measures


def _without_wrappers(module: nn.Module) -> Any:
    """The classifier itself, or compiled: torch.compile hands on all that it has, other wrappers do not."""
    return module if isinstance(getattr(module, "_orig_mod", module), Classifier) else find_classifier(module)


def _share(batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's batches as pairs, equally many in each process, which together label each image once.

    Images beyond the labels are there for a forward pass alone: sharded weights (FSDP) need one of all processes.

    Raises:
        ValueError: Accelerate has divided them: it repeats images to fill the last batches.
    """
    if world_size() == 1:
        return map(_pair, batches)
    sampler, of_batches = getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None)
    if any(getattr(part, "num_processes", 1) > 1 for part in (of_batches, getattr(batches, "dataset", None))):
        raise ValueError(
            "the loader of clean training images is divided by Accelerate, which repeats images so that processes have "
            "equally many: hand in the loader as it was before prepare()"
        )
    for divided in (sampler, getattr(of_batches, "sampler", None)):
        if getattr(divided, "num_replicas", 1) > 1:
            return _first(map(_pair, batches), _own_images(divided))
    return _every_nth(map(_pair, batches))


def _every_nth(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's batch of each round; where the last round has none for it, an image without a label."""
    rounds = iter(pairs)
    while batches := list(islice(rounds, world_size())):
        images, target = batches[0]
        yield batches[dist.get_rank()] if dist.get_rank() < len(batches) else (images[:1], target[:0])


def _own_images(sampler: Any) -> int | None:
    """How many images of a process are its own: a sampler that gives all equally many appends others' images.

    None: as many as it gives.
    """
    if not isinstance(sampler, DistributedSampler | OrderedDistributedSampler):
        return None
    own = range(sampler.rank, min(sampler.total_size, len(sampler.dataset)), sampler.num_replicas)  # type: ignore[arg-type]
    return len(own)


def _first(pairs: Iterable[tuple[Tensor, Tensor]], count: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """All images, and the labels of the first `count` of them."""
    for images, target in pairs:
        yield images, target[:count]
        count = None if count is None else max(0, count - len(target))


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, Mapping) and {"pixel_values", "labels"} <= batch.keys():
        images, target = batch["pixel_values"], batch["labels"]
    elif isinstance(batch, list | tuple) and len(batch) == 2:
        images, target = batch
    else:
        got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"a batch must be (images, target) or hold pixel_values and labels, got {got}")
    if images.shape[:1] != target.shape[:1]:
        raise ValueError(f"a batch of {len(images)} images needs a label each, target has {tuple(target.shape)}")
    return images, target


def _draw_as_rank_zero(batches: Any, device: torch.device) -> None:
    """The states of rank 0 for torch's generator and the loader's own: a shuffle must be the same in every process."""
    if world_size() == 1:
        return
    for generator in (torch.default_generator, *own_generators(batches)):
        state = generator.get_state().to(device)
        broadcast(state)
        generator.set_state(state.cpu())


@contextmanager
def _as_rank_zero(module: nn.Module) -> Iterator[None]:
    """The buffers of rank 0 in every process; afterwards each has its own again."""
    if world_size() == 1:
        yield
        return
    own = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        for buffer, _ in own:
            broadcast(buffer)
        yield
    finally:
        for buffer, before in own:
            buffer.copy_(before)


@contextmanager
def _without_autocast(model: Any, like: Tensor) -> Iterator[None]:
    """Neither the caller's autocast, nor the one that Accelerate's `prepare` puts into `forward`."""
    parts = vars(getattr(model, "_orig_mod", model))
    wrapped, own = parts.get("forward"), parts.get("_original_forward")  # the second is Accelerate's name for it
    if wrapped is not None and own is not None:
        parts["forward"] = own
    try:
        with torch.autocast(like.device.type, enabled=False):
            yield
    finally:
        if wrapped is not None and own is not None:
            parts["forward"] = wrapped
