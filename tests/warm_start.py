"""Processes of their own for tests, with the large packages imported already, which takes seconds each time.

They are forked from a process that has done nothing but those imports, once for each worker of pytest, so they start as
clean as `python SCRIPT` does. What such a process says goes into files: nothing of it waits in a pipe.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).parents[1]
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
"""The start method, also for torch.multiprocessing.start_processes."""

_CONTEXT = multiprocessing.get_context(METHOD)
_CONTEXT.set_forkserver_preload(["torch", "torchvision", "timm", "torchmetrics", "sklearn.datasets"])


def run(words, ranks=1, *, environment=os.environ, folder=ROOT, timeout=600):
    """What `python WORDS` says, and its exit code; the words are SCRIPT or -m MODULE, and arguments.

    With more ranks than one they run side by side, and one that fails ends the others, as torchrun has it.
    """
    words = [str(word) for word in words]
    with TemporaryDirectory() as place:
        outputs = [Path(place, "stdout"), Path(place, "stderr")]
        for path in outputs:
            path.touch()
        started = [
            _CONTEXT.Process(target=_as_python, args=(words, environment | own, str(folder), outputs))
            for own in (_places(ranks) if ranks > 1 else [{}])
        ]
        for process in started:
            process.start()
        deadline, late = time.monotonic() + timeout, False
        while running := [process for process in started if process.exitcode is None]:
            late = time.monotonic() > deadline
            if late or len(running) < ranks and any(process.exitcode for process in started):
                for process in running:
                    process.terminate()
                    process.join(30)
                    process.kill()
                    process.join()
            running[0].join(0.02)
        done = subprocess.CompletedProcess(words, 0, *(path.read_text() for path in outputs))
    assert not late, done
    done.returncode = next((process.exitcode for process in started if process.exitcode), 0)
    return done


def _places(ranks):
    """What torchrun tells each rank by its environment."""
    with socket.socket() as probe:  # a free port
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _as_python(words, environment, folder, outputs):
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count())))  # read when torch was imported
    os.chdir(folder)
    added = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    installed = [path for path in sys.path if not Path(path).is_relative_to(ROOT / "tests")]
    if words[0] == "-m":
        sys.path[:], sys.argv = [folder, *added, *installed], words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[:], sys.argv = [str(Path(words[0]).parent), *added, *installed], words
        runpy.run_path(words[0], run_name="__main__")
