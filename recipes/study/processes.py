"""Run one of the project's scripts: as a process of its own, forked where it can be, or in this process."""

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
from recipes.study.template import CAN_FORK, ROOT, ForkedRun, Template

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Ended:
    """How a script ended: its exit code, and the most memory it held, in bytes (0 where it is not known)."""

    code: int
    memory: int = 0


Launch = Callable[[str, Sequence[str], Path, int], Ended]
"""(script, arguments, log file, lock that the process inherits) → how it ended."""


class SpawnedRun:
    """A script in a process that starts from nothing."""

    def __init__(self, script: str, argv: Sequence[str], env: Mapping[str, str], log: int, lock: int) -> None:
        self._child = subprocess.Popen(
            [sys.executable, str(ROOT / script), *argv],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            pass_fds=(lock,),
            start_new_session=True,
        )
        self.pid = self._child.pid

    def wait(self) -> tuple[int, int]:
        """The status, as os.wait gives it, and the most memory that the run held, as the system counts it."""
        _, status, usage = os.wait4(self.pid, 0)
        self._child.returncode = os.waitstatus_to_exitcode(status)
        return status, usage.ru_maxrss


@dataclass
class Processes:
    """Launches scripts as processes, each in a session of its own, and stops them all on request.

    Where the system can, they are forked from one process that has imported what they need, see `Template`.

    Attributes:
        gpus: what each running script may see of the GPUs (CUDA_VISIBLE_DEVICES); the least used one is taken next.
            Without any, a script sees what this process sees.
        forked: whether scripts are forked.
    """

    running: set[ForkedRun | SpawnedRun] = field(default_factory=set)
    stopping: bool = False
    guard: threading.Lock = field(default_factory=threading.Lock)
    gpus: Mapping[str, int] = field(default_factory=dict)
    forked: bool = CAN_FORK
    template: Template | None = None

    @classmethod
    def on(cls, gpus: Sequence[str]) -> Processes:
        """Processes that share these GPUs evenly."""
        return cls(gpus=dict.fromkeys(gpus, 0))

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back the process that scripts are forked from; those that go on are not touched."""
        if self.template is not None:
            self.template.close()
            self.template = None

    def __call__(self, script: str, argv: Sequence[str], log: Path, lock: int) -> Ended:
        """Run a script to its end."""
        with log.open("ab") as out:
            with self.guard:
                if self.stopping:
                    return Ended(EXIT_CODE)
                used = min(self.gpus, key=lambda gpu: self.gpus[gpu], default=None)
                env = {**os.environ, "OMP_NUM_THREADS": "1"} | ({} if used is None else {VISIBLE: used})
                # A process that outlives this one keeps its trial locked. The terminal's Ctrl-C does not reach it;
                # `stop` does, once.
                child = self._begin(script, argv, env, out.fileno(), lock)
                self.running.add(child)
                self._count(used, 1)
            status, memory = child.wait()
            with self.guard:
                self.running.discard(child)
                self._count(used, -1)
        unit = 1 if sys.platform == "darwin" else 1024
        return Ended(os.waitstatus_to_exitcode(status), memory * unit)

    def _begin(self, script: str, argv: Sequence[str], env: Mapping[str, str], *files: int) -> ForkedRun | SpawnedRun:
        if self.forked:
            try:
                self.template = self.template or Template()
                return self.template.fork(script, argv, env, *files)
            except ConnectionError:  # it was killed; the next run gets a new one
                self.close()
        return SpawnedRun(script, argv, env, *files)

    def _count(self, gpu: str | None, more: int) -> None:
        if gpu is not None:
            self.gpus = {name: number + more * (name == gpu) for name, number in self.gpus.items()}

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Send all running scripts a signal, by default the one on which they save and end; start no more."""
        with self.guard:
            self.stopping = True
            for child in self.running:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(child.pid, number)


def in_this_process(script: str, argv: Sequence[str], log: Path, lock: int) -> Ended:
    """Run the script's `main` here, for debugging; the only place where a script is imported."""
    import importlib

    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with log.open("a", encoding="utf-8") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            return Ended(module.main(list(argv)))
        except SystemExit as end:  # argparse's way to refuse an argument
            return Ended(end.code if isinstance(end.code, int) else 2)
