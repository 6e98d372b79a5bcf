"""The rows of a report's tables, as words."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from recipes.study.paired_tests import MARGIN_TESTS
from recipes.study.plots.figure import Figure
from recipes.study.power import spread_of, verdict_from
from recipes.study.progress import duration
from recipes.study.spec import Measure, Study
from recipes.study.tables import (
    format_count,
    format_difference,
    format_interval,
    format_mean,
    format_mean_and_sd,
    format_rounded,
    format_value,
    heading,
)

SIGNS = {
    "better": "▲",
    "worse": "▼",
    "higher": "↑",
    "lower": "↓",
    "equivalent": "=",
    "not worse": "≥",
    "no difference shown": "·",
    "too few seeds": "?",
    "not reached": "–",
    "baseline not reached": "–",
    "baseline": "",
}
"""Signs of the verdicts."""


def is_done(content: Mapping[str, Any], key: str) -> bool:
    """Whether a run of the comparison is finished."""
    return key in content["runs"] and content["runs"][key]["status"] == "done"


def key_values(values: Mapping[str, Any]) -> list[str]:
    """Keys with their values.

    Example:
        >>> key_values({"optim.lr": 0.1, "device": "cpu"})
        ['optim.lr = 0.1', 'device = cpu']
    """
    plain = (value if isinstance(value, str) else json.dumps(value) for value in values.values())
    return [f"{key} = {value}" for key, value in zip(values, plain, strict=True)]


def measure_table(
    table: Mapping[str, Any],
    measure: Measure,
    arms: Mapping[str, str],
    figure: Figure | None,
    images: int | None,
) -> dict[str, Any]:
    """The table of a measure: a row for each arm and for each contrast, with its figure and its note."""
    rows = []
    for entry in table["arms"]:
        value = format_mean(entry, measure)
        rows.append(
            {
                "arm": arms[entry["arm"]],
                "mean": value,
                "signed": value if entry["n"] == 0 else f"{value} {SIGNS[entry['verdict']]}".rstrip(),
                "spread": format_mean_and_sd(entry, measure),
                "n": format_count(entry),
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
        "power": _power(table["arms"], measure),
        "margin": measure.margin is not None,
        "path": measure.name,
        "rows": rows,
        "contrasts": contrasts,
        "figure": figure,
    }


def _paired(entry: Mapping[str, Any], measure: Measure) -> dict[str, str]:
    """The columns about differences; empty for the baseline."""
    paired = entry["verdict"] != "baseline" and entry["pairs"] > 0
    tested = paired and entry["difference_low"] is not None
    return {
        "difference": format_difference(entry, measure) if paired else "",
        "t": format_interval(entry, measure, "difference") if paired else "",
        "bootstrap": format_interval(entry, measure, "bootstrap") if paired else "",
        "p": _p(entry["p_holm"]) if tested else "",
        **{name: _p(entry["margin_p_holm"].get(name)) if tested else "" for name in MARGIN_TESTS},
        "verdict": entry["verdict"],
    }


def _p(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _power(entries: Sequence[Mapping[str, Any]], measure: Measure) -> str:
    """What the pairs at hand can show; empty where there are too few to tell."""
    spread, shown = spread_of(entries), verdict_from(entries, measure)
    if spread is None or shown is None:
        return ""
    text = f"{format_rounded(shown, measure.form, spread.sd)}{' points' if measure.form == 'percent' else ''}"
    beyond = ", the margin included," if measure.margin else ""
    return f"{spread.pairs} pairs give a verdict from a true difference of {text} on{beyond} with 80 % power"


def _note(measure: Measure, images: int | None) -> str:
    """Which way is better, the margin, and the number of images."""
    better = {"larger": "larger is better", "smaller": "smaller is better", "neither": "described, not judged"}
    points = " points" if measure.form == "percent" else ""
    margin = "" if measure.margin is None else f"; margin {format_value(measure.margin, measure.form)}{points}"
    return better[measure.better] + margin + ("" if images is None else f"; on {images} images a run")


def search_table(entry: Mapping[str, Any], arms: Mapping[str, str]) -> dict[str, Any]:
    """What the search tried for one arm on one data setting."""
    points = [
        {
            "point": ", ".join(key_values(point["point"])),
            "mean": "failed" if point["error"] else "–" if point["mean"] is None else f"{point['mean']:.4f}",
            "chosen": point["point"] == entry["chosen"],
        }
        for point in entry["points"]
    ]
    return {"data": entry["data"], "arm": arms[entry["arm"]], "measure": entry["measure"], "points": points}


def search_error(search: Sequence[Mapping[str, Any]]) -> str:
    """The standard error of a point's mean: sd over its seeds, pooled over all points, divided by √seeds."""
    by_point = [[value for value in point["values"].values()] for entry in search for point in entry["points"]]
    values = [point for point in by_point if len(point) > 1 and None not in point]
    if not values:
        return (
            ""
            if not search
            else "A point has one seed, so that its standard error is not known: near points may be chance."
        )
    pooled = statistics.fmean(statistics.variance(point) for point in values) ** 0.5
    seeds = max(map(len, values))
    return f"A point's mean has a standard error of {pooled / seeds**0.5:.4f} (over {seeds} seeds, pooled over points)."


def warning_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The warnings of the evaluations, with the number of runs that have each."""
    counts: dict[str, int] = {}
    for record in content["runs"].values():
        for report in (record["robustness"] or {}).values():
            for warning in (report or {}).get("warnings", []):
                counts[warning] = counts.get(warning, 0) + 1
    return [{"warning": warning, "runs": count} for warning, count in sorted(counts.items())]


def cost_rows(
    content: Mapping[str, Any], study: Study, arms: Mapping[str, str], timing: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A row for each data setting and arm: time, memory and epochs, as medians over seeds."""
    rows = []
    for data in study.settings:
        for name, label in arms.items():
            keys = [cell["key"] for cell in content["cells"] if (cell["data"], cell["arm"]) == (data, name)]
            keys = [key for key in keys if is_done(content, key) and key in timing]
            if keys:
                costs = _costs([timing[key] for key in keys], [content["runs"][key]["summary"] for key in keys])
                rows.append({"data": data, "arm": label} | costs)
    return rows


def _costs(timings: Sequence[Mapping[str, Any]], summaries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    names = ("train_seconds", "evaluation_seconds", "train_images_per_second", "peak_bytes")
    training, evaluation, speed, memory = (statistics.median(timing[name] for timing in timings) for name in names)
    onsets = [summary["onset_epoch"] for summary in summaries if summary["onset_epoch"] is not None]
    return {
        "seconds": duration(training),
        "evaluation": duration(evaluation) if evaluation else "–",
        "speed": f"{speed:,.0f}".replace(",", " "),
        "memory": f"{memory / 2**20:.0f} MiB" if memory else "–",
        "parameters": f"{summaries[0]['parameters']:,}".replace(",", " "),
        "epochs": f"{statistics.median(summary['epochs'] for summary in summaries):g}",
        "onset": f"{statistics.median(onsets):g}" if onsets else "not reached",
        "reached": f"{len(onsets)} of {len(summaries)}",
    }


def command_rows(content: Mapping[str, Any], study: Study, arms: Mapping[str, str]) -> list[dict[str, str]]:
    """The command of each arm's first seed on each data setting; other seeds differ in --seed alone."""
    rows = []
    for cell in content["cells"]:
        if cell["seed"] == study.seeds[0] and cell["key"] in content["runs"]:
            command = content["runs"][cell["key"]]["command"]
            rows.append({"arm": arms[cell["arm"]], "data": cell["data"], "command": command})
    return rows
