"""Fill the tables of studies in README.md and docs from the committed files of the studies, and from nothing else.

    python benchmarks/studies/digest.py            # rewrite the tables
    python benchmarks/studies/digest.py --check    # exit code 1 where a table is not what the results say

A document says which table it shows; between the two comments stands what this script has written:

    <!-- study: terminal_phase; measures: at_end.test.accuracy, at_end.test.loss; arms: known, papyan -->
    <!-- end of study -->

`data` names one data setting where a study has several; `arms` and `data` may be left out. `differences: no` leaves the
differences to the baseline to the report and keeps their signs; `rows: contrasts` shows the study's contrasts instead
of its arms. A second kind of table lists all studies with their runs and the time that they took (from timing.json):

    <!-- all studies -->
    <!-- end of studies -->
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from recipes.core.errors import UserError
from recipes.study import results
from recipes.study.load import read_study
from recipes.study.measures import image_count
from recipes.study.spec import Measure
from recipes.study.tables import format_difference, format_interval, format_mean_and_sd, heading

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"study", "data", "measures", "arms", "differences", "rows"}
BLOCK = re.compile(r"(<!-- study: (?P<asked>[^>]*?) -->\n).*?(<!-- end of study -->)", re.DOTALL)
LIST = re.compile(r"(<!-- all studies -->\n).*?(<!-- end of studies -->)", re.DOTALL)
SIGNS = {"better": " ▲", "worse": " ▼", "higher": " ↑", "lower": " ↓"}


def documents() -> list[Path]:
    """Where tables may stand."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str, folder: Path, *, up: str = "") -> str:
    """A document's text with its tables made new, from studies in `folder`; `up` leads from the document to the root.

    Raises:
        UserError: a table asks for a study, data setting, measure or arm that is not there.
    """
    text = BLOCK.sub(lambda found: f"{found[1]}{_table(_asked(found['asked']), folder, up)}{found[3]}", text)
    return LIST.sub(lambda found: f"{found[1]}{_list(folder, up)}{found[2]}", text)


def _list(folder: Path, up: str) -> str:
    """All studies: what they ask, how many runs are there of those planned, and the hours of one thread they took.

    A run that two of them share counts once in the sum.
    """
    rows, every = [["study", "question", "runs", "searching", "hours of one thread"], ["---"] * 5], {}
    for path in sorted(folder.glob("*.yaml")):
        study, there = read_study(path), folder / path.stem / "results.json"
        link = f"[{path.stem}]({up}benchmarks/studies/{path.name})"
        if not there.exists():
            rows.append(
                [link, study.question, f"0 of {len(study.seeds) * len(study.settings) * len(study.arms)}", "", ""]
            )
            continue
        content, timing = results.read(there), json.loads(there.with_name("timing.json").read_text())
        done = sum(cell["key"] in content["runs"] for cell in content["cells"])
        tried = sum(len(point["values"]) for entry in content["search"] for point in entry["points"])
        taken = {key: run["train_seconds"] + run["evaluation_seconds"] for key, run in timing.items()}
        every = taken | every  # a run that two studies share took its time once
        runs = f"{done}" if done == len(content["cells"]) else f"{done} of {len(content['cells'])}"
        rows.append([link, study.question, runs, f"{tried or ''}", f"{sum(taken.values()) / 3600:.1f}"])
    lines = [
        "| " + " | ".join(row) + " |"
        for row in (*rows, ["", "all of them", "", "", f"{sum(every.values()) / 3600:.1f}"])
    ]
    return "\n".join(["", *lines, "", ""])


def _asked(words: str) -> dict[str, str]:
    pairs = [part.partition(":") for part in f"study: {words}".split(";")]
    asked = {key.strip(): value.strip() for key, _, value in pairs}
    if set(asked) - KEYS or "measures" not in asked:
        raise UserError(f"study: {words}: study, measures, and if wanted data, arms, differences and rows, parted by ;")
    for key, word in (("differences", "no"), ("rows", "contrasts")):
        if asked.get(key, word) != word:
            raise UserError(f"study: {words}: {key} can only be {word}")
    return asked


def _table(asked: Mapping[str, str], folder: Path, up: str) -> str:
    content = results.read(folder / asked["study"] / "results.json")
    settings = {table["data"]: None for table in content["statistics"]}
    data = _one_of(asked.get("data", next(iter(settings))), settings, "data", asked)
    measures = {measure.name: measure for measure in (Measure(**item) for item in content["study"]["measures"])}
    arms = {name: arm["label"] or name for name, arm in content["study"]["arms"].items()}
    names = [_one_of(name, measures, "measures", asked) for name in _words(asked["measures"])]
    kept = [_one_of(name, arms, "arms", asked) for name in _words(asked.get("arms", ", ".join(arms)))]
    columns = [
        next(table for table in content["statistics"] if (table["data"], table["measure"]) == (data, name))
        for name in names
    ]
    titles = [heading(measures[name], image_count(content, data, measures[name])) for name in names]
    if "rows" in asked:
        rows = _contrasts(columns, arms, [measures[name] for name in names])
        kept = list(arms)
    else:
        show = _level if "differences" in asked else _cell
        rows = [
            [arms[arm], *(show(column, arm, measures[name]) for name, column in zip(names, columns, strict=True))]
            for arm in kept
        ]
    head = ["contrast" if "rows" in asked else "arm", *titles]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(["", *lines, "", _caption(content, asked, data, columns, kept, up), ""])


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _one_of(word: str, known: Mapping[str, Any], key: str, asked: Mapping[str, str]) -> str:
    if word not in known:
        raise UserError(f"study {asked['study']}: {key}={word!r} is not there: one of {', '.join(known)}")
    return word


def _level(table: Mapping[str, Any], arm: str, measure: Measure) -> str:
    """Mean ± sd, and the verdict's sign."""
    entry = next(entry for entry in table["arms"] if entry["arm"] == arm)
    return f"{_value(table, entry, measure)}{SIGNS.get(entry['verdict'], '')}"


def _cell(table: Mapping[str, Any], arm: str, measure: Measure) -> str:
    """Mean ± sd; the difference to the baseline, its interval and the verdict's sign."""
    entry = next(entry for entry in table["arms"] if entry["arm"] == arm)
    text = _value(table, entry, measure)
    if not entry["n"] or entry["verdict"] == "baseline" or entry["difference_low"] is None:
        return text
    return f"{text}; {_apart(entry, measure)}"


def _value(table: Mapping[str, Any], entry: Mapping[str, Any], measure: Measure) -> str:
    few = f" (n = {entry['n']})" if 0 < entry["n"] < _most(table) else ""
    return format_mean_and_sd(entry, measure) + few


def _apart(entry: Mapping[str, Any], measure: Measure) -> str:
    apart = f"{format_difference(entry, measure)} {format_interval(entry, measure, 'difference')}"
    return f"{apart}{SIGNS.get(entry['verdict'], '')}"


def _contrasts(
    columns: Sequence[Mapping[str, Any]], arms: Mapping[str, str], measures: Sequence[Measure]
) -> list[list[str]]:
    """A row a contrast: the paired difference in each measure; a dash where no interval can be given."""
    by_contrast = zip(*(column.get("contrasts", []) for column in columns), strict=True)
    return [
        [
            f"{arms[entries[0]['arm']]} − {arms[entries[0]['against']]}",
            *(
                "–" if entry["difference_low"] is None else _apart(entry, measure)
                for entry, measure in zip(entries, measures, strict=True)
            ),
        ]
        for entries in by_contrast
    ]


def _most(table: Mapping[str, Any]) -> int:
    return max(int(entry["n"]) for entry in table["arms"])


def _caption(
    content: Mapping[str, Any],
    asked: Mapping[str, str],
    data: str,
    columns: Sequence[Mapping[str, Any]],
    arms: Sequence[str],
    up: str,
) -> str:
    study = content["study"]
    base = study["baseline"] or next(iter(study["arms"]))
    used = {cell["key"] for cell in content["cells"] if cell["data"] == data and cell["arm"] in arms}
    commits = sorted({content["runs"][key]["commit"][:7] for key in used if key in content["runs"]})
    n = f"n = {max(map(_most, columns))} seeds"
    if "rows" in asked:
        what, whose = f"Mean paired difference over {n} with its 95 % t interval", ""
    elif "differences" in asked:
        what, whose = f"Mean ± sd over {n}", f" than `{base}`"
    else:
        what, whose = f"Mean ± sd over {n}; then the paired difference to `{base}` with its 95 % t interval", ""
    return (
        f"{what}; ▲ better{whose}, ▼ worse, ↑ higher, ↓ lower by the [rules]({up}docs/compare.md#the-verdicts), "
        f"no sign: no difference shown. [Report]({up}benchmarks/studies/{content['name']}/report.md), "
        f"runs of commit {', '.join(commits)}."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0, 1 where --check finds a table that is not up to date, 2 where one cannot be made."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a table is stale")
    stale = []
    args = parser.parse_args(argv)
    try:
        for path in documents():
            old = path.read_text()
            new = filled(old, Path(__file__).parent, up="" if path.parent == ROOT else "../")
            if new != old:
                stale.append(path)
                if not args.check:
                    path.write_text(new)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'a table is not what the results say' if args.check else 'written anew'}")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
