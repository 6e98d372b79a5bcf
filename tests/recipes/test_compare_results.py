"""results.json: the same bits another day, complete, checked when it is read, and never lost."""

import json
import re
import shutil

import pytest
from miniature_study import content, run, without_commit, write_study

from recipes.core.errors import UserError
from recipes.core.interrupt import EXIT_CODE
from recipes.study import pipeline, results


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
    monkeypatch.setattr(pipeline, "run_trials", lambda trials, *args, **more: launched.extend(trials) or True)
    assert run(path) == 0 and launched == []
    assert (path.parent / path.stem / "results.json").read_bytes() == (
        miniature.parent / miniature.stem / "results.json"
    ).read_bytes()
    path = write_study(tmp_path / "fresh", seeds=[0, 1, 2])
    assert run(path) == EXIT_CODE  # nothing was run here, so that it is not complete
    assert [(trial.arm, trial.seed) for trial in launched] == [("baseline", 2), ("etf", 2)]


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
