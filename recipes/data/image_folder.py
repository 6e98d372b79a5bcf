"""A data set from a folder of images: its splits, its classes, its files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from recipes.core.config import DataConfig
from recipes.core.errors import NotHere, UserError
from recipes.core.memory import is_out_of_memory
from recipes.data.class_names import alike, check_composition, few
from recipes.data.decode import WRONG_IMAGE, decoded, has_more_pages, pages_notes
from recipes.data.lazy_images import LazyImages, worker_count
from recipes.data.split import SPLIT_NAMES, Source, Split, resized
from recipes.data.unreadable import Unreadable

SYSTEM_FOLDERS = frozenset(
    {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
)
"""Folders that macOS, Windows, Linux and network drives put beside images; @eaDir holds thumbnails of all of them."""

HIDDEN = "whose name or folder begins with a dot, or whose folder is one of the system's, such as @eaDir"

LOOKED_AT = 36
"""Files, at least where there are so many, whose headers tell the size of a set's images."""


def image_folder(
    config: DataConfig,
    image_size: Callable[[int | None], int],
    *,
    former: Collection[str] = (),
    class_names: tuple[str, ...] | None = None,
    partial: bool = False,
) -> Source:
    """Images in root/train/CLASS, with root/val or root/test or both beside it, or in root/CLASS alone.

    If only one of val and test exists, it is the test split; if both exist, val is the validation split. Links are
    followed; names that begin with a dot and the folders of `SYSTEM_FOLDERS` are skipped.

    Args:
        config: names the folder.
        image_size: maps None to the side to use.
        former: files that take their place among the others even if they are gone by now.
        class_names: of a classifier that is evaluated on the images; the folder may lack some of these classes.
        partial: whether the images are only evaluated on: one class is enough, and a split may lack some.

    Raises:
        UserError: no folder, too few classes, a class without images, splits that do not fit together, or
            split folders where class folders belong.
    """
    parts = split_folders(config.root)
    train = parts["train"]
    trained = tuple(sorted(path.name for path in _folders(train)))
    found = tuple(sorted({path.name for folder in parts.values() for path in _folders(folder)}))
    for folder in parts.values():
        check_composition([path.name for path in _folders(folder)], str(folder))
    if class_names is not None:
        names = _known(found, class_names)
    else:
        names = found if partial else trained
        _check_number(train, len(names), least=1 if partial else 2)
    notes = [*_strange_classes(train), *_left_out(config.root, parts)]
    side, workers = image_size(None), worker_count(config.workers)
    whole = class_names is None and not partial
    splits = {part: _split(folder, names, train, side, workers, former, whole) for part, folder in parts.items()}
    if "test" not in splits and "val" in splits:
        splits["test"] = splits.pop("val")
    gone = frozenset(file for file in former if not Path(file).is_file())
    if gone:
        notes.append(f"left out, as they are gone: {', '.join(sorted(gone))}")
    read: Any = splits["train"].images
    edge, on_pages = read.read.look()
    notes += on_pages
    parts_read = (splits["train"], splits.get("test"), splits.get("val"))
    return Source(names, *parts_read, tuple(notes), gone=gone, native_side=edge)


def _check_number(train: Path, classes: int, *, least: int) -> None:
    if classes < least:
        count = f"{classes} class folder{'s' * (classes != 1)}"
        needs = "a classifier needs" if least > 1 else "there must be"
        raise UserError(f"{train} has {count}: {needs} at least {least}")


def _known(found: tuple[str, ...], class_names: tuple[str, ...]) -> tuple[str, ...]:
    """The classes of a classifier, if those found are among them."""
    if not found or set(found) - set(class_names):
        near = alike([name for name in found if name not in class_names], class_names)
        raise UserError(f"classes differ: the run knows {class_names}, the data has {found}{near}")
    return class_names


def split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split; the root itself is the training split if the class folders are directly in it.

    Raises:
        UserError: no folder, one split under two names, or a split without a training split beside it.
    """
    if not root.is_dir():
        here = "" if root.is_absolute() else f" in {Path.cwd()}"
        raise NotHere(f"data.root={root} is not a folder{here}: --data.root FOLDER with a folder for each class in it")
    folders = _folders(root)
    parts: dict[str, Path] = {}
    for part, names in SPLIT_NAMES.items():
        # A folder with images and no folders in it is a class, even if it is called train.
        there = [path for name in names for path in folders if path.name.lower() == name and _folders(path)]
        if len(there) > 1:
            raise UserError(f"{there[0]} and {there[1]} are both for {part}: remove one of them")
        if there:
            parts[part] = there[0]
    if parts and "train" not in parts:
        other = next(iter(parts.values()))
        raise UserError(f"{other} has no {root / 'train'} beside it: put the training images there")
    return parts or {"train": root}


def image_files(folder: Path) -> list[Path]:
    """Image files in a folder and its subfolders, known by their suffix; hidden ones are left out.

    Raises:
        UserError: a pipe, socket or device has such a suffix: reading it might never end.
    """
    found = sorted(path for path, hidden in _files(folder) if not hidden and _is_image(path))
    for path in found:
        if not path.is_file() and path.exists():
            raise UserError(f"{path} is a pipe, socket or device and no file: remove it")
    return found


def hidden_images(folder: Path) -> int:
    """Number of images that `image_files` leaves out because their name or that of a folder is hidden."""
    return sum(hidden and _is_image(path) for path, hidden in _files(folder))


def other_files(folder: Path) -> Counter[str]:
    """How many files `image_files` leaves out because of their suffix, by suffix; hidden ones do not count."""
    return Counter(
        path.suffix or "without a suffix" for path, hidden in _files(folder) if not hidden and not _is_image(path)
    )


def _visible_files(folder: Path) -> list[os.DirEntry[str]]:
    """The files that lie in a folder itself."""
    return [entry for entry in _entries(folder) if not _is_folder(entry) and not _is_hidden(entry.name)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one; a link into a circle is none."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMG_EXTENSIONS


def _files(folder: Path, hidden: bool = False, above: tuple[Path, ...] = ()) -> Iterator[tuple[Path, bool]]:
    """Files in a folder and its subfolders, and whether they are hidden; links to a folder above are not followed."""
    real = folder.resolve()
    if any(place.is_relative_to(real) for place in above):
        return
    for entry in _entries(folder):
        unseen = hidden or _is_hidden(entry.name)
        if _is_folder(entry):
            yield from _files(Path(entry.path), unseen, (*above, real))
        else:
            yield Path(entry.path), unseen


def _folders(folder: Path) -> list[Path]:
    return sorted(Path(entry.path) for entry in _entries(folder) if _is_folder(entry) and not _is_hidden(entry.name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM_FOLDERS


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None


def _strange_classes(train: Path) -> Iterable[str]:
    """A note if the class folders look like something else.

    Raises:
        UserError: they are splits of a set, or hold such splits.
    """
    classes = _folders(train)
    own = [path for path in classes if any(_is_image(Path(entry.name)) for entry in _entries(path))]
    inside = {path: [folder.name for folder in _folders(path)] for path in classes if path not in own}
    for path, names in [(train, [path.name for path in classes]), *inside.items()]:
        found = {part for part, known in SPLIT_NAMES.items() if {name.lower() for name in names} & set(known)}
        if len(found) > 1 and (path != train or len(names) == len(found)):
            raise UserError(
                f"{path} holds {', '.join(names)}, which are parts of a set: --data.root names the folder that holds "
                f"the parts, and each part holds a folder for each class"
            )
    same = {tuple(names) for names in inside.values()}
    if len(inside) == len(classes) and len(same) == 1 and len(held := same.pop()) > 1:
        yield (
            f"each class ({', '.join(path.name for path in classes)}) holds no image but the same folders "
            f"({', '.join(held)}): if these are the classes, --data.root is one level too high"
        )


def _split(
    folder: Path,
    names: tuple[str, ...],
    train: Path,
    side: int,
    workers: int,
    former: Collection[str],
    whole: bool,
) -> Split:
    """The images of a split; `whole` demands some of every class."""
    unknown = sorted(path.name for path in _folders(folder) if path.name not in names)
    if unknown:
        raise UserError(f"{folder} has classes without training images: {few(unknown)}{alike(unknown, names)}")
    were = {path for path in map(Path, former) if path.is_relative_to(folder)}
    files = []
    for index, name in enumerate(names):
        place = folder / name
        here = set(image_files(place)) if place.is_dir() else set()
        files += [(path, index) for path in sorted(here | {path for path in were if path.is_relative_to(place)})]
    if not files:
        raise UserError(f"{folder} has no images ({', '.join(IMG_EXTENSIONS)}) in its class folders")
    present = {index for _, index in files}
    absent = [name for index, name in enumerate(names) if index not in present]
    if absent and whole:
        away = few([str(train / name) for name in absent])
        raise UserError(
            f"no image of class {few(absent)} in {folder}: add some, or do without the class and remove {away}"
            + ("" if folder == train else f" too, or remove {folder}, for its part to be drawn")
        )
    read = Files(np.array([os.fsencode(path) for path, _ in files]), side)
    images = LazyImages(read, torch.arange(len(files)), (3, side, side), workers)
    return Split(images, torch.tensor([index for _, index in files]))


def _left_out(root: Path, parts: dict[str, Path]) -> Iterable[str]:
    """Notes on files and folders in the set's folder that are not read; of hidden files only images are mentioned."""
    used = set(parts.values())
    beside = [] if root in used else sorted(path.name for path in _folders(root) if path not in used)
    if beside:
        yield f"left out: {', '.join(str(root / name) for name in beside)}, beside {', '.join(map(str, sorted(used)))}"
    strange: Counter[str] = Counter()
    unseen = 0
    for part in used:
        strange += other_files(part)
        strange["images outside class folders"] += sum(_is_image(Path(entry.name)) for entry in _visible_files(part))
        unseen += hidden_images(part)
    if +strange:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted((+strange).items()))
        yield f"left out: files in {root} that are no images of a class ({kinds}); read are {', '.join(IMG_EXTENSIONS)}"
    if unseen:
        yield f"left out: hidden images in {root}, {HIDDEN} ({unseen})"


@dataclass(frozen=True)
class Files:
    """Reads image files by their number; all paths (N,) are in one array, which worker processes share."""

    paths: np.ndarray
    side: int

    def __call__(self, number: int) -> Tensor:
        """An image as uint8 (3, side, side)."""
        return read_image(self.path(number), self.side)

    def path(self, number: int) -> Path:
        """The file of an image."""
        return Path(os.fsdecode(self.paths[number]))

    def check(self, number: int) -> None:
        """See whether the file has the header of an image.

        Raises:
            Unreadable: it has not, or cannot be opened.
        """
        with self._opened(number):
            pass

    def look(self) -> tuple[int | None, list[str]]:
        """What a few dozen files say, spread over all of them: the median shorter edge, and notes on files with pages.

        The edge is in pixels, None if none of them can be read.
        """
        count, edges, paged = len(self.paths), [], []
        for number in range(0, count, max(1, count // LOOKED_AT)):
            with suppress(Unreadable):
                with self._opened(number) as opened:
                    edges.append(min(opened.size))
                    paged += [self.path(number)] if has_more_pages(opened) else []
        return (median_low(edges) if edges else None), pages_notes(paged, len(edges))

    @contextmanager
    def _opened(self, number: int) -> Iterator[Image.Image]:
        """An image of which no more than the header has been read."""
        with _named(self.path(number)) as path, Image.open(path) as opened:
            yield opened


@contextmanager
def _named(path: Path) -> Iterator[Path]:
    """Turn what Pillow raises into the error that names the file."""
    try:
        yield path
    except WRONG_IMAGE as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).replace(str(path), "").split()).strip(" :'") or type(error).__name__
        raise Unreadable({str(path): f"{path} is not a readable image ({reason}): repair or remove it"}) from None


def read_image(path: Path, side: int, channels: int = 3) -> Tensor:
    """An image file as uint8 (channels, side, side), RGB or gray, see `decoded`; the EXIF orientation is ignored.

    Raises:
        Unreadable: the file is not a readable image, or its pixel values have no known range.
    """
    with _named(path), Image.open(path) as opened:
        image = decoded(opened, channels)
    return resized(image, side)
