"""Run trials: each one locked, resumed where it was stopped, and a failure recorded instead of ending the others."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from recipes.core.cli import config_of, parse
from recipes.core.errors import UserError
from recipes.core.extras import pip_install
from recipes.core.files import locked, write_atomically
from recipes.core.interrupt import EXIT_CODE, StopRequest
from recipes.study.processes import Ended, Launch, Processes, in_this_process
from recipes.study.spec import Evaluations
from recipes.study.trials import Trial
from recipes.training.run_dir import RunDir

Outcome = Literal["done", "failed", "stopped", "elsewhere"]
"""How a trial ended; elsewhere: another job is running it."""

Report = Callable[[Trial, Outcome], None]
Start = Callable[[str, Sequence[str]], Ended]
"""(script, arguments) → how it ended, where it ended well."""


@dataclass(frozen=True)
class RunSettings:
    """Where and how trials are run.

    Attributes:
        runs: folder of all runs; each trial has a folder in it, named by its key.
        workers: processes at a time; 0: none, everything in this process.
        shard: (i, n): run the i-th of n shares, counted from 1.
        ray: address of a Ray cluster to run on; None for this machine.
        gpus: those that the processes share, as CUDA_VISIBLE_DEVICES names them; none: what this process sees.
    """

    runs: Path
    workers: int = 0
    shard: tuple[int, int] = (1, 1)
    ray: str | None = None
    gpus: tuple[str, ...] = ()


def find_run_dir(folder: Path) -> Path | None:
    """The run in a trial's folder: a finished one, else the newest that has a checkpoint to go on from.

    One whose bounds were moved by hand is another run than the trial.
    """
    found = sorted((path.parent for path in folder.glob("*/config.yaml")), key=lambda path: path.stat().st_mtime_ns)
    found = [path for path in found if not RunDir(path).extensions()]
    finished = [path for path in found if (path / "summary.json").exists()]
    started = [path for path in found if list(path.glob("checkpoints/last.pt")) + list(path.glob("checkpoints/p*.pt"))]
    return next(reversed(finished or started), None)


def has_evaluations(run: Path, evaluations: Evaluations | None) -> bool:
    """Whether a run has been evaluated as the study wants; true where the study wants no evaluation."""
    note = run / "evaluated.json"
    return evaluations is None or (
        note.exists() and json.loads(note.read_text(encoding="utf-8"))["words"] == evaluations.words
    )


class _ScriptFailed(Exception):
    """A script did not exit with 0."""

    def __init__(self, script: str, ended: Ended) -> None:
        super().__init__(script)
        self.script, self.ended = script, ended


def run_trial(trial: Trial, runs: Path, evaluations: Evaluations | None, launch: Launch) -> Outcome:
    """Train, evaluate and draw whatever of a trial is still missing, in the folder runs/KEY."""
    folder = runs / trial.key
    with locked(folder) as lock:
        if lock is None:
            return "elsewhere"
        log, failure = folder / "log.txt", folder / "failure.json"
        failure.unlink(missing_ok=True)

        def start(script: str, argv: Sequence[str]) -> Ended:
            ended = launch(script, argv, log, lock)
            if ended.code:
                raise _ScriptFailed(script, ended)
            return ended

        try:
            run = _train(trial, folder, start)
            if evaluations is not None and not has_evaluations(run, evaluations):
                _evaluate(run, evaluations, trial, start)
        except _ScriptFailed as error:
            if error.ended.code == EXIT_CODE:
                return "stopped"
            _write_json(failure, {"error": _failure_message(error.script, error.ended, log)})
            return "failed"
        if trial.pictured and not (run / "collapse" / "view-train.json").exists():
            with contextlib.suppress(_ScriptFailed):  # the study is complete without this figure
                start("recipes/plot_collapse.py", [str(run), *_place(trial, run), "--images", "200"])
    return "done"


def _train(trial: Trial, folder: Path, start: Start) -> Path:
    """The directory of the trial's finished run; begun, resumed or already there."""
    run = find_run_dir(folder)
    if run is not None and (run / "summary.json").exists():
        return run
    argv = [*trial.argv, "--quiet=true", f"--out={folder}"]
    argv = argv if run is None else ["--resume", str(run), *_place(trial, run)]
    ended = start("recipes/train.py", argv)
    run = find_run_dir(folder)
    if run is None:
        raise UserError(f"{folder}: recipes/train.py ended well and left no run")
    _write_json(run / "memory.json", {"peak_bytes": ended.memory})
    return run


def _place(trial: Trial, run: Path) -> list[str]:
    """The option that says where a trial's folder of images lies now, if the run does not know it."""
    if trial.config["data.name"] != "folder":
        return []
    now = parse(trial.argv).data.root
    return [] if now == config_of(run).data.root else [f"--data.root={now}"]


def _evaluate(run: Path, evaluations: Evaluations, trial: Trial, start: Start) -> None:
    began, place = time.perf_counter(), _place(trial, run)
    for checkpoint in evaluations.checkpoints:
        if (run / "checkpoints" / f"{checkpoint}.pt").exists():
            start("recipes/robustness.py", [str(run), *place, *evaluations.argv(checkpoint, trial.seed)])
    seconds = time.perf_counter() - began
    _write_json(run / "evaluated.json", {"words": evaluations.words, "seconds": seconds})


def _failure_message(script: str, ended: Ended, log: Path) -> str:
    """The last error in the log, or its last line, and how the script ended."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")
    how = f"signal {-ended.code}" if ended.code < 0 else f"exit code {ended.code}"
    return f"{script}: {last or 'no word'} ({how})"


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(content) + "\n")


def run_trials(
    trials: Sequence[Trial],
    evaluations: Evaluations | None,
    settings: RunSettings,
    *,
    report: Report,
    stop: StopRequest,
) -> bool:
    """Run the trials as the settings say, in their order; False where a stop was requested.

    Args:
        trials: to run; those of a search are not evaluated.
        evaluations: of the finished runs.
        settings: where and how.
        report: called as each trial ends.
        stop: entered by the caller; looked at between and during the trials.
    """
    if settings.ray is not None:
        return run_on_ray(trials, settings.runs, evaluations, address=settings.ray, report=report)
    if settings.workers == 0:
        return _run_in_this_process(trials, settings.runs, evaluations, report=report, stop=stop)
    return _run_in_processes(trials, evaluations, settings, report=report, stop=stop)


def _run_in_this_process(
    trials: Sequence[Trial], runs: Path, evaluations: Evaluations | None, *, report: Report, stop: StopRequest
) -> bool:
    for trial in trials:
        if stop.requested:
            return False
        outcome = run_trial(trial, runs, None if trial.searching else evaluations, in_this_process)
        report(trial, outcome)
        if outcome == "stopped":
            return False
    return not stop.requested


def _run_in_processes(
    trials: Sequence[Trial],
    evaluations: Evaluations | None,
    settings: RunSettings,
    *,
    report: Report,
    stop: StopRequest,
) -> bool:
    with Processes.on(settings.gpus) as processes, ThreadPoolExecutor(settings.workers) as pool:
        waiting = {}
        for trial in trials:
            wanted = None if trial.searching else evaluations
            waiting[pool.submit(run_trial, trial, settings.runs, wanted, processes)] = trial
        try:
            while waiting:
                ended, _ = wait_for(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in ended:
                    trial = waiting.pop(future)
                    outcome = future.result()
                    if not (outcome == "stopped" and processes.stopping):
                        report(trial, outcome)
                if stop.requested and not processes.stopping:
                    processes.stop()
        except BaseException:  # a second Ctrl-C: nothing may be left running
            processes.stop(signal.SIGKILL)
            raise
    return not stop.requested


def run_on_ray(
    trials: Sequence[Trial], runs: Path, evaluations: Evaluations | None, *, address: str, report: Report
) -> bool:
    """Run the trials on a Ray cluster whose machines share the folder of runs; where it has GPUs, each on one."""
    try:
        import ray  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise UserError(f"--ray needs the package ray: {pip_install('cluster')}") from None
    ray.init(address=address, ignore_reinit_error=True)
    one = {"num_gpus": 1} if ray.cluster_resources().get("GPU", 0) >= 1 else {}
    remote = ray.remote(num_cpus=1, **one)(_run_on_worker)
    waiting = {
        remote.remote(trial, runs.resolve(), None if trial.searching else evaluations): trial for trial in trials
    }
    while waiting:
        (ended, *_), _ = ray.wait(list(waiting))
        trial = waiting.pop(ended)
        try:
            outcome = ray.get(ended)
        except ray.exceptions.RayError as error:  # the worker or its machine is lost; the other trials are not
            message = next(line for line in [*str(error).splitlines(), type(error).__name__] if line.strip())
            _write_json(runs / trial.key / "failure.json", {"error": f"Ray: {message.strip()}"})
            outcome = "failed"
        report(trial, outcome)
    return True


_processes_on_worker = cache(Processes)  # Ray gives a worker one trial after the other


def _run_on_worker(trial: Trial, runs: Path, evaluations: Evaluations | None) -> Outcome:
    return run_trial(trial, runs, evaluations, _processes_on_worker())
