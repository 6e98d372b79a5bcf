"""A process that imports what runs need once, and is forked for each run: a study pays for its start a single time.

Every run is a process of its own, forked from one that has done nothing but import: random numbers, flags, warnings,
environment and memory are as at the start of a fresh process, and a run that dies dies alone. The code is that of the
study's start, even where files change while it goes on.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import finalize

ROOT = Path(__file__).resolve().parents[2]

IMPORTED_LATE = ("ncreg.metrics", "ncreg.robustness", "recipes.training.plots", "sklearn.model_selection")
"""What the scripts import while they run, beside what stands at their top."""

CAN_FORK = sys.platform == "linux" and hasattr(os, "pidfd_open")
"""Elsewhere a process that has loaded so much cannot be forked safely, or not be waited for."""

LARGEST_REQUEST = 2**22


class Template:
    """The study's end: starts the process, hands it requests, and hears how runs end."""

    def __init__(self) -> None:
        own, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LARGEST_REQUEST)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "recipes.study.template", str(theirs.fileno())],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                pass_fds=(theirs.fileno(),),
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._requests = own
        self.close = finalize(self, _end, own, self._process)
        """Fork no more; runs that go on are not touched. It happens by itself where nobody holds the object."""

    def fork(self, script: str, argv: Sequence[str], env: Mapping[str, str], log: int, lock: int) -> ForkedRun:
        """Begin a run of a script; `log` and `lock` are file descriptors that it keeps.

        Raises:
            ConnectionError: the process is no more.
        """
        request = {"script": str(ROOT / script), "argv": list(argv), "env": dict(env), "cwd": os.getcwd()}
        answers, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, contextlib.ExitStack() as failed:
            failed.enter_context(answers)
            socket.send_fds(self._requests, [json.dumps(request).encode()], [log, lock, theirs.fileno()])
            theirs.close()  # so that the end of the other process is heard
            if not (pid := answers.recv(64)):
                raise ConnectionError("the process that runs are forked from has ended")
            failed.pop_all()
        return ForkedRun(int(pid), answers)


def _end(requests: socket.socket, process: subprocess.Popen[bytes]) -> None:
    requests.close()
    process.wait()


class ForkedRun:
    """A run that goes on, or has ended; its `pid` takes signals."""

    def __init__(self, pid: int, answers: socket.socket) -> None:
        self.pid, self._answers = pid, answers

    def wait(self) -> tuple[int, int]:
        """The status, as os.wait gives it, and the most memory that the run held, as the system counts it."""
        answer: list[bytes] = []
        with self._answers, contextlib.suppress(ConnectionError):
            answer = self._answers.recv(64).split()
        if answer:
            return int(answer[0]), int(answer[1])
        with contextlib.suppress(ProcessLookupError):  # nobody is left to say how it ends
            os.kill(self.pid, signal.SIGKILL)
        return signal.SIGKILL, 0


def serve(requests: socket.socket) -> dict[str, Any] | None:
    """Fork a process for each request and say how each ends, until there are no more requests.

    Returns:
        In a forked process, what it is to run; in this one, None at the end.
    """
    selector = selectors.DefaultSelector()
    selector.register(requests, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.data is not None:  # a run has ended
                pid, answers = key.data
                selector.unregister(key.fd)
                os.close(key.fd)
                _, status, usage = os.wait4(pid, 0)
                _answer(answers, f"{status} {usage.ru_maxrss}")
                answers.close()
                continue
            message, descriptors, *_ = socket.recv_fds(requests, LARGEST_REQUEST, 3)
            if not message:
                return None
            request, (log, lock, answers_fd) = json.loads(message), descriptors
            _import(request["script"])
            answers = socket.socket(fileno=answers_fd)
            if (pid := os.fork()) == 0:
                for other in list(selector.get_map().values()):  # among them the answers of other runs
                    if other.data is not None:
                        other.data[1].close()
                        os.close(other.fd)
                answers.close()
                requests.close()
                selector.close()
                return request | {"log": log}  # the lock stays open for as long as the run lives
            os.close(log)
            os.close(lock)
            selector.register(os.pidfd_open(pid), selectors.EVENT_READ, data=(pid, answers))
            _answer(answers, str(pid))


def _answer(answers: socket.socket, words: str) -> None:
    with contextlib.suppress(ConnectionError):  # the study has been killed; its runs go on
        answers.send(words.encode())


def _import(script: str) -> None:
    """Import a script of the project and what it imports late; its errors are the run's to tell, not this process's."""
    path = Path(script)
    if not path.is_relative_to(ROOT / "recipes"):
        return
    for name in (".".join(path.relative_to(ROOT).with_suffix("").parts), *IMPORTED_LATE):
        if name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    gc.freeze()  # the collector of a run would otherwise copy every page that runs share


def run(request: Mapping[str, Any]) -> None:
    """In a forked process: run the script as `python SCRIPT ARGUMENTS` would."""
    os.setsid()
    os.dup2(request["log"], 1)
    os.dup2(request["log"], 2)
    os.close(request["log"])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # its own start, as `random` takes it by itself
    sys.argv = [request["script"], *request["argv"]]
    sys.path[0] = str(Path(request["script"]).parent)
    runpy.run_path(request["script"], run_name="__main__")


if __name__ == "__main__":
    if wanted := serve(socket.socket(fileno=int(sys.argv[1]))):
        run(wanted)
