"""Run what is missing: one process a cell, locked, resumed, stopped together, a failure kept as a result."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from recipes.core.errors import UserError
from recipes.core.files import locked, write_atomically
from recipes.core.interrupt import EXIT_CODE, StopRequest
from recipes.study.spec import Evaluations
from recipes.study.trials import Cell

ROOT = Path(__file__).resolve().parents[2]
Outcome = Literal["done", "failed", "stopped", "elsewhere"]


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, and the most memory it held, in bytes (0 where it is not known)."""

    code: int
    memory: int = 0


Launch = Callable[[str, Sequence[str], Path, int], Ended]
"""(script, words, log file, lock that the process inherits) → how it ended."""


@dataclass
class Processes:
    """Launches scripts as processes of their own session, and stops them all on request."""

    running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    stopping: bool = False
    guard: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, script: str, words: Sequence[str], log: Path, lock: int) -> Ended:
        """Run one to its end."""
        with log.open("ab") as out:
            with self.guard:
                if self.stopping:
                    return Ended(EXIT_CODE)
                child = subprocess.Popen(
                    [sys.executable, str(ROOT / script), *words],
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    pass_fds=(lock,),  # an orphan keeps its cell locked
                    start_new_session=True,  # Ctrl-C reaches it once, through us
                )
                self.running.add(child)
            _, status, usage = os.wait4(child.pid, 0)
            with self.guard:
                child.returncode = os.waitstatus_to_exitcode(status)
                self.running.discard(child)
        unit = 1 if sys.platform == "darwin" else 1024
        return Ended(child.returncode, usage.ru_maxrss * unit)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ask all to save and end, and start no more."""
        with self.guard:
            self.stopping = True
            for child in self.running:
                os.kill(child.pid, number)


def in_this_process(script: str, words: Sequence[str], log: Path, lock: int) -> Ended:
    """Run the script's main here: for debugging, and where processes are dear."""
    import importlib

    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with log.open("a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            return Ended(module.main(list(words)))
        except SystemExit as end:  # argparse's way to refuse a word
            return Ended(end.code if isinstance(end.code, int) else 2)


def run_folder(folder: Path) -> Path | None:
    """The cell's run in its folder: a finished one, else the newest that can go on."""
    found = sorted((path.parent for path in folder.glob("*/config.yaml")), key=lambda path: path.stat().st_mtime_ns)
    finished = [path for path in found if (path / "summary.json").exists()]
    started = [path for path in found if list(path.glob("checkpoints/last.pt")) + list(path.glob("checkpoints/p*.pt"))]
    return next(reversed(finished or started), None)


def evaluated(run: Path, asked: Evaluations | None) -> bool:
    """Whether the run has the evaluation asked for."""
    note = run / "evaluated.json"
    return asked is None or (note.exists() and json.loads(note.read_text())["words"] == asked.words)


def run_cell(item: Cell, runs: Path, asked: Evaluations | None, launch: Launch) -> Outcome:
    """Train what is not trained, evaluate what is not evaluated, draw what is to be drawn, in the folder runs/KEY."""
    folder = runs / item.key
    with locked(folder) as lock:
        if lock is None:
            return "elsewhere"
        log, failure = folder / "log.txt", folder / "failure.json"
        failure.unlink(missing_ok=True)
        run = run_folder(folder)
        if run is None or not (run / "summary.json").exists():
            words = [*item.argv, "--quiet=true", f"--out={folder}"] if run is None else ["--resume", str(run)]
            ended = launch("recipes/train.py", words, log, lock)
            if ended.code:
                return _note_end(ended, "recipes/train.py", log, failure)
            run = run_folder(folder)
            if run is None:
                raise UserError(f"{folder}: recipes/train.py ended well and left no run")
            _write(run / "memory.json", {"peak_bytes": ended.memory})
        if not evaluated(run, asked) and asked is not None:
            began = time.perf_counter()
            for checkpoint in asked.checkpoints:
                if not (run / "checkpoints" / f"{checkpoint}.pt").exists():
                    continue
                ended = launch("recipes/robustness.py", [str(run), *asked.argv(checkpoint)], log, lock)
                if ended.code:
                    return _note_end(ended, "recipes/robustness.py", log, failure)
            seconds = time.perf_counter() - began
            _write(run / "evaluated.json", {"words": asked.words, "seconds": seconds})
        if item.pictured and not (run / "collapse" / "view-train.json").exists():
            launch("recipes/plot_collapse.py", [str(run), "--images", "200"], log, lock)  # a figure may be missing
    return "done"


def _note_end(ended: Ended, script: str, log: Path, failure: Path) -> Outcome:
    if ended.code == EXIT_CODE:
        return "stopped"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")
    how = f"signal {-ended.code}" if ended.code < 0 else f"exit code {ended.code}"
    _write(failure, {"error": f"{script}: {said or 'no word'} ({how})"})
    return "failed"


def _write(path: Path, content: dict[str, object]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(content) + "\n")


Report = Callable[[Cell, Outcome], None]


def run_all(
    cells: Sequence[Cell], runs: Path, asked: Evaluations | None, *, workers: int, report: Report, stop: StopRequest
) -> bool:
    """Run the cells, `workers` at a time (0: in this process); False where it was asked to stop.

    Args:
        cells: in the order of their start.
        runs: folder of the cells' folders.
        asked: evaluation of the finished runs.
        workers: processes at a time.
        report: called as each cell ends.
        stop: entered by the caller; looked at between and during the cells.
    """
    if workers == 0:
        for item in cells:
            if stop.requested:
                return False
            outcome = run_cell(item, runs, None if item.searching else asked, in_this_process)
            report(item, outcome)
            if outcome == "stopped":
                return False
        return not stop.requested
    processes = Processes()
    with ThreadPoolExecutor(workers) as pool:
        waiting = {
            pool.submit(run_cell, item, runs, None if item.searching else asked, processes): item for item in cells
        }
        try:
            while waiting:
                ended, _ = wait_for(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in ended:
                    item = waiting.pop(future)
                    outcome = future.result()
                    if not (outcome == "stopped" and processes.stopping):
                        report(item, outcome)
                if stop.requested and not processes.stopping:
                    processes.stop()
        except BaseException:  # a second Ctrl-C: nothing may be left running
            processes.stop(signal.SIGKILL)
            raise
    return not stop.requested


def run_on_ray(cells: Sequence[Cell], runs: Path, asked: Evaluations | None, *, address: str, report: Report) -> bool:
    """The same on a Ray cluster whose machines share the folder of runs."""
    try:
        import ray  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise UserError("--ray needs the package: pip install ray, or ncreg[cluster]") from None
    ray.init(address=address, ignore_reinit_error=True)
    remote = ray.remote(num_cpus=1)(_run_cell_there)
    waiting = {remote.remote(item, runs.resolve(), None if item.searching else asked): item for item in cells}
    while waiting:
        (ended, *_), _ = ray.wait(list(waiting))
        item = waiting.pop(ended)
        try:
            outcome = ray.get(ended)
        except ray.exceptions.RayError as error:  # the worker or its machine is lost; the other cells are not
            said = next(line for line in [*str(error).splitlines(), type(error).__name__] if line.strip())
            _write(runs / item.key / "failure.json", {"error": f"Ray: {said.strip()}"})
            outcome = "failed"
        report(item, outcome)
    return True


def _run_cell_there(item: Cell, runs: Path, asked: Evaluations | None) -> Outcome:
    return run_cell(item, runs, asked, Processes())
