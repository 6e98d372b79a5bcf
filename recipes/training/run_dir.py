"""The folder of a run: made once, never shared, and left so that a killed run can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from ncreg.checkpoint import load_checkpoint, save_checkpoint
from recipes.core.config import TrainConfig, as_yaml
from recipes.core.errors import UserError
from recipes.core.files import environment, json_row, strict, write_atomically
from recipes.data.fingerprint import checksums


class RunDir:
    """config.yaml, environment.json, history.jsonl, summary.json, timing.json, checkpoints/, figures/.

    For data.name=folder with up to 50,000 images also images.json: the files that the run began with, and checksums.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self.writes = writes  # one rank alone does

    @classmethod
    def create(cls, config: TrainConfig, command: Sequence[str]) -> RunDir:
        """A new folder under `config.out`, never one that exists."""
        backbone = config.model.backbone.replace(":", "/").rstrip("/").rpartition("/")[2]  # local-dir:/a/b gives b
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        name = f"{config.data.name}-{config.recipe}-{backbone}-seed{config.seed}-{stamp}"
        try:
            run = cls(_new_folder(config.out, name))
            for part in ("checkpoints", "figures"):
                (run.path / part).mkdir()
            run.write("environment.json", environment(command))
            files = checksums(config.data.root) if config.data.name == "folder" else {}
            if files:
                run.write("images.json", {"root": str(config.data.root), "files": files})
            write_atomically(run.path / "config.yaml", as_yaml(config))
        except OSError as error:
            raise UserError(f"out={config.out} cannot be written to: {error}; --out FOLDER names another") from None
        return run

    @classmethod
    def unfinished(cls, config: TrainConfig) -> RunDir | None:
        """The run under `config.out` of the same configuration, begun and not finished, that has come furthest.

        Among those of as many epochs the newest: dates alone would mislead after a clock that was set back.
        """
        text = as_yaml(config)
        found = [path.parent for path in config.out.glob("*/config.yaml") if path.read_text() == text]
        open_ones = [cls(path) for path in found if not (path / "summary.json").exists()]
        started = [run for run in open_ones if run.checkpoints()]
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
        """Turn a full disk or a folder that cannot be written into one line that says what is left."""
        try:
            yield
        except OSError as error:
            good = self.checkpoints()
            kept = f"the last good checkpoint is {good[0]}" if good else "no checkpoint was written yet"
            raise UserError(f"run {self.path} cannot be written to: {error}; {kept}") from None

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """A JSON file, whole or not at all; what is not a number becomes null."""
        with self.writing():
            write_atomically(self.path / name, json.dumps(strict(content), indent=1, allow_nan=False) + "\n")

    def write_history(self, history: Iterable[Mapping[str, Any]]) -> None:
        """history.jsonl anew."""
        if self.writes:
            with self.writing():
                write_atomically(self.path / "history.jsonl", "".join(json_row(entry) for entry in history))

    def log(self, entry: Mapping[str, Any]) -> None:
        """Add an epoch to history.jsonl."""
        if self.writes:
            with self.writing(), (self.path / "history.jsonl").open("a") as file:
                file.write(json_row(entry))

    def checkpoint(self, name: str) -> Path:
        """Path of a checkpoint: last, previous, best or onset."""
        return self.path / "checkpoints" / f"{name}.pt"

    def checkpoints(self) -> list[Path]:
        """Those to go on from, best first."""
        return [path for path in map(self.checkpoint, ("last", "previous")) if path.exists()]

    def save(self, state: Mapping[str, Any], *also: str) -> None:
        """Write last.pt and keep the one before as previous.pt; `also` names copies (best, onset)."""
        if not self.writes:
            return
        coming = self.checkpoint("coming")
        with self.writing():
            save_checkpoint(coming, state)
            for name in also:
                save_checkpoint(self.checkpoint(name), state)
            if self.checkpoint("last").exists():
                os.replace(self.checkpoint("last"), self.checkpoint("previous"))
            os.replace(coming, self.checkpoint("last"))

    def load(self) -> tuple[dict[str, Any], str]:
        """The newest whole checkpoint, and a word on those that were passed over.

        Raises:
            UserError: there is none, or an image of the run is gone, changed or new.
        """
        self._check_images()
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
        why = "; ".join(damaged) or "it has no checkpoint"
        raise UserError(f"run {self.path} cannot be resumed: {why}")

    def _check_images(self) -> None:
        """Other images would make another run of it, without a word."""
        if not (self.path / "images.json").is_file():
            return
        began = json.loads((self.path / "images.json").read_text())
        root, then = Path(began["root"]), began["files"]
        now = checksums(root)
        for name in sorted(then.keys() | now.keys()):
            if then.get(name) != now.get(name):
                what = "is gone" if name not in now else "is new" if name not in then else "has changed"
                raise UserError(
                    f"run {self.path} cannot be resumed: image {root / name} {what} since it began; "
                    "put its images back as they were, or start a new run"
                )


def _new_folder(out: Path, name: str) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, 10_000):
        path = out / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise FileExistsError(f"{out} has 9,999 runs of the name {name}")
