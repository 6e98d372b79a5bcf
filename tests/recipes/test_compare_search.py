"""The search before a comparison: validation images choose, every arm has the same budget."""

import pytest
from miniature_study import record_of, study_of

from recipes.core.errors import UserError
from recipes.study.search import chosen_points, search_results
from recipes.study.trials import comparison_trials, make_trial


def known(study, values):
    """Finished search runs whose validation accuracy is what `values` gives by arm and point."""
    records = {}
    for arm, numbers in values.items():
        for point, number in zip(study.points(arm), numbers, strict=True):
            trial = make_trial(study, "digits", arm, 100, point, searching=True)
            state = "failed" if number is None else "done"
            summary = {"at_end": {"val": {"accuracy": number}}}
            records[trial.key] = record_of(state, summary=summary, error="diverged")
    return records


def test_validation_images_choose_and_the_search_is_recorded():
    study = study_of(search={"grid": {"optim.lr": [0.1, 0.2, 0.3]}, "seeds": [100], "overrides": {"tpt.max_epochs": 1}})
    records = known(study, {"baseline": [0.5, 0.9, 0.9], "etf": [None, 0.4, 0.3]})
    assert chosen_points(study, records) == {
        ("digits", "baseline"): {"optim.lr": 0.2},
        ("digits", "etf"): {"optim.lr": 0.2},
    }
    entry = search_results(study, records)[1]
    assert [point["mean"] for point in entry["points"]] == [None, 0.4, 0.3]
    assert entry["points"][0]["error"] == "diverged" and entry["missing"] == 0
    trial = comparison_trials(study, chosen_points(study, records))[0]
    assert trial.config["optim.lr"] == 0.2 and trial.config["tpt.max_epochs"] == 2  # the search's own keys are gone


def test_an_arm_waits_for_its_whole_search():
    study = study_of(search={"grid": {"optim.lr": [0.1, 0.2]}})
    records = known(study, {"baseline": [0.5, 0.9], "etf": [0.4, 0.3]})
    missing = make_trial(study, "digits", "etf", 100, {"optim.lr": 0.2}, searching=True)
    del records[missing.key]
    assert set(chosen_points(study, records)) == {("digits", "baseline")}
    assert search_results(study, records)[1]["missing"] == 1


def test_every_arm_has_the_same_budget():
    search = {"grid": {"optim.lr": [0.1, 0.2, 0.3], "optim.weight_decay": [0.0, 0.1]}, "budget": 4}
    study = study_of(search=search)
    assert study.points("baseline") == study.points("etf") and len(study.points("etf")) == 4
    arms = {"baseline": {"recipe": "baseline"}, "etf": {"recipe": "etf", "grid": {"model.head_args.scale": [1, 2]}}}
    with pytest.raises(UserError, match="different numbers of points .baseline 4, etf 2"):
        study_of(arms=arms, search=search)
