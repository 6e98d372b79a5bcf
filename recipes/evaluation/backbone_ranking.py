"""Which backbone for my images: one pass of each candidate over labelled images, and what its features say."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ncreg.metrics import NeuralCollapse
from ncreg.models import Classifier
from ncreg.robustness import linear_probe
from ncreg.transferability import NCTIScore, leave_one_out_accuracy, logme, naswot, ncti
from recipes.core.cli import parse
from recipes.core.config import DataConfig
from recipes.core.errors import UserError
from recipes.data.lazy_images import report_lost_workers
from recipes.data.load import Dataset, check_set, load
from recipes.data.side import Side
from recipes.data.split import Split, stratified
from recipes.data.unreadable import offering_skip
from recipes.evaluation.backbone_scores import NOT_FOR_TRAINED, BackboneRanking, BackboneScores
from recipes.evaluation.candidates import Candidate
from recipes.evaluation.feature_store import FeatureStore
from recipes.evaluation.model_images import ToChannels
from recipes.evaluation.model_pass import model_outputs
from recipes.evaluation.model_under_test import ModelUnderTest, is_run, open_model
from recipes.training.metrics import images_at_once

IMAGES = 5_000
"""Images of each split, at most."""

NASWOT_IMAGES = 128


class _StoredFeatures(Mapping[str, Tensor]):
    """Training features of the candidates, of which one is in memory at a time."""

    def __init__(self, stores: Mapping[str, FeatureStore]) -> None:
        self._stores = stores

    def __getitem__(self, name: str) -> Tensor:
        return torch.cat([block for block, _ in self._stores[name]])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stores)

    def __len__(self) -> int:
        return len(self._stores)


@dataclass
class _Images:
    """The data at the side that a candidate takes; the last side's is kept, for many candidates share one."""

    config: DataConfig
    held_out: str
    most: int
    seed: int
    size: int | None
    key: object = None
    data: Dataset | None = None

    def at(self, tested: ModelUnderTest) -> Dataset:
        """The set with training and held-out images thinned to `most`, classes in proportion."""
        side = Side.of(tested.side)
        if self.size is not None and side != self.size:
            raise UserError(f"data.image_size={self.size}: it takes images of {side} pixels; drop the key")
        key = (int(side), side.shorter, side.interpolation, side.squash)
        if self.data is None or self.key != key:
            self.data = None  # freed before the next is read
            read = load(self.config, seed=self.seed, image_size=tested.image_size)
            least = len(read.class_names)
            parts: dict[str, Any] = {
                name: _thinned(getattr(read, name), max(self.most, least), self.seed)
                for name in ("train", self.held_out)
            }
            self.key, self.data = key, replace(read, **parts)
        return self.data


def _thinned(split: Split, most: int, seed: int) -> Split:
    return split if len(split) <= most else stratified(split, most, seed=seed, what="--images")


def rank_backbones(
    candidates: Sequence[Candidate],
    overrides: Sequence[str],
    *,
    held_out: str = "val",
    images: int = IMAGES,
    seed: int = 0,
    device: str = "auto",
    tell: Callable[[str], None] = lambda text: None,
) -> BackboneRanking:
    """Score every candidate on a data set; one that fails is named in the result and stops none of the others.

    Memory holds one model, one set of images and one candidate's features at a time; the others' are in files.

    Args:
        candidates: the backbones.
        overrides: `--data.KEY=VALUE` words that name the data.
        held_out: val or test, the split that the linear probe is judged on.
        images: of each split, at most.
        seed: of the splits and draws.
        device: for the forward passes.
        tell: takes a line on each candidate as it is done.

    Raises:
        UserError: no data, or no candidate that could be scored.
    """
    config = _data_config(overrides)
    source = _Images(config, held_out, images, seed, config.image_size)
    scores: dict[str, BackboneScores] = {}
    stores: dict[str, FeatureStore] = {}
    failed: dict[str, str] = {}
    target, about = torch.zeros(0, dtype=torch.long), None
    with report_lost_workers(), ExitStack() as stack:
        for number, candidate in enumerate(candidates, 1):
            tell(f"{number} of {len(candidates)}: {candidate.name}")
            store = stack.enter_context(FeatureStore())
            try:
                with offering_skip():
                    scores[candidate.name], about = _scored(candidate, source, store, overrides, device)
                stores[candidate.name], target = store, store.target
            except Exception as error:  # a model may raise anything; the other candidates go on
                failed[candidate.name] = _reason(error, candidate)
                tell(f"  failed: {failed[candidate.name]}")
        if about is None:
            reasons = set(failed.values())
            if len(reasons) == 1:
                raise UserError(f"{', '.join(failed)}: {reasons.pop()}")
            raise UserError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
        ranks = ncti(_StoredFeatures(stores), target) if len(stores) > 1 else {}
    found = [_with_ncti(item, ranks.get(name)) for name, item in scores.items()]
    found.sort(key=lambda item: (-item.linear_probe, -item.nearest_center))
    return BackboneRanking(
        config.name,
        dict(word.removeprefix("--data.").split("=", 1) for word in overrides),
        len(about.class_names),
        len(about.train),
        held_out,
        len(getattr(about, held_out)),
        seed,
        tuple(found),
        failed,
        about.notes,
    )


def _data_config(overrides: Sequence[str]) -> DataConfig:
    if not any(word.startswith("--data.name") for word in overrides):
        raise UserError("name the images: --data.name SET, or --data.name folder --data.root FOLDER")
    config = parse(["--quiet", *overrides]).data
    if config.name != "folder":
        check_set("data.name=", config.name)
    return replace(config, batch_size=2)  # so that any number of images is enough


def _scored(
    candidate: Candidate, source: _Images, store: FeatureStore, overrides: Sequence[str], device: str
) -> tuple[BackboneScores, Dataset]:
    """The scores of a candidate, and the data they were computed on; its training features go into the store."""
    own = () if is_run(Path(candidate.word)) else overrides
    tested = open_model(candidate.word, candidate.options, overrides=own, device=device, needs_data=False)
    data, model = source.at(tested), _for_any_channels(tested)
    held = getattr(data, source.held_out)
    began = time.perf_counter()
    with FeatureStore() as other:
        for split, place in ((data.train, store), (held, other)):
            _pass(model, split, place)
        seconds = time.perf_counter() - began
        train, test = (torch.cat([rows for rows, _ in place]) for place in (store, other))
    _check_features(train, test)
    probe = linear_probe(train, data.train.target, test, held.target, seed=source.seed)
    collapse = NeuralCollapse(len(data.class_names), store.width)
    collapse.update(train, data.train.target)
    score, reason = _naswot(candidate, model, data.train)
    head = {id(parameter) for parameter in model.head.parameters()}
    return BackboneScores(
        candidate.name,
        probe.accuracy,
        probe.interval,
        probe.chosen,
        leave_one_out_accuracy(train, data.train.target),
        float(collapse.compute()["cdnv"]),
        logme(train, data.train.target),
        store.width,
        sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in head),
        int(tested.side),
        seconds,
        (len(train) + len(test)) / seconds,
        naswot=score,
        no_naswot=reason,
        probe_at_edge=probe.at_edge,
    ), data


def _for_any_channels(tested: ModelUnderTest) -> Classifier:
    """The model on images of one or three channels; runs take those of their own data alone."""
    model = tested.model.eval()
    if tested.is_run and model.image_shape:
        model.preprocess = nn.Sequential(ToChannels(model.image_shape[0]), model.preprocess)
    return model


@torch.no_grad()
def _pass(model: Classifier, split: Split, store: FeatureStore) -> None:
    """Features of a split into a store."""
    like = next(model.parameters())
    for images, target in split.in_batches(images_at_once(split.side, like.device)):
        _, features = model_outputs(model, images.to(like.device))
        store.append(features.flatten(1), target)


def _check_features(*parts: Tensor) -> None:
    for rows in parts:
        if not bool(rows.isfinite().all()):
            raise UserError("its features are not finite: other weights, or images that it cannot take")
    if bool((parts[0] == parts[0][0]).all()):
        raise UserError("its features are the same for every image: nothing can be told apart")


def _naswot(candidate: Candidate, model: Classifier, split: Split) -> tuple[float | None, str]:
    """NASWOT of an untrained candidate; or None, and why."""
    if candidate.options.untrained is None:
        return None, NOT_FOR_TRAINED
    chosen = split[torch.linspace(0, len(split) - 1, min(len(split), NASWOT_IMAGES)).round().long()]
    like = next(model.parameters())
    ((images, _),) = chosen.in_batches(NASWOT_IMAGES)
    try:
        return naswot(lambda batch: model.backbone(model.preprocess(batch)), images.to(like.device, like.dtype)), ""
    except ValueError as error:
        return None, str(error)


def _with_ncti(scores: BackboneScores, found: NCTIScore | None) -> BackboneScores:
    if found is None:
        return scores
    return replace(
        scores,
        ncti=found.score,
        ncti_terms={"within": found.within, "spread": found.spread, "posterior": found.posterior},
    )


def _reason(error: Exception, candidate: Candidate) -> str:
    """Why a candidate failed, in a line."""
    line = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, UserError | ValueError | OSError | RuntimeError):
        line = f"{type(error).__name__}: {line}"
    word = candidate.word
    for former, now in (
        ("has no pretrained weights: --weights FILE", f"has no pretrained weights: {word}=FILE or =untrained"),
        ("--weights FILE takes", f"{word}=FILE takes"),
        (f"--weights {candidate.options.weights}", f"{candidate.options.weights}"),
        (f"MODEL {word}: ", ""),
        (f"MODEL {word} ", "it "),
    ):
        line = line.replace(former, now)
    return line
