"""Fill the tables of studies in README.md and docs from the committed files of the studies, and from nothing else.

    python benchmarks/studies/digest.py            # rewrite the tables
    python benchmarks/studies/digest.py --check    # exit code 1 where a table differs from the results

A comment in a document says which table it shows; this script writes what stands between the two comments:

    <!-- study: terminal_phase; measures: at_end.test.accuracy, at_end.test.loss; arms: known, papyan -->
    <!-- end of study -->

`data` names one data setting where a study has several; `arms` and `data` may be left out. `differences: no` leaves out
the differences to the baseline and keeps their signs; `rows: contrasts` shows the study's contrasts instead of its
arms. A second kind of table lists all studies with their runs and the time that they took (from timing.json):

    <!-- all studies -->
    <!-- end of studies -->

A third kind, `<!-- method: etf -->`, shows what all studies found about one recipe (`method_tables.py`).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.studies import cells, method_tables
from recipes.core.errors import UserError
from recipes.study.load import read_study
from recipes.study.measures import image_count
from recipes.study.power import spread_of, verdict_from
from recipes.study.spec import Measure
from recipes.study.tables import format_mean_and_sd, format_rounded, format_value, heading

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"study", "data", "measures", "arms", "differences", "rows"}
BLOCK = re.compile(r"(<!-- study: (?P<request>[^>]*?) -->\n).*?(<!-- end of study -->)", re.DOTALL)
LIST = re.compile(r"(<!-- all studies -->\n).*?(<!-- end of studies -->)", re.DOTALL)
METHOD = re.compile(r"(<!-- method: (?P<recipe>\w+) -->\n).*?(<!-- end of method -->)", re.DOTALL)


@dataclass(frozen=True)
class Table:
    """A requested table.

    Attributes:
        content: the study's results.json.
        data: the data setting.
        measures: the columns.
        statistics: the entry of each column in results.json.
        arms: the arms that are shown.
        labels: the label of every arm.
        levels_only: without the differences to the baseline.
        contrasts: rows are contrasts, not arms.
    """

    content: Mapping[str, Any]
    data: str
    measures: Sequence[Measure]
    statistics: Sequence[Mapping[str, Any]]
    arms: Sequence[str]
    labels: Mapping[str, str]
    levels_only: bool
    contrasts: bool


def documents() -> list[Path]:
    """The documents that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str, folder: Path, *, up: str = "") -> str:
    """A document's text with its tables written anew.

    Args:
        text: of the document.
        folder: of the studies.
        up: leads from the document to the project's root.

    Raises:
        UserError: a comment names a study, data setting, measure or arm that does not exist.
    """
    text = BLOCK.sub(lambda found: f"{found[1]}{_markdown(_requested(found['request'], folder), up)}{found[3]}", text)
    text = METHOD.sub(lambda found: f"{found[1]}{method_tables.markdown(found['recipe'], folder, up)}{found[3]}", text)
    return LIST.sub(lambda found: f"{found[1]}{_list_of_studies(folder, up)}{found[2]}", text)


def _list_of_studies(folder: Path, up: str) -> str:
    """All studies: their questions, how many of the planned runs exist, and the hours of one thread they took."""
    rows = [["study", "question", "runs", "searching", "hours of one thread"], ["---"] * 5]
    all_seconds: dict[str, float] = {}
    for path in sorted(folder.glob("*.yaml")):
        row, seconds = _study_row(path, up)
        rows.append(row)
        all_seconds = seconds | all_seconds  # a run that two studies share counts once in the sum
    rows.append(["", "all of them", "", "", f"{sum(all_seconds.values()) / 3600:.1f}"])
    return "\n".join(["", *cells.lines(rows), "", ""])


def _study_row(path: Path, up: str) -> tuple[list[str], dict[str, float]]:
    """The row of one study in the list, and the seconds of each of its runs."""
    study, file = read_study(path), path.with_suffix("") / "results.json"
    link = f"[{path.stem}]({up}benchmarks/studies/{path.name})"
    planned = len(study.seeds) * len(study.settings) * len(study.arms)
    if not file.exists():
        return [link, study.question, f"0 of {planned}", "", ""], {}
    content, timing = cells.results_in(file.parent), json.loads(file.with_name("timing.json").read_text())
    done = sum(cell["key"] in content["runs"] for cell in content["cells"])
    searched = sum(len(point["values"]) for entry in content["search"] for point in entry["points"])
    seconds = {key: run["train_seconds"] + run["evaluation_seconds"] for key, run in timing.items()}
    runs = f"{done}" if done == planned else f"{done} of {planned}"
    return [link, study.question, runs, f"{searched or ''}", f"{sum(seconds.values()) / 3600:.1f}"], seconds


def _requested(words: str, folder: Path) -> Table:
    """The table that a comment requests."""
    pairs = [part.partition(":") for part in f"study: {words}".split(";")]
    request = {key.strip(): value.strip() for key, _, value in pairs}
    if set(request) - KEYS or "measures" not in request:
        raise UserError(f"study: {words}: study, measures, and if wanted data, arms, differences and rows, parted by ;")
    for key, word in (("differences", "no"), ("rows", "contrasts")):
        if request.get(key, word) != word:
            raise UserError(f"study: {words}: {key} can only be {word}")
    content = cells.results_in(folder / request["study"])
    statistics = {(table["data"], table["measure"]): table for table in content["statistics"]}
    settings = list(dict.fromkeys(data for data, _ in statistics))
    measures = {measure.name: measure for measure in (Measure(**item) for item in content["study"]["measures"])}
    labels = {name: arm["label"] or name for name, arm in content["study"]["arms"].items()}
    (data,) = _known([request.get("data", settings[0])], settings, "data", request["study"])
    names = _known(_words(request["measures"]), measures, "measures", request["study"])
    arms = _known(_words(request.get("arms", ", ".join(labels))), labels, "arms", request["study"])
    return Table(
        content=content,
        data=data,
        measures=[measures[name] for name in names],
        statistics=[statistics[data, name] for name in names],
        arms=list(labels) if "rows" in request else arms,
        labels=labels,
        levels_only="differences" in request,
        contrasts="rows" in request,
    )


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _known(words: Sequence[str], known: Sequence[str] | Mapping[str, Any], key: str, study: str) -> list[str]:
    """The words, if all of them are known."""
    for word in words:
        if word not in known:
            raise UserError(f"study {study}: {key}={word!r} is not there: one of {', '.join(known)}")
    return list(words)


def _markdown(table: Table, up: str) -> str:
    titles = [heading(measure, image_count(table.content, table.data, measure)) for measure in table.measures]
    head = ["contrast" if table.contrasts else "arm", *titles]
    rows = _contrast_rows(table) if table.contrasts else _arm_rows(table)
    return "\n".join(["", *cells.lines([head, ["---"] * len(head), *rows]), "", _caption(table, up), ""])


def _arm_rows(table: Table) -> list[list[str]]:
    """A row for each arm: its mean ± sd in each measure, and its difference to the baseline."""
    cell = _level if table.levels_only else _level_and_difference
    columns = list(zip(table.statistics, table.measures, strict=True))
    return [[table.labels[arm], *(cell(column, arm, measure) for column, measure in columns)] for arm in table.arms]


def _level(column: Mapping[str, Any], arm: str, measure: Measure) -> str:
    """Mean ± sd, and the verdict's sign."""
    entry = next(entry for entry in column["arms"] if entry["arm"] == arm)
    return f"{_mean(column, entry, measure)}{cells.SIGNS.get(entry['verdict'], '')}"


def _level_and_difference(column: Mapping[str, Any], arm: str, measure: Measure) -> str:
    """Mean ± sd; then the difference to the baseline, its interval and the verdict's sign."""
    entry = next(entry for entry in column["arms"] if entry["arm"] == arm)
    text = _mean(column, entry, measure)
    if not entry["n"] or entry["verdict"] == "baseline" or entry["difference_low"] is None:
        return text
    return f"{text}; {cells.difference(entry, measure)}"


def _mean(column: Mapping[str, Any], entry: Mapping[str, Any], measure: Measure) -> str:
    """Mean ± sd, with n where other arms have more seeds."""
    few = f" (n = {entry['n']})" if 0 < entry["n"] < _most_seeds(column) else ""
    return format_mean_and_sd(entry, measure) + few


def _contrast_rows(table: Table) -> list[list[str]]:
    """A row for each contrast: the paired difference in each measure."""
    rows = []
    for entries in zip(*(column.get("contrasts", []) for column in table.statistics), strict=True):
        name = f"{table.labels[entries[0]['arm']]} − {table.labels[entries[0]['against']]}"
        columns = zip(entries, table.measures, strict=True)
        rows.append([name, *(cells.difference(entry, measure) for entry, measure in columns)])
    return rows


def _most_seeds(column: Mapping[str, Any]) -> int:
    return max(int(entry["n"]) for entry in column["arms"])


def _caption(table: Table, up: str) -> str:
    """The line under a table: what it shows, the signs, the report, and the commits of the runs."""
    content, study = table.content, table.content["study"]
    base = study["baseline"] or next(iter(study["arms"]))
    cells = [cell for cell in content["cells"] if cell["data"] == table.data and cell["arm"] in table.arms]
    keys = {cell["key"] for cell in cells} & set(content["runs"])
    commits = sorted({each[:7] for key in keys for each in content["runs"][key]["commit"].split(", then ")})
    n = f"n = {max(map(_most_seeds, table.statistics))} seeds"
    if table.contrasts:
        shown, than = f"Mean paired difference over {n} with its 95 % t interval", ""
    elif table.levels_only:
        shown, than = f"Mean ± sd over {n}", f" than `{base}`"
    else:
        shown, than = f"Mean ± sd over {n}; then the paired difference to `{base}` with its 95 % t interval", ""
    return (
        f"{shown}; ▲ better{than}, ▼ worse, ↑ higher, ↓ lower, = equivalent and ≥ not worse within the margin, by the "
        f"[rules]({up}docs/compare.md#the-verdicts); no sign: none of these is shown. {_margins(table)}{_power(table)}"
        f"[Report]({up}benchmarks/studies/{content['name']}/report.md), runs of commit {', '.join(commits)}."
    )


def _margins(table: Table) -> str:
    """The margin of each column, which is a part of what its signs say; empty where none has one."""
    texts = ["none" if item.margin is None else format_value(item.margin, item.form) for item in table.measures]
    if set(texts) == {"none"}:
        return ""
    return f"Margins: {', '.join(texts)} (by column). "


def _power(table: Table) -> str:
    """From which true difference on the table's tests give a verdict, column by column; empty where none varies."""
    kind = "contrasts" if table.contrasts else "arms"
    texts = []
    for column, measure in zip(table.statistics, table.measures, strict=True):
        spread, shown = spread_of(column[kind]), verdict_from(column[kind], measure)
        texts.append("–" if spread is None else format_rounded(shown, measure.form, spread.sd))
    if set(texts) == {"–"}:
        return ""
    return f"A verdict is given with 80 % power from a true difference of {', '.join(texts)} on (by column). "


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: exit code 0, 1 where --check finds a table out of date, 2 where one cannot be made."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a table is out of date")
    args = parser.parse_args(argv)
    changed = []
    try:
        for path in documents():
            old = path.read_text()
            new = filled(old, Path(__file__).parent, up="" if path.parent == ROOT else "../")
            if new != old:
                changed.append(path)
                if not args.check:
                    path.write_text(new)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in changed:
        print(f"{path.relative_to(ROOT)}: {'a table differs from the results' if args.check else 'written anew'}")
    return int(args.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
