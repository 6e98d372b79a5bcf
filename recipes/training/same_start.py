"""Whether the images and the code of a run are still those that it began with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from recipes.core.config import DataConfig, TrainConfig, as_yaml
from recipes.core.errors import UserError
from recipes.core.files import write_atomically, write_json
from recipes.core.own_code import own_files
from recipes.data.fingerprint import checksums, described
from recipes.data.image_folder import image_files, split_folders
from recipes.data.load import Dataset, load
from recipes.data.map_style import Size
from recipes.training.run_dir import UNREADABLE, RunDir

IMAGES = "images.json"
"""The folder of images that a run began with, and the checksums of its files."""

DATA = "data.json"
"""What the data are that a run began with, where they lie in no folder of images."""


def check_code(run: RunDir, config: TrainConfig) -> None:
    """Refuse to go on with other code of the user's own than the run began with.

    Raises:
        UserError: names the file that has changed or is gone.
    """
    copies = run.code()
    for key, path in own_files(config).items():
        if path not in copies:
            continue
        there = Path(path).expanduser()
        if not there.is_file() or there.read_text(encoding="utf-8-sig") != copies[path].read_text(encoding="utf-8"):
            what = "has changed since it began" if there.is_file() else "is gone"
            raise UserError(
                f"run {run.path} cannot be resumed: {there} of {key} {what}; put back what it was, which is kept "
                f"in {copies[path]}, or start a new run"
            )


def check_data(run: RunDir, data: Dataset, *, trained: bool) -> None:
    """Refuse data that are not those that the run began with; a new run writes down what it has.

    Args:
        run: the run.
        data: as they are now.
        trained: whether the run only has to be measured, which needs no training images in their order.

    Raises:
        UserError: names what has changed.
    """
    if data.train_gone and not trained:
        raise UserError(
            f"run {run.path} cannot be resumed: of the images that are gone, {data.train_gone} are for training, "
            "which is not done; put them back, or start a new run"
        )
    if (run.path / IMAGES).is_file() or run.unreadable():
        return  # `load` looks at the files themselves
    now = described(data)
    noted = run.path / DATA
    then = json.loads(noted.read_text(encoding="utf-8")) if noted.is_file() else None
    if then is None and run.writes and not run.epochs:
        run.write(DATA, now)
    elif then is not None and then != now:
        key = next(key for key in now if then.get(key) != now[key])
        raise UserError(
            f"run {run.path}: its data are not those that it began with ({key} was {then.get(key)}, is {now[key]}); "
            "they must be as they were"
        )


def check_images(run: RunDir, config: TrainConfig) -> None:
    """Refuse other images than the run began with, wherever they lie now."""
    if not (run.path / IMAGES).is_file():
        return
    root, then = config.data.root, json.loads((run.path / IMAGES).read_text(encoding="utf-8"))["files"]
    now = checksums(root)
    mended = set(unreadable_now(run, config))
    for name in sorted(then.keys() | now.keys()):
        if str(root / name) not in mended and then.get(name) != now.get(name):
            what = "is gone" if name not in now else "is new" if name not in then else "has changed"
            raise UserError(
                f"run {run.path}: image {root / name} {what} since it began; its images must be as they were"
            )


def unreadable_now(run: RunDir, config: TrainConfig) -> list[str]:
    """The images at which a run ended because they could not be read, by their paths under the data.root of now."""
    began = run.begun_with().data.root
    paths = map(Path, run.unreadable())
    return [str(config.data.root / path.relative_to(began) if path.is_relative_to(began) else path) for path in paths]


def moved(run: RunDir, config: TrainConfig) -> bool:
    """Whether data.root is another place than the run's folder names."""
    return config.data.root != run.begun_with().data.root


def own_data(run: RunDir, config: TrainConfig, image_size: Size) -> Dataset:
    """The data of a run that is not to be trained, divided as they were; elsewhere they must be the same.

    Raises:
        UserError: they are not, or cannot be loaded.
    """
    elsewhere = moved(run, config)
    if elsewhere:
        check_images(run, config)
    former = unreadable_now(run, config) if elsewhere else former_images(run, config.data)
    data = load(config.data, seed=config.seed, image_size=image_size, former=former)
    if elsewhere:
        check_data(RunDir(run.path, writes=False), data, trained=True)
    return data


def record_root(run: RunDir, config: TrainConfig) -> None:
    """Where a run's images have moved and are known to be the same, write their new place into its folder.

    config.yaml comes last: until then a run that is killed has to be told the place once more.
    """
    if not run.writes or not moved(run, config):
        return
    former = run.begun_with()
    with run.writing():
        if (run.path / IMAGES).is_file():
            began = json.loads((run.path / IMAGES).read_text(encoding="utf-8"))
            write_json(run.path / IMAGES, began | {"root": str(config.data.root)})
        if run.unreadable():
            write_json(run.path / UNREADABLE, {"images": unreadable_now(run, config)})
        path = run.path / "config.yaml"
        comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        now = replace(former, data=replace(former.data, root=config.data.root))
        write_atomically(path, "\n".join([*comments, as_yaml(now)]))


def former_images(run: RunDir, data: DataConfig) -> list[str]:
    """Images that count in drawing the run's splits again, also those that it did without in the end.

    Args:
        run: the run.
        data: what is read; other data than the run's own has no such images.

    Raises:
        UserError: images were added to those that the run divided, or taken from them.
    """
    noted = run.path / IMAGES
    if data.name != "folder" or not noted.is_file():
        return []
    began, former = json.loads(noted.read_text(encoding="utf-8")), run.unreadable()
    root = Path(began["root"])
    if data.root != root or not root.is_dir():
        return []
    divided = split_folders(root)["train"]
    then = {path for path in (root / name for name in began["files"]) if path.is_relative_to(divided)}
    now = set(image_files(divided))
    for path in sorted((then ^ now) - set(map(Path, former))):
        what = "is new" if path in now else "is gone"
        raise UserError(
            f"RUN {run.path}: image {path} {what} since the run divided its images; drawn again, the splits would "
            "be others, with training images among those tested: put its images back as they were, or name another "
            "folder with --data.name folder --data.root FOLDER --split all"
        )
    return former
