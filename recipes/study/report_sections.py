"""The sections of a report: for each data setting, a table and a figure of every measure, and further figures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from recipes.evaluation import simplex_plot
from recipes.study.measures import image_count, lookup
from recipes.study.plots.evaluations import plot_attacks, plot_corruptions
from recipes.study.plots.figure import Figure, finish_figure
from recipes.study.plots.measures import plot_collapse_accuracy, plot_measure
from recipes.study.plots.training import plot_training
from recipes.study.report_rows import is_done, measure_table
from recipes.study.spec import Study

ANCHORS = ("processors", "warnings", "protocol", "search", "failures", "cost", "commands", "environment")
"""Anchors of the sections that every page has."""


def section(
    content: Mapping[str, Any],
    study: Study,
    arms: Mapping[str, str],
    data: str,
    attachments: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The tables and figures of one data setting."""
    all_tables = [table for table in content["statistics"] if table["data"] == data]
    tables = [table for table in all_tables if any(entry["n"] for entry in table["arms"])]
    measures = {measure.name: measure for measure in study.measures}
    prefix = f"s{list(study.settings).index(data)}"
    plots = [
        plot_measure(table, measures[table["measure"]], arms, study.base, f"{prefix}-measure{number}")
        for number, table in enumerate(tables)
    ]
    more = _more_figures(content, arms, data, attachments, prefix)
    any_done = any(is_done(content, cell["key"]) for cell in content["cells"] if cell["data"] == data)
    empty = [measures[table["measure"]].title for table in all_tables if table not in tables]
    shown = []
    for table, figure in zip(tables, plots, strict=True):
        measure = measures[table["measure"]]
        shown.append(measure_table(table, measure, arms, figure, image_count(content, data, measure)))
    return {
        "data": data,
        "slug": _anchor(data, study, prefix),
        "without": empty if any_done else [],
        "tables": shown,
        "more": more,
        "figures": [figure for figure in (*plots, *more) if figure is not None],
    }


def _anchor(data: str, study: Study, spare: str) -> str:
    """The setting's name as an anchor; the spare one where it would be empty or taken."""
    slug, *others = (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") for name in [data, *study.settings])
    return slug if slug and others.count(slug) == 1 and slug not in ANCHORS else spare


def _more_figures(
    content: Mapping[str, Any],
    arms: Mapping[str, str],
    data: str,
    attachments: Mapping[str, Mapping[str, Any]],
    prefix: str,
) -> list[Figure]:
    """The figures of a data setting that belong to no single measure."""
    keys = [(cell["arm"], cell["key"]) for cell in content["cells"] if cell["data"] == data]
    runs = [(arm, key, content["runs"][key]) for arm, key in keys if is_done(content, key)]
    points = [
        {"arm": arm, "nc1": lookup(run, "at_end.train.nc1"), "accuracy": lookup(run, "at_end.test.accuracy")}
        for arm, _, run in runs
    ]
    by_arm = {name: [(key, run) for arm, key, run in runs if arm == name] for name in arms}
    onsets = {name: [run["summary"]["onset_epoch"] for _, run in own] for name, own in by_arm.items()}
    histories = {
        name: [attachments["curves"][key] for key, _ in own if key in attachments["curves"]]
        for name, own in by_arm.items()
    }
    reports = {
        name: [run["robustness"]["last"]["parts"] for _, run in own if (run["robustness"] or {}).get("last")]
        for name, own in by_arm.items()
    }
    figures = [
        plot_collapse_accuracy(points, arms, data, f"{prefix}-collapse-accuracy"),
        plot_training(histories, onsets, arms, data, f"{prefix}-curves"),
        plot_attacks(reports, arms, data, f"{prefix}-adversarial"),
        plot_corruptions(reports, arms, data, f"{prefix}-corruptions"),
        *(
            _simplex(attachments["collapse"][key], arms[arm], f"{prefix}-simplex{number}")
            for number, (arm, key, _) in enumerate(runs)
            if key in attachments["collapse"]
        ),
    ]
    return [figure for figure in figures if figure is not None]


def _simplex(content: Mapping[str, Any], label: str, name: str) -> Figure:
    views = [simplex_plot.View.read(item) for item in content["views"]]
    canvas, alt = simplex_plot.draw(views, content["class_names"])
    caption = (
        "Training features (small), class means (large) and class vectors (lines) of the first seed, in the plane of "
        "the simplex nearest to the means; each panel in units of its own mean length. A collapsed class is one "
        "point on its corner."
    )
    return finish_figure(canvas, name, f"Collapse on the simplex: {label}", f"{label}. {alt}", caption)
