"""A run that goes on elsewhere: with other code, other libraries or on another processor, which its files tell."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from recipes.core.errors import UserError
from recipes.core.files import environment
from recipes.training.run_dir import RunDir

EFFECT = "from here on its numbers may differ from those of a run that never stopped, at first in the last digits"


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """What differs between two environments (`environment`) and may change numbers, with both values.

    Example:
        >>> then = {"packages": {"torch": "2.13.0", "timm": "1.0.31"}, "processor": "A", "git_commit": "1f0237d"}
        >>> changes(then, then | {"processor": "B"})
        {'processor': ('A', 'B')}
        >>> changes(then, then | {"packages": {"torch": "2.14.1", "timm": "1.0.31"}})
        {'torch': ('2.13.0', '2.14.1')}
    """
    before, after = ({**told.get("packages", {}), **_beside(told)} for told in (then, now))
    return {key: (before[key], after[key]) for key in after if before.get(key, after[key]) != after[key]}


def _beside(told: Mapping[str, Any]) -> dict[str, str]:
    named = {"processor": told.get("processor"), "commit": told.get("git_commit")}
    return {key: value for key, value in named.items() if value}  # earlier runs do not tell the processor


class Move:
    """What changed since the run's last start, to be said and noted.

    Args:
        run: the run that goes on.
        command: the words of the command line that goes on with it.
    """

    def __init__(self, run: RunDir, command: Sequence[str]) -> None:
        self._run = run
        try:
            self._told = dict(json.loads((run.path / "environment.json").read_text(encoding="utf-8")))
            last = [self._told, *(entry["environment"] for entry in self._told.get("resumed", []))][-1]
        except (OSError, ValueError, TypeError, KeyError):  # gone or damaged: nothing tells what the run began with
            self._told = last = {}
        self._now = environment(command)
        self._changes = changes(last, self._now)

    def refusal(self, error: UserError) -> UserError:
        """The error of a checkpoint that does not fit, with what it was written with where that is another."""
        if not self._changes:
            return error
        then = ", ".join(f"{key} {before}" for key, (before, _) in self._changes.items())
        return UserError(f"{error}; it was written with {then}: go on with that, or begin a new run")

    def note(self, epoch: int) -> str:
        """Put what changed into the run's environment.json; a sentence that says it, empty where nothing did."""
        if not self._changes:
            return ""
        resumed = [*self._told.get("resumed", []), {"epoch": epoch, "environment": self._now}]
        self._run.write("environment.json", self._told | {"resumed": resumed})
        words = [f"{key} {now} ({before} before)" for key, (before, now) in self._changes.items()]
        return f"goes on with {', '.join(words)}: {EFFECT}"
