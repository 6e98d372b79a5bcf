"""Code of the user's own, named as path/to/file.py:name: loaded, fingerprinted, and kept with the run that used it."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from recipes.core.config import TrainConfig
from recipes.core.errors import UserError
from recipes.core.suggestions import a_kind, did_you_mean

_copies: dict[str, Path] = {}
"""Files that run folders keep, which take the place of those that names point to, by the path in the name."""

_loaded: dict[str, tuple[Path, bytes]] = {}
"""File and text of every module of the user's own that this process has imported, by the module's name."""


def own_names(config: TrainConfig) -> dict[str, str]:
    """The names in a configuration that point to code of the user's own, by a key where they stand."""
    named = {"data.name": config.data.name, "model.head": config.model.head, "model.norm": config.model.norm}
    return {key: name for key, name in (named | {f"loss.{term}": term for term in config.loss}).items() if is_own(name)}


def own_files(config: TrainConfig) -> dict[str, str]:
    """The user's own files that a configuration names, code and costs, by a key where each stands."""
    files = {key: name.rpartition(":")[0] for key, name in own_names(config).items()}
    return files if config.data.cost is None else files | {"data.cost": str(config.data.cost)}


def is_own(name: object) -> bool:
    """Whether a value names code of the user's own.

    Example:
        >>> is_own("losses/mine.py:MyLoss"), is_own("cross_entropy"), is_own("timm:hfds/owner/set")
        (True, False, False)
    """
    return isinstance(name, str) and re.search(r"\.py:", name) is not None


def load_own(name: str, key: str) -> Any:
    """The function or class that `path/to/file.py:name` names; the path is relative to the working folder.

    The file is imported once a process, under a module name of its own; files beside it can be imported by it.

    Args:
        name: of the code.
        key: what messages call it, such as data.name.

    Raises:
        UserError: no such file, no such name in it, something that cannot be called, or an error while importing it.
    """
    path, _, attribute = name.rpartition(":")
    module = _imported(_file(path, f"{key}={name}"), f"{key}={name}")
    known = [word for word in vars(module) if callable(vars(module)[word]) and not word.startswith("_")]
    if not hasattr(module, attribute):
        raise UserError(f"{key}={name}: {path} has no {attribute!r}{did_you_mean(attribute, known)}")
    found = getattr(module, attribute)
    if not callable(found):
        raise UserError(f"{key}={name}: it is {a_kind(found)}, not a function or class")
    return found


def fingerprint(name: str, key: str) -> str:
    """The name with its path replaced by a hash of the file's text: the same wherever the file lies.

    Raises:
        UserError: the file cannot be read.
    """
    path, _, attribute = name.rpartition(":")
    return f"{_digest(_file(path, f'{key}={name}'))}:{attribute}"


def texts(files: Mapping[str, str]) -> dict[str, str]:
    """The text of files by path.

    Args:
        files: their paths by their keys.

    Raises:
        UserError: one of them cannot be read.
    """
    return {path: read_text(path, f"{key}={path}") for key, path in files.items()}


def read_text(path: str | Path, what: str) -> str:
    """The text of a file of the user's own, or of the copy that a run keeps of it.

    Args:
        path: as it was given.
        what: how messages call it.

    Raises:
        UserError: it is not there, or is no text.
    """
    try:
        return _file(str(path), what).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} cannot be read: {error}") from None


def content_digest(path: str | Path, what: str) -> str:
    """A hash of such a file: the same wherever it lies.

    Raises:
        UserError: it is not there.
    """
    return _digest(_file(str(path), what))


def use_copies(copies: Mapping[str, Path]) -> None:
    """From now on, load code from these files in place of those that the paths in names lead to."""
    _copies.update(copies)


class LoadedCode:
    """The own code that this process has loaded; another process that unpickles this has loaded it then too.

    In a pickle it stands before the objects whose classes lie in such code. The text travels, not the path: a file
    that is edited in the meantime changes nothing.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_again, (dict(_loaded),)


def _load_again(loaded: Mapping[str, tuple[Path, bytes]]) -> LoadedCode:
    for module_name, (file, text) in loaded.items():
        if module_name not in sys.modules:
            _executed(module_name, file, text, str(file))
    return LoadedCode()


def _file(path: str, what: str) -> Path:
    file = _copies.get(path, Path(path).expanduser())
    if not file.is_file():
        raise UserError(f"{what}: there is no file {file} (looked for in {Path.cwd()})")
    return file


def _digest(file: Path) -> str:
    return _hash(file.read_bytes())


def _hash(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


def _imported(file: Path, what: str) -> ModuleType:
    text = file.read_bytes()
    module_name = f"own_{re.sub(r'[^A-Za-z0-9]', '_', file.stem)}_{_hash(text)}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    return _executed(module_name, file, text, what)


def _executed(module_name: str, file: Path, text: bytes, what: str) -> ModuleType:
    """The module of a file's text, which is not read again."""
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{what}: {file} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look here
    beside = str(file.resolve().parent)
    if beside not in sys.path:
        sys.path.append(beside)  # last: it hides no installed package
    try:
        exec(compile(text, str(file.absolute()), "exec", dont_inherit=True), vars(module))  # noqa: S102  (it is the user's own code)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        del sys.modules[module_name]
        raise UserError(f"{what}: importing {file} fails{where(error, file)}: {in_a_line(error)}") from None
    _loaded[module_name] = (file.absolute(), text)
    return module


def where(error: BaseException, file: Path) -> str:
    """The last line of a file that an error came through, as words; nothing for an error from elsewhere."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == file.resolve()
    ]
    return f" at line {lines[-1]}" if lines else ""


def in_a_line(error: BaseException) -> str:
    """Class and message of an error, without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(": ")


def raised(name: str, *usual: type[Exception]) -> tuple[type[BaseException], ...]:
    """What building or calling a part may raise: the usual errors, or any if the code is the user's own."""
    return (Exception, SystemExit) if is_own(name) else usual
