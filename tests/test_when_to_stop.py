"""When to stop: a planted rule is found, noise gives none, and the page says what the results say."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks.studies import when_to_stop as script

ROOT = Path(__file__).parents[1]


def runs_of(gain, seed=0):
    """Runs of 40 settings with random numbers at zero error, and the gain that follows from them."""
    generator = np.random.default_rng(seed)
    runs = []
    for setting in np.repeat([f"s{n}" for n in range(40)], 5):
        known = dict(zip(script.PREDICTORS, generator.random(len(script.PREDICTORS)), strict=True))
        runs.append(script.Run(str(setting), known, float(gain(known) + 0.1 * generator.standard_normal())))
    return runs


def test_a_planted_threshold_is_found_and_pays(monkeypatch):
    monkeypatch.setattr(script, "DRAWS", 200)
    found = script.analysis(runs_of(lambda known: 1.0 if known["NC3"] < 0.6 else -2.0))
    assert found["rule"]["predictor"] == "NC3" and not found["rule"]["above"] and found["pays"]
    assert found["rule"]["threshold"] == pytest.approx(0.6, abs=0.1)
    assert found["rule"]["goes_on"] == pytest.approx(0.6, abs=0.15)
    assert found["test"]["gain"] == pytest.approx(0.6, abs=0.15) and found["always"]["testing"] < 0


def test_from_noise_no_rule_is_said_to_pay(monkeypatch):
    monkeypatch.setattr(script, "DRAWS", 200)
    assert not any(script.analysis(runs_of(lambda known: 0.5, seed=seed))["pays"] for seed in range(3))


def test_settings_are_never_in_both_halves():
    runs = runs_of(lambda known: 0.0)
    fitting, testing = script.halves(runs)
    assert len(fitting) + len(testing) == len(runs)
    assert not {run.setting for run in fitting} & {run.setting for run in testing}


def test_the_page_says_what_the_results_say():
    path = ROOT / "benchmarks" / "results" / "studies" / "when_to_stop-cpu.json"
    (content,) = json.loads(path.read_text())["settings"]
    assert script.table(content) in (ROOT / "docs" / "evidence.md").read_text()
    runs = script.read_runs(ROOT / "benchmarks" / "studies")
    fitting, testing = script.halves(runs)
    found = content["with"]
    assert (found["runs"]["fitting"], found["runs"]["testing"]) == (len(fitting), len(testing))
    gains = np.array([run.gain for run in testing])
    for row in found["candidates"]:
        values = np.array([run.known[row["predictor"]] for run in testing])
        assert row["correlation"] == pytest.approx(stats.spearmanr(values, gains).statistic, abs=1e-9)
    values = np.array([run.known[found["rule"]["predictor"]] for run in testing])
    goes_on = values > found["rule"]["threshold"] if found["rule"]["above"] else values < found["rule"]["threshold"]
    assert found["test"]["difference"] == pytest.approx((gains * goes_on).mean() - gains.mean(), abs=1e-9)
