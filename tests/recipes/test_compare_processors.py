"""Runs of one pair on different processors are named, before the missing ones are made and in every report after."""

import copy
import json
import shutil
import statistics
from pathlib import Path

import pytest

from recipes import compare
from recipes.core.files import processor
from recipes.study import processors, results
from recipes.study.load import read_study
from recipes.study.pipeline import plan_trials
from recipes.study.processors import UNKNOWN, mixed_pairs, pairs_to_be_mixed
from recipes.study.records import RunRecord
from recipes.study.report_rows import search_error

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "studies" / "bn_decay"


@pytest.fixture
def content():
    """Committed results, whose runs record no processor, with one seed of one arm moved to another one."""
    content = json.loads((COMMITTED / "results.json").read_text())
    content["environments"].append(content["environments"][0] | {"processor": "Abacus, DEFAULT"})
    (cell,) = (
        cell for cell in content["cells"] if (cell["arm"], cell["seed"], cell["data"]) == ("bn_1e-2", 1, "mnist5k")
    )
    content["runs"][cell["key"]]["environment"] = len(content["environments"]) - 1
    return content


def test_pairs_of_two_processors_are_named_in_report_and_terminal(content, tmp_path, capsys):
    assert mixed_pairs(json.loads((COMMITTED / "results.json").read_text())) == []
    (line,) = mixed_pairs(content)
    assert line.startswith("mnist5k seed 1 mixes processors: ") and "bn_1e-2 on Abacus, DEFAULT" in line
    assert f"bn_2e-3, bn_5e-4, bn_1e-3 on {UNKNOWN}" in line or f"on {UNKNOWN}; bn_1e-2" in line
    for path in COMMITTED.glob("*.json"):
        shutil.copy(path, tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(content))
    study = str(COMMITTED.with_suffix(".yaml"))
    compare.main([study, "--report-only", "--out", str(tmp_path), "--runs", str(tmp_path / "runs")])
    assert f"warning: {line}" in capsys.readouterr().out
    assert line in (tmp_path / "report.md").read_text() and line in (tmp_path / "report.html").read_text()


def test_what_would_be_mixed_is_said_before_it_is_run(monkeypatch):
    study = read_study(COMMITTED.with_suffix(".yaml"))
    records = results.read_records(COMMITTED, "bn_decay")
    trials = plan_trials(study, records)
    assert pairs_to_be_mixed(study, trials, records) is None  # nothing is missing
    missing = next(trial for trial in trials if trial.seed == 2 and trial.data == "mnist5k")
    fewer = {key: record for key, record in records.items() if key != missing.key}
    note = pairs_to_be_mixed(study, trials, fewer)
    assert "mnist5k seed 2: some arms were run on " + UNKNOWN in note and processor() in note
    assert "seed 1" not in note and "fashion" not in note
    monkeypatch.setattr(processors, "processor", lambda: "Abacus, DEFAULT")
    here = {key: RunRecord(copy.deepcopy(record.result)) for key, record in fewer.items()}
    for record in here.values():
        record.result["environment"]["processor"] = "Abacus, DEFAULT"
    assert pairs_to_be_mixed(study, trials, here) is None


def test_the_search_tells_the_standard_error_of_a_point():
    points = [{"values": {"1": 0.80, "2": 0.82, "3": 0.81}}, {"values": {"1": 0.70, "2": 0.76, "3": 0.70}}]
    pooled = statistics.mean([statistics.variance([0.80, 0.82, 0.81]), statistics.variance([0.70, 0.76, 0.70])]) ** 0.5
    assert f"{pooled / 3**0.5:.4f} (over 3 seeds" in search_error([{"points": points}])
    assert "one seed" in search_error([{"points": [{"values": {"1": 0.8}}]}]) and search_error([]) == ""
    failed = [*points, {"values": {"1": None, "2": 0.9, "3": 0.1}}]
    assert search_error([{"points": failed}]) == search_error([{"points": points}])
