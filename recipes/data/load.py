"""From the name of a data set to its training, validation and test splits.

The test split is the set's own, or a fixed draw that no seed changes; the seed draws validation and `train_size`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial as bound
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipes.core.config import DataConfig
from recipes.core.errors import UserError
from recipes.core.own_code import is_own
from recipes.core.suggestions import did_you_mean
from recipes.data.class_names import few
from recipes.data.gray_sets import digits, fashion_mnist, mnist5k
from recipes.data.held_out import without_classes
from recipes.data.image_folder import image_folder
from recipes.data.lazy_images import LazyImages
from recipes.data.left_out import of_classes, still_there, without_unreadable
from recipes.data.map_style import Size
from recipes.data.names import IN_PYTHON
from recipes.data.own_sets import given_set, no_set, noting_unread_root, own_set
from recipes.data.repeated import repeated_images
from recipes.data.split import Source, Split, TooFew, divide, stratified
from recipes.data.timm_sets import PREFIX, timm_set
from recipes.data.torchvision_sets import torchvision_set
from recipes.data.unreadable import Unreadable

SMALLEST = 28
"""Smaller images are scaled up to this side in pixels: timm's backbones reduce them to nothing otherwise."""

MOMENT_IMAGES = 10_000
"""Training images from which mean and standard deviation are computed if the set is not held in memory."""


@dataclass(frozen=True)
class Dataset:
    """A set of images in three splits.

    Attributes:
        clean: which training labels are right (N,); None if all are.
        test_drawn: whether the test split was drawn, because the set has none of its own.
        notes: sentences for the user about how the set was read, such as files that were left out.
        train_gone: training images that the splits were drawn with but are not there any more.
        native_side: median shorter edge of the training images in pixels, before they are scaled; None if unknown.
        first_side: that of the first image, by which sets of one's own are sized; None where it decides nothing.
    """

    class_names: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    clean: Tensor | None = None
    test_drawn: bool = False
    notes: tuple[str, ...] = ()
    train_gone: int = 0
    native_side: int | None = None
    first_side: int | None = None

    def to(self, device: torch.device) -> Dataset:
        """The same set on a device."""
        clean = None if self.clean is None else self.clean.to(device)
        train, val, test = (part.to(device) for part in (self.train, self.val, self.test))
        return replace(self, train=train, val=val, test=test, clean=clean)

    def correctly_labelled(self) -> Split:
        """The training images whose label was not changed by label noise."""
        return self.train if self.clean is None else self.train[self.clean]

    def class_counts(self) -> Tensor:
        """Training images of each class (C,), on the CPU."""
        return torch.bincount(self.train.target.cpu(), minlength=len(self.class_names))

    def moments(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over the training images, in units of [0, 1].

        If the set is not held in memory, over at most MOMENT_IMAGES of them, evenly spaced.
        """
        count, channels = self.train.images.shape[:2]
        part = self.train
        if isinstance(part.images, LazyImages) and count > MOMENT_IMAGES:
            part = part[torch.arange(MOMENT_IMAGES) * count // MOMENT_IMAGES]
        levels = torch.arange(256, dtype=torch.float64) / 255
        counts = torch.zeros(channels * 256, dtype=torch.long)
        for images, _ in part.in_batches(512):
            codes = (images * 255).round_().long() + 256 * torch.arange(channels, device=images.device)[:, None, None]
            counts += torch.bincount(codes.flatten(), minlength=len(counts)).cpu()
        histogram = counts.view(channels, 256) / (counts.sum().double() / channels)
        mean = histogram @ levels
        return mean.tolist(), (histogram @ levels**2 - mean**2).clamp_min(1e-8).sqrt().tolist()


def load(
    config: DataConfig,
    *,
    seed: int,
    image_size: Size,
    given: Any = None,
    former: Collection[str] = (),
) -> Dataset:
    """The data set that `config` names, in its three splits.

    Args:
        config: which set, and how much of it.
        seed: draws the validation split and `train_size`.
        image_size: maps the side of the set's images (None for a folder of mixed sizes) to the side to use.
        given: datasets in place of the named set, see `given_set`.
        former: files of a folder that take part in drawing the splits, even if they are gone by now.

    Raises:
        UserError: an unknown set, missing or unreadable files, a class without training images, too few images.
    """
    return split_source(read_source(config, image_size, given=given, former=former), config, seed=seed)


def read_source(
    config: DataConfig,
    image_size: Size,
    *,
    given: Any = None,
    former: Collection[str] = (),
    class_names: tuple[str, ...] | None = None,
    partial: bool = False,
) -> Source:
    """The data set that `config` names as its source provides it, before any split is drawn.

    Args:
        config: which set.
        image_size: as of `load`.
        given: as of `load`.
        former: as of `load`.
        class_names: of a classifier that is evaluated on the set, which may then lack some of these classes.
        partial: whether the set is only evaluated on, so that one class is enough and a split may lack some.

    Raises:
        UserError: as `load`, or a class that is not among `class_names`.
    """
    if given is not None:
        source = given_set(given, config, image_size)
    elif config.name == "folder":
        source = image_folder(config, image_size, former=former, class_names=class_names, partial=partial)
    else:
        check_set("data.name=", config.name)
        source = _reader(config.name)(config, image_size)
        if config.name in IN_PACKAGES:
            source = noting_unread_root(source, config)
    if class_names is not None:
        source = of_classes(source, class_names)
    if partial:
        source = replace(source, partial=True)
    return source if config.unreadable == "refuse" else without_unreadable(source)


def _reader(name: str) -> Callable[[DataConfig, Size], Source]:
    if is_own(name):
        return own_set
    return timm_set if name.startswith(PREFIX) else SOURCES.get(name, torchvision_set)


def split_source(source: Source, config: DataConfig, *, seed: int, wanted: str | None = None) -> Dataset:
    """A source's three splits: missing ones are drawn, then the training split is thinned and mislabelled.

    Args:
        source: the data.
        config: what is drawn, and of how many images.
        seed: of the draws.
        wanted: the split that takes all images which are too few to be divided, so that another one is empty: of a
            source that is only evaluated on. None refuses them.

    Raises:
        UserError: too few images, a class without training images.
    """
    source = without_classes(source, config.hold_out)
    train, test = source.train, source.test
    if test is None:
        draw = bound(divide, train, 0.2, source.class_names, seed=0)
        train, test = _divided(draw, train, "test", wanted)
    val = source.val
    if val is None:
        draw = bound(divide, train, config.val_share, source.class_names, seed=seed, key="data.val_share")
        train, val = _divided(draw, train, "val", wanted)
    train = stratified(train, config.train_size, seed=seed, what="data.train_size")
    if config.imbalance > 1 and len(train):
        train = long_tailed(train, config.imbalance, source.class_names, seed=seed)
    clean = None
    if config.label_noise:
        train, clean = with_label_noise(train, config.label_noise, len(source.class_names), seed=seed)
    counts = torch.bincount(train.target, minlength=len(source.class_names))
    absent = [source.class_names[index] for index in (counts == 0).nonzero().flatten()]
    if absent and not source.partial:
        number = f": classes count from 0 to {len(counts) - 1}" if absent[0].isdecimal() else ""
        raise UserError(f"no training image of class {few(absent)}{number}: add some, or remove the class from the set")
    if len(train) < config.batch_size and wanted is None:
        raise UserError(
            f"{len(train)} training images are fewer than data.batch_size={config.batch_size}: "
            "no full batch; lower --data.batch_size"
        )
    here = [still_there(split, source.gone) for split in (train, val, test)]
    gone = tuple(int((~rows).sum()) for rows in here)
    clean = clean if clean is None else clean[here[0]]
    splits = [split[rows] if not rows.all() else split for split, rows in zip((train, val, test), here, strict=True)]
    train, val, test = in_memory_if_small(splits, config.memory_limit)
    notes = (*source.notes, *_missing_classes(source.class_names, validation=val, test=test))
    if config.name not in AS_THEY_ARE and not config.label_noise:
        notes += (*repeated_images(source.class_names, train, validation=val, test=test),)
    drawn = source.test is None
    sides = source.native_side, source.first_side
    return Dataset(source.class_names, train, val, test, clean, drawn, notes, gone[0], *sides)


def _divided(
    draw: Callable[[], tuple[Split, Split]], split: Split, name: str, wanted: str | None
) -> tuple[Split, Split]:
    """What is left of a split, and the split `name` that was drawn of it; one of them is empty if it is too small."""
    try:
        if len(split) or wanted is None:
            return draw()
    except TooFew as error:
        if wanted is None or error.divisible:
            raise
    none = split[torch.arange(0)]
    return (none, split) if name == wanted else (split, none)


def in_memory_if_small(splits: Sequence[Split], memory_limit: float) -> Sequence[Split]:
    """The splits, read into memory if all of them together take at most `memory_limit` GiB.

    Raises:
        Unreadable: names all images that cannot be read.
    """
    if sum(split.images.nbytes for split in splits) > memory_limit * 2**30:
        return splits
    held: list[Split] = []
    unreadable: dict[str, str] = {}
    for split in splits:
        try:
            held.append(split.in_memory())
        except Unreadable as error:
            unreadable |= error.images
    if unreadable:
        raise Unreadable(unreadable)
    return held


def _missing_classes(class_names: tuple[str, ...], **splits: Split) -> Iterator[str]:
    """A note on every split that has no image of some class."""
    for what, split in splits.items():
        counts = torch.bincount(split.target, minlength=len(class_names))
        absent = [name for name, count in zip(class_names, counts.tolist(), strict=True) if not count]
        if absent:
            yield f"no {what} image of class {few(absent)}: what is measured there says nothing of it; add images"


def long_tailed(split: Split, ratio: float, class_names: tuple[str, ...], *, seed: int) -> Split:
    """A long-tailed split: the k-th class, in an order drawn with the seed, keeps n · ratio^(−k/(C−1)) images.

    n is the largest number for which every class has enough images.
    """
    draw, target = np.random.default_rng([seed, 3]), split.target.numpy()
    rank = draw.permutation(len(class_names))
    profile = ratio ** -(rank / (len(class_names) - 1))
    available = np.bincount(target, minlength=len(class_names))
    kept = np.rint(np.min(available / profile) * profile).astype(int)
    if not kept.all():
        raise UserError(
            f"data.imbalance={ratio:g} leaves no training image of class {class_names[int(np.argmin(kept))]}, "
            f"with {np.max(available)} of the largest class; lower it, or raise --data.train_size"
        )
    rows = [draw.permutation(np.flatnonzero(target == label))[:count] for label, count in enumerate(kept)]
    return split[torch.from_numpy(np.sort(np.concatenate(rows)))]


def with_label_noise(split: Split, fraction: float, num_classes: int, *, seed: int) -> tuple[Split, Tensor]:
    """The split with a fraction of its labels moved to another class at random, and which labels are right (N,)."""
    draw = np.random.default_rng([seed, 2])
    wrong = draw.permutation(len(split))[: round(fraction * len(split))]
    target = split.target.clone()
    target[wrong] = (target[wrong] + torch.from_numpy(draw.integers(1, num_classes, len(wrong)))) % num_classes
    return Split(split.images, target), target == split.target


def check_set(option: str, name: str) -> None:
    """Refuse an unknown data set; `option` is the text before its name in the message, such as `data.name=`."""
    if name not in SOURCES and not name.startswith(("torchvision.", PREFIX)) and not is_own(name):
        near = did_you_mean(name, SOURCES)
        known = ", ".join(key for key in SOURCES if key != IN_PYTHON)
        raise UserError(f"{option}{name!r} is unknown: one of {known}, torchvision.NAME, timm:NAME, FILE.py:NAME{near}")


IN_PACKAGES = ("digits", "mnist5k")
"""Sets that a Python package holds."""

AS_THEY_ARE = ("digits", "fashion_mnist", "mnist5k")
"""Sets whose images everybody knows, and nobody will change."""

SOURCES: dict[str, Callable[[DataConfig, Size], Source]] = {
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "mnist5k": mnist5k,
    "folder": image_folder,
    IN_PYTHON: no_set,
}
