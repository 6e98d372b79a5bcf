"""Tables that a reader meets: columns that never touch, counts beside means, one line for one cause."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.study.load import read_study
from recipes.study.measures import image_count
from recipes.study.pipeline import _required
from recipes.study.plots.figure import arm_line, arm_marker
from recipes.study.plots.measures import plot_measure
from recipes.study.plots.training import _when
from recipes.study.spec import Measure
from recipes.study.tables import (
    align_pipe_tables,
    closing_lines,
    columns,
    failure_lines,
    format_rounded,
    format_value,
    heading,
)

CELLS = st.text("ab±−▲ |\\", max_size=6).map(str.strip)


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(CELLS, min_size=n, max_size=n), min_size=2, max_size=5)))
def test_lining_up_changes_no_cell_and_parts_the_columns_at_the_same_places(rows):
    rows = [[re.sub(r"[|\\]", "", cell).strip() for cell in row] for row in rows]
    text = "\n".join(["before", *(f"|{'|'.join(row)}|" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])), "end"])
    found = align_pipe_tables(text)
    assert found.startswith("before\n|") and found.endswith("|\nend")
    table = found.split("\n")[1:-1]
    assert len({len(line) for line in table}) == 1
    assert len({tuple(place for place, sign in enumerate(line) if sign == "|") for line in table}) == 1
    kept = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (table[0], *table[2:])]
    assert kept == rows and align_pipe_tables(found) == found


def test_an_escaped_bar_is_no_border_and_other_lines_are_left_alone():
    text = "a | b\n\n| x \\| y | n |\n|---|---:|\n| z | 10 |\n\n    code | here"
    assert align_pipe_tables(text) == "a | b\n\n| x \\| y |  n |\n|--------|---:|\n| z      | 10 |\n\n    code | here"


def test_columns_are_parted_by_two_spaces_however_wide_a_cell_is():
    lines = columns([["etf", "+0.0414", "higher"], ["a very long name of an arm", "–", "worse"]], right=(1,))
    assert lines == ["etf                         +0.0414  higher", "a very long name of an arm        –  worse"]


def test_a_minus_is_one_sign_in_every_form_and_zero_has_none():
    assert [format_value(-1e-6, "percent"), format_value(-1e-6, "percent", signed=True)] == ["0.00", "+0.00"]
    assert [format_value(-0.00123, form) for form in ("percent", "plain", "scientific")] == [
        "−0.12",
        "−0.00123",
        "−0.00123",
    ]
    values = (-1.234e-7, 1e-4, 0.1, 100, 12345, 0)
    there = ["−1.23e-07", "0.000100", "0.100", "100", "1.23e+04", "0.00"]
    assert [format_value(value, "scientific") for value in values] == there


def test_values_have_the_digits_that_the_seeds_allow():
    deviations = (0.026, 0.0042, 3.0, None, 0.0)
    assert [format_rounded(0.56284, "plain", sd) for sd in deviations] == ["0.563", "0.5628", "0.6", "0.5628", "0.5628"]
    assert format_rounded(0.00266, "scientific", 0.00025) == "0.00266"
    assert format_rounded(1.234e-6, "scientific", 2e-7) == "1.23e-06"  # beyond six places a power of ten
    assert format_rounded(-0.10888, "plain", 1.7e-5) == "−0.108880"
    assert [format_rounded(-0.0004, "plain", 0.2, signed=signed) for signed in (True, False)] == ["+0.00", "0.00"]
    odd = [format_rounded(1.5, "plain", sd) for sd in (float("nan"), float("inf"), -1.0)]
    assert odd == ["1.5", "1.5", "1.5"] and format_rounded(1e30, "plain", 0.1) == "1e+30"
    assert format_rounded(0.87243, "percent", 0.1) == "87.24" and format_rounded(None, "plain", 0.1) == "–"


def test_a_figure_names_the_arms_that_it_cannot_show():
    rows = [entry(arm, pairs=3, by_seed={"0": 0.5, "1": 0.6}, difference=0.0) for arm in ("a", "b")]
    rows += [entry("never", n=0, mean=None, by_seed={}, pairs=0, verdict="not reached")]
    names = {"a": "A", "b": "B", "never": "C"}
    figure = plot_measure({"data": "set", "arms": rows}, Measure("x"), names, "a", "name")
    assert "Not reached by any run of C." in figure.caption and "not reached by C" in figure.alt
    assert ">A<" in figure.svg and ">C<" not in figure.svg and "difference to the baseline" in figure.svg


MEASURES = [
    {"path": "robustness.adversarial.headline.accuracy", "label": "AutoAttack", "form": "percent"},
    {"path": "robustness.calibration.after.ece", "label": "ECE"},
    {"path": "at_end.train.nc1", "label": "NC1", "form": "scientific", "better": "neither"},
]


def record(images, *, status="done", error=None):
    parts = {"adversarial": {"images": images, "headline": {"accuracy": 0.5}}, "calibration": {"samples": 360}}
    return {"status": status, "error": error, "command": "train", "robustness": {"last": {"parts": parts}}}


def entry(arm, **values):
    missing = dict.fromkeys(("sd", "difference_sd", "difference", "difference_low", "difference_high"))
    return {"arm": arm, "n": 3, "runs": 3, "pairs": 3, "mean": 0.5, "verdict": "baseline", **missing, **values}


def content(runs, **tables):
    cells = [{"data": "set", "arm": "a", "seed": seed, "key": key} for seed, key in enumerate(runs)]
    statistics = [
        {"data": "set", "measure": name, "arms": entries, "contrasts": []} for name, entries in tables.items()
    ]
    return {
        "study": {"measures": MEASURES, "data": {}, "arms": {"a": {}}, "seeds": list(range(len(runs)))},
        "runs": runs,
        "cells": cells,
        "statistics": statistics,
        "search": [],
    }


def test_the_number_of_images_stands_in_the_title_where_it_is_small():
    found = content({"x": record(100), "y": record(64), "z": record(None) | {"robustness": None}})
    attack, calibration, collapse = (Measure(**item) for item in MEASURES)
    assert [image_count(found, "set", m) for m in (attack, calibration, collapse)] == [64, 360, None]
    assert image_count(found, "elsewhere", attack) is None
    assert heading(attack, 64) == "AutoAttack (%; 64 images)" and heading(attack, 1000) == "AutoAttack (%)"
    assert heading(calibration, 360) == "ECE" and heading(calibration, 64) == "ECE (64 images)"


def test_the_closing_table_says_not_reached_and_how_many_of_the_seeds_did(tmp_path):
    rows = [
        entry("a", sd=0.0041, mean=0.137),
        entry(
            "longer",
            sd=0.0077,
            difference_sd=0.0077,
            mean=0.179,
            difference=0.0414,
            difference_low=0.0346,
            difference_high=0.0482,
        )
        | {"verdict": "higher"},
        entry("fewer", pairs=2, difference=0.1, verdict="too few seeds"),
        entry("some", n=1, difference=0.1, verdict="too few seeds"),
        entry("none", n=0, mean=None, verdict="not reached"),
    ]
    lines = closing_lines(content({}, **{"at_end.train.nc1": rows}), total=1, out=tmp_path)
    assert lines[1:7] == [
        "set: NC1",
        "  a       0.1370 ± 0.0041  n = 3                                           baseline",
        "  longer  0.1790 ± 0.0077  n = 3              +0.0414  [+0.0346, +0.0482]  higher",
        "  fewer   0.500            n = 3, 2 in pairs   +0.100                      too few seeds",
        "  some    0.500            n = 1 of 3          +0.100                      too few seeds",
        "  none    not reached      n = 0 of 3               –                      not reached",
    ]


@pytest.mark.parametrize(("count", "said"), [(2, "FAILED set a seed 0, set a seed 1: no"), (9, "FAILED 9 runs, the")])
def test_a_cause_that_runs_share_is_said_once(count, said):
    runs = {str(key): record(1, status="failed", error="no room") for key in range(count)}
    (line,) = failure_lines(content(runs))
    assert line.startswith(said) and line.endswith("no room")


def test_when_zero_error_came_counts_the_seeds():
    assert _when([3, None, 5]) == "2 of 3 (epochs 3 to 5)"
    assert _when([None, 4]) == "1 of 2 (epoch 4)" and _when([None, None]) == "none of 2"


def test_no_two_arms_of_a_study_are_told_apart_by_colour_alone():
    arms = [str(number) for number in range(30)]
    looks = [(str(arm_marker(arms, arm)), str(arm_line(arms, arm))) for arm in arms]
    assert len(set(looks)) == 30
    for ours, theirs in itertools.combinations(arms[:7], 2):
        assert arm_marker(arms, ours)["marker"] != arm_marker(arms, theirs)["marker"]
    by_line = [(arm_marker(arms, arm)["color"], str(arm_line(arms, arm))) for arm in arms]
    assert len(set(by_line)) == 30  # where marks are far apart, colour and line still are one of a kind


def test_a_difference_to_something_evaluated_waits_for_the_evaluation(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(
        "question: Which?\narms: {a: {recipe: baseline}, b: {recipe: etf}}\nbaseline: a\nseeds: [0, 1]\n"
        "evaluations: {preset: quick, parts: [calibration]}\nmeasures: [{path: at_end.test.accuracy}, "
        "{path: at_end.test.accuracy, minus: robustness.calibration.before.ece}]\n"
    )
    study = read_study(path)
    plain, minus = (_required(study, measure) for measure in study.measures)
    assert plain is None and minus is not None and minus == study.evaluations


def test_a_logarithmic_axis_has_plain_numbers():
    for values, ticks in (
        ({"0": 3e-3, "1": 0.06}, (">0.005<", ">0.01<")),
        ({"0": 1e-4, "1": 1.0}, (">0.001<", ">0.1<")),
    ):
        rows = [entry("a", pairs=0, by_seed=values), entry("b", pairs=2, by_seed=values, difference=0.0)]
        table = {"data": "set", "arms": rows}
        svg = plot_measure(table, Measure("x", form="scientific"), {"a": "A", "b": "B"}, "a", "name").svg
        assert all(tick in svg for tick in ticks) and "mathdefault" not in svg and "10^" not in svg
