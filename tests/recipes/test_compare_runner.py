"""Running trials: locks, stopping and going on, failures, real processes, a Ray cluster."""

import json
import re
import signal
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from miniature_study import TINY, content, run, study_of, trials_of, without_commit, write_study

from recipes import compare
from recipes.core.errors import UserError
from recipes.core.files import locked
from recipes.core.interrupt import EXIT_CODE
from recipes.study.processes import Ended, Processes
from recipes.study.runner import run_on_ray, run_trial
from recipes.study.spec import Evaluations


def leave_run(folder, *, finished):
    """What recipes/train.py would leave, as little of it as a study looks at."""
    path = folder / "run"
    (path / "checkpoints").mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").touch()
    (path / "checkpoints" / "last.pt").touch()
    if finished:
        (path / "summary.json").write_text("{}")


def test_two_jobs_never_run_one_cell_at_once(tmp_path):
    trial = trials_of(study_of())[0]
    begun, go_on = threading.Event(), threading.Event()
    count = []

    def launch(script, words, log, lock):
        count.append(script)
        begun.set()
        assert go_on.wait(10)
        leave_run(log.parent, finished=True)
        return Ended(0)

    first = threading.Thread(target=run_trial, args=(trial, tmp_path, None, launch))
    first.start()
    assert begun.wait(10)
    assert run_trial(trial, tmp_path, None, launch) == "elsewhere"
    go_on.set()
    first.join()
    assert run_trial(trial, tmp_path, None, launch) == "done" and count == ["recipes/train.py"]


def test_the_lock_of_a_killed_job_is_free_but_its_orphan_keeps_it(tmp_path):
    text = f"""
import os, signal, subprocess, sys
from pathlib import Path
sys.path.insert(0, {str(Path(compare.__file__).parents[1])!r})
from recipes.core.files import locked
with locked(Path({str(tmp_path)!r})) as lock:
    subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read(1)"], pass_fds=(lock,))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    job = subprocess.Popen([sys.executable, "-c", text], stdin=subprocess.PIPE)
    assert job.wait(120) == -signal.SIGKILL
    with locked(tmp_path) as lock:  # what the job had begun lives on, and so does its lock
        assert lock is None
    job.stdin.close()
    with locked(tmp_path, wait=True) as lock:
        assert lock is not None


def test_a_stopped_cell_is_resumed_and_an_evaluation_done_once(tmp_path):
    trial, evaluations = trials_of(study_of())[0], Evaluations(parts=["calibration"], checkpoints=["last", "onset"])
    heard = []

    def launch(script, words, log, lock):
        heard.append((script, words[0] if script.endswith("train.py") else words[words.index("--checkpoint") + 1]))
        if len(heard) == 1:
            leave_run(log.parent, finished=False)
            return Ended(EXIT_CODE)
        leave_run(log.parent, finished=True)
        return Ended(0, memory=7)

    assert run_trial(trial, tmp_path, evaluations, launch) == "stopped"
    assert run_trial(trial, tmp_path, evaluations, launch) == "done"
    assert run_trial(trial, tmp_path, evaluations, launch) == "done"
    assert heard == [  # no onset checkpoint, so that one is not evaluated
        ("recipes/train.py", "baseline"),
        ("recipes/train.py", "--resume"),
        ("recipes/robustness.py", "last"),
    ]
    assert json.loads((tmp_path / trial.key / "run" / "memory.json").read_text()) == {"peak_bytes": 7}


@pytest.mark.parametrize(("images", "seeds"), [("same", [None, None]), ("anew", ["0", "1"])])
def test_evaluations_draw_their_images_anew_for_each_seed_where_asked(tmp_path, images, seeds):
    study = study_of(evaluations={"parts": ["adversarial"], "images": images})
    heard = []

    def launch(script, words, log, lock):
        leave_run(log.parent, finished=True)
        if script.endswith("robustness.py"):
            heard.append(words[words.index("--seed") + 1] if "--seed" in words else None)
        return Ended(0)

    baseline = [trial for trial in trials_of(study) if trial.arm == "baseline"]
    for trial in baseline * 2:  # the second time everything is there
        assert run_trial(trial, tmp_path, study.evaluations, launch) == "done"
    assert heard == seeds
    other = Evaluations(parts=["adversarial"], images="same" if images == "anew" else "anew")
    assert other.words != study.evaluations.words  # so that the other kind is not taken for this one
    assert run_trial(baseline[1], tmp_path, other, launch) == "done" and len(heard) == 3


def test_a_seed_for_the_evaluation_and_images_anew_exclude_each_other():
    with pytest.raises(UserError, match="--seed: images: anew takes the seed of each run"):
        study_of(evaluations={"images": "anew", "args": ["--seed=3"]})


def script_at(tmp_path, text):
    path = tmp_path / "script.py"
    path.write_text(text)
    return str(path)


def test_a_process_that_dies_ends_alone(tmp_path):
    trial = trials_of(study_of())[0]
    crash = script_at(tmp_path, "import os, signal\nprint('about to go', flush=True)\nos.kill(os.getpid(), 9)\n")
    processes = Processes()
    outcome = run_trial(trial, tmp_path, None, lambda script, *rest: processes(crash, *rest))
    assert outcome == "failed" and not processes.running
    error = json.loads((tmp_path / trial.key / "failure.json").read_text())["error"]
    assert error == "recipes/train.py: about to go (signal 9)"
    assert processes(script_at(tmp_path, "x = bytearray(2**24)"), [], tmp_path / "log", 1).memory > 2**24


def test_processes_are_asked_to_stop_and_no_more_are_begun(tmp_path):
    ready = tmp_path / "ready"
    text = "import signal, sys, time\nsignal.signal(15, lambda *a: sys.exit(75))\n"
    # short sleeps: Python would not see a signal that comes just before a long one until its end
    waits = script_at(tmp_path, f"{text}open({str(ready)!r}, 'w')\nfor _ in range(600):\n    time.sleep(0.1)")
    processes, ended = Processes(), []
    thread = threading.Thread(target=lambda: ended.append(processes(waits, [], tmp_path / "log", 1)))
    thread.start()
    while not ready.exists():
        threading.Event().wait(0.01)
    processes.stop()
    thread.join(20)
    assert ended[0].code == EXIT_CODE and processes(waits, [], tmp_path / "log", 1) == Ended(EXIT_CODE)


def test_a_failed_cell_is_shown_and_the_others_go_on(tmp_path, capsys):
    arms = {"baseline": {"recipe": "baseline"}, "broken": {"recipe": "etf", "overrides": {"model.head_args.scale": -1}}}
    path = write_study(tmp_path, arms=arms, seeds=[0], contrasts=[{"arm": "broken", "against": "baseline"}])
    assert run(path) == 1
    said = capsys.readouterr().out
    assert re.search("FAILED digits broken seed 0", said) and "scale=-1" in said
    found = content(path)
    states = {place["arm"]: found["runs"][place["key"]]["status"] for place in found["cells"]}
    assert states == {"baseline": "done", "broken": "failed"}
    report = (path.parent / path.stem / "report.html").read_text()
    assert "1 run failed" in report and "scale=-1" in report
    assert str(tmp_path) not in (path.parent / path.stem / "results.json").read_text()


@pytest.mark.slow
def test_ctrl_c_stops_and_the_same_command_ends_with_the_same_bits(miniature, tmp_path):
    """Real worker processes, a real SIGINT."""
    path = write_study(tmp_path / "stopped", overrides=TINY | {"tpt.max_epochs": 60, "tpt.threshold": 0.999})
    whole = write_study(tmp_path / "whole", overrides=TINY | {"tpt.max_epochs": 60, "tpt.threshold": 0.999})
    command = [sys.executable, str(Path(compare.__file__)), str(path), "--workers", "2"]
    command += ["--runs", str(path.parent / "runs")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as job:
        while not list((path.parent / "runs").glob("*/*/history.jsonl")):
            threading.Event().wait(0.1)
        job.send_signal(signal.SIGINT)
        assert job.wait(120) == EXIT_CODE
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    other = [word.replace("stopped", "whole") for word in command]
    assert subprocess.run(other, stdout=subprocess.DEVNULL).returncode == 0
    texts = [(p.parent / "miniature" / "results.json").read_text() for p in (path, whole)]
    assert without_commit(texts[0]) == without_commit(texts[1])


def test_ray_runs_the_same_function(tmp_path):
    pytest.importorskip("ray")
    trial, ended = trials_of(study_of(seeds=[0]))[0], []
    assert run_on_ray([trial], tmp_path, None, address="local", report=lambda *said: ended.append(said))
    assert ended == [(trial, "done")]


@pytest.mark.parametrize("gpus", [0.0, 2.0])
def test_a_worker_that_ray_loses_fails_its_cell_alone(tmp_path, monkeypatch, gpus):
    resources = []

    class RayError(Exception):
        pass

    class Remote:
        def __init__(self, function):
            self.function = function

        def remote(self, trial, *rest):
            return lambda: trial

    def get(ticket):
        if ticket().seed == 0:
            raise RayError("The worker died unexpectedly.\nMore about it")
        return "done"

    there = types.SimpleNamespace(
        init=lambda **kwargs: None,
        cluster_resources=lambda: {"CPU": 2.0, "GPU": gpus},
        remote=lambda **kwargs: resources.append(kwargs) or Remote,
        wait=lambda items: (items[:1], items[1:]),
        get=get,
        exceptions=types.SimpleNamespace(RayError=RayError),
    )
    monkeypatch.setitem(sys.modules, "ray", there)
    items, ended = [trial for trial in trials_of(study_of(seeds=[0, 1])) if trial.arm == "etf"], []
    assert run_on_ray(items, tmp_path, None, address="auto", report=lambda *said: ended.append(said))
    assert ended == [(items[0], "failed"), (items[1], "done")]
    note = json.loads((tmp_path / items[0].key / "failure.json").read_text())
    assert note == {"error": "Ray: The worker died unexpectedly."}
    assert resources == [{"num_cpus": 1} | ({"num_gpus": 1} if gpus else {})]


def test_processes_share_the_gpus_evenly(tmp_path):
    script = script_at(
        tmp_path, "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(0.5)"
    )
    processes, logs = Processes.on(["3", "7"]), [tmp_path / f"log{number}" for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert {ended.code for ended in pool.map(lambda log: processes(script, [], log, 1), logs)} == {0}
    assert sorted(log.read_text().strip() for log in logs) == ["3", "3", "7", "7"]
    assert processes.gpus == {"3": 0, "7": 0}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--devices", "cuda"], "as cuda:0,cuda:1"),
        (["--devices", "cuda:0,cuda:0"], "none twice"),
        (["--devices", "cuda:0,cpu"], "as cuda:0,cuda:1"),
        (["--devices", "cuda:9"], "this machine shows 2 GPUs"),
        (["--devices", "cuda:0", "--workers", "0"], "--workers 0 runs in this process"),
        (["--devices", "cuda:0", "--ray", "auto"], "leave one of the two out"),
    ],
)
def test_devices_that_cannot_be_had_are_one_line(words, said, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert compare.main(["baseline", "etf", *words]) == 2
    found = capsys.readouterr().err
    assert said in found and found.count("\n") == 1


def test_devices_are_those_that_the_process_may_see(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-8f,6")
    settings = compare.parse_options(["baseline", "etf", "--devices", "cuda:1,cuda:2"]).settings
    assert settings.gpus == ("GPU-8f", "6") and settings.workers == 2
