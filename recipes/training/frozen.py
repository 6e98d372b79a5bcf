"""Epochs with a frozen backbone: where images are the same in each of them, the backbone sees every image once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ncreg.models import Classifier
from recipes.core.config import TrainConfig
from recipes.core.distributed import Ranks
from recipes.data.split import Split
from recipes.training.metrics import Clock, images_at_once

FEWEST_EPOCHS = 2
"""Frozen epochs from which remembering features takes less time than making them anew."""


@dataclass(frozen=True)
class EncodedSplit(Split):
    """A backbone's features (N, width) in the place of the images of a split."""

    images: Tensor

    @property
    def side(self) -> int:
        """1: rows of features are no large images."""
        return 1

    def batches(self, indices: Iterable[Tensor | slice]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (features, classes), one for each of the given indices."""
        for index in indices:
            yield self.images[index.to(self.images.device) if isinstance(index, Tensor) else index], self.target[index]


class FrozenBackbone:
    """What a run trains and measures while the backbone is frozen: the parts behind it, on features computed once.

    That goes where nothing changes an image from epoch to epoch, the backbone answers alike twice (dropout may go on in
    eval mode in somebody's model), the features fit into `data.memory_limit`, and one process trains; half precision is
    left out, for training would see other features than measuring. Otherwise the whole model works on images.

    Args:
        model: its backbone is to be frozen for `model.freeze_epochs` epochs.
        config: of the run.
        ranks: the processes.
        images: of all splits that are worked on in these epochs, together.
        between: called between the batches of a pass, which may take long; it may raise `Stopped`.
    """

    def __init__(
        self, model: Classifier, config: TrainConfig, ranks: Ranks, images: int, between: Callable[[], object]
    ) -> None:
        self.model, self.epochs, self.between = model, config.model.freeze_epochs, between
        augment = config.augment
        size = next(model.parameters()).element_size()
        fits = size * images * model.backbone_width <= config.data.memory_limit * 2**30
        same = not (augment.crop or augment.flip or augment.mixes or config.adversarial.epsilon)
        whole = config.precision in ("float32", "float64") and ranks.size == 1
        self.wanted = self.epochs >= FEWEST_EPOCHS and fits and same and whole
        self.behind = Classifier(
            nn.Identity(),
            model.norm,
            model.head,
            project=model.project,
            num_classes=model.num_classes,
            head_hidden_size=model.head_hidden_size,
        )
        self.known: dict[int, tuple[Split, EncodedSplit]] = {}

    def notes(self) -> list[str]:
        """A sentence on what the first epoch begins with."""
        once = f"the backbone is frozen for {self.epochs} epochs: its features of every image are computed once"
        return [once] if self.wanted else []

    def stands_in(self, epoch: int, split: Split, clock: Clock) -> tuple[Classifier, Split]:
        """What works on a split in an epoch: the parts behind the backbone and its features, or model and images."""
        if epoch > self.epochs:
            self.known.clear()  # the backbone learns from now on
        if epoch > self.epochs or not self.wanted or not len(split):
            return self.model, split
        if id(split) not in self.known:
            began = time.perf_counter()
            self.wanted = bool(self.known) or self._answers_alike(split)
            if not self.wanted:
                return self.model, split
            self.known[id(split)] = split, EncodedSplit(self._encoded(split), split.target)
            clock.add("encode", began)
        return self.behind, self.known[id(split)][1]

    def _answers_alike(self, split: Split) -> bool:
        """Whether the backbone gives the same features of two images when it is asked again."""
        few = split[torch.arange(min(2, len(split)), device=split.target.device)]
        return torch.equal(self._encoded(few), self._encoded(few))

    @torch.no_grad()
    def _encoded(self, split: Split) -> Tensor:
        """The backbone's features of all images, (N, width)."""
        backbone, training = self.model.backbone, self.model.backbone.training
        backbone.eval()
        rows = []
        for images, _ in split.in_batches(images_at_once(split.side, split.target.device)):
            self.between()
            rows.append(backbone(self.model.preprocess(images)))
        backbone.train(training)
        return torch.cat(rows)
