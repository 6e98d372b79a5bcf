"""Run one of the project's scripts: as a process of its own, or in this process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recipes.core.interrupt import EXIT_CODE

ROOT = Path(__file__).resolve().parents[2]


VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Ended:
    """How a script ended: its exit code, and the most memory it held, in bytes (0 where it is not known)."""

    code: int
    memory: int = 0


Launch = Callable[[str, Sequence[str], Path, int], Ended]
"""(script, arguments, log file, lock that the process inherits) → how it ended."""


@dataclass
class Processes:
    """Launches scripts as processes, each in a session of its own, and stops them all on request.

    Attributes:
        gpus: what each running script may see of the GPUs (CUDA_VISIBLE_DEVICES); the least used one is taken next.
            Without any, a script sees what this process sees.
    """

    running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    stopping: bool = False
    guard: threading.Lock = field(default_factory=threading.Lock)
    gpus: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def on(cls, gpus: Sequence[str]) -> Processes:
        """Processes that share these GPUs evenly."""
        return cls(gpus=dict.fromkeys(gpus, 0))

    def __call__(self, script: str, argv: Sequence[str], log: Path, lock: int) -> Ended:
        """Run a script to its end."""
        with log.open("ab") as out:
            with self.guard:
                if self.stopping:
                    return Ended(EXIT_CODE)
                used = min(self.gpus, key=lambda gpu: self.gpus[gpu], default=None)
                child = subprocess.Popen(
                    [sys.executable, str(ROOT / script), *argv],
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": "1"} | ({} if used is None else {VISIBLE: used}),
                    pass_fds=(lock,),  # a process that outlives this one keeps its trial locked
                    start_new_session=True,  # the terminal's Ctrl-C does not reach it; `stop` does, once
                )
                self.running.add(child)
                self._count(used, 1)
            _, status, usage = os.wait4(child.pid, 0)
            with self.guard:
                child.returncode = os.waitstatus_to_exitcode(status)
                self.running.discard(child)
                self._count(used, -1)
        unit = 1 if sys.platform == "darwin" else 1024
        return Ended(child.returncode, usage.ru_maxrss * unit)

    def _count(self, gpu: str | None, more: int) -> None:
        if gpu is not None:
            self.gpus = {name: number + more * (name == gpu) for name, number in self.gpus.items()}

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Send all running scripts a signal, by default the one on which they save and end; start no more."""
        with self.guard:
            self.stopping = True
            for child in self.running:
                os.kill(child.pid, number)


def in_this_process(script: str, argv: Sequence[str], log: Path, lock: int) -> Ended:
    """Run the script's `main` here, for debugging; the only place where a script is imported."""
    import importlib

    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with log.open("a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            return Ended(module.main(list(argv)))
        except SystemExit as end:  # argparse's way to refuse an argument
            return Ended(end.code if isinstance(end.code, int) else 2)
