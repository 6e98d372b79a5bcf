"""What mistakes cost: a YAML or CSV file by class names, read into a matrix in the order of the data's classes."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from recipes.core.errors import UserError
from recipes.core.own_code import read_text
from recipes.core.suggestions import did_you_mean
from recipes.core.unique_keys import UniqueKeyLoader

DEFAULT = "default"
"""Key of a YAML file that holds the cost of every mistake that the file does not name."""

MOST_NAMED = 5
"""Names that a message lists at most."""

Entries = dict[tuple[str, str], float]
"""Costs by (true class, predicted class)."""


def read_costs(path: Path, class_names: Sequence[str], *, key: str = "--cost") -> Tensor:
    """The matrix M (C, C) of a file, in float64: what taking class y for j costs, in row y and column j.

    A `.csv` file has the predicted classes in its first row and the true ones in its first column, every class once, in
    any order. A `.yaml` file maps true classes to predicted ones to costs; `default: COST` holds for all other
    mistakes:

        default: 1
        Shirt: {Coat: 10, Pullover: 10}

    Args:
        path: of the file.
        class_names: of the data.
        key: what messages call it.

    Raises:
        UserError: names what is wrong: a file that cannot be read, classes that are unknown or missing or come twice, a
            cost that is negative, not finite or of a right answer.
    """
    what = f"{key} {path}"
    text = read_text(path, what)
    if path.suffix.lower() == ".csv":
        entries, default = _of_csv(text, what), None
    elif path.suffix.lower() in (".yaml", ".yml"):
        entries, default = _of_yaml(text, what)
    else:
        raise UserError(f"{what}: must end in .csv, .yaml or .yml")
    return _matrix(entries, default, tuple(class_names), what)


def _matrix(entries: Entries, default: float | None, names: tuple[str, ...], what: str) -> Tensor:
    """The matrix of these costs, once every class and every cost has been checked."""
    if unknown := list(dict.fromkeys(name for pair in entries for name in pair if name not in names)):
        near = did_you_mean(unknown[0], names)
        raise UserError(f"{what}: unknown class {_listed(unknown)}{near}; the data has {_listed(names)}")
    for (true, guess), cost in entries.items():
        if not (math.isfinite(cost) and cost >= 0):
            raise UserError(f"{what}: the cost of taking {true} for {guess} is {cost:g}: must be finite, not negative")
        if true == guess and cost:
            raise UserError(f"{what}: the cost of taking {true} for {guess}, which is right, is {cost:g}: must be 0")
    wanted = [(true, guess) for true in names for guess in names if true != guess]
    if default is None and (missing := [pair for pair in wanted if pair not in entries]):
        pairs = _listed([f"{true} -> {guess}" for true, guess in missing])
        raise UserError(f"{what}: no cost for {pairs}; `default: COST` in a YAML file holds for all that it lacks")
    costs = {pair: entries.get(pair, default) for pair in wanted}
    if not any(costs.values()):
        raise UserError(f"{what}: no mistake costs anything")
    rows = [[0.0 if true == guess else costs[true, guess] for guess in names] for true in names]
    return torch.tensor(rows, dtype=torch.float64)


def _of_csv(text: str, what: str) -> Entries:
    """Costs of a table with a header row and a header column."""
    table = [[cell.strip() for cell in line] for line in csv.reader(io.StringIO(text)) if any(map(str.strip, line))]
    if len(table) < 2 or len(table[0]) < 2:
        raise UserError(f"{what}: needs the predicted classes in the first row, the true ones in the first column")
    columns, rows = table[0][1:], [line[0] for line in table[1:]]
    for side, found in (("row", columns), ("column", rows)):
        if twice := sorted({name for name in found if found.count(name) > 1}):
            raise UserError(f"{what}: the first {side} names {_listed(twice)} twice")
    if odd := sorted(set(rows) ^ set(columns)):
        raise UserError(f"{what}: {len(rows)} rows and {len(columns)} columns, {_listed(odd)} in one of them alone")
    entries = {}
    for true, line in zip(rows, table[1:], strict=True):
        if len(line) != len(table[0]):
            raise UserError(f"{what}: the row of {true} has {len(line) - 1} costs for {len(columns)} classes")
        for guess, cell in zip(columns, line[1:], strict=True):
            entries[true, guess] = 0.0 if not cell and true == guess else _number(cell, true, guess, what)
    return entries


def _of_yaml(text: str, what: str) -> tuple[Entries, float | None]:
    """Costs of a mapping of mappings, and the cost of all other mistakes."""
    try:
        content = yaml.load(text, Loader=UniqueKeyLoader)  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{what}: {' '.join(str(error).split())}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{what}: must map true classes to predicted classes to costs: {{CLASS: {{CLASS: COST}}}}")
    entries: Entries = {}
    default = None
    for true, row in content.items():
        if true == DEFAULT and not isinstance(row, Mapping):
            default = _number(row, "a class", "another", what)
            if not (math.isfinite(default) and default >= 0):
                raise UserError(f"{what}: default is {default:g}: must be finite, not negative")
        elif isinstance(row, Mapping):
            for guess, cost in row.items():
                pair = _name(true, what), _name(guess, what)
                entries[pair] = _number(cost, *pair, what)
        else:
            raise UserError(f"{what}: {true} has {row!r}: must be the costs by predicted class, {{CLASS: COST}}")
    return entries, default


def _name(word: Any, what: str) -> str:
    if word is None or isinstance(word, bool):
        raise UserError(f"{what}: YAML reads a class as {word}: put its name in quotes")
    return str(word)


def _number(value: Any, true: str, guess: str, what: str) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{what}: the cost of taking {true} for {guess} is {value!r}, not a number") from None


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
