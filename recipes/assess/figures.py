"""Figures of an evaluation."""

from __future__ import annotations

from pathlib import Path

from recipes.assess.result import Result


def draw(folder: Path, result: Result, *, title: str) -> None:
    """Draw."""
