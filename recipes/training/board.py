"""Scalars for TensorBoard, one point an epoch, in the run folder; a resumed run overwrites what it repeats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from recipes.core.errors import UserError
from recipes.training.run_dir import RunDir


class Board:
    """Writes what history.jsonl keeps; does nothing unless `wanted`."""

    def __init__(self, run: RunDir, wanted: bool, *, done: int = 0) -> None:
        self._writer: Any = None
        if not wanted:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("tensorboard=true needs the package: pip install tensorboard, or ncreg[recipes]") from None
        self._writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=done + 1)

    def add(self, entry: Mapping[str, Any]) -> None:
        """An epoch's numbers."""
        if self._writer is None:
            return
        for name, value in _scalars(entry):
            self._writer.add_scalar(name, value, entry["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """After the last epoch."""
        if self._writer is not None:
            self._writer.close()


def _scalars(entry: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in entry.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "epoch":
            yield f"{prefix}{name}", float(value)
