"""Runs forked from one process: the same bits as a run alone, each on its own, nothing left behind."""

import json
import os
import signal
import threading
import time

import pytest

from recipes.core.files import locked
from recipes.study.processes import Processes
from recipes.study.template import CAN_FORK

pytestmark = pytest.mark.skipif(not CAN_FORK, reason="runs are forked on Linux alone")

TINY = ["--data.train_size=128", "--data.batch_size=32", "--tpt.max_epochs=2", "--tpt.min_terminal=1", "--quiet"]

DISTURBING = """
import os, random, sys, warnings
import matplotlib, numpy, torch

torch.manual_seed(7), numpy.random.seed(7), random.seed(7)
torch.set_num_threads(2)
torch.use_deterministic_algorithms(True)
torch.backends.cudnn.benchmark = torch.backends.mkldnn.enabled = False
torch.set_flush_denormal(True)
warnings.simplefilter("error")
matplotlib.rcParams["figure.dpi"] = 7
torch.nn.functional.cross_entropy = None
sys.modules["timm"].create_model = None
os.environ["OMP_NUM_THREADS"] = "9"


def loss(logits, target):
    open(__file__.replace("mine.py", "disturbed"), "w").close()
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    return torch.nn.functional.nll_loss(logits.log_softmax(1), target)
"""


def history(folder):
    (found,) = folder.glob("*/history.jsonl")
    return found.read_bytes()


def train(processes, out, *words):
    ended = processes("recipes/train.py", [*words, *TINY, f"--out={out}"], out.parent / "log.txt", 1)
    return ended.code


@pytest.mark.parametrize(
    "recipes",
    [
        (["cosine", "--optim.ema=0.9"],),
        pytest.param((["etf"], ["adversarial", "--adversarial.steps=1"], ["ntce"]), marks=pytest.mark.slow),
    ],
)
def test_a_run_after_others_is_to_the_byte_the_run_alone(tmp_path, recipes):
    """After a run that changed whatever a process has. It starts Python two times, some seconds each."""
    (tmp_path / "mine.py").write_text(DISTURBING)
    with Processes() as processes, Processes(forked=False) as alone:
        (tmp_path / "mine.yaml").write_text(f"loss: {{{tmp_path}/mine.py:loss: {{weight: 1.0}}}}")
        train(processes, tmp_path / "disturbing", "--config", str(tmp_path / "mine.yaml"))  # it may well break off
        assert (tmp_path / "disturbed").exists(), (tmp_path / "log.txt").read_text()
        for place, words in enumerate(recipes):
            assert train(processes, tmp_path / f"after{place}", *words) == 0, (tmp_path / "log.txt").read_text()
            assert train(alone, tmp_path / f"alone{place}", *words) == 0
            assert history(tmp_path / f"after{place}") == history(tmp_path / f"alone{place}")


def script_at(tmp_path, text, name="script.py"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


OBSERVES = """
import json, os, random, signal, sys, threading, warnings
import numpy
print(json.dumps([
    sys.argv, sys.path[0], os.getcwd(), __name__, sorted(os.environ), len(warnings.filters),
    os.getsid(0) == os.getpid(), threading.active_count(), len(os.listdir("/proc/self/task")),
    sys.stdout.line_buffering, str(signal.getsignal(signal.SIGINT)), str(signal.getsignal(signal.SIGCHLD)),
]))
print(json.dumps([random.random(), numpy.random.rand()]))
"""


def test_a_script_sees_what_it_would_see_alone(tmp_path):
    script = script_at(tmp_path, OBSERVES)
    said = []
    for forked in (True, False):
        with Processes(forked=forked) as processes:
            for _ in range(2):
                log = tmp_path / f"log{forked}"
                assert processes(script, ["a b", "--c"], log, 1).code == 0
        lines = log.read_text().splitlines()
        said.append(json.loads(lines[0]))
        assert lines[0] == lines[2] and lines[1] != lines[3]  # nothing draws from one start twice
    assert said[0] == said[1]


def in_background(processes, script, log, ended, lock=1):
    thread = threading.Thread(target=lambda: ended.append(processes(script, [], log, lock)))
    thread.start()
    while not log.exists() or "ready" not in log.read_text():
        time.sleep(0.01)
    return thread


WAITS = "import time\nprint('ready', flush=True)\ntime.sleep({seconds})\nprint('done')"


def test_a_killed_run_is_lost_alone(tmp_path):
    waits, ended, others = script_at(tmp_path, WAITS.format(seconds=60)), [], []
    brief = script_at(tmp_path, WAITS.format(seconds=1), "brief.py")
    with Processes() as processes:
        lost = in_background(processes, waits, tmp_path / "lost", ended)
        (first,) = processes.running
        other = in_background(processes, brief, tmp_path / "other", others)
        os.kill(first.pid, signal.SIGKILL)
        lost.join(20), other.join(20)
        assert (ended[0].code, others[0].code) == (-signal.SIGKILL, 0) and not processes.running
        assert processes(brief, [], tmp_path / "later", 1).code == 0
    assert "done" in (tmp_path / "other").read_text() and "done" not in (tmp_path / "lost").read_text()


def test_runs_go_on_after_the_process_that_they_are_forked_from_was_killed(tmp_path):
    waits, ended = script_at(tmp_path, WAITS.format(seconds=60)), []
    with Processes() as processes:
        thread = in_background(processes, waits, tmp_path / "lost", ended)
        processes.template._process.kill()
        thread.join(20)
        assert ended[0].code == -signal.SIGKILL  # nobody could say any more how it ends
        brief = script_at(tmp_path, WAITS.format(seconds=0), "brief.py")
        assert [processes(brief, [], tmp_path / "later", 1).code for _ in range(2)] == [0, 0]


def test_a_run_that_outlives_its_study_keeps_its_lock(tmp_path):
    waits, ended = script_at(tmp_path, WAITS.format(seconds=60)), []
    processes = Processes()
    with locked(tmp_path / "trial") as lock:
        thread = in_background(processes, waits, tmp_path / "log", ended, lock)
        processes.template._requests.close()  # as the system does it for a study that was killed
        (run,) = processes.running
    with locked(tmp_path / "trial") as lock:
        assert lock is None
    os.kill(run.pid, signal.SIGTERM)
    thread.join(20)
    processes.template._process.wait()
    with locked(tmp_path / "trial", wait=True) as lock:
        assert lock is not None


def test_memory_does_not_grow_from_run_to_run(tmp_path):
    leaks = script_at(tmp_path, "import json\njson.kept = getattr(json, 'kept', []) + [bytearray(2**26)]\n")
    with Processes() as processes:
        held = [processes(leaks, [], tmp_path / "log", 1).memory for _ in range(4)]
    assert min(held) > 2**26 and max(held) < min(held) + 2**23
