"""The report of a study, from the files of its folder alone: an HTML file that needs nothing else, and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from recipes.study.load import study_from_dict
from recipes.study.plots.figure import Figure
from recipes.study.processors import mixed_pairs
from recipes.study.progress import duration
from recipes.study.report_rows import (
    SIGNS,
    command_rows,
    cost_rows,
    key_values,
    search_error,
    search_table,
    warning_rows,
)
from recipes.study.report_sections import section
from recipes.study.results import ATTACHMENTS, count_missing, read, read_attachment
from recipes.study.spec import Study
from recipes.study.tables import align_pipe_tables, failures

ARMS_ABREAST = 5
"""Arms beside the baseline in one table of the Markdown, which is read as plain text too."""

KEY_FIGURES = 3
"""Figures that the Markdown shows; they are small enough to be kept under version control, the others are not."""


def write_report(out: Path) -> None:
    """Write report.html, report.md and figures/ beside results.json.

    Figures that report.md shows lie in figures/, all others in figures/more/.

    Raises:
        UserError: the results cannot be read, or do not name the commit that made them.
    """
    content = read(out / "results.json")
    view = report_view(content, {name: read_attachment(out, name) for name in ATTACHMENTS})
    _write_figures(out / "figures", view["figures"], view["key_figures"])
    templates = _templates()
    html, markdown = (templates.get_template(f"{name}.jinja").render(view) for name in ("report.html", "report.md"))
    (out / "report.html").write_text(html.rstrip() + "\n", encoding="utf-8")
    (out / "report.md").write_text(align_pipe_tables(markdown.rstrip() + "\n"), encoding="utf-8")


def _templates() -> Environment:
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=lambda name: bool(name and name.startswith("report.html")),
    )
    env.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return env


def _write_figures(folder: Path, figures: Sequence[Figure], key_figures: Sequence[str]) -> None:
    (folder / "more").mkdir(parents=True, exist_ok=True)
    for stale in folder.rglob("*.svg"):
        stale.unlink()
    for figure in figures:
        path = folder / ("" if figure.name in key_figures else "more") / f"{figure.name}.svg"
        path.write_text('<?xml version="1.0" encoding="utf-8"?>\n' + figure.svg, encoding="utf-8")


def report_view(content: Mapping[str, Any], attachments: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The values that both templates show."""
    study = study_from_dict(content["study"])
    arms = {name: arm.label or name for name, arm in study.arms.items()}
    sections = [section(content, study, arms, data, attachments) for data in study.settings]
    done = [run for run in content["runs"].values() if run["status"] == "done"]
    failed = failures(content)
    commits = sorted({run["commit"] for run in done})
    timing = attachments["timing"]
    return {
        "name": content["name"],
        "command": content["command"],
        "study": study,
        "arms": arms,
        "labels": list(arms.values()),
        "base": arms[study.base],
        "signs": SIGNS,
        "sections": sections,
        "figures": [figure for part in sections for figure in part["figures"]],
        "key_figures": key_figures(sections),
        "common": key_values(study.overrides),
        "overrides": {name: key_values(arm.overrides) for name, arm in study.arms.items()},
        "settings": {name: key_values(values) for name, values in study.data.items()},
        "search": [search_table(entry, arms) for entry in content["search"]],
        "failed": failed,
        "failures": sum(map(len, failed.values())),
        "blocks": _blocks(study),
        "missing": count_missing(content),
        "cost": cost_rows(content, study, arms, timing),
        "total": duration(sum(run["train_seconds"] + run["evaluation_seconds"] for run in timing.values())),
        "commits": commits,
        "warnings": warning_rows(content),
        "mixed": mixed_pairs(content),
        "search_error": search_error(content["search"]),
        "dirty": [commit for commit in commits if "-dirty" in commit],
        "environments": content["environments"],
        "runs": len(done),
        "examples": command_rows(content, study, arms),
    }


def key_figures(sections: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the figures for the Markdown.

    First the study's first measure on each data setting, then the curves of training and collapse against accuracy on
    the first setting.
    """
    first = [part["tables"][0]["figure"] for part in sections if part["tables"]]
    more = {figure.name: figure for part in sections[:1] for figure in part["more"]}
    others = [more.get(f"s0-{kind}") for kind in ("curves", "collapse-accuracy")]
    return [figure.name for figure in (*first, *others) if figure is not None][:KEY_FIGURES]


def _blocks(study: Study) -> list[list[int]]:
    """The arms side by side in each overview table of the Markdown, by their index, the baseline always first."""
    base = list(study.arms).index(study.base)
    rivals = [index for index in range(len(study.arms)) if index != base]
    return [[base, *rivals[start : start + ARMS_ABREAST]] for start in range(0, max(1, len(rivals)), ARMS_ABREAST)]
