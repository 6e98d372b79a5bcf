"""The report of a study: one HTML file that needs nothing else, and the same as Markdown, from results.json alone."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from recipes.evaluation import simplex_plot as simplex_view
from recipes.study import plots as figures
from recipes.study import robustness_figures
from recipes.study.progress import words
from recipes.study.results import BESIDE, lookup, outstanding, read, read_beside
from recipes.study.spec import Measure, Study, study_from
from recipes.study.tables import count, difference, failures, heading, images_behind, interval, mean, mean_and_sd, shown
from recipes.study.text_table import lined_up

SIGNS = {
    "better": "▲",
    "worse": "▼",
    "higher": "↑",
    "lower": "↓",
    "no difference shown": "=",
    "too few seeds": "?",
    "not reached": "–",
    "baseline not reached": "–",
    "baseline": "",
}

ANCHORS = ("warnings", "protocol", "search", "failures", "cost", "commands", "environment")
"""Sections of every page."""

ABREAST = 5
"""Arms beside the baseline in one table of Markdown, which is read as plain text too."""


def write_report(out: Path) -> None:
    """report.html, report.md and figures/*.svg beside results.json.

    Raises:
        UserError: the results cannot be read, or do not name the commit that made them.
    """
    content = read(out / "results.json")
    view = view_of(content, *(read_beside(out, name) for name in BESIDE))
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=lambda name: bool(name and name.startswith("report.html")),
    )
    env.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    (out / "figures").mkdir(exist_ok=True)
    for stale in (out / "figures").glob("*.svg"):
        stale.unlink()
    for figure in view["figures"]:
        (out / "figures" / f"{figure.name}.svg").write_text('<?xml version="1.0" encoding="utf-8"?>\n' + figure.svg)
    for name in ("report.html", "report.md"):
        text = env.get_template(f"{name}.jinja").render(view).rstrip() + "\n"
        (out / name).write_text(lined_up(text) if name == "report.md" else text)


def view_of(
    content: Mapping[str, Any], timing: Mapping[str, Any], curves: Mapping[str, Any], collapse: Mapping[str, Any]
) -> dict[str, Any]:
    """What both templates show."""
    study = study_from(content["study"])
    arms = {name: arm.label or name for name, arm in study.arms.items()}
    sections = [
        _section(content, study, arms, data, index, curves, collapse) for index, data in enumerate(study.settings)
    ]
    done = [record for record in content["runs"].values() if record["status"] == "done"]
    failed = failures(content)
    commits = sorted({record["commit"] for record in done})
    return {
        "name": content["name"],
        "command": content["command"],
        "study": study,
        "arms": arms,
        "labels": list(arms.values()),
        "base": arms[study.base],
        "signs": SIGNS,
        "sections": sections,
        "figures": [figure for section in sections for figure in section["figures"]],
        "common": _keys(study.overrides),
        "overrides": {name: _keys(arm.overrides) for name, arm in study.arms.items()},
        "settings": {name: _keys(values) for name, values in study.data.items()},
        "search": [_searched(entry, arms) for entry in content["search"]],
        "failed": failed,
        "failures": sum(map(len, failed.values())),
        "blocks": _blocks(study),
        "missing": outstanding(content),
        "cost": _costs(content, study, arms, timing),
        "total": words(sum(timing[key]["train_seconds"] + timing[key]["evaluation_seconds"] for key in timing)),
        "commits": commits,
        "warnings": _warnings(content),
        "dirty": [commit for commit in commits if commit.endswith("-dirty")],
        "environments": content["environments"],
        "runs": len(done),
        "examples": _commands(content, study, arms),
    }


def _keys(values: Mapping[str, Any]) -> list[str]:
    """Keys and values as a study file writes them."""
    plain = (value if isinstance(value, str) else json.dumps(value) for value in values.values())
    return [f"{key} = {value}" for key, value in zip(values, plain, strict=True)]


def _section(
    content: Mapping[str, Any],
    study: Study,
    arms: Mapping[str, str],
    data: str,
    index: int,
    curves: Mapping[str, Any],
    collapse: Mapping[str, Any],
) -> dict[str, Any]:
    """Tables and figures of one data setting."""
    every = [table for table in content["statistics"] if table["data"] == data]
    tables = [table for table in every if any(entry["n"] for entry in table["arms"])]
    measures = {measure.name: measure for measure in study.measures}
    keys = [(cell["arm"], cell["key"]) for cell in content["cells"] if cell["data"] == data]
    runs = [(arm, key, content["runs"][key]) for arm, key in keys if _is_done(content, key)]
    points = [
        {
            "arm": arm,
            "nc1": lookup(record, "at_end.train.nc1"),
            "accuracy": lookup(record, "at_end.test.accuracy"),
        }
        for arm, _, record in runs
    ]
    onsets = {name: [r["summary"]["onset_epoch"] for arm, _, r in runs if arm == name] for name in arms}
    histories = {name: [curves[key] for arm, key, _ in runs if arm == name and key in curves] for name in arms}
    reports = {
        name: [
            r["robustness"]["last"]["parts"]
            for arm, _, r in runs
            if arm == name and (r["robustness"] or {}).get("last")
        ]
        for name in arms
    }
    prefix = f"s{index}"
    drawn = [
        figures.dots(table, measures[table["measure"]], arms, study.base, f"{prefix}-measure{number}")
        for number, table in enumerate(tables)
    ]
    more = [
        figures.scatter(points, arms, data, f"{prefix}-collapse-accuracy"),
        figures.curves(histories, onsets, arms, data, f"{prefix}-curves"),
        robustness_figures.attacked(reports, arms, data, f"{prefix}-adversarial"),
        robustness_figures.corrupted(reports, arms, data, f"{prefix}-corruptions"),
        *(
            _collapse(collapse[key], arms[arm], f"{prefix}-simplex{number}")
            for number, (arm, key, _) in enumerate(runs)
            if key in collapse
        ),
    ]
    shown_tables = []
    for table, figure in zip(tables, drawn, strict=True):
        measure = measures[table["measure"]]
        shown_tables.append(_table(table, measure, arms, figure, images_behind(content, data, measure)))
    return {
        "data": data,
        "slug": _slug(data, study, prefix),
        "without": [measures[table["measure"]].title for table in every if table not in tables] if runs else [],
        "tables": shown_tables,
        "more": [figure for figure in more if figure is not None],
        "figures": [figure for figure in [*drawn, *more] if figure is not None],
    }


def _slug(data: str, study: Study, spare: str) -> str:
    """The setting's name as an anchor; the spare one where it would be empty or not the only one of the page."""
    slug, *others = (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") for name in [data, *study.settings])
    return slug if slug and others.count(slug) == 1 and slug not in ANCHORS else spare


def _collapse(content: Mapping[str, Any], label: str, name: str) -> figures.Figure:
    views = [simplex_view.View.read(item) for item in content["views"]]
    canvas, words = simplex_view.draw(views, content["class_names"])
    caption = (
        "Training features (small), class means (large) and class vectors (lines) of the first seed, in the plane of "
        "the simplex nearest to the means; each panel in units of its own mean length. A collapsed class is one "
        "point on its corner."
    )
    return figures.finished(canvas, name, f"Collapse on the simplex: {label}", f"{label}. {words}", caption)


def _is_done(content: Mapping[str, Any], key: str) -> bool:
    return key in content["runs"] and content["runs"][key]["status"] == "done"


def _table(
    table: Mapping[str, Any],
    measure: Measure,
    arms: Mapping[str, str],
    figure: figures.Figure | None,
    images: int | None,
) -> dict[str, Any]:
    rows = []
    for entry in table["arms"]:
        value = mean(entry, measure)
        rows.append(
            {
                "arm": arms[entry["arm"]],
                "mean": value,
                "signed": value if entry["n"] == 0 else f"{value} {SIGNS[entry['verdict']]}".rstrip(),
                "spread": mean_and_sd(entry, measure),
                "n": count(entry),
                **_paired(entry, measure),
            }
        )
    contrasts = [
        {"arm": arms[entry["arm"]], "against": arms[entry["against"]], "n": entry["pairs"], **_paired(entry, measure)}
        for entry in table["contrasts"]
    ]
    return {
        "title": heading(measure, images),
        "note": _note(measure, images),
        "path": measure.name,
        "rows": rows,
        "contrasts": contrasts,
        "figure": figure,
    }


def _paired(entry: Mapping[str, Any], measure: Measure) -> dict[str, str]:
    """What a row says of its differences; nothing of the baseline's, which has none."""
    paired = entry["verdict"] != "baseline" and entry["pairs"] > 0
    tested = paired and entry["difference_low"] is not None
    return {
        "difference": difference(entry, measure) if paired else "",
        "t": interval(entry, measure, "difference") if paired else "",
        "bootstrap": interval(entry, measure, "bootstrap") if paired else "",
        "p": "" if not tested else "< 0.001" if entry["p_holm"] < 0.001 else f"{entry['p_holm']:.3f}",
        "verdict": entry["verdict"],
    }


def _note(measure: Measure, images: int | None) -> str:
    """What is wished for, from which margin on, and on how many images."""
    wish = {"larger": "larger is better", "smaller": "smaller is better", "neither": "described, not judged"}
    points = " points" if measure.form == "percent" else ""
    margin = "" if measure.margin is None else f"; margin {shown(measure.margin, measure.form)}{points}"
    return wish[measure.better] + margin + ("" if images is None else f"; on {images} images a run")


def _blocks(study: Study) -> list[list[int]]:
    """The arms that stand side by side in the Markdown's overview, by their place: in each block the baseline first."""
    base = list(study.arms).index(study.base)
    rivals = [place for place in range(len(study.arms)) if place != base]
    return [[base, *rivals[start : start + ABREAST]] for start in range(0, max(1, len(rivals)), ABREAST)]


def _searched(entry: Mapping[str, Any], arms: Mapping[str, str]) -> dict[str, Any]:
    def said(point: Mapping[str, Any]) -> str:
        return ", ".join(_keys(point))

    points = [
        {
            "point": said(point["point"]),
            "mean": "failed" if point["error"] else "–" if point["mean"] is None else f"{point['mean']:.4f}",
            "chosen": point["point"] == entry["chosen"],
        }
        for point in entry["points"]
    ]
    return {"data": entry["data"], "arm": arms[entry["arm"]], "measure": entry["measure"], "points": points}


def _warnings(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the evaluations found suspicious, with the number of runs that say so."""
    counts: dict[str, int] = {}
    for record in content["runs"].values():
        for report in (record["robustness"] or {}).values():
            for warning in (report or {}).get("warnings", []):
                counts[warning] = counts.get(warning, 0) + 1
    return [{"warning": warning, "runs": count} for warning, count in sorted(counts.items())]


def _costs(
    content: Mapping[str, Any], study: Study, arms: Mapping[str, str], timing: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A row a data setting and arm: medians over seeds."""
    rows = []
    for data in study.settings:
        for name, label in arms.items():
            keys = [cell["key"] for cell in content["cells"] if (cell["data"], cell["arm"]) == (data, name)]
            keys = [key for key in keys if _is_done(content, key) and key in timing]
            if not keys:
                continue
            summaries = [content["runs"][key]["summary"] for key in keys]
            onsets = [s["onset_epoch"] for s in summaries if s["onset_epoch"] is not None]

            def middle(field: str, keys: list[str] = keys) -> float:
                return statistics.median(timing[key][field] for key in keys)

            memory = middle("peak_bytes")
            rows.append(
                {
                    "data": data,
                    "arm": label,
                    "seconds": words(middle("train_seconds")),
                    "evaluation": words(middle("evaluation_seconds")) if middle("evaluation_seconds") else "–",
                    "speed": f"{middle('train_images_per_second'):,.0f}".replace(",", " "),
                    "memory": f"{memory / 2**20:.0f} MiB" if memory else "–",
                    "parameters": f"{summaries[0]['parameters']:,}".replace(",", " "),
                    "epochs": f"{statistics.median(s['epochs'] for s in summaries):g}",
                    "onset": f"{statistics.median(onsets):g}" if onsets else "not reached",
                    "reached": f"{len(onsets)} of {len(summaries)}",
                }
            )
    return rows


def _commands(content: Mapping[str, Any], study: Study, arms: Mapping[str, str]) -> list[dict[str, str]]:
    """The command of the first seed of each arm and setting; other seeds differ in --seed alone."""
    found = []
    for cell in content["cells"]:
        if cell["seed"] == study.seeds[0] and cell["key"] in content["runs"]:
            command = content["runs"][cell["key"]]["command"]
            found.append({"arm": arms[cell["arm"]], "data": cell["data"], "command": command})
    return found
