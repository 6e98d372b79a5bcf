"""Stopping by a signal: the step in progress is finished, the run is saved, and the exit code says so."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

EXIT_CODE = 75
"""Temporary failure, go on later (EX_TEMPFAIL of sysexits.h)."""


class Stopped(Exception):
    """The run was stopped by a signal, and is saved."""


class StopRequest:
    """While entered, SIGTERM and SIGINT set `requested`; a second signal acts as it would without this."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
