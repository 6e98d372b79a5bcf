"""Files that are written whole or not at all, strict JSON, locks, and a note of where a result was made."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from recipes.core.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CAN_LOCK = fcntl is not None
"""Whether the system has the locks of `locked`."""

LONGEST_NAME = 180
"""Bytes of a name that the application makes up; file systems take 255, of which it adds dates and suffixes."""

PACKAGES = ("ncreg", "torch", "torchvision", "timm", "torchmetrics", "numpy", "scikit-learn")


def file_name(text: str) -> str:
    """A text as part of a file's name: a hyphen takes the place of what such a name cannot hold.

    Example:
        >>> file_name("timm:hfds/owner/set"), file_name("torchvision.CIFAR10")
        ('timm-hfds-owner-set', 'torchvision.CIFAR10')
    """
    return re.sub(r"[^\w.-]+", "-", text).strip("-")


def fitting(name: str, most: int = LONGEST_NAME) -> str:
    """A name of at most `most` bytes: a longer one keeps its beginning, and a checksum tells it from others.

    Example:
        >>> fitting("short"), fitting("x" * 300, 20)
        ('short', 'xxxxxxxxxxx-1b432d13')
    """
    whole = os.fsencode(name)
    if len(whole) <= most:
        return name
    return f"{whole[: most - 9].decode('utf-8', errors='ignore')}-{zlib.crc32(whole):08x}"


def check_folder(folder: Path, option: str) -> None:
    """Refuse a folder for results that cannot be made or written to, before the work whose results it takes.

    Raises:
        UserError: names the option.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{option} {folder} cannot be written to: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{option} {folder} cannot be written to: no permission in {there}")


def check_file(file: Path, option: str) -> None:
    """Refuse a file for results that cannot be written, before the work whose results it takes.

    Raises:
        UserError: names the option.
    """
    if file.is_dir():
        raise UserError(f"{option} {file} cannot be written: it is a folder")
    if not file.absolute().parent.exists():
        raise UserError(f"{option} {file} cannot be written: the folder {file.parent} does not exist")
    check_folder(file.parent, option)
    if file.exists() and not os.access(file, os.W_OK):
        raise UserError(f"{option} {file} cannot be written: no permission")


def write_atomically(path: Path, text: str) -> None:
    """Write a text file, whole or not at all: a reader never sees half of it."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8", errors="surrogateescape")  # names of files are any bytes
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def copy_atomically(source: Path, path: Path) -> None:
    """Copy a file, whole or not at all, and onto the disk itself."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        shutil.copyfile(source, unfinished)
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all; a number that is not finite becomes null."""
    write_atomically(path, json.dumps(strict(content), indent=1, allow_nan=False) + "\n")


def path_of_its_own(folder: Path, name: str, about: Mapping[str, object]) -> Path:
    """Where to write a result: folder/name.json, or name-2, name-3 … where a file there is about something else.

    Args:
        folder: of the results.
        name: of the file, without .json.
        about: keys of the result that say what it is about, with their values; paths are the same from any folder.
    """
    for attempt in itertools.count(1):
        path = folder / (f"{name}.json" if attempt == 1 else f"{name}-{attempt}.json")
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none, or a damaged one
            break
        if isinstance(held, dict) and all(_same(held.get(key), value) for key, value in about.items()):
            break
    if attempt > 1:
        note = f"note: {folder / name}.json holds other results: these go to {path.name}"
        print(note, file=sys.stderr)
    return path


def _same(one: object, other: object) -> bool:
    return os.path.abspath(str(one)) == os.path.abspath(str(other))


def json_row(entry: Mapping[str, Any]) -> str:
    """One line of a .jsonl file."""
    return json.dumps(strict(entry), allow_nan=False) + "\n"


def strict(value: Any) -> Any:
    """The value with null in place of every float that is not finite, as strict JSON needs it."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment(command: Sequence[str]) -> dict[str, Any]:
    """Command, versions, platform, processor and commit behind a result."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    command_line = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(command_line, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        commit = None
    return {
        "command": list(command),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": processor(),
        "packages": packages,
        "git_commit": commit,
    }


def processor() -> str:
    """The processor's name, where the system tells it, and the vector instructions that torch uses on it.

    Both change the last bits of a run's numbers, and over many steps the run.
    """
    import torch  # here: whoever only writes a file need not wait for it

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(named, "") or platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[int | None]:
    """Lock a folder: gives the lock's file descriptor, or None if another process holds it and `wait` is false.

    The kernel releases the lock when the last process that holds it ends, however it ends. A file system without
    locks, as Lustre and NFS can be mounted, goes unlocked, and a note says so.

    Raises:
        UserError: the system has no such locks (Windows).
    """
    if not CAN_LOCK:
        raise UserError("evaluations and studies lock their folders as POSIX does: run them on Linux, macOS or WSL")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        except OSError as error:
            note = f"note: the file system of {folder} has no locks ({error.strerror}): keep other processes from it"
            print(note, file=sys.stderr)
        yield descriptor
    finally:
        os.close(descriptor)
