"""What all committed studies found about one recipe against plain cross-entropy, the losses beside the wins.

A comment in a document asks for the table, and `digest.py` fills it:

    <!-- method: etf -->
    <!-- end of method -->

Rows are chosen by a rule, not by hand: in each study whose baseline is the recipe `baseline`, the arms with the
recipe's name, those that differ from the baseline in the recipe alone, and the contrasts of an arm of this recipe with
an arm of another. Where there is none, the studies whose baseline and arms are all of this recipe: forms of it beside
one another. Where there is none of these either, the arms with the recipe's name beside the study's baseline, whatever
recipe that is. A row says which keys its arm changes besides recipe, rate and decay where the other arm does not: the
difference is theirs too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.studies import cells
from recipes.study.spec import Measure

COLUMNS = {
    "accuracy (points)": ("at_end.test.accuracy", "at_end.val.accuracy"),
    "balanced accuracy (points)": ("robustness.long_tail.test.balanced",),
    "cross-entropy": ("at_end.test.loss", "at_end.val.loss"),
    "cross-entropy after a temperature": ("robustness.calibration.after.nll",),
    "NC1": ("at_end.train.nc1",),
    "AutoAttack (points)": ("robustness.adversarial.headline.accuracy",),
    "transfer (points)": ("robustness.transfer.mean.linear",),
}
ALSO = {"default": ("default", "logit_adjusted", "smoothing"), "tpt": ("tpt_step",)}
"""Arms that are made from other recipes, or have other names, and show a recipe or one of its parts."""

TUNED = ("optim.lr", "optim.weight_decay")
"""Keys that every arm has its own best value of."""

Statistics = Mapping[tuple[str, str], Mapping[str, Any]]


def markdown(recipe: str, folder: Path, up: str) -> str:
    """The table of a recipe, or the sentence that there is none.

    Args:
        recipe: its name.
        folder: of the studies.
        up: leads from the document to the project's root.
    """
    studies = [cells.results_in(path.parent) for path in sorted(folder.glob("*/results.json"))]
    found = [row for content in studies for row in _rows(content, _pairs(content["study"], recipe), up)]
    if not found:
        found = [row for content in studies for row in _rows(content, _forms(content["study"], recipe), up)]
    if not found:
        found = [row for content in studies for row in _rows(content, _named(content["study"], recipe), up)]
    titles = [title for title in COLUMNS if any(title in row for _, row in found)]
    if not titles:
        return "\nNo finished study of ours compares it with the recipe `baseline`.\n"
    head = ["study, data, arm", *titles]
    body = [[label, *(row.get(title, "") for title in titles)] for label, row in found]
    return "\n".join(["", *cells.lines([head, ["---"] * len(head), *body]), "", _caption(up), ""])


def _caption(up: str) -> str:
    return (
        "Paired difference to plain cross-entropy, or to the arm after the minus sign, each at its own rate and decay, "
        "with its 95 % t interval "
        f"([signs and verdicts]({up}docs/compare.md#the-verdicts)); a lower cross-entropy is better, a lower NC1 more "
        "collapsed. *With* names what else an arm changes, *against* what the other one does: the difference is that "
        "key's too. A cell without a sign may be of a study that gives no verdicts on this measure."
    )


def _pairs(study: Mapping[str, Any], recipe: str) -> list[tuple[str, str]]:
    """Arms of a study that show a recipe, each with the one that it is compared with."""
    arms, base = study["arms"], _base(study)
    named = [
        name
        for name, arm in arms.items()
        if name in ALSO.get(recipe, ())
        or (arm["recipe"] == recipe and (name == recipe or arm["overrides"] == arms[base]["overrides"]))
    ]
    pairs = [(name, base) for name in named if name != base and arms[base]["recipe"] == "baseline"]
    return pairs + [pair for pair in _contrasts(study) if pair not in pairs and _with_another(arms, recipe, *pair)]


def _forms(study: Mapping[str, Any], recipe: str) -> list[tuple[str, str]]:
    """The arms of a study that is of this recipe alone, each with the baseline."""
    base = _base(study)
    alone = all(arm["recipe"] == recipe for arm in study["arms"].values())
    return [(name, base) for name in study["arms"] if alone and name != base]


def _named(study: Mapping[str, Any], recipe: str) -> list[tuple[str, str]]:
    """The arm with the recipe's name, with the baseline of its study, which is of another recipe than `baseline`."""
    arm, base = study["arms"].get(recipe, {}), _base(study)
    return [(recipe, base)] if arm.get("recipe") == recipe and recipe != base else []


def _base(study: Mapping[str, Any]) -> str:
    return study["baseline"] or next(iter(study["arms"]))


def _rows(
    content: Mapping[str, Any], pairs: Sequence[tuple[str, str]], up: str
) -> Iterator[tuple[str, dict[str, str]]]:
    """The label and the cells, by column, of each of these pairs of arms."""
    study = content["study"]
    arms, base = study["arms"], _base(study)
    statistics = {(table["data"], table["measure"]): table for table in content["statistics"]}
    measures = {measure.name: measure for measure in (Measure(**item) for item in study["measures"])}
    settings = list(dict.fromkeys(data for data, _ in statistics))
    for data in settings:
        for arm, against in pairs:
            row, n = _cells(statistics, measures, data, arm, against, base)
            if n:
                where = [f"[{content['name']}]({up}benchmarks/studies/{content['name']}/report.md)"]
                where += [data] * (len(settings) > 1) + ["validation images"] * ("at_end.val.accuracy" in measures)
                name = f"`{arm}`" if against == base and _is_plain(arms[base]) else f"`{arm}` − `{against}`"
                where += [name + _besides(arms[arm]["overrides"], arms[against]["overrides"]), f"n = {n}"]
                yield ", ".join(where), row


def _is_plain(arm: Mapping[str, Any]) -> bool:
    """Whether an arm is cross-entropy and nothing else, at whatever rate and decay."""
    return arm["recipe"] == "baseline" and not set(arm["overrides"]) - set(TUNED)


def _contrasts(study: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(item["arm"], item["against"]) for item in study.get("contrasts", [])]


def _with_another(arms: Mapping[str, Mapping[str, Any]], recipe: str, arm: str, against: str) -> bool:
    """Whether the first of two arms is the recipe, and the second another one."""
    return arms[arm]["recipe"] == recipe != arms[against]["recipe"]


def _besides(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The keys that one arm changes and the other does not, rate and decay aside."""
    changed = [
        f"`{key}: {_brief(value)}`"
        for key, value in mine.items()
        if key not in TUNED and (key not in theirs or theirs[key] != value)
    ]
    other = [f"`{key}: {_brief(value)}`" for key, value in theirs.items() if key not in TUNED and key not in mine]
    text = f" with {' and '.join(changed)}" if changed else ""
    return f"{text} against {' and '.join(other)}" if other else text


def _brief(value: Any) -> str:
    """A value as in YAML; of a mapping its keys alone."""
    if isinstance(value, dict):
        return " + ".join(value)
    return value if isinstance(value, str) else json.dumps(value)


def _cells(
    statistics: Statistics, measures: Mapping[str, Measure], data: str, arm: str, against: str, base: str
) -> tuple[dict[str, str], int]:
    """The cells of a row by column, and from how many pairs they come."""
    row, pairs = {}, 0
    for title, names in COLUMNS.items():
        for name in names:
            entry = _entry(statistics.get((data, name), {}), arm, against, base)
            if entry:
                row[title] = cells.difference(entry, measures[name])
                pairs = max(pairs, entry["pairs"])
    return row, pairs


def _entry(table: Mapping[str, Any], arm: str, against: str, base: str) -> Mapping[str, Any] | None:
    """What a table of a study says about one arm against another."""
    kind = "arms" if against == base else "contrasts"
    found = (item for item in table.get(kind, []) if item["arm"] == arm and item.get("against", base) == against)
    return next(found, None)
