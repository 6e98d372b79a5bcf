"""The typed result of an evaluation and its file, results.json: strict JSON with a version, complete by parts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from recipes.core.errors import UserError
from recipes.training.run_dir import RunDir

SCHEMA = 1
"""Version of results.json. A file of another version is not read, and not overwritten either."""

LONGEST = 100_000
"""Numbers that one tensor of a result may have: more is data, not a result."""


class Damaged(UserError):
    """A results.json that was cut off or overwritten: nothing of it can be kept."""


@dataclass(frozen=True)
class About:
    """What was evaluated, and how: parts are only put together under the same answers.

    What has a default came later: a file without it was made so. `image_share` is the share of the preset's numbers of
    images that was looked at, below 1 where the images are large (`Preset.for_images`); `attacked` is the number of
    attacked images that was asked for in place of the preset's.
    """

    run: str
    recipe: str
    data: str
    backbone: str
    run_seed: int
    checkpoint: str
    checkpoint_sha256: str
    preset: str
    epsilon: float
    norm: str
    seed: int
    sets: tuple[str, ...] | None
    split: str = "test"
    image_share: float = 1.0
    attacked: int | None = None


@dataclass
class Result:
    """An evaluation: what it is about, by what it was made, its parts by name, and all that speaks against it.

    Attributes:
        about: what was evaluated, and how.
        environment: packages and command of the call that added the last part.
        parts: the outcome of each part, plain numbers, strings, lists and dicts.
        commits: the commit that made each part; null outside a repository.
        warnings: what was found suspicious, each with the part that says so.
        skipped: parts that could not be had here, with the reason.
    """

    about: About
    environment: dict[str, Any]
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    commits: dict[str, str | None] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """results.json in `folder`, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        RunDir(folder).write("results.json", {"schema": SCHEMA, **asdict(self)})
        return folder / "results.json"

    @classmethod
    def read(cls, path: Path) -> Result:
        """What `write` wrote.

        Raises:
            Damaged: no JSON.
            UserError: no such file, another version, or keys that are missing or unknown.
        """
        try:
            found = json.loads(path.read_text())
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        except ValueError as error:  # half a character too
            raise Damaged(f"{path} is damaged ({error}): --fresh replaces it, --out NAME leaves it") from None
        version = found.pop("schema", None) if isinstance(found, dict) else None
        if version != SCHEMA:
            raise UserError(
                f"{path} has schema {version!r}, this version reads {SCHEMA}: move it away to evaluate anew"
            )
        about = found.pop("about", None)
        for made, values in ((About, about), (cls, {"about": about, **found})):
            known = {item.name for item in fields(made)}
            needed = {item.name for item in fields(made) if made is cls or item.default is MISSING}
            if not isinstance(values, dict) or not needed <= set(values) <= known:
                raise UserError(f"{path}: {made.__name__} needs the keys {', '.join(sorted(known))}")
        sets = about["sets"]
        return cls(About(**about | {"sets": None if sets is None else tuple(sets)}), **found)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain(value: Any, where: str = "result") -> Any:
    """A result as JSON can hold it: dataclasses as dicts, tensors as lists, what is not a finite number as null.

    Raises:
        TypeError: an object of another kind, or a tensor of more than `LONGEST` numbers.
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = {item.name: getattr(value, item.name) for item in fields(value)}
    if isinstance(value, Tensor):
        if value.numel() > LONGEST:
            raise TypeError(f"{where} is a tensor of {value.numel()} numbers: keep a summary of it")
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}: results hold numbers, strings, lists and dicts")
