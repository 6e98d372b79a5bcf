"""The folder of a run: made once, never shared, and left so that a killed run can go on."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ncreg.checkpoint import load_checkpoint, save_checkpoint
from recipes.config import TrainConfig, UserError, as_yaml
from recipes.image_folder import image_files, parts_of

PACKAGES = ("ncreg", "torch", "torchvision", "timm", "torchmetrics", "numpy", "scikit-learn")

LARGE = 50_000
"""Images of a folder beyond which reading them all once more would hold up a run."""


class RunFolder:
    """config.yaml, environment.json, history.jsonl, summary.json, timing.json, checkpoints/, figures/.

    For data.name=folder with up to 50,000 images also images.json: the files that the run began with, and checksums.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self.writes = writes  # one rank alone does

    @classmethod
    def create(cls, config: TrainConfig, command: Sequence[str]) -> RunFolder:
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
            _replace(run.path / "config.yaml", as_yaml(config))
        except OSError as error:
            raise UserError(f"out={config.out} cannot be written to: {error}; --out FOLDER names another") from None
        return run

    @classmethod
    def unfinished(cls, config: TrainConfig) -> RunFolder | None:
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
            _replace(self.path / name, json.dumps(_strict(content), indent=1, allow_nan=False) + "\n")

    def write_history(self, history: Iterable[Mapping[str, Any]]) -> None:
        """history.jsonl anew."""
        if self.writes:
            with self.writing():
                _replace(self.path / "history.jsonl", "".join(_row(entry) for entry in history))

    def log(self, entry: Mapping[str, Any]) -> None:
        """Add an epoch to history.jsonl."""
        if self.writes:
            with self.writing(), (self.path / "history.jsonl").open("a") as file:
                file.write(_row(entry))

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


def checksums(root: Path) -> dict[str, int]:
    """CRC-32 of every image file that data.name=folder reads under `root`, by its path there; none of a large set."""
    found = [path for top in parts_of(root).values() for path in image_files(top)]
    if len(found) > LARGE:
        return {}
    return {path.relative_to(root).as_posix(): zlib.crc32(path.read_bytes()) for path in found if path.is_file()}


def contents(root: Path) -> str:
    """The images under `root` in a few words, others for other images: their number, and a hash of names and contents.

    Of a set beyond the size up to which there are checksums the files' sizes stand for their contents.
    """
    files = checksums(root) or {
        path.relative_to(root).as_posix(): path.stat().st_size
        for top in parts_of(root).values()
        for path in image_files(top)
    }
    digest = hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()
    return f"{len(files)} images, {digest[:16]}"


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


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _row(entry: Mapping[str, Any]) -> str:
    return json.dumps(_strict(entry), allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment(command: Sequence[str]) -> dict[str, Any]:
    """Where and by what a run was made."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(asked, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        commit = None
    return {
        "command": list(command),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": packages,
        "git_commit": commit,
    }
