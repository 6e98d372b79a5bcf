"""Features that are read again and again without being held in memory: a temporary file, or arrays of an .npz file."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from recipes.core.errors import UserError

BLOCK_BYTES = 2**25
"""Bytes of features that are held at once."""

MANY_CLASSES = 10_000
"""Classes above which at least half of the numbers up to the largest label must be in use."""


class Features(Protocol):
    """Features (N, d) and their classes (N,), read in blocks as often as they are asked for."""

    width: int
    target: Tensor

    def __len__(self) -> int:
        """Their number N."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of features and classes, in their order."""


class FeatureStore:
    """Features of a model, written into a temporary file batch by batch; use it in a `with` block.

    Example:
        >>> with FeatureStore() as store:
        ...     store.append(torch.ones(2, 3), torch.tensor([0, 1]))
        ...     store.append(torch.zeros(1, 3), torch.tensor([1]))
        ...     [(len(block), labels.tolist()) for block, labels in store]
        [(3, [0, 1, 1])]
    """

    def __init__(self) -> None:
        self.width = 0
        self._dtype: Any = np.float32
        self._targets: list[Tensor] = []
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="ncreg-features-")

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, features: Tensor, target: Tensor) -> None:
        """Add a batch of features (B, d) and classes (B,); half precision is stored as float32."""
        rows = features.detach().to("cpu")
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if not self._targets:
            self.width, self._dtype = rows.shape[1], rows.numpy().dtype
        self._file.seek(0, 2)
        self._file.write(np.ascontiguousarray(rows.numpy(), self._dtype).tobytes())
        self._targets.append(target.detach().cpu())

    @property
    def target(self) -> Tensor:
        """All classes (N,)."""
        return torch.cat(self._targets) if self._targets else torch.zeros(0, dtype=torch.long)

    def __len__(self) -> int:
        return sum(map(len, self._targets))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._file.seek(0)
        yield from _blocks(self._file, self.target, self.width, np.dtype(self._dtype))


class FeatureFile:
    """The array `features` of an .npz file, read in blocks also where it is compressed, and its array `target`.

    Args:
        path: the file; features (N, d) of floating point, target (N,) of whole numbers.
        option: words for it in messages.

    Raises:
        UserError: no such file, or arrays that are missing or do not fit together.
    """

    def __init__(self, path: Path, *, option: str = "--features") -> None:
        self.path, self.option = path, option
        self._columns: Any = None
        if not path.is_file():
            raise UserError(f"{option} {path} does not exist: an .npz file with arrays features and target")
        shape, self._by_column, self._dtype = self._header("features")
        if len(shape) != 2 or self._dtype.kind != "f":
            self._refuse(f"features must be numbers (N, d), floating point, not {self._dtype} {shape}")
        if 0 in shape:
            self._refuse(f"features {shape} are empty: the file holds {shape[0]} rows of {shape[1]} numbers")
        self.count, self.width = shape
        self.target = self._target()

    def _target(self) -> Tensor:
        """The classes (N,), int64."""
        target = self.array("target")
        if target is None or target.shape != (self.count,) or target.dtype.kind not in "iu":
            got = "missing" if target is None else f"{target.dtype} {target.shape}"
            self._refuse(
                f"target must be {self.count} whole numbers, shape ({self.count},), a class for each row of features; "
                f"it is {got}"
            )
        lowest, highest = int(target.min()), int(target.max())
        if lowest < 0:
            self._refuse(f"target holds {lowest}: classes are counted from 0")
        if highest >= max(MANY_CLASSES, 2 * (distinct := len(np.unique(target)))):
            self._refuse(
                f"target goes up to {highest} with {distinct} distinct values: classes are counted from "
                "0; _, target = numpy.unique(target, return_inverse=True) numbers them"
            )
        return torch.from_numpy(target.astype(np.int64))

    def array(self, name: str) -> Any:
        """An array of the file; None where it has none of that name."""
        try:
            with np.load(self.path, allow_pickle=False) as held:
                return held[name] if name in held.files else None
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise self._error(f"{name} cannot be read ({error})") from None

    def __len__(self) -> int:
        return int(self.count)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows, target in self._by_rows() if not self._by_column else self._from_columns():
            if not rows.isfinite().all():
                self._refuse("features hold NaN or infinite values")
            yield rows, target

    def _from_columns(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of an array that is stored column by column, which has to be read whole."""
        if self._columns is None:
            self._columns = self.array("features")
        rows = max(1, BLOCK_BYTES // (self.width * self._dtype.itemsize))
        for start in range(0, self.count, rows):
            yield _block(self._columns[start : start + rows]), self.target[start : start + rows]

    def _by_rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("features.npy") as member:
                _read_header(member)
                yield from _blocks(member, self.target, self.width, self._dtype)
        except (OSError, zipfile.BadZipFile, EOFError) as error:
            raise self._error(f"features cannot be read ({error})") from None

    def _header(self, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                if f"{name}.npy" not in archive.namelist():
                    there = ", ".join(entry.removesuffix(".npy") for entry in archive.namelist())
                    self._refuse(f"it has no array {name}; there: {there or 'none'}")
                with archive.open(f"{name}.npy") as member:
                    return _read_header(member)
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise self._error(f"it is no .npz file ({error})") from None

    def _refuse(self, reason: str) -> None:
        raise self._error(reason)

    def _error(self, reason: str) -> UserError:
        return UserError(f"{self.option} {self.path}: {reason}")


def _read_header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, and dtype of an array in .npy form; the stream then stands at its numbers."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)


def _blocks(file: Any, target: Tensor, width: int, dtype: np.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of rows of a stream of numbers, with their classes."""
    rows = max(1, BLOCK_BYTES // max(1, width * dtype.itemsize))
    for start in range(0, len(target), rows):
        labels = target[start : start + rows]
        wanted = len(labels) * width * dtype.itemsize
        raw = file.read(wanted)
        if len(raw) != wanted:
            raise EOFError(f"the file ends after {start} of {len(target)} rows")
        yield _block(np.frombuffer(raw, dtype).reshape(len(labels), width)), labels


def _block(rows: Any) -> Tensor:
    """Rows as a tensor, half precision as float32."""
    return torch.from_numpy(rows.astype(np.float64 if rows.dtype.itemsize == 8 else np.float32, order="C"))
