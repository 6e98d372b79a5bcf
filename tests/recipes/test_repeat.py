"""Runs of a study made again: what is drawn, what counts as the same, and the hours that a sample stands for."""

import itertools
import json
import math
import random
import statistics

import pytest
import yaml

from benchmarks.studies import repeat
from recipes import compare

TINY = {"data.train_size": 128, "tpt.max_epochs": 1, "tpt.extend": None, "device": "cpu"}


class Start(random.Random):
    """A draw whose random start is given."""

    def __init__(self, start):
        super().__init__()
        self.start = start

    def randrange(self, stop):
        assert 0 <= self.start < stop
        return self.start


@pytest.mark.parametrize(("count", "one_in"), [(60, 12), (24, 6), (5, 12), (2, 3), (1, 4), (7, 2)])
def test_every_run_is_drawn_from_one_start_alone(count, one_in):
    """Over all starts, each run falls into one draw: equal chances; two at least where there are two."""
    step = min(one_in, max(count // 2, 1))
    draws = [repeat.sample(range(count), one_in, Start(start)) for start in range(step)]
    assert sorted(itertools.chain(*draws)) == list(range(count))
    assert min(map(len, draws)) >= min(count, 2)


def test_hours_are_right_on_average_over_the_draws():
    """The expected total, averaged over all starts, is the total; its error is that of a mean without replacement."""
    taken = [random.Random(3).uniform(20, 200) for _ in range(60)]
    totals = []
    for start in range(12):
        rows = [{"stratum": "a", "seconds": x} for x in repeat.sample(taken, 12, Start(start))]
        total, error = repeat.expected_seconds(rows, {"a": 60})
        totals.append(total)
        values = [row["seconds"] for row in rows]
        assert error == pytest.approx(60 * math.sqrt((1 - 5 / 60) * statistics.variance(values) / 5))
    assert statistics.mean(totals) == pytest.approx(sum(taken))
    rows = [{"stratum": "all", "seconds": x} for x in taken]
    assert repeat.expected_seconds(rows, {"all": 60}) == pytest.approx((sum(taken), 0.0))


def test_strata_add_up_with_their_counts():
    rows = [{"stratum": "a", "seconds": 10.0}, {"stratum": "a", "seconds": 14.0}, {"stratum": "b", "seconds": 3.0}]
    total, error = repeat.expected_seconds(rows, {"a": 6, "b": 1})
    assert total == 6 * 12 + 3
    assert error == pytest.approx(math.sqrt((1 - 2 / 6) * 36 * 8 / 2))


def test_differences_name_the_place_and_count_what_is_gone():
    then = {"a": [1.0, 2.0, math.nan], "b": {"c": 4, "d": 0.0, "seconds": 3.0}, "e": 7.0, "right": True}
    now = {"a": [1.0, 2.5, math.nan], "b": {"c": 4, "d": 1e-9, "seconds": 9.0}, "e": None, "right": True, "new": 1}
    assert repeat.relative_differences(then, now) == {"a.1": 0.2, "b.d": 1.0, "e": 2.0}
    assert repeat.relative_differences({"a": math.nan}, {"a": 1.0}) == {"a": 2.0}
    assert repeat.relative_differences(then, then) == {}


@pytest.fixture
def studies(tmp_path, monkeypatch):
    """A committed study of four runs and two of a search, as the script finds it."""
    content = {
        "question": "Is it the same again?",
        "arms": {"baseline": {"recipe": "baseline"}, "etf": {"recipe": "etf"}},
        "seeds": [0, 1],
        "overrides": TINY,
        "search": {"grid": {"optim.lr": [0.05]}, "seeds": [100]},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    assert compare.main([str(tmp_path / "small.yaml"), "--workers", "0", "--runs", str(tmp_path / "runs")]) == 0
    monkeypatch.setattr(repeat, "STUDIES", tmp_path)
    return tmp_path


def again(studies, monkeypatch):
    words = ["repeat.py", "--runs", str(studies / "again"), "--one-in", "2", "--workers", "0"]
    monkeypatch.setattr("sys.argv", [*words, "--out", str(studies / "out")])
    assert repeat.main() == 0
    return json.loads((studies / "out" / "studies" / "repeat-cpu.json").read_text())["settings"]


def test_runs_made_again_are_held_to_the_study(studies, monkeypatch):
    """The same numbers count as the same; a number that the study has otherwise is found, with its place and size."""
    whole, *rows = again(studies, monkeypatch)
    assert (whole["runs"], whole["made_again"], whole["summaries_the_same"], whole["evaluated"]) == (6, 4, 4, 0)
    timing = json.loads((studies / "small" / "timing.json").read_text())
    took = sum(run["train_seconds"] + run["evaluation_seconds"] for run in timing.values())
    assert len(timing) == 6 and whole["hours_then"] == pytest.approx(took / 3600)
    assert {row["stratum"] for row in rows} == {"small", "small, searching"}
    assert all(row["summary"]["numbers"] > 50 and row["summary"]["differ"] == 0 for row in rows)
    there = studies / "small" / "results.json"
    content = json.loads(there.read_text())
    for record in content["runs"].values():
        record["summary"]["at_end"]["test"]["loss"] *= 2
    there.write_text(json.dumps(content))
    whole, *rows = again(studies, monkeypatch)
    assert whole["summaries_the_same"] == 0
    assert all(row["summary"]["largest"] == {"at_end.test.loss": 0.5} for row in rows)
