"""Statistics of a study's cells, and the same as words: for the terminal and for both reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.study.cells import Cell
from recipes.study.results import Absent, Found, lookup, outstanding
from recipes.study.statistics import compare
from recipes.study.study import Measure, Study


def value_of(record: Mapping[str, Any], measure: Measure) -> float | None:
    """A measure of a finished run; None where it was not reached."""
    value = lookup(record, measure.path)
    if value is None or measure.minus is None:
        return value
    taken = lookup(record, measure.minus)
    return None if taken is None else value - taken


def tabulate(study: Study, found: Found, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """For each data setting and measure, the values by seed and the comparison of every arm with the baseline.

    Raises:
        UserError: no run has the measure at all; where only some have it, the others count as missing.
    """
    _refuse_unknown(study, found, cells)
    tables = []
    for data in study.settings:
        for measure in study.measures:
            values: dict[str, dict[int, float]] = {arm: {} for arm in study.arms}
            for cell in cells:
                if cell.data == data and found.done(cell, study.evaluations):
                    try:
                        value = value_of(found.runs[cell.key], measure)
                    except Absent:
                        continue
                    if value is not None:
                        values[cell.arm][cell.seed] = value
            entries = compare(measure, values, base=study.base, min_seeds=study.min_seeds)
            for entry in entries:
                entry["by_seed"] = {str(seed): value for seed, value in sorted(values[entry["arm"]].items())}
            tables.append({"data": data, "measure": measure.name, "arms": entries})
    return tables


def _refuse_unknown(study: Study, found: Found, cells: Sequence[Cell]) -> None:
    done = [found.runs[cell.key] for cell in cells if found.done(cell, study.evaluations)]
    for measure in study.measures:
        absent: list[Absent] = []
        for record in done:
            try:
                value_of(record, measure)
            except Absent as error:
                absent.append(error)
        if done and len(absent) == len(done):
            raise absent[0]


def shown(value: float | None, form: str, *, signed: bool = False) -> str:
    """A value as people read it."""
    if value is None:
        return "–"
    sign = "+" if signed else ""
    if form == "percent":
        text = f"{100 * value:{sign}.2f}"
    elif form == "scientific":
        text = f"{value:{sign}.2e}"
    else:
        text = f"{value:{sign}.4g}"
    return text.replace("-", "−") if form != "scientific" else text


def unit(measure: Measure) -> str:
    """What stands behind the title."""
    return " (%)" if measure.form == "percent" else ""


def closing_lines(content: Mapping[str, Any], *, total: int, out: Path) -> list[str]:
    """The last lines of the command: a table a data setting and measure, then what is missing and where the rest is."""
    study = content["study"]
    lines: list[str] = []
    for table in content["statistics"]:
        measure = next(m for m in map(_measure, study["measures"]) if m.name == table["measure"])
        if not any(entry["n"] for entry in table["arms"]):
            continue
        lines += ["", f"{table['data']}: {measure.title}{unit(measure)}"]
        for entry in table["arms"]:
            low, high = (shown(entry[f"difference_{end}"], measure.form, signed=True) for end in ("low", "high"))
            difference = f"{shown(entry['difference'], measure.form, signed=True):>9} [{low}, {high}]"
            if entry["verdict"] == "baseline":
                difference = ""
            spread = f"{shown(entry['mean'], measure.form):>9} ± {shown(entry['sd'], measure.form):<8} n={entry['n']}"
            lines.append(f"  {entry['arm']:<22}{spread:<30}{difference:<32}{entry['verdict']}")
    lines.append("")
    failures: dict[str, list[str]] = {}
    for key, record in content["runs"].items():
        if record["status"] == "failed":
            places = [
                f"{cell['data']} {cell['arm']} seed {cell['seed']}" for cell in content["cells"] if cell["key"] == key
            ]
            failures.setdefault(record["error"], []).extend(places or [record["command"]])
    for error, places in failures.items():
        lines.append(f"FAILED {', '.join(places)}: {error}")
    for entry in content["search"]:
        if not entry["missing"] and entry["chosen"] is None:
            lines.append(
                f"{entry['data']} {entry['arm']}: no point of the search came to its end, so it is not compared"
            )
    done = sum(content["runs"].get(cell["key"], {}).get("status") == "done" for cell in content["cells"])
    lines += [f"{done} of {total} runs of the comparison are there; report: {out / 'report.html'}"]
    if outstanding(content):
        lines.append("the same command goes on with the rest")
    return lines


def _measure(values: Mapping[str, Any]) -> Measure:
    return Measure(**values)
