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
from recipes.training.state import random_state, restore_random

FEWEST_EPOCHS = 2
"""Frozen epochs from which remembering features takes less time than making them anew."""

CLOSE = 1e-2
"""Largest change of a feature with the size of the batch, in units of the largest feature: rounding is far below."""


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

    That goes where nothing changes an image from epoch to epoch, the backbone is a function of the image alone, the
    features fit into `data.memory_limit`, and one process trains; half precision is left out, for training would see
    other features than measuring. Otherwise the whole model works on images.

    Args:
        model: its backbone is to be frozen for `model.freeze_epochs` epochs.
        config: of the run.
        ranks: the processes.
        splits: all that are worked on in these epochs; some may be the same.
        between: called between the batches of a pass, which may take long; it may raise `Stopped`.
        tell: takes a sentence for the user.
    """

    def __init__(
        self,
        model: Classifier,
        config: TrainConfig,
        ranks: Ranks,
        splits: Iterable[Split],
        *,
        between: Callable[[], object],
        tell: Callable[[str], object],
    ) -> None:
        self.model, self.between, self.tell = model, between, tell
        self.epochs = config.model.freeze_epochs
        self.splits = {id(split): split for split in splits}
        augment = config.augment
        size = next(model.parameters()).element_size() * model.backbone_width
        fits = size * sum(map(len, self.splits.values())) <= config.data.memory_limit * 2**30
        same = not (augment.crop or augment.flip or augment.mixes or config.adversarial.epsilon)
        whole = config.precision in ("float32", "float64") and ranks.size == 1
        self.wanted = config.model.freeze_epochs >= FEWEST_EPOCHS and fits and same and whole
        self.behind = Classifier(
            nn.Identity(),
            model.norm,
            model.head,
            project=model.project,
            num_classes=model.num_classes,
            head_hidden_size=model.head_hidden_size,
        )
        self.known: dict[int, EncodedSplit] = {}

    def stands_in(self, epoch: int, split: Split, clock: Clock) -> tuple[Classifier, Split]:
        """What works on a split in an epoch: the parts behind the backbone and its features, or model and images.

        The first call computes the features of all splits, so that it belongs before the first step of an epoch.
        """
        if epoch > self.epochs:
            self.known.clear()  # the backbone learns from now on
            return self.model, split
        if self.wanted and not self.known:
            self.wanted = self._is_fixed(next(iter(self.splits.values())))
        if not self.wanted:
            return self.model, split
        if not self.known:
            self.tell("the backbone is frozen: its features of each image are computed once")
            began = time.perf_counter()
            self.known = {key: EncodedSplit(self._encoded(part), part.target) for key, part in self.splits.items()}
            clock.add("encode", began)
        return self.behind, self.known[id(split)]

    def _is_fixed(self, split: Split) -> bool:
        """Whether features of two images draw no random numbers, are the same again, and hang on no other image."""
        few = split[torch.arange(min(2, len(split)))]
        one, before = few[torch.arange(1)], random_state()
        rows, again, alone = self._encoded(few), self._encoded(few), self._encoded(one)
        after = random_state()
        restore_random(before)
        drawn = any(str(before[name]) != str(after[name]) for name in ("numpy", "python"))
        drawn |= not torch.equal(before["torch"], after["torch"])
        drawn |= any(not torch.equal(*pair) for pair in zip(before["cuda"], after["cuda"], strict=True))
        near = CLOSE * float(rows.abs().max())
        return not drawn and torch.equal(rows, again) and bool(((rows[:1] - alone).abs() <= near).all())

    @torch.no_grad()
    def _encoded(self, split: Split) -> Tensor:
        """The backbone's features of all images, (N, width)."""
        backbone, training = self.model.backbone, self.model.backbone.training
        backbone.eval()
        rows = [torch.zeros(0, self.model.backbone_width).to(next(self.model.parameters()))]
        for images, _ in split.in_batches(images_at_once(split.side, split.target.device)):
            self.between()
            rows.append(backbone(self.model.preprocess(images)))
        backbone.train(training)
        return torch.cat(rows)
