"""A miniature study for the tests of recipes/compare.py: two arms, two seeds, two epochs on 128 images."""

import re

import yaml

from recipes import compare
from recipes.study import results
from recipes.study.load import study_from_dict
from recipes.study.records import RunRecord
from recipes.study.search import chosen_points
from recipes.study.trials import comparison_trials

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


def without_commit(text):
    """The tree may get a commit while the tests run; everything else is held to the last byte."""
    return re.sub(r'"commit": "[^"]+"', "", text)


def content(path):
    return results.read(path.parent / path.stem / "results.json")


def study_of(**changes):
    return study_from_dict(MINIATURE | {"collapse": False} | changes)


def trials_of(study):
    return comparison_trials(study, chosen_points(study, {}))


def record_of(status="done", **result):
    return RunRecord({"status": status, "evaluation": None, "error": None, **result})
