"""The result of a run's evaluations and its file, results.json: strict JSON with a version."""

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
from recipes.core.files import write_json
from recipes.core.suggestions import a_kind

SCHEMA = 1
"""Version of results.json. A file of another version is neither read nor overwritten."""

LONGEST = 100_000
"""Most numbers in one tensor of a result: more is data, not a result."""


class Damaged(UserError):
    """A results.json that was cut off or overwritten, so that nothing of it can be kept."""


@dataclass(frozen=True)
class Conditions:
    """What was evaluated, and how: one file holds evaluations under equal conditions only.

    Fields with a default were added later: a file without them was made under the default. `image_share` is the
    fraction of the preset's numbers of images that was used, below 1 for large images (`Preset.for_images`);
    `attacked` is the number of attacked images where it is not the preset's, `cost` a hash of what mistakes cost,
    `images` tells the images of a model that is no run from others; those of a run are its own.
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
    cost: str | None = None
    images: str | None = None


@dataclass
class Result:
    """The evaluations of a run under one set of conditions.

    Attributes:
        about: what was evaluated, and how.
        environment: packages and command of the call that added the last evaluation.
        parts: the outcome of each evaluation by its name: plain numbers, strings, lists and dicts.
        commits: the commit that made each evaluation; null outside a repository.
        warnings: what looks suspicious, each behind the name of its evaluation.
        skipped: evaluations that were not available, with the reason.
    """

    about: Conditions
    environment: dict[str, Any]
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    commits: dict[str, str | None] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write results.json into a folder, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "results.json", {"schema": SCHEMA, **asdict(self)})
        return folder / "results.json"

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read a file that `write` wrote.

        Raises:
            Damaged: it is no JSON.
            UserError: it does not exist, has another version, or keys that are missing or unknown.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        except ValueError as error:  # half a character too
            raise Damaged(f"{path} is damaged ({error}): --fresh replaces it, --out NAME leaves it") from None
        version = content.pop("schema", None) if isinstance(content, dict) else None
        if version != SCHEMA:
            raise UserError(
                f"{path} has schema {version!r}, this version reads {SCHEMA}: move it away to evaluate anew"
            )
        about = content.pop("about", None)
        for kind, values in ((Conditions, about), (cls, {"about": about, **content})):
            known = {item.name for item in fields(kind)}
            needed = {item.name for item in fields(kind) if kind is cls or item.default is MISSING}
            if not isinstance(values, dict) or not needed <= set(values) <= known:
                raise UserError(f"{path}: {kind.__name__} needs the keys {', '.join(sorted(known))}")
        sets = about["sets"]
        return cls(Conditions(**about | {"sets": None if sets is None else tuple(sets)}), **content)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain(value: Any, where: str = "result") -> Any:
    """A result as JSON holds it: dataclasses become dicts, tensors lists, numbers that are not finite null.

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
    raise TypeError(f"{where} is {a_kind(value)}: results hold numbers, strings, lists and dicts")
