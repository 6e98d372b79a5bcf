"""The folder of a run: made by one process, and always left so that a killed run can be resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from ncreg.checkpoint import load_checkpoint, save_checkpoint
from recipes.core.cli import BOUNDS, ON_RESUME, config_of
from recipes.core.config import TrainConfig, as_yaml
from recipes.core.errors import RankError, UserError
from recipes.core.files import (
    CAN_LOCK,
    copy_atomically,
    environment,
    fitting,
    json_row,
    locked,
    write_atomically,
    write_json,
)
from recipes.data.fingerprint import checksums
from recipes.data.unreadable import Unreadable

CODE = "code.json"
"""Names the run's copy of each file of the user's own that it uses."""

UNREADABLE = "unreadable.json"
"""Names the images at which a run ended because they could not be read."""

EXTENSIONS = "extensions.json"
"""How the bounds of a run were moved."""


class RunDir:
    """A run's files: config.yaml, environment.json, history.jsonl, summary.json, timing.json, checkpoints/, figures/.

    A run on a folder of up to 50,000 images also has images.json, the checksums of the files that it began with, other
    runs data.json, the sizes and labels of their data. Under torchrun only one rank writes; on the others `writes` is
    false.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self.writes = writes

    @classmethod
    def create(
        cls,
        out: Path,
        name: str,
        *,
        config: str,
        command: Sequence[str],
        images: Path | None = None,
        code: Mapping[str, str] | None = None,
    ) -> RunDir:
        """A new folder in `out`, called `name` and the time; never one that exists.

        Args:
            out: folder of the runs.
            name: first part of the folder's name.
            config: the configuration as YAML.
            command: the words of the command line, for environment.json.
            images: folder of the images, if they lie in one.
            code: text of the files of the user's own that the run uses, by path.

        Raises:
            UserError: `out` cannot be written to.
        """
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        try:
            run = cls(new_folder(out, f"{fitting(name)}-{stamp}"))
            for folder in ("checkpoints", "figures"):
                (run.path / folder).mkdir()
            run.write("environment.json", environment(command))
            files = {} if images is None else checksums(images)
            if files:
                run.write("images.json", {"root": str(images), "files": files})
            run._keep_code(code or {})
            write_atomically(run.path / "config.yaml", config)
        except OSError as error:
            raise UserError(f"out={out} cannot be written to: {error}; --out FOLDER names another") from None
        return run

    @classmethod
    def unfinished(cls, out: Path, config: str, *, unreadable: bool = False) -> RunDir | None:
        """The unfinished run in `out` with this configuration (as YAML) that has the most epochs, or None.

        Keys that change nothing of what a run computes, such as quiet and data.workers, may differ; data.root may not.
        Of several with as many epochs, the newest; dates alone would mislead after a clock was set back. With
        `unreadable`, only runs count that ended at images which could not be read.
        """
        wanted = _computed(config)
        found = [path.parent for path in out.glob("*/config.yaml") if _computed(_text(path)) == wanted]
        started = [run for run in map(cls, found) if not run.finished and run.checkpoints()]
        started = [run for run in started if run.unreadable()] if unreadable else started
        return max(started, key=lambda run: (run.epochs, run.path.stat().st_mtime_ns), default=None)

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return (self.path / "summary.json").exists()

    @property
    def epochs(self) -> int:
        """Epochs in history.jsonl."""
        history = self.path / "history.jsonl"
        return history.read_bytes().count(b"\n") if history.is_file() else 0

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn a full disk or a folder that cannot be written to into one line that names the last good checkpoint."""
        try:
            yield
        except OSError as error:
            good = self.checkpoints()
            kept = f"the last good checkpoint is {good[0]}" if good else "no checkpoint was written yet"
            raise UserError(f"run {self.path} cannot be written to: {error}; {kept}") from None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from training the run: each would write its steps over the other's.

        Raises:
            UserError: another process trains it.
        """
        if not CAN_LOCK:
            yield
            return
        with ExitStack() as held:
            with self.writing():
                lock = held.enter_context(locked(self.path))
            if lock is None:
                raise UserError(
                    f"run {self.path} is being trained by another process: wait for its end, or stop it; without "
                    "--resume a run of its own begins"
                )
            yield

    @contextmanager
    def noting_unreadable(self) -> Iterator[None]:
        """Note images that turn out to be unreadable: the run can go on once they are mended or gone.

        Raises:
            RankError: from within the block, in place of `Unreadable`: says how to go on.
        """
        try:
            yield
        except Unreadable as error:
            with self.writing():
                write_json(self.path / UNREADABLE, {"images": sorted({*self.unreadable(), *error.images})})
            raise RankError(
                f"{error}; nothing of {self.path} is lost: mend or remove what is unreadable, and the same command "
                "goes on with it; a new run leaves out such images with --data.unreadable skip"
            ) from None

    def unreadable(self) -> list[str]:
        """The images at which the run ended because they could not be read."""
        noted = self.path / UNREADABLE
        return list(json.loads(noted.read_text(encoding="utf-8"))["images"]) if noted.is_file() else []

    def all_read(self) -> None:
        """The run has come to its end: of the unreadable images, note those alone that are gone."""
        gone = [image for image in self.unreadable() if not Path(image).is_file()]
        (self.path / UNREADABLE).unlink(missing_ok=True)
        if gone:
            self.write(UNREADABLE, {"images": gone})

    def _keep_code(self, code: Mapping[str, str]) -> None:
        for number, (path, text) in enumerate(code.items()):
            (self.path / "code").mkdir(exist_ok=True)
            write_atomically(self.path / "code" / f"{number}-{Path(path).name}", text)
        if code:
            write_json(self.path / CODE, {path: f"{n}-{Path(path).name}" for n, path in enumerate(code)})

    def code(self) -> dict[str, Path]:
        """The run's copies of files of the user's own, by the path in the configuration."""
        noted = self.path / CODE
        copies = json.loads(noted.read_text(encoding="utf-8")) if noted.is_file() else {}
        return {path: self.path / "code" / name for path, name in copies.items()}

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file, whole or not at all; numbers that are not finite become null."""
        with self.writing():
            write_json(self.path / name, content)

    def write_history(self, history: Iterable[Mapping[str, Any]]) -> None:
        """Write history.jsonl anew."""
        if self.writes:
            with self.writing():
                write_atomically(self.path / "history.jsonl", "".join(json_row(record) for record in history))

    def log(self, record: Mapping[str, Any]) -> None:
        """Add an epoch's record to history.jsonl."""
        if self.writes:
            with self.writing(), (self.path / "history.jsonl").open("a", encoding="utf-8") as file:
                file.write(json_row(record))

    def config(self, changes: Sequence[str] = ()) -> TrainConfig:
        """The configuration that the run began with, with changes for the rest of it as words of a command line.

        Raises:
            UserError: the run is finished and its bounds are not to move, or this is no run folder.
        """
        if not (self.path / "config.yaml").is_file():
            raise UserError(
                f"resume={self.path} is no run folder: it has no config.yaml; name the folder of a run, or auto"
            )
        config = self.begun_with(changes)
        if self.finished and config.tpt == self.begun_with().tpt:
            raise UserError(
                f"run {self.path} is finished: its summary.json is there; nothing to resume. With a larger bound, such "
                f"as --{BOUNDS[0]} N, it trains longer"
            )
        return config

    def begun_with(self, changes: Sequence[str] = ()) -> TrainConfig:
        """The configuration in its config.yaml, whether it is finished or not."""
        return config_of(self.path, changes)

    def extensions(self) -> list[dict[str, Any]]:
        """How its bounds were moved: the epoch, what they were and became, and by which command."""
        noted = self.path / EXTENSIONS
        return list(json.loads(noted.read_text(encoding="utf-8"))["extensions"]) if noted.is_file() else []

    def checkpoint(self, name: str) -> Path:
        """Path of a checkpoint: last, previous, best or onset."""
        return self.path / "checkpoints" / f"{name}.pt"

    def checkpoints(self) -> list[Path]:
        """Checkpoints that a run can be resumed from, newest first."""
        return [path for path in map(self.checkpoint, ("last", "previous")) if path.exists()]

    def save(self, state: Mapping[str, Any], *also: str) -> None:
        """Write last.pt and keep the one before it as previous.pt; `also` names copies (best, onset)."""
        if not self.writes:
            return
        coming = self.checkpoint("coming")
        with self.writing():
            try:
                save_checkpoint(coming, state)
                for name in also:
                    copy_atomically(coming, self.checkpoint(name))
            except BaseException:
                coming.unlink(missing_ok=True)
                raise
            if self.checkpoint("last").exists():
                os.replace(self.checkpoint("last"), self.checkpoint("previous"))
            os.replace(coming, self.checkpoint("last"))

    def load(self) -> tuple[dict[str, Any], str]:
        """The newest undamaged checkpoint, and a sentence about damaged ones that were skipped.

        Raises:
            UserError: there is none.
        """
        damaged: list[str] = []
        for path in self.checkpoints():
            try:
                state = load_checkpoint(path)
            except ValueError as error:
                damaged.append(str(error))
                continue
            if "epoch" in state:
                return state, "; ".join(damaged)
            damaged.append(f"checkpoint {path} was not written by a training run")
        why = "; ".join(damaged) or "it has no checkpoint; without --resume a new run begins"
        raise UserError(f"run {self.path} cannot be resumed: {why}")


def _text(path: Path) -> str:
    """The text of a file; none where it is gone, cannot be read or is no text: that folder is no run to go on with."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _computed(config: str) -> Any:
    """The values of a configuration in YAML that say what a run computes; None where it cannot be read.

    Keys that came after it was written have their defaults.
    """
    try:
        given = yaml.safe_load(config)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    if not isinstance(given, dict):
        return None
    defaults: dict[str, Any] = yaml.safe_load(as_yaml(TrainConfig()))
    values = {
        key: default | given[key]
        if isinstance(default, dict) and key != "loss" and isinstance(given.get(key), dict)
        else given.get(key, default)
        for key, default in defaults.items()
    } | {key: value for key, value in given.items() if key not in defaults}
    for key in set(ON_RESUME) - {"data.root", *BOUNDS}:
        group, _, name = key.rpartition(".")
        inner = values.get(group) if group else values
        if isinstance(inner, dict):
            inner.pop(name, None)
    return values


def new_folder(out: Path, name: str) -> Path:
    """Make a folder in `out`, called `name`, or `name-2`, `name-3` … where there is one."""
    out.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, 10_000):
        path = out / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise FileExistsError(f"{out} has 9,999 runs of the name {name}")
