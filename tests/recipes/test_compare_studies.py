"""Study files: the committed ones resolve, wrong ones are refused by name."""

import datetime
import re
from pathlib import Path

import pytest
import yaml
from miniature_study import MINIATURE

from recipes.core.errors import UserError
from recipes.study.load import read_study, study_from_dict, study_to_dict
from recipes.study.trials import (
    make_trial,
)

STUDIES = sorted((Path(__file__).parents[2] / "benchmarks" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_committed_studies_resolve(path):
    study = read_study(path)
    trials = [
        make_trial(study, data, arm, 0, study.points(arm)[0], searching=False)
        for data in study.settings
        for arm in study.arms
    ]
    assert len({trial.key for trial in trials}) == len(trials), "two arms are the same run"
    assert study_from_dict(yaml.safe_load(yaml.safe_dump(study_to_dict(study)))) == study


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
        ({"evaluations": {"args": ["--checkpoint", "best"]}}, "use evaluations.checkpoints instead"),
        ({"evaluations": {"args": ["--parts=ood"]}}, "use evaluations.parts instead"),
        ({"evaluations": {"preset": "slow"}}, "slow"),
        ({"arms": {"a": {"recipe": "etf", "grid": {"optim.lr": [1.0]}}}}, "no search"),
    ],
)
def test_a_wrong_study_is_refused_by_name(changes, word):
    with pytest.raises(UserError, match=re.escape(word)):
        study_from_dict(MINIATURE | {"contrasts": []} | changes)


def test_a_study_file_that_says_a_thing_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("question: q\nseeds: [0]\narms:\n  a: {recipe: baseline}\n  a: {recipe: etf}\n")
    with pytest.raises(UserError, match="line 5: a is named twice"):
        read_study(path)
    path.write_bytes("question: ä".encode("latin-1"))
    with pytest.raises(UserError, match="no text in UTF-8"):
        read_study(path)
