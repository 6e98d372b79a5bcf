"""The command recipes/compare.py: refusals in one line, the plan, checks before the first run, progress."""

import re
from pathlib import Path

import pytest
from miniature_study import record_of, run, study_of, trials_of, write_study
from PIL import Image

from recipes import compare
from recipes.core.errors import UserError
from recipes.study import pipeline, results
from recipes.study.progress import Progress
from recipes.study.records import RunRecord

STUDIES = sorted((Path(__file__).parents[2] / "benchmarks" / "studies").glob("*.yaml"))


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


@pytest.mark.parametrize("option", ["--out", "--runs"])
def test_a_folder_that_cannot_be_written_to_is_known_before_the_first_run(option, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "run_trials", None)
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
    trials, progress = trials_of(study), Progress(2, study)
    record = RunRecord({"status": "done", "summary": {"at_end": {"val": {"accuracy": 0.5}}}}, {"train_seconds": 1.0})
    assert "0.5 in 1 s; measure at_end_ema.test.accuracy: no 'at_end_ema'" in progress.line(trials[0], "done", record)
    with pytest.raises(UserError, match="no 'at_end_ema'"):
        progress.line(trials[1], "done", record)  # now no arm has it


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
        (["--model.norm=nope"], "model.norm='nope' is unknown: one of none, batch"),
        (["--device=nope"], "device='nope' cannot be used"),
    ],
)
@pytest.mark.parametrize("plan", [True, False])
def test_what_no_run_could_begin_with_is_said_once_and_before_the_first(
    more, word, plan, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "run_trials", None)
    assert compare.main(["baseline", "etf", *more, *(["--plan"] if plan else [])]) == 2
    said = capsys.readouterr().err
    assert word in said and said.startswith("error: no run of baseline on ") and said.count("\n") == 1


def test_only_what_is_still_to_run_needs_its_data(miniature, capsys, monkeypatch):
    monkeypatch.setattr("recipes.study.preflight.load", None)
    assert run(miniature, "--plan") == 0


def test_an_error_that_runs_share_is_said_in_full_once():
    study = study_of()
    progress, said = Progress(4, study), []
    for trial, error in zip(trials_of(study), ("no room", "no room", "lost", "no room"), strict=True):
        line = progress.line(trial, "failed", record_of("failed", error=error))
        said.append(line.split("; about")[0].split(": ", 1)[1])
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
