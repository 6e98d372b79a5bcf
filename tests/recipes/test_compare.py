"""Studies end to end, small and real: pairing, the bits of results.json, resuming, locks, failures, the report."""

import datetime
import functools
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import types
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from recipes import compare
from recipes.core.cli import parse, recipes
from recipes.core.config import TrainConfig
from recipes.core.errors import UserError
from recipes.core.files import locked
from recipes.core.interrupt import EXIT_CODE
from recipes.data.augment import epoch_order
from recipes.data.load import load
from recipes.study import results, runner
from recipes.study.progress import Progress
from recipes.study.runner import Ended, Processes, run_cell
from recipes.study.search import chosen, tried
from recipes.study.spec import Evaluations, plain, read_study, study_from
from recipes.study.trials import _images_of, cell, dotted, grid, identity, share
from recipes.training.build import build_model, image_size

STUDIES = sorted((Path(__file__).parents[2] / "benchmarks" / "studies").glob("*.yaml"))
TINY = {
    "data.train_size": 128,
    "data.batch_size": 64,
    "tpt.max_epochs": 2,
    "tpt.min_terminal": 1,
    "tpt.threshold": 0.05,
    "optim.lr": 0.05,
    "device": "cpu",
}
MINIATURE = {
    "question": "Does the same study give the same bits?",
    "arms": {"baseline": {"recipe": "baseline"}, "etf": {"recipe": "etf", "label": "fixed simplex"}},
    "contrasts": [{"arm": "etf", "against": "baseline"}],
    "seeds": [0, 1],
    "overrides": TINY,
    "collapse": True,
}


def write_study(folder, **changes):
    folder.mkdir(exist_ok=True)
    path = folder / "miniature.yaml"
    path.write_text(yaml.safe_dump(MINIATURE | changes))
    return path


def run(path, *more):
    return compare.main([str(path), "--workers", "0", "--runs", str(path.parent / "runs"), *more])


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """The miniature study, run in a folder of its own."""
    path = write_study(tmp_path_factory.mktemp("first"))
    assert run(path) == 0
    return path


def without_commit(text):
    """The tree may get a commit while the tests run; everything else is held to the last byte."""
    return re.sub(r'"commit": "[^"]+"', "", text)


def content(path):
    return results.read(path.parent / path.stem / "results.json")


# Pairing


@functools.cache
def start(name, seed):
    """A recipe's backbone before the first step, its data, and its first batch orders."""
    config = parse([name, f"--seed={seed}", *(f"--{key}={value}" for key, value in TINY.items())])
    config.model.pretrained = False
    data = load(
        config.data,
        seed=config.seed,
        image_size=partial(image_size, backbone=config.model.backbone, requested=config.data.image_size),
    )
    return (
        build_model(config.model, data, seed=config.seed).backbone.state_dict(),
        data,
        [epoch_order(config.seed, e, 128) for e in (1, 2)],
    )


@pytest.mark.parametrize("name", [name for name in recipes() if name not in ("baseline", "finetune")])
def test_recipes_of_one_seed_start_alike(name):
    """Backbone weights, split and batch order equal the baseline's to the last bit, so that differences are paired."""
    (ours, data, turns), (theirs, base, base_turns) = start(name, 3), start("baseline", 3)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(data, part).images, getattr(base, part).images)
        assert torch.equal(getattr(data, part).target, getattr(base, part).target)
    assert all(torch.equal(*pair) for pair in zip(turns, base_turns, strict=True))


def test_another_seed_starts_otherwise_but_tests_on_the_same_images():
    (ours, data, turns), (theirs, base, base_turns) = start("etf", 3), start("etf", 4)
    assert any(not torch.equal(ours[key], theirs[key]) for key in ours)
    assert not torch.equal(data.train.images, base.train.images) and not torch.equal(turns[0], base_turns[0])
    assert torch.equal(data.test.images, base.test.images)


# The same bits, another day


def test_results_are_bit_equal_in_another_folder(miniature, tmp_path):
    path = write_study(tmp_path / "second")
    assert run(path) == 0
    for name in ("results.json", "curves.json", "report.md"):
        texts = [(p.parent / p.stem / name).read_text() for p in (miniature, path)]
        if name == "report.md":  # all but the times
            texts = [re.sub(r"## Cost.*?## Commands|Made by .*", "", text, flags=re.DOTALL) for text in texts]
        assert without_commit(texts[0]) == without_commit(texts[1])


def test_results_hold_the_runs_numbers_exactly(miniature):
    found = content(miniature)
    assert [(c["arm"], c["seed"]) for c in found["cells"]] == [
        ("baseline", 0),
        ("etf", 0),
        ("baseline", 1),
        ("etf", 1),
    ]
    for place in found["cells"]:
        (summary,) = (miniature.parent / "runs" / place["key"]).glob("*/summary.json")
        record = found["runs"][place["key"]]
        assert record["summary"] == json.loads(summary.read_text())
        assert record["summary"]["recipe"] == place["arm"] and record["summary"]["seed"] == place["seed"]
        assert record["commit"] and record["status"] == "done"
    (table,) = [t for t in found["statistics"] if t["measure"] == "at_end.test.accuracy"]
    by_hand = [
        found["runs"][place["key"]]["summary"]["at_end"]["test"]["accuracy"]
        for place in found["cells"]
        if place["arm"] == "etf"
    ]
    assert table["arms"][1]["mean"] == pytest.approx(sum(by_hand) / 2, rel=1e-12)
    assert [entry["verdict"] for entry in table["arms"]] == ["baseline", "too few seeds"]
    assert [entry["difference"] for entry in table["contrasts"]] == [table["arms"][1]["difference"]]


def test_a_finished_study_runs_nothing_even_without_its_runs(miniature, tmp_path, monkeypatch):
    """On a fresh machine the committed results.json is enough to go on."""
    path = write_study(tmp_path / "fresh")
    (path.parent / path.stem).mkdir()
    for name in ("results.json", "timing.json", "curves.json"):
        (path.parent / path.stem / name).write_bytes((miniature.parent / miniature.stem / name).read_bytes())
    launched = []
    monkeypatch.setattr(compare, "run_all", lambda cells, *args, **more: launched.extend(cells) or True)
    assert run(path) == 0 and launched == []
    assert (path.parent / path.stem / "results.json").read_bytes() == (
        miniature.parent / miniature.stem / "results.json"
    ).read_bytes()
    path = write_study(tmp_path / "fresh", seeds=[0, 1, 2])
    assert run(path) == EXIT_CODE  # nothing was run here, so that it is not complete
    assert [(item.arm, item.seed) for item in launched] == [("baseline", 2), ("etf", 2)]


def test_a_configuration_from_before_a_new_key_is_the_one_with_its_default():
    config = dotted(parse(["etf"]))
    old = {key: value for key, value in config.items() if key not in ("data.imbalance", "optim.ema")}
    old["loss"] = {"cross_entropy": {"weight": 1.0, "phase": "always", "args": {}}}
    assert identity(old) == identity(config)
    assert identity(config | {"data.imbalance": 10.0}) != identity(config)


def test_what_changes_no_number_changes_no_identity():
    def of(*more):
        return identity(dotted(parse(["etf", *more])))

    assert of() == of("--out=elsewhere", "--quiet=true", "--tensorboard=true", "--data.root=/there")
    assert len({of(), of("--seed=1"), of("--optim.lr=0.2"), of("--data.train_size=100")}) == 4
    folder = ["--data.name=folder", "--data.root"]
    assert of(*folder, "a") != of(*folder, "b")


# Jobs


def study_of(**changes):
    return study_from(MINIATURE | {"collapse": False} | changes)


def cells_of(study):
    return grid(study, chosen(study, results.Found()))


def test_shards_part_the_runs_and_a_shared_run_goes_to_one_job():
    study = study_of(arms={name: {"recipe": "etf" if name == "twin" else name} for name in ("baseline", "etf", "twin")})
    cells = cells_of(study)
    parts = [{item.key for item in share(cells, (index, 3))} for index in (1, 2, 3)]
    assert set.union(*parts) == {item.key for item in cells} and sum(map(len, parts)) == 4  # etf and twin are one run
    assert share(cells, (1, 1)) == [item for item in cells if item.arm != "twin"]


def leave_run(folder, *, finished):
    """What recipes/train.py would leave, as little of it as a study looks at."""
    path = folder / "run"
    (path / "checkpoints").mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").touch()
    (path / "checkpoints" / "last.pt").touch()
    if finished:
        (path / "summary.json").write_text("{}")


def test_two_jobs_never_run_one_cell_at_once(tmp_path):
    item = cells_of(study_of())[0]
    begun, go_on = threading.Event(), threading.Event()
    count = []

    def launch(script, words, log, lock):
        count.append(script)
        begun.set()
        assert go_on.wait(10)
        leave_run(log.parent, finished=True)
        return Ended(0)

    first = threading.Thread(target=run_cell, args=(item, tmp_path, None, launch))
    first.start()
    assert begun.wait(10)
    assert run_cell(item, tmp_path, None, launch) == "elsewhere"
    go_on.set()
    first.join()
    assert run_cell(item, tmp_path, None, launch) == "done" and count == ["recipes/train.py"]


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
    item, asked = cells_of(study_of())[0], Evaluations(parts=["calibration"], checkpoints=["last", "onset"])
    heard = []

    def launch(script, words, log, lock):
        heard.append((script, words[0] if script.endswith("train.py") else words[words.index("--checkpoint") + 1]))
        if len(heard) == 1:
            leave_run(log.parent, finished=False)
            return Ended(EXIT_CODE)
        leave_run(log.parent, finished=True)
        return Ended(0, memory=7)

    assert run_cell(item, tmp_path, asked, launch) == "stopped"
    assert run_cell(item, tmp_path, asked, launch) == "done"
    assert run_cell(item, tmp_path, asked, launch) == "done"
    assert heard == [  # no onset checkpoint, so that one is not evaluated
        ("recipes/train.py", "baseline"),
        ("recipes/train.py", "--resume"),
        ("recipes/robustness.py", "last"),
    ]
    assert json.loads((tmp_path / item.key / "run" / "memory.json").read_text()) == {"peak_bytes": 7}


def script_at(tmp_path, text):
    path = tmp_path / "script.py"
    path.write_text(text)
    return str(path)


def test_a_process_that_dies_ends_alone(tmp_path):
    item = cells_of(study_of())[0]
    crash = script_at(tmp_path, "import os, signal\nprint('about to go', flush=True)\nos.kill(os.getpid(), 9)\n")
    processes = Processes()
    outcome = run_cell(item, tmp_path, None, lambda script, *rest: processes(crash, *rest))
    assert outcome == "failed" and not processes.running
    error = json.loads((tmp_path / item.key / "failure.json").read_text())["error"]
    assert error == "recipes/train.py: about to go (signal 9)"
    assert processes(script_at(tmp_path, "x = bytearray(2**24)"), [], tmp_path / "log", 1).memory > 2**24


def test_processes_are_asked_to_stop_and_no_more_are_begun(tmp_path):
    ready = tmp_path / "ready"
    text = "import signal, sys, time\nsignal.signal(15, lambda *a: sys.exit(75))\n"
    waits = script_at(tmp_path, f"{text}open({str(ready)!r}, 'w')\ntime.sleep(60)")
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
    item, ended = cells_of(study_of(seeds=[0]))[0], []
    assert runner.run_on_ray([item], tmp_path, None, address="local", report=lambda *said: ended.append(said))
    assert ended == [(item, "done")]


def test_a_worker_that_ray_loses_fails_its_cell_alone(tmp_path, monkeypatch):
    class RayError(Exception):
        pass

    class Remote:
        def __init__(self, function):
            self.function = function

        def remote(self, item, *rest):
            return lambda: item

    def get(ticket):
        if ticket().seed == 0:
            raise RayError("The worker died unexpectedly.\nMore about it")
        return "done"

    there = types.SimpleNamespace(
        init=lambda **kwargs: None,
        remote=lambda **kwargs: Remote,
        wait=lambda items: (items[:1], items[1:]),
        get=get,
        exceptions=types.SimpleNamespace(RayError=RayError),
    )
    monkeypatch.setitem(sys.modules, "ray", there)
    items, ended = [item for item in cells_of(study_of(seeds=[0, 1])) if item.arm == "etf"], []
    assert runner.run_on_ray(items, tmp_path, None, address="auto", report=lambda *said: ended.append(said))
    assert ended == [(items[0], "failed"), (items[1], "done")]
    note = json.loads((tmp_path / items[0].key / "failure.json").read_text())
    assert note == {"error": "Ray: The worker died unexpectedly."}


# Search


def known(study, values):
    """Finished search runs whose validation accuracy is what `values` gives by arm and point."""
    found = results.Found()
    for arm, numbers in values.items():
        for point, number in zip(study.points(arm), numbers, strict=True):
            item = cell(study, "digits", arm, 100, point, searching=True)
            state = "failed" if number is None else "done"
            summary = {"at_end": {"val": {"accuracy": number}}}
            found.runs[item.key] = {"status": state, "summary": summary, "evaluation": None, "error": "diverged"}
    return found


def test_validation_images_choose_and_the_search_is_recorded():
    study = study_of(search={"grid": {"optim.lr": [0.1, 0.2, 0.3]}, "seeds": [100], "overrides": {"tpt.max_epochs": 1}})
    found = known(study, {"baseline": [0.5, 0.9, 0.9], "etf": [None, 0.4, 0.3]})
    assert chosen(study, found) == {("digits", "baseline"): {"optim.lr": 0.2}, ("digits", "etf"): {"optim.lr": 0.2}}
    entry = tried(study, found)[1]
    assert [point["mean"] for point in entry["points"]] == [None, 0.4, 0.3]
    assert entry["points"][0]["error"] == "diverged" and entry["missing"] == 0
    item = grid(study, chosen(study, found))[0]
    assert item.config["optim.lr"] == 0.2 and item.config["tpt.max_epochs"] == 2  # the search's own keys are gone


def test_an_arm_waits_for_its_whole_search():
    study = study_of(search={"grid": {"optim.lr": [0.1, 0.2]}})
    found = known(study, {"baseline": [0.5, 0.9], "etf": [0.4, 0.3]})
    missing = cell(study, "digits", "etf", 100, {"optim.lr": 0.2}, searching=True)
    del found.runs[missing.key]
    assert set(chosen(study, found)) == {("digits", "baseline")}
    assert tried(study, found)[1]["missing"] == 1


def test_every_arm_has_the_same_budget():
    search = {"grid": {"optim.lr": [0.1, 0.2, 0.3], "optim.weight_decay": [0.0, 0.1]}, "budget": 4}
    study = study_of(search=search)
    assert study.points("baseline") == study.points("etf") and len(study.points("etf")) == 4
    arms = {"baseline": {"recipe": "baseline"}, "etf": {"recipe": "etf", "grid": {"model.head_args.scale": [1, 2]}}}
    with pytest.raises(UserError, match="different numbers of points .baseline 4, etf 2"):
        study_of(arms=arms, search=search)


# Study files


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_committed_studies_resolve(path):
    study = read_study(path)
    cells = [
        cell(study, data, arm, 0, study.points(arm)[0], searching=False)
        for data in study.settings
        for arm in study.arms
    ]
    assert len({item.key for item in cells}) == len(cells), "two arms are the same run"
    assert study_from(yaml.safe_load(yaml.safe_dump(plain(study)))) == study


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"arms": {}}, "arms"),
        ({"arms": {"a": {"recipe": "none_such"}}}, "none_such"),
        ({"arms": {"a": {"recipe": "etf", "overides": {"optim.lr": 1}}}}, "overides"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "1 is named twice"),
        ({"seeds": [-1]}, "seeds"),
        ({"seeds": 3}, "seeds"),
        ({"sed": [1]}, "sed"),
        ({"baseline": "mse"}, "baseline='mse'"),
        ({"arms": {1: {"recipe": "etf"}}}, "arms: 1 is no name"),
        ({"arms": {" ": {"recipe": "etf"}}}, "arms: ' ' is no name"),
        ({"data": {3: {}}}, "data: 3 is no name"),
        ({"arms": {a: {"recipe": "etf", "label": "one"} for a in "ab"}}, "labels of arms: one is named twice"),
        ({"overrides": {"data.root": datetime.date(2024, 1, 1)}}, "overrides.data.root=datetime.date(2024, 1, 1)"),
        ({"overrides": {"model.head_args": {"scale": float("inf")}}}, "overrides.model.head_args={'scale': inf}"),
        ({"overrides": {"resume": "auto"}}, "overrides.resume"),
        ({"overrides": None}, "overrides"),
        ({"contrasts": [{"arm": "etf", "against": "mse"}]}, "contrasts: 'mse' is no arm: one of baseline, etf"),
        ({"contrasts": [{"arm": "etf", "against": "etf"}]}, "contrasts: 'etf' against itself"),
        ({"contrasts": [{"arm": "etf", "against": "baseline"}] * 2}, "etf against baseline is named twice"),
        ({"contrasts": [{"arm": "etf"}]}, "against"),
        ({"measures": []}, "measures"),
        ({"measures": [{"path": "a"}, {"path": "a"}]}, "a is named twice"),
        ({"measures": [{"path": "a", "better": "bigger"}]}, "bigger"),
        ({"measures": [{"path": "a", "margin": -1.0}]}, "margin=-1.0"),
        ({"min_seeds": 1}, "min_seeds"),
        ({"overrides": {"seed": 3}}, "overrides.seed"),
        ({"data": {"a": {"out": "x"}}}, "data.a.out"),
        ({"search": {"grid": {}}}, "grid"),
        ({"search": {"grid": {"optim.lr": []}}}, "grid"),
        ({"search": {"grid": {"optim.lr": [1.0]}, "measure": "at_end.test.accuracy"}}, "never test images"),
        ({"search": {"grid": {"optim.lr": [1.0]}, "budget": 0}}, "budget"),
        ({"search": {"grid": {"seed": [1]}}}, "search.grid.seed"),
        ({"search": {"grid": {"optim.lr": [0.1, 0.1]}}}, "search.grid.optim.lr: 0.1 is named twice"),
        ({"search": {"grid": {"optim.lr": [0.1]}, "overrides": {"seed": 3}}}, "search.overrides.seed"),
        ({"evaluations": {"checkpoints": []}}, "evaluations.checkpoints=[]"),
        ({"evaluations": {"args": ["--checkpoint", "best"]}}, "say it by evaluations.checkpoints"),
        ({"evaluations": {"args": ["--parts=ood"]}}, "say it by evaluations.parts"),
        ({"evaluations": {"preset": "slow"}}, "slow"),
        ({"arms": {"a": {"recipe": "etf", "grid": {"optim.lr": [1.0]}}}}, "no search"),
    ],
)
def test_a_wrong_study_is_refused_by_name(changes, word):
    with pytest.raises(UserError, match=re.escape(word)):
        study_from(MINIATURE | {"contrasts": []} | changes)


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ([], "name a study file"),
        (["none_such.yaml"], "none_such.yaml"),
        (["etf", "none_such"], "none_such"),
        (["etf", "etf"], "twice"),
        (["etf", "--seeds", "x"], "--seeds x"),
        (["etf", "--seeds", "0"], "--seeds 0: at least one"),
        (["etf", "--shard", "3/2"], "--shard 3/2"),
        (["etf", "--workers", "-1"], "--workers -1"),
        (["etf", "--workers", "many"], "--workers"),
        (["etf", "--optim.lr"], "--optim.lr needs a value"),
        (["etf", "--optim.lrr", "1", "--plan"], "optim.lrr"),
        (["etf", "--seed", "1"], "overrides.seed"),
        (["etf", "-x"], "-x is unknown"),
        (["etf", "--seeds", "-1"], "--seeds -1: at least one"),
        (["etf", "--shard", "²/3"], "--shard ²/3"),
        ([str(STUDIES[0]), "--optim.lr", "1"], "--optim.lr: a study file says everything"),
        ([str(STUDIES[0]), "--seeds", "9"], "--seeds: a study file says everything"),
    ],
)
def test_a_wrong_command_is_one_line(argv, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compare.main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and word in said


def test_a_measure_that_no_run_has_is_refused_with_what_there_is(miniature, tmp_path, capsys):
    path = write_study(tmp_path, measures=[{"path": "at_end.test.acuracy"}])
    command = [str(path), "--runs", str(miniature.parent / "runs"), "--report-only"]
    assert compare.main(command) == 2
    said = capsys.readouterr().err
    assert "no 'acuracy' in at_end.test" in said and "accuracy" in said


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda found: found.update(schema=2), "schema 1"),
        (lambda found: found.pop("search"), "search"),
        (lambda found: found.update(more=1), "more"),
        (lambda found: next(iter(found["runs"].values())).update(commit=""), "does not name the commit"),
        (lambda found: next(iter(found["runs"].values())).pop("commit"), "commit missing or unknown"),
    ],
)
def test_no_table_from_results_that_do_not_say_what_made_them(miniature, tmp_path, change, word):
    found = content(miniature)
    change(found)
    (tmp_path / "results.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match=word):
        results.read(tmp_path / "results.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.update(runs=[]),
        lambda found: next(iter(found["runs"].values())).update(environment=9),
        lambda found: next(iter(found["runs"].values())).update(status="odd"),
        lambda found: next(iter(found["runs"].values())).update(summary=None),
        lambda found: next(iter(found["runs"].values())).update(config={"loss": "mse"}),
    ],
)
def test_a_damaged_results_file_is_one_line(miniature, tmp_path, change, capsys):
    found = content(miniature)
    change(found)
    path = write_study(tmp_path)
    (tmp_path / path.stem).mkdir()
    (tmp_path / path.stem / "results.json").write_text(json.dumps(found))
    assert run(path) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "results.json" in said


def test_a_run_whose_files_are_cut_short_fails_alone(miniature, tmp_path, capsys):
    path = write_study(tmp_path)
    shutil.copytree(miniature.parent / "runs", tmp_path / "runs")
    first, second = list((tmp_path / "runs").glob("*/*/summary.json"))[:2]
    first.write_text(first.read_text()[:100])
    (second.parent / "timing.json").unlink()
    assert run(path, "--report-only") == 1
    said = capsys.readouterr().out
    assert "2 of 4 runs" in said and said.count("a file of the run is damaged") == 2 and "remove that folder" in said
    (tmp_path / path.stem / "curves.json").write_text("[1")
    assert run(path, "--report-only") == 2
    assert "curves.json is damaged" in capsys.readouterr().err


def test_runs_without_the_evaluation_asked_for_are_not_all_there(miniature, tmp_path, capsys):
    """What needs no evaluation is tabulated all the same."""
    shutil.copytree(miniature.parent / miniature.stem, tmp_path / miniature.stem)
    path = write_study(tmp_path, evaluations={"parts": ["calibration"]})
    assert run(path, "--report-only") == EXIT_CODE
    said = capsys.readouterr().out
    assert "0 of 4 runs" in said and "the same command goes on" in said
    tables = content(path)["statistics"]
    assert [table["arms"] for table in tables] == [table["arms"] for table in content(miniature)["statistics"]]
    assert "Not complete" in (tmp_path / path.stem / "report.md").read_text()


def test_runs_that_leave_a_study_are_kept_and_another_study_is_not_written_over(miniature, tmp_path, capsys):
    shutil.copytree(miniature.parent / miniature.stem, tmp_path / miniature.stem)
    before = (tmp_path / miniature.stem / "results.json").read_bytes()
    path = write_study(tmp_path, seeds=[0])
    assert run(path, "--report-only") == 0
    kept = tmp_path / miniature.stem / "results-before-1.json"
    assert kept.read_bytes() == before and "2 runs are no part of the study any more" in capsys.readouterr().out
    assert run(path, "--report-only") == 0 and not kept.with_name("results-before-2.json").exists()
    other = path.rename(tmp_path / "other.yaml")
    assert run(other, "--out", str(tmp_path / miniature.stem)) == 2
    assert "holds the study miniature, not other: --out another folder" in capsys.readouterr().err


def test_a_study_file_that_says_a_thing_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("question: q\nseeds: [0]\narms:\n  a: {recipe: baseline}\n  a: {recipe: etf}\n")
    with pytest.raises(UserError, match="line 5: a is named twice"):
        read_study(path)
    path.write_bytes("question: ä".encode("latin-1"))
    with pytest.raises(UserError, match="no text in UTF-8"):
        read_study(path)


@pytest.mark.parametrize("option", ["--out", "--runs"])
def test_a_folder_that_cannot_be_written_to_is_known_before_the_first_run(option, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "run_all", None)
    path = write_study(tmp_path)
    (tmp_path / "file").write_text("")
    assert run(path, option, str(tmp_path / "file")) == 2
    assert f"{option} {tmp_path / 'file'} cannot be written to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"parts": ["nope"]}, "--parts nope"),
        ({"args": ["--nope"]}, "--nope is unknown"),
        ({"args": ["--attacked"]}, "--attacked"),
    ],
)
def test_words_that_the_evaluation_does_not_know_are_said_before_the_first_run(asked, word, tmp_path, capsys):
    assert run(write_study(tmp_path, evaluations=asked), "--plan") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: evaluations: recipes/robustness.py ") and word in said and said.count("\n") == 1


def test_a_measure_that_one_arm_lacks_is_said_and_ends_nothing():
    study = study_of(measures=[{"path": "at_end.val.accuracy"}, {"path": "at_end_ema.test.accuracy"}], seeds=[0])
    found, cells = results.Found(), cells_of(study)
    plain_run = {"summary": {"at_end": {"val": {"accuracy": 0.5}}}}
    found.runs = {item.key: plain_run for item in cells}
    found.timing = {item.key: {"train_seconds": 1.0} for item in cells}
    progress = Progress(found, cells, study, workers=1)
    assert "0.5 in 1 s; measure at_end_ema.test.accuracy: no 'at_end_ema'" in progress.line(cells[0], "done")
    with pytest.raises(UserError, match="no 'at_end_ema'"):
        progress.line(cells[1], "done")  # now no arm has it


def test_a_folder_of_images_is_known_by_its_images_and_not_by_its_place(tmp_path, monkeypatch):
    def folder(name, *shades):
        for place, shade in enumerate(shades):
            (tmp_path / name / "im" / f"c{place % 2}").mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), shade).save(tmp_path / name / "im" / f"c{place % 2}" / f"{place}.bmp")
        monkeypatch.chdir(tmp_path / name)
        _images_of.cache_clear()
        return identity(dotted(parse(["etf", "--data.name=folder", "--data.root=im"])))

    one = folder("here", 10, 20, 30, 40)
    assert folder("there", 10, 20, 30, 40) == one
    assert len({one, folder("other", 10, 20, 30, 41), folder("here", 10, 20, 30, 40, 50)}) == 3


def test_the_plan_runs_nothing_and_knows_the_time(miniature, capsys):
    assert run(miniature, "--plan") == 0
    assert "4 runs, 0 to run" in capsys.readouterr().out
    path = write_study(miniature.parent, seeds=[0, 1, 7])
    try:
        assert run(path, "--plan") == 0
    finally:
        write_study(miniature.parent)
    *rows, total = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"6 runs, 2 to run, about \d+ s of one thread", total)
    assert [row.split()[:5] for row in rows[1:]] == [["run", "digits", arm, "2", "1"] for arm in ("baseline", "etf")]
    assert len(list((miniature.parent / "runs").glob("*/log.txt"))) == 4


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--data.name=foldr"], "data.name='foldr' is unknown"),
        (["--data.name=folder", "--data.root=nowhere"], "data.root=nowhere is not a folder"),
        (["--data.batch_size=4000"], "fewer than data.batch_size=4000"),
        (["--model.backbone=resnet19"], "did you mean resnet18"),
        (["--loss.nope.weight=1"], "loss.nope is unknown: one of cross_entropy"),
        (["--model.head=nope"], "model.head='nope' is unknown: one of"),
        (["--device=nope"], "device='nope' cannot be used"),
    ],
)
@pytest.mark.parametrize("plan", [True, False])
def test_what_no_run_could_begin_with_is_said_once_and_before_the_first(
    more, word, plan, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "run_all", None)
    assert compare.main(["baseline", "etf", *more, *(["--plan"] if plan else [])]) == 2
    said = capsys.readouterr().err
    assert word in said and said.startswith("error: no run of baseline on ") and said.count("\n") == 1


def test_only_what_is_still_to_run_needs_its_data(miniature, capsys, monkeypatch):
    monkeypatch.setattr("recipes.study.preflight.load", None)
    assert run(miniature, "--plan") == 0


def test_an_error_that_runs_share_is_said_in_full_once():
    study = study_of()
    cells, found = cells_of(study), results.Found()
    for item, error in zip(cells, ("no room", "no room", "lost", "no room"), strict=True):
        found.runs[item.key] = {"status": "failed", "error": error}
    progress = Progress(found, cells, study, workers=1)
    said = [progress.line(item, "failed").split("; about")[0].split(": ", 1)[1] for item in cells]
    again = "FAILED with the same error, as {} runs so far"
    assert said == ["FAILED: no room", again.format(2), "FAILED: lost", again.format(3)]


def test_a_folder_of_images_with_one_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for shade, name in ((60, "dark"), (200, "light")):
        (tmp_path / "my_images" / name).mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (28, 28), (shade + number, shade, shade)).save(tmp_path / f"my_images/{name}/{number}.png")
    command = ["baseline", "etf", "--data.name", "folder", "--data.root", "my_images", "--seeds", "1", "--workers=0"]
    more = ["--data.batch_size=8", "--data.image_size=28", "--tpt.max_epochs=1", "--device", "cpu"]
    assert compare.main([*command, *more]) == 0
    (out,) = (tmp_path / "runs").glob("compare-folder-baseline-etf-*")  # a folder for these keys alone
    assert "Which does better, baseline or etf?" in (out / "report.html").read_text()
    found = results.read(out / "results.json")
    assert [place["seed"] for place in found["cells"]] == [0, 0]
    assert "--data.name=folder" in found["command"] and "--seeds 1" in found["command"]
    assert "2 of 2 runs" in capsys.readouterr().out


# The report


class Page(HTMLParser):
    """Checks as it reads: tags close in turn, ids are one of a kind; keeps what the tests ask for."""

    VOID = {"meta", "link", "br", "img", "input", "hr"}

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.found = [], [], []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), list(self.open)))
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs), list(self.open)))
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def of(self, tag):
        return [attrs for name, attrs, _ in self.found if name == tag]


def test_the_html_stands_alone_and_can_be_read_by_all(miniature):
    text = (miniature.parent / miniature.stem / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert not page.open and len(page.ids) == len(set(page.ids))
    assert page.of("html")[0]["lang"] == "en" and page.of("title") and page.of("main") and page.of("meta")
    for tag in ("script", "link", "img", "iframe"):
        assert not page.of(tag)
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert not re.search(r"(src|href)=\"(?!#)", without_names) and "@import" not in text and "url(http" not in text
    targets = re.findall(r'href="#([^"]+)"', text) + re.findall(r"url\(#([^)]+)\)", text)
    assert targets and set(targets) <= set(page.ids)
    assert len(page.of("table")) == text.count("<caption>") == len(re.findall(r'<div class="scroll"', text))
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.of("th"))
    cards = [attrs for attrs in page.of("div") if attrs.get("role") == "img"]
    assert len(cards) == len(page.of("svg")) >= 5 and all(len(card["aria-label"]) > 20 for card in cards)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert "fixed simplex" in text and "too few seeds" in text
    assert text.count("Collapse on the simplex") == 2  # the first seed of each arm


def test_the_markdown_says_the_same_as_the_html(miniature):
    out = miniature.parent / miniature.stem
    html, markdown = (out / "report.html").read_text(), (out / "report.md").read_text()
    rows = [line for line in markdown.splitlines() if line.startswith("| fixed simplex")]
    (overview,) = [line for line in markdown.splitlines() if line.startswith("| test accuracy (%) ")]
    assert len(overview.split("|")) == 5  # the arms side by side
    arms, contrasts = (
        [[cell.strip() for cell in row.split("|")] for row in rows if ("| baseline " in row) == asked]
        for asked in (False, True)
    )
    assert len(arms) == len(contrasts) == 5  # a row a measure; the contrast is the same difference once more
    assert [row[4:6] for row in arms] == [row[4:6] for row in contrasts]
    for value in re.findall(r"\d+\.\d+(?:e[-+]\d+)?", " ".join([*rows, overview])):
        assert value in html
    for picture in re.findall(r"\]\((figures/[^)]+)\)", markdown):
        assert (out / picture).read_text().startswith("<?xml")


def test_the_config_of_a_study_cell_is_what_train_resolves():
    item = cells_of(study_of())[1]
    assert item.argv[0] == "etf" and item.config == dotted(parse(list(item.argv)))
    assert set(item.config) == set(dotted(TrainConfig()))
