"""Whatever timm's create_dataset reads: data.name=timm:hfds/NAME, timm:wds/NAME, timm:torch/NAME, timm: for a tar."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median_low
from typing import Any

import torch
from PIL import Image
from timm.data.dataset_factory import create_dataset

from recipes.core.config import DataConfig
from recipes.core.errors import NotHere, UserError
from recipes.core.extras import is_installed
from recipes.core.memory import physical_memory
from recipes.core.suggestions import did_you_mean
from recipes.data.class_names import same_classes, without_unlabelled
from recipes.data.decode import pixels_of
from recipes.data.lazy_images import LazyImages, worker_count
from recipes.data.map_style import Size, source_of
from recipes.data.split import SPLIT_NAMES, Source, Split, resized
from recipes.data.unreadable import Unreadable

PREFIX = "timm:"

MOST_HELD = 0.5
"""Share of the machine's memory that sets may take which are read in their order alone."""

KINDS = ("", "hfds", "hfids", "tfds", "torch", "wds")
"""What may stand before the slash in timm's names; nothing for a folder or a tar of images, data.root."""

TORCH_SPLITS = ("train", "validation")
"""What timm makes of the splits of any torchvision set that it knows."""


def timm_set(config: DataConfig, image_size: Size) -> Source:
    """The set `timm:NAME`, where NAME and data.root are what timm's create_dataset takes as name and root.

    Raises:
        UserError: timm or a package behind it cannot read it, or it has no training split.
    """
    name, what = config.name.removeprefix(PREFIX), f"data.name={config.name}"
    with _explained(what, config):
        splits = chosen_splits(_split_names(name, config.root), what)
        of_hub = name.startswith(("hfds/", "hfids/"))
        keys, notes = _hf_columns(name, config.root, splits["train"], what) if of_hub else ({}, [])
        found = {part: _opened(name, config.root, split, keys) for part, split in splits.items()}
        if any(isinstance(part, torch.utils.data.IterableDataset) for part in found.values()):
            source = _held(found, config, image_size, what)
        else:
            source = source_of(found, config, image_size, what=what)
        return replace(source, notes=(*source.notes, *notes))


def chosen_splits(names: Sequence[str], what: str) -> dict[str, str]:
    """Which of a set's splits serves as train, val and test; one of val and test alone is the test split.

    Raises:
        UserError: none is for training.

    Example:
        >>> chosen_splits(["train", "validation"], "data.name=x")
        {'train': 'train', 'test': 'validation'}
        >>> chosen_splits(["all"], "data.name=x")
        {'train': 'all'}
    """
    lower = {name.lower(): name for name in reversed(names)}
    found = {
        part: lower[next(name for name in known if name in lower)]
        for part, known in SPLIT_NAMES.items()
        if set(known) & set(lower)
    }
    if not found and len(names) == 1:
        return {"train": names[0]}
    if "train" not in found:
        raise UserError(f"{what} has the splits {', '.join(names) or 'none'}: one of them must be train")
    if "val" in found and "test" not in found:
        found["test"] = found.pop("val")
    return found


class TimmItems:
    """A map-style set of timm with its images as the file has them; timm itself would pass over unreadable ones."""

    def __init__(self, found: Any) -> None:
        self.reader = found.reader
        numbers = getattr(self.reader, "class_to_idx", None) or getattr(self.reader, "class_name_to_idx", {})
        names = sorted(numbers, key=numbers.__getitem__)
        if [numbers[name] for name in names] == list(range(len(names))):
            self.classes = names
        if hasattr(self.reader, "iter_targets"):
            self.targets = list(self.reader.iter_targets())

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, number: int) -> tuple[Image.Image, Any]:
        if hasattr(self.reader, "tar_state"):
            return Image.open(io.BytesIO(self._from_tar(number))), self.reader.targets[number]
        file, label = self.reader[number]
        with file:
            return Image.open(io.BytesIO(file.read())), label

    def _from_tar(self, number: int) -> bytes:
        """The bytes of a file in a tar, or in a tar in it; timm's open tar would be shared by forked workers."""
        inside, tar, inner = self.reader.samples[number]
        with (Path(self.reader.root) / (tar or "")).open("rb") as file:
            file.seek(inside.offset_data + (inner.offset_data if inner else 0))
            return file.read(inside.size)


def _opened(name: str, root: Path, split: str, keys: Mapping[str, Any]) -> Any:
    """Timm's dataset of a split, `keys` naming its columns; an iterable one gives all of its images to every rank."""
    kind, _, rest = name.partition("/")
    download: dict[str, Any] = {"download": True} if kind in ("torch", "tfds", "hfids") and "folder" not in rest else {}
    found = create_dataset(name, str(root), split=split, input_img_mode="", **download, **keys)
    reader: Any = getattr(found, "reader", None)
    if hasattr(reader, "dist_num_replicas"):
        reader.dist_rank, reader.dist_num_replicas = 0, 1  # a run divides its batches among the ranks itself
        return found
    return found if reader is None else TimmItems(found)


def _split_names(name: str, root: Path) -> list[str]:
    """The splits of a set, without opening them: timm gives another split, or the whole, for one that is not there."""
    kind, _, rest = name.partition("/")
    if kind not in KINDS:
        near = did_you_mean(kind, [known for known in KINDS if known])
        raise UserError(f"data.name={PREFIX}{name}: {kind!r} is none of {', '.join(filter(None, KINDS))}{near}")
    if kind in ("hfds", "hfids"):
        import datasets

        datasets.disable_progress_bars()  # they would stand among the notes
        return list(datasets.get_dataset_split_names(rest))
    if kind == "wds":
        if not is_installed("webdataset"):
            raise ImportError("webdataset is not installed: pip install webdataset")
        about = next((root / name for name in ("_info.json", "info.json") if (root / name).is_file()), None)
        splits = json.loads(about.read_text(encoding="utf-8")).get("splits") if about else None
        if not splits:
            raise UserError(f"data.name={PREFIX}{name}: {root} has no _info.json (or info.json) that lists its splits")
        return list(splits)
    if kind == "tfds":
        import tensorflow_datasets

        return list(tensorflow_datasets.builder(rest, data_dir=str(root)).info.splits)
    if kind == "torch" and "folder" not in rest:
        return list(TORCH_SPLITS)
    if not root.exists():
        raise NotHere(f"data.root={root} does not exist")
    inside = [path.name for path in sorted(root.iterdir()) if path.is_dir()] if root.is_dir() else []
    known = [name for name in inside if any(name in names for names in SPLIT_NAMES.values())]
    return known or ["all"]


def _hf_columns(name: str, root: Path, split: str, what: str) -> tuple[dict[str, str], list[str]]:
    """The columns of images and labels where they are not called image and label, and notes on others of their kind.

    Raises:
        UserError: there is none.
    """
    import datasets

    kind, _, rest = name.partition("/")
    features = datasets.load_dataset_builder(rest, cache_dir=str(root)).info.features
    if not features and kind == "hfds":  # files without a card, which say it themselves
        features = datasets.load_dataset(rest, split=split, cache_dir=str(root)).features
    keys, notes = {}, []
    for key, usual, feature in (("input_key", "image", datasets.Image), ("target_key", "label", datasets.ClassLabel)):
        columns = [column for column, found in (features or {}).items() if isinstance(found, feature)]
        if not features or usual in features:
            continue
        if not columns:
            raise UserError(
                f"{what} has the columns {', '.join(features)}: none is called {usual} or is of the kind "
                f"{feature.__name__}; a function in a file may give pairs (image, label), --data.name FILE.py:NAME"
            )
        keys[key] = columns[0]
        if len(columns) > 1:
            notes.append(f"{what}: its {usual}s are the column {columns[0]}; not taken: {', '.join(columns[1:])}")
    return keys, notes


@contextmanager
def _explained(what: str, config: DataConfig) -> Any:
    """Turn what timm and the packages behind it raise into one line, without the hub's own lines on each attempt."""
    hub = logging.getLogger("huggingface_hub")
    before = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # readers of many packages, each with errors of its own
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())[:300] or type(error).__name__
        raise NotHere(
            f"{what} with data.root={config.root} cannot be read by timm ({reason}); names are hfds/NAME, wds/NAME, "
            "torch/NAME ... as in timm's create_dataset"
        ) from None
    finally:
        hub.setLevel(before)


def _held(found: Mapping[str, Any], config: DataConfig, image_size: Size, what: str) -> Source:
    """A source of sets that are read in their order alone: all images are held in memory.

    Raises:
        UserError: they take too much of it.
        Unreadable: timm passed over some.
    """
    read = _Images(config, image_size, what)
    splits = {part: read.split(part_set, part) for part, part_set in found.items()}
    if any(split.images.shape[1] != read.channels for split in splits.values()):  # colour came after gray
        splits = {part: read.split(part_set, part) for part, part_set in found.items()}
    splits, renamed = same_classes(splits, {part: _names(part_set) for part, part_set in found.items()}, what)
    splits, left_out = without_unlabelled(splits, what)
    labels = torch.cat([split.target for split in splits.values()])
    lowest, count = int(labels.min()), 1 + int(labels.max())
    if lowest < 0:
        raise UserError(f"{what}: labels run from {lowest} to {count - 1}, but must count from 0")
    names = _names(found["train"]) or ()
    if len(names) != count:
        names = tuple(map(str, range(count)))
    parts = splits["train"], splits.get("test"), splits.get("val")
    notes = (*read.notes, *renamed, *left_out)
    return Source(names, *parts, notes, native_side=median_low(read.edges), first_side=read.edges[0])


def _names(found: Any) -> tuple[str, ...] | None:
    """The names of a set's classes in the order of their numbers; None unless these are 0, 1, 2 and so on."""
    numbers = getattr(found.reader, "class_to_idx", None) or {}
    if sorted(numbers.values()) != list(range(len(numbers))):
        return None
    return tuple(str(name) for name in sorted(numbers, key=numbers.__getitem__)) or None


@dataclass(frozen=True)
class _Rows:
    """Reads images from memory; above data.memory_limit they are not brought to the device all together."""

    images: torch.Tensor

    def __call__(self, number: int) -> torch.Tensor:
        return self.images[number]


class _Images:
    """Reads sets one after the other, at one size and number of channels: colour as soon as an image has it."""

    def __init__(self, config: DataConfig, image_size: Size, what: str) -> None:
        self.config, self.image_size, self.what = config, image_size, what
        self.side, self.channels, self.taken = 0, 1, 0.0
        self.edges: list[int] = []
        self.notes: list[str] = []

    def split(self, found: Iterable[Any], part: str) -> Split:
        images, labels = [], []
        with _logged("timm.data.readers.reader_wds") as passed_over, _explained(self.what, self.config):
            for image, label in found:
                images.append(self._bytes(image))
                labels.append(self._label(label))
        if not images:
            raise UserError(f"{self.what}: {part} has no images")
        self._check_complete(found, len(images), part, passed_over)
        if any(image.shape[0] != self.channels for image in images):
            images = [image.expand(self.channels, -1, -1) for image in images]
        whole = torch.stack(images)
        workers = worker_count(self.config.workers)
        lazy = LazyImages(_Rows(whole), torch.arange(len(whole)), (self.channels, self.side, self.side), workers)
        return Split(lazy, torch.tensor(labels))

    def _bytes(self, image: Image.Image) -> torch.Tensor:
        pixels = pixels_of(image, None)
        self.edges.append(min(pixels.shape[1:]))
        self.side = self.side or self.image_size(self.edges[0])
        self.channels = max(self.channels, pixels.shape[0])
        self.taken += self.channels * self.side**2
        if self.taken > MOST_HELD * physical_memory():
            raise UserError(
                f"{self.what} is read in its order alone, so all images have to be held, and they take more than "
                f"{MOST_HELD:.0%} of this machine's memory: unpack the set into a folder, --data.name folder"
            )
        return resized(pixels.expand(max(self.channels, pixels.shape[0]), -1, -1), self.side)

    def _label(self, label: Any) -> int:
        if not isinstance(label, int) and not hasattr(label, "__index__"):
            raise UserError(f"{self.what}: its labels are {type(label).__name__}, not one class an image")
        return int(label)

    def _check_complete(self, found: Any, count: int, part: str, passed_over: Sequence[str]) -> None:
        """Refuse or count the images that timm passed over because it could not read them."""
        reader = getattr(found, "reader", None)
        promised = int(getattr(reader, "num_samples", 0) or 0)
        lost = max(len(passed_over), promised - count)
        if not lost:
            return
        said = f"{self.what}: {lost} of its {max(promised, count + lost)} {part} images are not readable"
        reasons = "; ".join(passed_over[:3])
        if self.config.unreadable != "skip":
            raise Unreadable({f"{part} images": f"{said} ({reasons or 'the set holds fewer than it says'})"})
        self.notes.append(f"left out: {said.removeprefix(self.what + ': ')}, as data.unreadable=skip says")


@contextmanager
def _logged(name: str) -> Any:
    """The warnings that a logger gives within the block, which are kept from being printed."""
    logger, said = logging.getLogger(name), []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(" ".join(record.getMessage().split()))

    handler, passing = Kept(), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = passing
