"""The --help of recipes/train.py: every key with its meaning and default, in plain words."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser

from recipes.core.config import TermConfig, TrainConfig
from recipes.core.script import WIDTH

COLUMN = 36
"""Where the explanations begin."""

OPTIONS = {
    "-h, --help": "show this and exit",
    "--config FILE": "a YAML file of keys; later ones win over earlier ones",
    "--print_config": "show the configuration with all values as YAML, and train nothing",
    "--resume RUN": "a run folder to go on with, or auto for the furthest unfinished run of this configuration; with "
    "RUN, quiet, device, tensorboard, on_epoch, data.root, data.workers and data.memory_limit may change, and the "
    "bounds tpt.max_epochs, tpt.extend, tpt.min_terminal, tpt.max_terminal and tpt.stop_patience, which train a "
    "finished run longer",
    "--start-from RUN": "begin a new run from the weights of another; its head is kept where the classes are the same",
    "--plan [true|false]": "show the learning rates for assumed epochs of zero error and the curvature of the loss by "
    "layer, refuse what training would refuse, and train nothing",
}
PLACEHOLDERS = {bool: "[true|false]", int: "N", float: "X", str: "NAME", Path: "PATH"}


def help_text(cards: Mapping[str, str], names: Mapping[str, Sequence[str]]) -> str:
    """The text of `train.py --help`.

    Args:
        cards: what each recipe is.
        names: what a key's value can be, by a title such as "heads".
    """
    lines = ["Usage: train.py [RECIPE] [--config FILE] [--KEY VALUE ...]", "", _summary(TrainConfig), ""]
    lines += ["Recipes:", *_entries(cards, column=24), "", "Options:", *_entries(OPTIONS), ""]
    lines += _group("Keys", TrainConfig, "--")
    for item, kind in _typed_fields(TrainConfig):
        if is_dataclass(kind):
            lines += _group(_summary(kind), kind, f"--{item.name}.")  # type: ignore[arg-type]
    lines += _group(_summary(TermConfig), TermConfig, "--loss.NAME.")
    lines += ["Names that exist:", *_entries({title: ", ".join(known) for title, known in names.items()}, column=24)]
    return "\n".join(lines)


def _group(title: str, kind: type, prefix: str) -> list[str]:
    """A title, and a line or more for each key that is no group itself."""
    said = {param.arg_name: param.description or "" for param in docstring_parser.parse(kind.__doc__ or "").params}
    rows = {}
    for item, hint in _typed_fields(kind):
        if not is_dataclass(hint):
            text = " ".join(said[item.name].split())
            text = text if text.endswith("...") else text.removesuffix(".")
            rows[f"{prefix}{item.name} {_placeholder(hint)}"] = f"{text} (default: {_default(item)})"
    return [f"{title.rstrip('.')}:", *_entries(rows), ""]


def _typed_fields(kind: type) -> list[tuple[Field[Any], Any]]:
    hints = get_type_hints(kind)
    return [(item, hints[item.name]) for item in fields(kind)]


def _summary(kind: type) -> str:
    return docstring_parser.parse(kind.__doc__ or "").short_description or ""


def _placeholder(hint: Any) -> str:
    """What stands for a value: its choices, or a word for its type."""
    if get_origin(hint) is Literal:
        return "{" + ",".join(get_args(hint)) + "}"
    if get_origin(hint) is dict:
        return "{KEY: VALUE}"
    if get_origin(hint) is list and get_origin(get_args(hint)[0]) is Literal:
        return f"[{','.join(get_args(get_args(hint)[0]))}]"
    for kind in (hint, *get_args(hint)):  # of `int | None` the first
        if kind in PLACEHOLDERS:
            return PLACEHOLDERS[kind]
    raise TypeError(f"no placeholder for a key of type {hint}")


def _default(item: Field[Any]) -> str:
    value = item.default if item.default_factory is MISSING else item.default_factory()
    if isinstance(value, dict):
        return ", ".join(value) or "none"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _entries(rows: Mapping[str, str], column: int = COLUMN) -> list[str]:
    """Names on the left, explanations wrapped on the right; below a name that leaves no room for them."""
    lines = []
    for name, text in rows.items():
        start = f"  {name}".ljust(column)
        if len(f"  {name}") >= column:
            lines.append(start)
            start = ""
        lines += textwrap.wrap(
            text, WIDTH, initial_indent=start or " " * column, subsequent_indent=" " * column, break_on_hyphens=False
        )
    return lines
