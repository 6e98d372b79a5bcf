"""Tables as words: how values are written, columns for a terminal and for Markdown, the last lines of the command."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.study.measures import image_count
from recipes.study.processors import mixed_pairs
from recipes.study.results import count_missing, final_status
from recipes.study.spec import Measure

FEW = 200
"""With fewer images than this, the title of a measure gives their number."""

UNESCAPED_BAR = re.compile(r"(?<!\\)\|")


def columns(rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), gap: str = "  ") -> list[str]:
    """Rows as lines, each column as wide as its widest cell; those numbered in `right` end together.

    Example:
        >>> columns([["etf", "1.5"], ["baseline", "10.5"]], right=[1])
        ['etf        1.5', 'baseline  10.5']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        gap.join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def align_pipe_tables(markdown: str) -> str:
    r"""The same Markdown with the columns of its pipe tables padded; `---:` puts a column's cells to the right.

    Example:
        >>> print(align_pipe_tables("| arm | n |\n|---|---:|\n| etf | 10 |"))
        | arm |  n |
        |-----|---:|
        | etf | 10 |
    """
    lines: list[str] = []
    table: list[list[str]] = []
    for line in [*markdown.split("\n"), ""]:
        if line.startswith("|"):
            table.append([cell.strip() for cell in UNESCAPED_BAR.split(line.strip())[1:-1]])
            continue
        lines += [*_pipe_table(table), line]
        table = []
    return "\n".join(lines[:-1])


def _pipe_table(rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    head, rule, *body = rows
    right = [number for number, mark in enumerate(rule) if mark.endswith(":")]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    rules = ["-" * (width + 1) + (":" if number in right else "-") for number, width in enumerate(widths)]
    room = sum(widths) + 3 * (len(widths) - 1)
    first, *others = [f"| {line.ljust(room)} |" for line in columns([head, *body], right=right, gap=" | ")]
    return [first, f"|{'|'.join(rules)}|", *others]


def format_value(value: float | None, form: str, *, signed: bool = False) -> str:
    """A value with as many digits as its form has: per cent to the hundredth, plain to four, scientific to three."""
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


def format_rounded(value: float | None, form: str, sd: float | None, *, signed: bool = False) -> str:
    """A value rounded to the second digit of its standard deviation `sd`; per cent always to the hundredth."""
    places = max(0, 1 - math.floor(math.log10(sd))) if sd and 0 < sd < math.inf else math.inf
    if value is None or form == "percent" or places > 6 or abs(value) >= 1e9:
        return format_value(value, form, signed=signed)
    sign = "+" if signed else ""
    return _with_a_minus(f"{value:{sign}.{places}f}", sign)


def _with_a_minus(text: str, sign: str) -> str:
    """The number with a true minus sign, and none where it was rounded to zero."""
    return re.sub("^-", "−" if float(text) else sign, text)


def unit(measure: Measure) -> str:
    """What follows a measure's title: the per cent sign, or nothing."""
    return " (%)" if measure.form == "percent" else ""


def format_count(entry: Mapping[str, Any]) -> str:
    """The number of seeds that have the measure, e.g. 3, or 1 of 3 where some ended without it.

    Where the other arm lacks it for some of these seeds the pairs follow, which differences and verdicts come from.
    """
    count = f"{entry['n']}" if entry["n"] == entry["runs"] else f"{entry['n']} of {entry['runs']}"
    fewer = entry["verdict"] != "baseline" and 0 < entry["pairs"] < entry["n"]
    return f"{count}, {entry['pairs']} in pairs" if fewer else count


def format_mean(entry: Mapping[str, Any], measure: Measure) -> str:
    """The mean over seeds, or "not reached" where every run ended without the measure."""
    return (
        "not reached" if entry["runs"] and not entry["n"] else format_rounded(entry["mean"], measure.form, entry["sd"])
    )


def format_mean_and_sd(entry: Mapping[str, Any], measure: Measure) -> str:
    """The mean ± the standard deviation over seeds, where there is one."""
    sd = entry["sd"]
    return format_mean(entry, measure) + ("" if sd is None else f" ± {format_rounded(sd, measure.form, sd)}")


def format_interval(entry: Mapping[str, Any], measure: Measure, kind: str) -> str:
    """The 95 % interval of the difference; empty where there is none. `kind` is difference (by t) or bootstrap.

    An end keeps its sign where it is rounded to zero: whether zero lies inside is what an interval is read for.
    """
    ends = [entry[f"{kind}_{end}"] for end in ("low", "high")]
    if None in ends:
        return ""
    low, high = (
        _with_its_sign(end, format_rounded(end, measure.form, entry["difference_sd"], signed=True)) for end in ends
    )
    return f"[{low}, {high}]"


def _with_its_sign(value: float, text: str) -> str:
    return re.sub("^[+]", "−", text) if value < 0 else text


def format_difference(entry: Mapping[str, Any], measure: Measure) -> str:
    """The mean paired difference, with its sign."""
    return format_rounded(entry["difference"], measure.form, entry["difference_sd"], signed=True)


def heading(measure: Measure, images: int | None) -> str:
    """A measure's title with its unit; and with the number of images where that is small."""
    few = "" if images is None or images >= FEW else f"{images} images"
    inside = "; ".join(word for word in (unit(measure).strip(" ()"), few) if word)
    return measure.title + (f" ({inside})" if inside else "")


def closing_lines(content: Mapping[str, Any], *, total: int, out: Path) -> list[str]:
    """The last lines of the command: tables of all measures, the failures, and how many runs are done."""
    measures = {measure.name: measure for measure in (Measure(**item) for item in content["study"]["measures"])}
    lines: list[str] = []
    for table in content["statistics"]:
        measure = measures[table["measure"]]
        if any(entry["n"] for entry in table["arms"]):
            title = heading(measure, image_count(content, table["data"], measure))
            lines += ["", f"{table['data']}: {title}", *_rows(table, measure)]
    lines += ["", *failure_lines(content), *(f"warning: {line}" for line in mixed_pairs(content))]
    for entry in content["search"]:
        if not entry["missing"] and entry["chosen"] is None:
            lines.append(
                f"{entry['data']} {entry['arm']}: no point of the search came to its end, so it is not compared"
            )
    done = sum(final_status(content, cell["key"]) == "done" for cell in content["cells"])
    lines += [f"{done} of {total} runs of the comparison are there; report: {out / 'report.html'}"]
    if count_missing(content):
        lines.append("the same command goes on with the rest")
    return lines


def _rows(table: Mapping[str, Any], measure: Measure) -> list[str]:
    rows = [
        [
            f"  {entry['arm']}",
            format_mean_and_sd(entry, measure),
            f"n = {format_count(entry)}",
            "" if entry["verdict"] == "baseline" else format_difference(entry, measure),
            "" if entry["verdict"] == "baseline" else format_interval(entry, measure, "difference"),
            entry["verdict"],
        ]
        for entry in table["arms"]
    ]
    rows += [
        [
            f"  {entry['arm']} against {entry['against']}",
            "",
            f"n = {entry['pairs']}",
            format_difference(entry, measure),
            format_interval(entry, measure, "difference"),
            entry["verdict"],
        ]
        for entry in table["contrasts"]
    ]
    return columns(rows, right=(3,))


def failures(content: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of the failed runs by their error."""
    by_error: dict[str, list[str]] = {}
    for key, run in content["runs"].items():
        if run["status"] == "failed":
            cells = [cell for cell in content["cells"] if cell["key"] == key]
            names = [f"{cell['data']} {cell['arm']} seed {cell['seed']}" for cell in cells]
            by_error.setdefault(run["error"], []).extend(names or [run["command"]])
    return by_error


def failure_lines(content: Mapping[str, Any]) -> list[str]:
    """A line for each error, with the runs that it ended."""
    return [
        f"FAILED {', '.join(names) if len(names) < 4 else f'{len(names)} runs, the first {names[0]}'}: {error}"
        for error, names in failures(content).items()
    ]
