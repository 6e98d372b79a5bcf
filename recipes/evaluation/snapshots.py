"""Features of a run at several times of its training: computed from its checkpoints, and stored in its folder."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from ncreg.checkpoint import load_checkpoint
from ncreg.models import Classifier
from recipes.core.cli import config_of
from recipes.core.config import TrainConfig
from recipes.core.errors import UserError
from recipes.core.files import check_folder
from recipes.data.load import Dataset
from recipes.data.split import Split, concatenate, stratified
from recipes.evaluation.class_order import listed
from recipes.evaluation.model_options import ModelOptions
from recipes.evaluation.model_under_test import check_own, is_run, read_classifier, run_dir_of, tell
from recipes.evaluation.run_under_test import RunUnderTest
from recipes.training.build import build_model, class_vectors, image_size
from recipes.training.metrics import images_at_once
from recipes.training.reporting import zero_error
from recipes.training.run_dir import RunDir
from recipes.training.same_start import own_data

Array = np.ndarray

TIMES = {"best": "best validation", "last": "end"}
"""What happened when a checkpoint was written; that of zero error depends on the threshold."""


@dataclass(frozen=True)
class Snapshot:
    """Features at one time of training.

    Attributes:
        title: of the panel.
        features: (N, d).
        target: (N,).
        weight: the head's class vectors (C, d).
    """

    title: str
    features: Array
    target: Array
    weight: Array


def take_snapshots(
    run: str | Path,
    *,
    split: str,
    images: int,
    options: ModelOptions | None = None,
    overrides: Sequence[str] = (),
) -> tuple[Path, list[Snapshot], tuple[str, ...]]:
    """Folder of the results, snapshots, and names of the classes of a run, or of a model as it is.

    Args:
        run: the run folder, or another MODEL.
        split: train, val, test or all.
        images: how many, drawn in proportion to the classes; all of a smaller split.
        options: of a model that is no run.
        overrides: `--data.KEY VALUE` words for its data.

    Raises:
        UserError: no run or model, no checkpoint, or fewer images than classes.
    """
    if is_run(Path(run)):
        check_own(run, options, overrides)
        home = run_dir_of(Path(run))
        return snapshots_of_run(home, config_of(home, overrides), split=split, images=images)
    tested = RunUnderTest.open(run, split=split, options=options, overrides=overrides)
    check_folder(tested.path, "the folder of the results,")
    chosen = _chosen(tested.data, split, images, seed=tested.seed)
    taken = snapshot(Path(tested.config.model.backbone).name, tested.model, chosen.to(tested.device))
    shown, names = _classes_with_images(taken, tested.data.class_names)
    return tested.path, [shown], names


def snapshots_of_run(
    run: Path, config: TrainConfig, *, split: str, images: int
) -> tuple[Path, list[Snapshot], tuple[str, ...]]:
    """A run's snapshots, read from its folder or computed and stored there.

    Raises:
        UserError: no checkpoint, or fewer images than classes.
    """
    side = partial(image_size, backbone=config.model.backbone, requested=config.data.image_size)
    data = own_data(RunDir(run), config, side)
    times = checkpoints(run)
    if not times:
        raise UserError(f"RUN {run} has no checkpoint yet: wait for the end of its first epoch")
    chosen = _chosen(data, split, images, seed=config.seed)
    path = run / "collapse" / f"features-{split}.npz"
    with suppress(UserError):  # there is none, or it is damaged: all of it can be computed again
        stored = read_snapshots(path)
        epochs = [item.title.split(" (")[0] for item in stored if item.title != "epoch 0"]
        if epochs == [f"epoch {epoch}" for epoch, _, _ in times] and len(stored[0].target) == len(chosen):
            titles = [item.title for item in stored if item.title == "epoch 0"]
            titles += [title_of(epoch, name, config.tpt.threshold) for epoch, name, _ in times]
            said = [replace(item, title=title) for item, title in zip(stored, titles, strict=True)]
            return run, said, data.class_names
    computed = [snapshot(title, model, chosen) for title, model in models(config, data, times)]
    write_snapshots(path, computed)
    return run, computed, data.class_names


def _classes_with_images(snapshot: Snapshot, class_names: tuple[str, ...]) -> tuple[Snapshot, tuple[str, ...]]:
    """The snapshot with those outputs alone that stand for classes with images, and their names; others are said."""
    present, target = np.unique(snapshot.target, return_inverse=True)
    names = tuple(class_names[label] for label in present)
    if absent := [name for name in class_names if name not in names]:
        tell([f"no image of {listed(absent)} among those shown: the figure is of {listed(names)}"])
    return replace(snapshot, target=target, weight=snapshot.weight[present]), names


def _chosen(data: Dataset, split: str, images: int, *, seed: int) -> Split:
    chosen = concatenate((data.train, data.val, data.test)) if split == "all" else getattr(data, split)
    return stratified(chosen, min(images, len(chosen)), seed=seed, what="--images")


def checkpoints(run: Path) -> list[tuple[int, str, Path]]:
    """Epoch, name and file of the run's checkpoints, earliest first; of the same epoch last.pt or else onset.pt.

    Raises:
        UserError: a checkpoint that cannot be read.
    """
    found = []
    for path in (run / "checkpoints").glob("*.pt"):
        if path.stem not in ("previous", "coming"):
            try:
                found.append((int(load_checkpoint(path)["epoch"]), path.stem, path))
            except ValueError as error:
                raise UserError(str(error)) from None
    rank = {"last": 0, "onset": 1}
    found.sort(key=lambda item: (item[0], rank.get(item[1], 2)))
    return [item for place, item in enumerate(found) if place == 0 or item[0] != found[place - 1][0]]


def models(
    config: TrainConfig, data: Dataset, times: Sequence[tuple[int, str, Path]]
) -> Iterator[tuple[str, Classifier]]:
    """Title and model: first the untrained one, rebuilt from its seed, then that of each checkpoint."""
    if not config.model.starts_trained:
        yield "epoch 0", build_model(config.model, data, seed=config.seed)
    for epoch, name, path in times:
        yield title_of(epoch, name, config.tpt.threshold), read_classifier(path, "cpu")


def title_of(epoch: int, name: str, threshold: float) -> str:
    """Title of the panel of a checkpoint.

    Example:
        >>> title_of(9, "onset", 0.999), title_of(9, "onset", 1.0), title_of(20, "last", 0.999)
        ('epoch 9 (99.9 % right)', 'epoch 9 (zero error)', 'epoch 20 (end)')
    """
    happened = zero_error(threshold) if name == "onset" else TIMES.get(name)
    return f"epoch {epoch}" + (f" ({happened})" if happened else "")


@torch.inference_mode()
def snapshot(title: str, model: Classifier, split: Split) -> Snapshot:
    """Eval-mode features of the images."""
    model.eval()
    batch, dtype = images_at_once(split.side, split.target.device), next(model.parameters()).dtype
    parts = (model(images.to(dtype), with_features=True) for images, _ in split.in_batches(batch))
    features = torch.cat([part.features for part in parts])
    weight = class_vectors(model).detach()
    return Snapshot(title, features.float().cpu().numpy(), split.target.cpu().numpy(), weight.float().cpu().numpy())


def write_snapshots(path: Path, snapshots: Sequence[Snapshot]) -> None:
    """Features, classes and class vectors of every snapshot, in one file without pickles."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"{number:03d}-{name}": getattr(snapshot, name)
        for number, snapshot in enumerate(snapshots)
        for name in ("features", "target", "weight")
    }
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    try:
        np.savez_compressed(unfinished, titles=np.array([snapshot.title for snapshot in snapshots]), **arrays)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_snapshots(path: Path) -> list[Snapshot]:
    """What `write_snapshots` wrote.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
            return [
                Snapshot(str(title), *(found[f"{number:03d}-{name}"] for name in ("features", "target", "weight")))
                for number, title in enumerate(found["titles"])
            ]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
        raise UserError(f"{path} holds no stored features: {error}") from None
