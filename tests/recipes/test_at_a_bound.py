"""Fitted numbers that ran to a bound of their search are said to be undefined where they would stand."""

from types import SimpleNamespace

import pytest
import torch

from recipes.evaluation import console_table, plots
from recipes.evaluation.backbone_scores import BackboneRanking, BackboneScores
from recipes.evaluation.backbone_table import ranking_table
from recipes.evaluation.evaluations import calibration
from recipes.evaluation.results import plain
from recipes.evaluation.run_under_test import Outputs
from recipes.study.measures import lookup

LABELS = torch.arange(40) % 4


def outcome(validation, test=None):
    """Calibration of logits of validation and test images, as results.json holds it; a tenth of the test is wrong."""
    test = 9.0 * torch.eye(4)[torch.where(torch.arange(40) < 4, LABELS.roll(1), LABELS)] if test is None else test
    parts = {"test": test, "val": validation}
    data = SimpleNamespace(val=validation)
    run = SimpleNamespace(
        split="test", seed=0, data=data, outputs_on=lambda name: Outputs(parts[name], parts[name], LABELS)
    )
    found, warnings = calibration(run, None)
    return plain(found), warnings


RIGHT = 5.0 * torch.eye(4)[LABELS]
CASES = {
    "lower": (RIGHT, "hold no error, or hardly one"),
    "upper": (-RIGHT, "worse than guessing"),
    "flat": (torch.ones(40, 4), "are all equal"),
}


@pytest.mark.parametrize("bound", CASES)
def test_no_number_after_a_temperature_that_is_not_defined(bound):
    validation, words = CASES[bound]
    numbers, warnings = outcome(validation)
    assert numbers["temperature_at_bound"] == bound and words in warnings[0]
    lines = console_table.calibration(numbers, "test")
    text = "\n".join(lines)
    assert "no temperature T from validation images" in lines[0] and "T = " not in lines[0]
    assert f"{numbers['after']['nll']:.4f}" not in text.replace(f"{numbers['before']['nll']:.4f}", "")
    assert "not defined" in lines[1] and words in lines[1] and text.count("1/T") == 1
    assert f"{numbers['before']['nll']:.4f}" in text and f"{numbers['risk_coverage']['aurc']:.5f}" in text
    top = plots.calibration(numbers).axes[0]
    assert [text.get_text()[:10] for text in top.get_legend().get_texts()] == ["softmax(z)"]
    assert words.split(",")[0] in top.get_title()


def test_at_the_lower_bound_the_likelihood_only_grows_as_t_falls():
    """The oracle of the sentence: NLL of all-right logits at ever smaller T, and of the test images there."""
    losses = [float(torch.nn.functional.cross_entropy(RIGHT.double() / t, LABELS)) for t in (1.0, 0.3, 0.1, 0.05)]
    assert losses == sorted(losses, reverse=True)
    numbers, _ = outcome(RIGHT)
    assert numbers["after"]["nll"] > 100 * numbers["before"]["nll"]  # kept in the file, shown nowhere


def test_a_temperature_that_is_defined_is_shown_as_ever():
    wrong = 9.0 * torch.eye(4)[torch.where(torch.arange(40) < 4, LABELS.roll(1), LABELS)]
    numbers, warnings = outcome(wrong)
    # softmax(9/T) of the right class is 0.9: T = 9 / ln 27
    assert numbers["temperature"] == pytest.approx(9 / torch.log(torch.tensor(27.0)).item(), rel=1e-6)
    text = "\n".join(console_table.calibration(numbers, "test"))
    assert warnings == [] and "temperature T = 2.73 from validation images" in text and "not defined" not in text
    assert f"scaled by 1/T: {numbers['after']['nll']:.4f}" in text
    assert len(plots.calibration(numbers).axes[0].get_legend().get_texts()) == 2
    del numbers["temperature_at_bound"]  # results of earlier versions
    assert "\n".join(console_table.calibration(numbers, "test")) == text


def test_a_study_takes_it_as_not_reached():
    numbers, _ = outcome(RIGHT)
    record = {"summary": {}, "robustness": {"last": {"parts": {"calibration": numbers}, "skipped": {}}}}
    for path in ("after.nll", "after.ece", "temperature"):
        assert lookup(record, f"robustness.calibration.{path}") is None
    assert lookup(record, "robustness.calibration.before.nll") == numbers["before"]["nll"]
    numbers["temperature_at_bound"] = None
    assert lookup(record, "robustness.calibration.after.nll") == numbers["after"]["nll"]


def test_distances_that_were_not_found_and_probes_at_the_end_of_their_grid():
    least = {"norm": "linf", "median": None, "images": 12, "failures": 8}
    numbers = {"images": 20, "rho": 0.05, "failures": 3, "deepfool_l2": {"median": 0.5}, "minimum_norm": least}
    lines = console_table.distances(numbers, "test")
    assert lines[1].endswith("0.0500  (n = 20, not found for 3 of them)")
    assert lines[3].endswith("not defined  (n = 12, not found for 8 of them)")
    probe = {"accuracy": 0.9, "interval": [0.8, 0.95], "chosen": 1e-5, "at_edge": True}
    task = {"linear": probe, "knn": probe | {"chosen": 5, "at_edge": False}, "few_shot": probe | {"shots": 5}}
    linear, knn, _ = console_table.transfer({"tasks": {"digits": task}}, "test")[1:]
    assert linear.endswith("[80.0, 95.0], l2 = 1e-05 at the end of its grid") and knn.endswith("[80.0, 95.0]")


def test_a_ranking_names_the_probes_at_the_end_of_their_grid():
    rows = [
        BackboneScores(name, 0.5, (0.4, 0.6), 1e-5, 0.5, 2.0, -0.5, 8, 10**6, 28, 2.0, 50.0, probe_at_edge=edge)
        for name, edge in (("one", False), ("two", True))
    ]
    lines = ranking_table(BackboneRanking("digits", {}, 10, 80, "val", 20, 0, tuple(rows), {})).splitlines()
    assert lines[-1] == "probe at the end of its grid of penalties: two (l2 = 1e-05)"
    few = ranking_table(BackboneRanking("digits", {}, 10, 80, "val", 20, 0, (rows[0],), {}))
    assert "grid" not in few
