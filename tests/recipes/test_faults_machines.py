"""Faults of machines that other libraries had reported: locks, long names, full disks, encodings."""

import ast
import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from test_faults_data import images

from ncreg.models import Classifier
from recipes import evaluate
from recipes.core.cli import parse
from recipes.core.distributed import copies_notes
from recipes.core.files import fitting, locked, path_of_its_own, write_atomically
from recipes.train import main, train
from recipes.training.run_dir import RunDir

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The command line of a short run on a folder of images, without --out."""
    folder = tmp_path_factory.mktemp("words")
    images(folder / "set", {"cat": 10, "dog": 10, "owl": 10})
    words = ["--data.name=folder", f"--data.root={folder / 'set'}", "--data.image_size=32", "--quiet"]
    return ["baseline", *words, "--model.backbone=test_resnet", "--tpt.max_epochs=1", "--data.batch_size=8"]


@pytest.fixture(scope="module")
def run(words, tmp_path_factory):
    """That run."""
    return train(parse([*words, f"--out={tmp_path_factory.mktemp('runs')}"]))


def test_a_run_that_another_process_trains_is_left_to_it(words, tmp_path, capsys):
    """A job that is queued again while its first process still works: each would overwrite the other's steps."""
    words = [*words, "--out", str(tmp_path)]
    folder = train(parse(words))
    (folder / "summary.json").unlink()  # as one that is under way
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with locked(folder) as held:
        assert held is not None
        for way in (["--resume", str(folder)], [*words, "--resume", "auto"]):
            assert main(way) == 2
            said = capsys.readouterr().err
            assert "is being trained by another process" in said and said.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert main(["--resume", str(folder)]) == 0  # free again


def test_a_run_is_locked_while_it_trains_and_free_afterwards(words, tmp_path):
    seen = []

    def look(record):
        (folder,) = tmp_path.iterdir()
        with locked(folder) as lock:
            seen.append(lock)

    train(parse([*words, "--out", str(tmp_path)]), on_epoch=look)
    assert seen and set(seen) == {None}
    with locked(next(tmp_path.iterdir())) as lock:
        assert lock is not None


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_stops_nothing(number, tmp_path, monkeypatch, capsys):
    """Lustre and NFS can be mounted so: that is no other process at work, and no reason to wait for one."""

    def refuses(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuses)
    with locked(tmp_path) as lock:
        assert lock is not None
    assert capsys.readouterr().err.startswith(f"note: the file system of {tmp_path} has no locks")
    with RunDir(tmp_path).alone():
        pass


def test_a_name_that_is_too_long_keeps_its_beginning_and_stays_its_own():
    assert fitting("a" * 180) == "a" * 180
    long = [fitting("é" * 100 + end) for end in "ab"]
    assert long[0] != long[1] and all(len(os.fsencode(name)) <= 180 and name.startswith("é" * 80) for name in long)


def test_a_long_name_costs_no_result(run, words, tmp_path, capsys):
    """Folders may have names of 255 bytes, and a file that is named after one would need more."""
    for end in "ab":
        images(tmp_path / ("x" * 249 + end), {"cat": 2, "dog": 2, "owl": 2})
        data = ["--data.name=folder", f"--data.root={tmp_path / ('x' * 249 + end)}", "--split=all"]
        assert evaluate.main([str(run), *data, f"--out-dir={tmp_path / 'out'}", "--train-images=0"]) == 0
    assert len(list((tmp_path / "out").glob("evaluation-*.json"))) == 2
    recipe = tmp_path / ("y" * 246 + ".yaml")
    recipe.write_text("seed: 3")
    assert main([str(recipe), *words[1:], f"--out={tmp_path / 'runs'}"]) == 0


def test_results_of_equal_name_are_kept_apart(tmp_path, monkeypatch, capsys):
    """Two files of weights called best.pth: the second evaluation took the place of the first."""
    images(tmp_path / "set", {"cat": 4, "dog": 4, "owl": 4})
    monkeypatch.chdir(tmp_path)
    data = ["--data.name=folder", "--data.root=set", "--split=all", "--image-size=32", "--train-images=0"]
    found = {}
    for seed, folder in enumerate(("a", "b", "a", "b")):
        Path(folder).mkdir(exist_ok=True)
        torch.manual_seed(seed)  # the second time, other weights in the same file: its results are made anew
        torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), f"{folder}/best.pth")
        assert evaluate.main(["timm:test_resnet", f"--weights={folder}/best.pth", *data]) == 0
        found[folder] = capsys.readouterr().out.partition("confusion matrix: ")[2].split()[0]
    files = sorted(path.name for path in Path("evaluations/timm-test_resnet-best").glob("*.json"))
    assert len(files) == 2 and files == sorted(Path(path).name for path in found.values())
    for folder, path in found.items():
        assert json.loads(Path(path).read_text())["weights"] == f"{folder}/best.pth"


def test_results_of_other_model_options_are_kept_apart(tmp_path, monkeypatch, capsys):
    """The second side of the images took the place of the first."""
    images(tmp_path / "set", {"cat": 2, "dog": 2, "owl": 2})
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), "best.pth")
    words = ["timm:test_resnet", "--weights=best.pth", "--data.name=folder", "--data.root=set", "--split=all"]
    found = {}
    for options in (["--image-size=32"], ["--image-size=64"], ["--image-size=32"], ["--image-size=32", "--mean=0,0,0"]):
        assert evaluate.main([*words, "--train-images=0", *options]) == 0
        path = capsys.readouterr().out.partition("confusion matrix: ")[2].split()[0]
        found.setdefault(tuple(options), set()).add(path)
    assert sorted(len(paths) for paths in found.values()) == [1, 1, 1] and len(set.union(*found.values())) == 3
    held = [json.loads(Path(*paths).read_text())["model_options"] for paths in found.values()]
    assert held == [{"image_size": 32}, {"image_size": 64}, {"image_size": 32, "mean": [0, 0, 0]}]


def test_two_runs_with_one_folder_of_results(run, tmp_path, capsys):
    other = tmp_path / "other"
    other.symlink_to(run)  # by another name, the results of another run
    for folder in (run, other, run):
        assert evaluate.main([str(folder), f"--out-dir={tmp_path / 'out'}", "--train-images=0"]) == 0
    held = [json.loads(path.read_text())["run"] for path in sorted((tmp_path / "out").glob("*.json"))]
    assert sorted(held) == sorted([str(run), str(other)])


def test_a_path_of_its_own(tmp_path, capsys, monkeypatch):
    about = {"run": "a", "weights": None}
    assert path_of_its_own(tmp_path, "x", about) == tmp_path / "x.json"
    (tmp_path / "x.json").write_text('{"run": "a"}')
    assert path_of_its_own(tmp_path, "x", about) == tmp_path / "x.json"
    assert path_of_its_own(tmp_path, "x", {"run": os.path.abspath("a"), "weights": None}) == tmp_path / "x.json"
    assert not capsys.readouterr().err
    assert path_of_its_own(tmp_path, "x", {"run": "a", "weights": Path("w")}) == tmp_path / "x-2.json"
    assert "x.json holds other results: these go to x-2.json" in capsys.readouterr().err
    (tmp_path / "x-2.json").write_text("[1]")
    assert path_of_its_own(tmp_path, "x", {"run": "b"}) == tmp_path / "x-3.json"
    (tmp_path / "x-2.json").write_text("{half")
    assert path_of_its_own(tmp_path, "x", {"run": "b"}) == tmp_path / "x-2.json"


LEAVE = """
import os, sys
from recipes.core.script import leave_with

def main():
    for _ in range(3):
        print("out " * 5000, flush=True)
    open("done", "w").close()
    return {code}

leave_with(main)
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
@pytest.mark.parametrize(("code", "ends_with"), [(0, 2), (75, 75)])
def test_a_full_disk_behind_the_output_costs_the_output_alone(code, ends_with, tmp_path):
    script = LEAVE.replace("{code}", str(code))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open("/dev/full", "wb") as full:
        ended = subprocess.run([sys.executable, "-c", script], stdout=full, stderr=-1, cwd=tmp_path, env=env, text=True)
    assert ended.returncode == ends_with and (tmp_path / "done").exists()
    assert ended.stderr.startswith("error: standard output cannot be written (No space left on device)")
    assert ended.stderr.count("\n") == 1


def test_letters_that_the_output_lacks_cost_nothing(tmp_path):
    """A container without a locale writes ASCII: names of classes ended the script after its work."""
    script = "from recipes.core.script import leave_with\nleave_with(lambda: print('caf\\xe9 \\udce9 \\u2026'))"
    for encoding, line in (("ascii", b"caf\\xe9 \\udce9 \\u2026\n"), ("utf-8", "café \\udce9 …\n".encode())):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, env=env)
        assert ended.returncode == 0 and ended.stdout == line and not ended.stderr


def test_files_hold_the_bytes_of_names_that_are_no_text(tmp_path):
    write_atomically(tmp_path / "page.html", os.fsdecode(b"caf\xe9 ") + "café")
    assert (tmp_path / "page.html").read_bytes() == b"caf\xe9 " + "café".encode()


@pytest.mark.parametrize("package", ["ncreg", "recipes"])
def test_every_text_file_is_utf8_wherever_it_is_read(package):
    """Without an encoding, Python takes that of the machine, and a file of one is not that of another."""
    missing = []
    for file in (ROOT / package).rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or any(word.arg == "encoding" for word in call.keywords):
                continue
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            mode = next((arg.value for arg in call.args if isinstance(arg, ast.Constant)), "")
            opens_text = name in ("open", "fdopen") and isinstance(mode, str) and mode in ("r", "w", "a", "x")
            if name in ("read_text", "write_text") and not _own(call) or opens_text:
                missing.append(f"{file.relative_to(ROOT)}:{call.lineno}")
    assert not missing


def _own(call):
    """Whether a call is of `recipes.core.own_code.read_text`, which reads UTF-8."""
    return isinstance(call.func, ast.Name)


def test_ctrl_c_is_one_line(tmp_path):
    script = "import os, signal\nfrom recipes.core.script import leave_with\n"
    script += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background ignores it
    script += "leave_with(lambda: print('before') or os.kill(os.getpid(), signal.SIGINT))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, env=env, text=True)
    assert ended.returncode == 130 and ended.stdout == "before\n"
    assert ended.stderr == "stopped: what was not written yet is lost\n"


@pytest.mark.parametrize(
    ("names", "starter"),
    [
        (("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"), "srun"),
        (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), "mpirun"),
        (("PMI_SIZE", "PMI_RANK"), "mpiexec"),
    ],
)
def test_copies_that_a_cluster_starts_are_said_to_be_copies(names, starter, words, tmp_path, capsys, monkeypatch):
    """`srun -n 4 python train.py` trains the same run four times."""
    monkeypatch.setenv(names[0], "4")
    monkeypatch.setenv(names[1], "0")
    train(parse([*words, f"--out={tmp_path}"]))
    said = f"note: {starter} started 4 copies of this command, and each trains for itself"
    assert capsys.readouterr().err.count(said) == 1
    for name, value in ((names[1], "1"), (names[0], "1"), ("RANK", "0")):  # another copy; one alone; one of torchrun's
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            assert copies_notes() == []


def torchs_own():
    torch.empty(2**50)  # a petabyte: the allocator refuses it


def numpys_own():
    np.empty(2**50)


def of_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nsecond line")


@pytest.mark.parametrize("full", [torchs_own, numpys_own, of_a_gpu])
def test_memory_that_is_used_up_is_one_line_with_a_way_out(full, words, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("recipes.train.forward_backward", lambda *_, **__: full())
    assert main([*words, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory (") and "--optim.accumulate" in said and said.count("\n") == 1
    monkeypatch.setattr(Classifier, "forward", lambda *_, **__: full())
    assert evaluate.main([str(run), "--out-dir", str(tmp_path / "results")]) == 2
    said = capsys.readouterr().err
    assert "error: out of memory (" in said and "--device cpu" in said and "Traceback" not in said


def test_other_errors_are_not_taken_for_it(words, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("recipes.train.forward_backward", broken)
    with pytest.raises(RuntimeError, match="of ours"):
        main([*words, "--out", str(tmp_path)])
