"""What a run prints while it trains and when it ends, and its scalars for TensorBoard."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ncreg.models import Classifier
from recipes.core.config import TrainConfig
from recipes.core.errors import UserError
from recipes.core.extras import pip_install
from recipes.core.own_code import in_a_line, is_own, load_own
from recipes.data.load import SMALLEST, Dataset
from recipes.training.image_side import native_size, smallest_side
from recipes.training.metrics import Clock

ROWS = (
    ("test accuracy", "test", "accuracy", "{:.2%}"),
    ("train accuracy", "train", "accuracy", "{:.2%}"),
    ("val accuracy", "val", "accuracy", "{:.2%}"),
    ("NC1  within-class variability", "train", "nc1", "{:.3e}"),
    ("NC2  std/mean of the lengths", "train", "nc2_equinorm", "{:.3e}"),
    ("NC2  |cosine + 1/(C-1)|", "train", "nc2_equiangularity", "{:.3e}"),
    ("NC3  means against class vectors", "train", "nc3", "{:.3e}"),
    ("NC4  disagreement with nearest mean", "train", "nc4", "{:.2%}"),
    ("mean intra-class cosine (to 1)", "train", "intra_cosine", "{:+.4f}"),
    ("mean inter-class cosine (to -1/(C-1))", "train", "inter_cosine", "{:+.4f}"),
)
"""The closing table: label, split, measure, number format."""


def opening_line(data: Dataset, model: Classifier, *, data_name: str, backbone: str) -> str:
    """Data set, number of images of each split, image shape, backbone, parameters and device in one line."""
    splits = {"training": data.train, "validation": data.val, "test": data.test}
    images = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    shape = " x ".join(map(str, data.train.images.shape[1:]))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return (
        f"{data_name}: {images} images of {len(data.class_names)} classes, {shape}; {backbone}, "
        f"{millions:.3g} million parameters, on {next(model.parameters()).device}"
    )


def batch_notes(batch_size: int, images: int) -> list[str]:
    """A hint where an epoch has one or two steps, so that the schedule moves in few, large steps.

    Example:
        >>> batch_notes(512, 1000)
        ['data.batch_size=512 makes an epoch of 1000 images one step; a smaller one trains in more steps']
        >>> batch_notes(128, 1000)
        []
    """
    if 3 * batch_size <= images:
        return []
    steps = ("no step", "one step", "two steps")[images // batch_size]
    return [
        f"data.batch_size={batch_size} makes an epoch of {images} images {steps}; a smaller one trains in more steps"
    ]


def size_notes(config: TrainConfig, data: Dataset, side: int) -> list[str]:
    """A hint where images are scaled to more than twice their size only because no `data.image_size` was given.

    Args:
        config: of the run.
        data: knows the size of the images before they are scaled.
        side: to which they are scaled, in pixels.

    Example:
        >>> from types import SimpleNamespace
        >>> pixels = SimpleNamespace(shape=(9, 3, 160, 160))
        >>> photographs = SimpleNamespace(native_side=32, first_side=None, train=SimpleNamespace(images=pixels))
        >>> size_notes(TrainConfig(), photographs, 160)[0][-84:]
        '160 for test_resnet: 25 times as many pixels to compute as with --data.image_size 32'
    """
    native, model = data.native_side, config.model
    if config.data.image_size is not None or native is None or 2 * native >= side:
        return []
    args = {"in_chans": data.train.images.shape[1], **model.model_args}
    smaller = smallest_side(model.backbone, max(native, SMALLEST), side, args)
    if smaller is None:
        return []
    starts = model.pretrained or model.weights is not None or model.start_from is not None
    by_first = data.first_side == side and not native_size(model.backbone)[1]
    return [
        f"the images have {native} pixels on their shorter edge (the median), but are scaled up to {side}"
        f"{', that of the first image' if by_first else f' for {model.backbone}'}: {(side / smaller) ** 2:.0f} times "
        f"as many pixels to compute as with --data.image_size {smaller}"
        + ("; weights that were trained on larger images may do better at the larger size, so try both" * starts)
    ]


def frozen_notes(model: Classifier, freeze_epochs: int) -> list[str]:
    """A hint where a frozen backbone leaves no matrix to learn: a norm alone cannot turn features to fixed vectors.

    Example:
        >>> from ncreg import swap_head
        >>> frozen_notes(swap_head("test_resnet", "etf", num_classes=3), 2)[0][:70]
        'model.freeze_epochs=2: nothing but the norm is learned while the backb'
        >>> frozen_notes(swap_head("test_resnet", "etf", num_classes=3, project=8), 2)
        []
    """
    backbone = {id(parameter) for parameter in model.backbone.parameters()}
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in backbone]
    if not freeze_epochs or any(parameter.ndim > 1 for parameter in rest):
        return []
    return [
        f"model.freeze_epochs={freeze_epochs}: nothing but the norm is learned while the backbone is frozen, for the "
        "class vectors are fixed; --model.project N puts a learned map between them"
    ]


class Progress:
    """A bar over the steps of a run; without a terminal, a line about every twentieth of the epochs.

    Args:
        steps: of an epoch.
        done: steps of the run that were taken before.
        epochs: the last epoch, where it is known; None before the terminal phase says it.
        max_epochs: bound of the run.
        visible: whether to show anything.
    """

    def __init__(self, *, steps: int, done: int, epochs: int | None, max_epochs: int, visible: bool) -> None:
        self._steps, self._max_epochs, self._visible = steps, max_epochs, visible
        total = steps * (epochs or max_epochs)
        self._bar = tqdm(total=total, initial=done, unit="step", disable=None if visible else True)
        self._bar.set_description_str(epoch_of(done // steps + 1, epochs, max_epochs), refresh=False)

    def step(self) -> None:
        """One optimizer step was taken."""
        self._bar.update()

    def epoch(self, record: Mapping[str, Any], *, phase: str, epochs: int | None, important: bool) -> None:
        """An epoch has ended: show its record; the run's last epoch is `epochs`, None if that is not known yet."""
        last = epochs or self._max_epochs
        self._bar.total = self._steps * last
        following = min(record["epoch"] + 1, last)
        self._bar.set_description_str(epoch_of(following, epochs, self._max_epochs), refresh=False)
        shown = {
            "loss": f"{record['loss']:.4f}",
            "acc": f"{record['train_accuracy']:.2%}",
            "nc1": f"{record['measures']['nc1']:.2e}",
            "phase": phase,
        }
        self._bar.set_postfix(shown)
        every = max(1, last // 20)
        if self._visible and self._bar.disable and (important or record["epoch"] == 1 or record["epoch"] % every == 0):
            values = "  ".join(f"{name} {value}" for name, value in shown.items())
            print(f"epoch {record['epoch']:>4}  {values}", flush=True)

    def close(self) -> None:
        """After the last epoch."""
        self._bar.close()


def epoch_of(epoch: int, last: int | None, max_epochs: int) -> str:
    """What the bar counts: up to the last epoch where it is known, else up to the bound of the run.

    Example:
        >>> epoch_of(77, 200, 2000), epoch_of(77, None, 2000)
        ('epoch 77 of 200', 'epoch 77 of at most 2000')
    """
    return f"epoch {epoch} of {last}" if last is not None else f"epoch {epoch} of at most {max_epochs}"


class TensorBoardLog:
    """Writes the records of epochs for TensorBoard, if `wanted`; a resumed run overwrites what it repeats."""

    def __init__(self, folder: Path, *, wanted: bool, epochs_done: int = 0) -> None:
        self._writer: Any = None
        if not wanted:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(f"tensorboard=true needs the package tensorboard: {pip_install('recipes')}") from None
        self._writer = SummaryWriter(str(folder), purge_step=epochs_done + 1)

    def add(self, record: Mapping[str, Any]) -> None:
        """Every number of an epoch's record."""
        if self._writer is None:
            return
        for name, value in _scalars(record):
            self._writer.add_scalar(name, value, record["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """After the last epoch."""
        if self._writer is not None:
            self._writer.close()


def hook_code(named: str) -> Any:
    """The function or class that on_epoch=path/to/file.py:name names.

    Raises:
        UserError: it names no code, or the code cannot be loaded.
    """
    if not is_own(named):
        raise UserError(f"on_epoch={named} names no code: path/to/file.py:function")
    return load_own(named, "on_epoch")


class EpochHook:
    """Calls code of the user's own with the record of each epoch, after the run is saved.

    Args:
        named: path/to/file.py:name of a function, or of a class that is made without arguments and then called.
        given: a callable in its place, from Python.

    Raises:
        UserError: the code cannot be loaded; or later, what it raised, with the way to go on.
    """

    def __init__(self, named: str | None, given: Callable[[dict[str, Any]], object] | None = None) -> None:
        self._name = "on_epoch" if named is None else f"on_epoch={named}"
        self._call = given
        if given is None and named is not None:
            found = hook_code(named)
            self._call = self._guarded(found) if isinstance(found, type) else found
        if self._call is not None and not callable(self._call):
            raise UserError(f"{self._name}: {self._call!r} cannot be called with the record of an epoch")

    def add(self, record: Mapping[str, Any], run: Path) -> None:
        """Hand over a copy of the record."""
        if self._call is not None:
            self._guarded(self._call, copy.deepcopy(dict(record)), saved=run)

    def _guarded(self, call: Callable[..., Any], *args: Any, saved: Path | None = None) -> Any:
        try:
            return call(*args)
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            on = "" if saved is None else f"; the run is saved: mend it and go on with --resume {saved}"
            raise UserError(f"{self._name} failed: {in_a_line(error)}{on}") from None


def _scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "epoch":
            yield f"{prefix}{name}", float(value)


def shown(value: float, form: str) -> str:
    """A number as text; "not defined" for NaN, as for measures of a class without images."""
    return "not defined" if math.isnan(value) else form.format(value)


def zero_error(threshold: float) -> str:
    """What a training accuracy of `tpt.threshold` means, for a label: below 1 some images may still be wrong.

    Example:
        >>> zero_error(0.999), zero_error(1.0)
        ('99.9 % right', 'zero error')
    """
    return "zero error" if threshold >= 1 else f"{100 * threshold:.6g} % right"


def zero_error_means(threshold: float) -> str:
    """The same for a line of text.

    Example:
        >>> zero_error_means(0.999), zero_error_means(1.0)
        ('training accuracy of 99.9% or more', 'training accuracy of 100%')
    """
    return f"training accuracy of {100 * threshold:.6g}%" + (" or more" if threshold < 1 else "")


def closing_lines(summary: Mapping[str, Any], path: Path) -> str:
    """The last lines that a run prints: its measures at zero error and at its end, side by side."""
    onset, end, means = summary["at_onset"], summary["at_end"], zero_error_means(summary["threshold"])
    if onset is None:
        lines = [
            f"zero error not found in {summary['epochs']} epoch{'s' * (summary['epochs'] > 1)} ({means}; the best was "
            f"{summary['best_train_accuracy']:.2%}): raise --tpt.max_epochs or lower --tpt.threshold"
        ]
        heads = ["", f"epoch {summary['epochs']}"]
    else:
        lines = [f"zero error ({means}) at epoch {summary['onset_epoch']}, terminal phase to epoch {summary['epochs']}"]
        heads = ["", f"epoch {summary['onset_epoch']}", f"epoch {summary['epochs']}"]
    columns = [ends for ends in (onset, end) if ends is not None]
    lines.append(f"{heads[0]:<38}" + "".join(f"{head:>14}" for head in heads[1:]))
    for label, split, measure, form in ROWS:
        cells = [column[split].get(measure, math.nan) for column in columns]
        lines.append(f"{label:<38}" + "".join(f"{shown(cell, form):>14}" for cell in cells))
    return "\n".join([*lines, f"run folder: {path}"])


def timing_line(clock: Clock, images_per_second: float) -> str:
    """Duration, speed, and the fraction of the time that measuring took."""
    total = sum(clock.seconds.values())
    fractions = {name: clock.seconds.get(name, 0.0) / total for name in ("measure_forward", "measure_collapse")}
    return (
        f"{total:.0f} s, {images_per_second:.0f} training images/s; measuring took {sum(fractions.values()):.0%} "
        f"({fractions['measure_forward']:.0%} forward pass, {fractions['measure_collapse']:.0%} measures)"
    )
