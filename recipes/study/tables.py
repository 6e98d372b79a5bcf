"""Statistics of a study's cells, and the same as words: for the terminal and for both reports."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.study.paired_tests import compare, contrast
from recipes.study.results import EVALUATED, Absent, Found, ended, lookup, outstanding
from recipes.study.spec import Evaluations, Measure, Study
from recipes.study.text_table import columns
from recipes.study.trials import Cell

FEW = 200
"""Images below which the title of a measure says on how many it was taken."""


def value_of(record: Mapping[str, Any], measure: Measure) -> float | None:
    """A measure of a finished run; None where it was not reached."""
    value = lookup(record, measure.path)
    if value is None or measure.minus is None:
        return value
    taken = lookup(record, measure.minus)
    return None if taken is None else value - taken


def _value_or_none(record: Mapping[str, Any], measure: Measure) -> float | None:
    try:
        return value_of(record, measure)
    except Absent:
        return None


def tabulate(study: Study, found: Found, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """For each data setting and measure, the values by seed, every arm held against the baseline, and the contrasts.

    Raises:
        UserError: no run has the measure at all; where only some have it, the others count as missing.
    """
    _refuse_unknown(study, found, cells)
    tables = []
    for data in study.settings:
        for measure in study.measures:
            values: dict[str, dict[int, float | None]] = {arm: {} for arm in study.arms}
            for cell in cells:
                if cell.data == data and found.done(cell, _needed(study, measure)):
                    values[cell.arm][cell.seed] = _value_or_none(found.runs[cell.key], measure)
            arms = compare(measure, values, base=study.base, min_seeds=study.min_seeds)
            pairs = contrast(measure, values, study.contrasts, min_seeds=study.min_seeds)
            tables.append({"data": data, "measure": measure.name, "arms": arms, "contrasts": pairs})
    return tables


def _needed(study: Study, measure: Measure) -> Evaluations | None:
    """What must have been evaluated for a run to have the measure."""
    paths = (measure.path, measure.minus or "")
    return study.evaluations if any(path.startswith("robustness") for path in paths) else None


def _refuse_unknown(study: Study, found: Found, cells: Sequence[Cell]) -> None:
    for measure in study.measures:
        done = [found.runs[cell.key] for cell in cells if found.done(cell, _needed(study, measure))]
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
        text = f"{value:{sign}#.3g}".rstrip(".")  # three digits, a power of ten only where there is need of one
    else:
        text = f"{value:{sign}.4g}"
    return _with_a_minus(text, sign)


def rounded(value: float | None, form: str, sd: float | None, *, signed: bool = False) -> str:
    """A value to the second digit of the deviation over seeds; per cent to the hundredth, as ever."""
    places = max(0, 1 - math.floor(math.log10(sd))) if sd and 0 < sd < math.inf else math.inf
    if value is None or form == "percent" or places > 6 or abs(value) >= 1e9:
        return shown(value, form, signed=signed)
    sign = "+" if signed else ""
    return _with_a_minus(f"{value:{sign}.{places}f}", sign)


def _with_a_minus(text: str, sign: str) -> str:
    """A number with a true minus; what was rounded to zero is on neither side of it."""
    return re.sub("^-", "−" if float(text) else sign, text)


def unit(measure: Measure) -> str:
    """What stands behind the title."""
    return " (%)" if measure.form == "percent" else ""


def count(entry: Mapping[str, Any]) -> str:
    """How many seeds have the measure: of all whose run has ended, where some did not reach it."""
    return f"{entry['n']}" if entry["n"] == entry["runs"] else f"{entry['n']} of {entry['runs']}"


def mean(entry: Mapping[str, Any], measure: Measure) -> str:
    """The mean over seeds, or why there is none."""
    return "not reached" if entry["runs"] and not entry["n"] else rounded(entry["mean"], measure.form, entry["sd"])


def mean_and_sd(entry: Mapping[str, Any], measure: Measure) -> str:
    """The same with its standard deviation, where there is one."""
    sd = entry["sd"]
    return mean(entry, measure) + ("" if sd is None else f" ± {rounded(sd, measure.form, sd)}")


def interval(entry: Mapping[str, Any], measure: Measure, kind: str) -> str:
    """The 95 % interval of the difference, `kind` being difference (t) or bootstrap; empty where there is none."""
    ends = [entry[f"{kind}_{end}"] for end in ("low", "high")]
    low, high = (rounded(end, measure.form, entry["difference_sd"], signed=True) for end in ends)
    return "" if None in ends else f"[{low}, {high}]"


def difference(entry: Mapping[str, Any], measure: Measure) -> str:
    """The mean difference to the baseline."""
    return rounded(entry["difference"], measure.form, entry["difference_sd"], signed=True)


def images_behind(content: Mapping[str, Any], data: str, measure: Measure) -> int | None:
    """On how many images an evaluation took a measure, the fewest of all runs on a setting; None where it says none."""
    if not measure.path.startswith("robustness"):
        return None
    first, *words = measure.path.split(".")
    keys = {cell["key"] for cell in content["cells"] if cell["data"] == data} & set(content["runs"])
    reports = [(content["runs"][key]["robustness"] or {}).get(EVALUATED[first]) for key in keys]
    counts = [_images(report["parts"], words) for report in reports if report]
    return min((number for number in counts if number is not None), default=None)


def _images(value: Any, words: Sequence[str]) -> int | None:
    """The count that stands nearest to the end of a path."""
    found = None
    for word in words:
        value = value.get(word) if isinstance(value, Mapping) else None
        if isinstance(value, Mapping):
            found = value.get("images", value.get("samples", found))
    return found


def heading(measure: Measure, images: int | None) -> str:
    """Title and unit; and the number of images where it is small, so that nobody takes it for more."""
    few = "" if images is None or images >= FEW else f"{images} images"
    inside = "; ".join(word for word in (unit(measure).strip(" ()"), few) if word)
    return measure.title + (f" ({inside})" if inside else "")


def closing_lines(content: Mapping[str, Any], *, total: int, out: Path) -> list[str]:
    """The last lines of the command: a table a data setting and measure, then what is missing and where the rest is."""
    measures = {measure.name: measure for measure in (Measure(**item) for item in content["study"]["measures"])}
    lines: list[str] = []
    for table in content["statistics"]:
        measure = measures[table["measure"]]
        if any(entry["n"] for entry in table["arms"]):
            title = heading(measure, images_behind(content, table["data"], measure))
            lines += ["", f"{table['data']}: {title}", *_rows(table, measure)]
    lines += ["", *failure_lines(content)]
    for entry in content["search"]:
        if not entry["missing"] and entry["chosen"] is None:
            lines.append(
                f"{entry['data']} {entry['arm']}: no point of the search came to its end, so it is not compared"
            )
    done = sum(ended(content, cell["key"]) == "done" for cell in content["cells"])
    lines += [f"{done} of {total} runs of the comparison are there; report: {out / 'report.html'}"]
    if outstanding(content):
        lines.append("the same command goes on with the rest")
    return lines


def _rows(table: Mapping[str, Any], measure: Measure) -> list[str]:
    rows = [
        [
            f"  {entry['arm']}",
            mean_and_sd(entry, measure),
            f"n = {count(entry)}",
            "" if entry["verdict"] == "baseline" else difference(entry, measure),
            "" if entry["verdict"] == "baseline" else interval(entry, measure, "difference"),
            entry["verdict"],
        ]
        for entry in table["arms"]
    ]
    rows += [
        [
            f"  {entry['arm']} against {entry['against']}",
            "",
            f"n = {entry['pairs']}",
            difference(entry, measure),
            interval(entry, measure, "difference"),
            entry["verdict"],
        ]
        for entry in table["contrasts"]
    ]
    return columns(rows, right=(3,))


def failures(content: Mapping[str, Any]) -> dict[str, list[str]]:
    """The runs that failed, by their error: one cause is said once."""
    found: dict[str, list[str]] = {}
    for key, record in content["runs"].items():
        if record["status"] == "failed":
            cells = [cell for cell in content["cells"] if cell["key"] == key]
            places = [f"{cell['data']} {cell['arm']} seed {cell['seed']}" for cell in cells]
            found.setdefault(record["error"], []).extend(places or [record["command"]])
    return found


def failure_lines(content: Mapping[str, Any]) -> list[str]:
    """A line for each error."""
    return [
        f"FAILED {', '.join(places) if len(places) < 4 else f'{len(places)} runs, the first {places[0]}'}: {error}"
        for error, places in failures(content).items()
    ]
