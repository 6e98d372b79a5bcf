"""Words of a command line that set a value within a mapping: --loss.TERM.args.NAME VALUE, --model.head_args.NAME VALUE.

jsonargparse takes some of them. Those that it does not take are set after it: names in a mapping within a mapping,
quoted words, and keys of a loss of one's own, where --loss.NAME stands for the term path/to/file.py:NAME.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

import jsonargparse
import yaml

from recipes.core.config import TermConfig, TrainConfig
from recipes.core.errors import UserError
from recipes.core.own_code import is_own
from recipes.core.suggestions import did_you_mean

POINTER = "(--help lists the keys, --print_config shows all values)"
KINDS = {
    "bool": "true or false",
    "dict": "{KEY: VALUE}",
    "list": "[VALUE, ...]",
    "str": "a text, in quotes where YAML takes it for something else",
    "Path": "a path, in quotes where YAML takes it for something else",
}
"""Words for types of Python that a reader may not know."""

Way = tuple[str, ...]
"""Names from the configuration down to a value; a dot in one of them, as in that of a file, is no step."""


@cache
def keys(kind: type = TrainConfig, prefix: str = "") -> dict[str, Any]:
    """Every key of a configuration with its type; a group stands before its keys.

    Example:
        >>> keys()["optim.lr"]
        <class 'float'>
    """
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        found[prefix + name] = hint
        if is_dataclass(hint):
            found |= keys(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
    return found


def mappings() -> list[str]:
    """The keys whose value is a mapping of any names.

    Example:
        >>> mappings()
        ['loss', 'model.head_args', 'model.model_args']
    """
    return [key for key, hint in keys().items() if str(hint).startswith("dict")]


def split_deep(args: Sequence[str]) -> tuple[list[str], list[tuple[Way, str]]]:
    """The words for jsonargparse, and what is set after it: ways into mappings with their values, as they were written.

    Raises:
        UserError: one of them has no value, stands before a file that may set it too, or beside --print_config.
    """
    left: list[str] = []
    deep: list[tuple[Way, str]] = []
    words = list(args)
    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        way = _way(option)
        value = value if equals else (words or ["--"])[0]
        if way is not None and not equals:
            if value.startswith("--"):
                raise UserError(f"{option} needs a value {POINTER}")
            words.pop(0)
        deep = [pair for pair in deep if not _sets_again(option, value, pair[0])]  # the last word wins
        if option == "--config" and deep:
            raise UserError(f"{dotted(deep[0][0])} stands before --config, which may set it too: put it behind")
        if way is None:
            left.append(word)
        elif _is_plain(way) and value[:1] not in ("'", '"'):
            left.append(f"{option}={value}")
        else:
            deep.append((way, value))
    if deep and any(word.startswith("--print_config") for word in left):
        raise UserError(f"--print_config does not show {dotted(deep[0][0])}: leave one of the two out")
    return left, deep


def _sets_again(option: str, value: str, way: Way) -> bool:
    """Whether a word sets what stands at a way; a mapping for a term of the loss leaves the keys it does not name."""
    if not f"{dotted(way)}.".startswith(f"{option}."):
        return False
    if way[0] != "loss" or option != dotted(way[:2]) or len(way) == 2:
        return True
    given = as_yaml_value(value)
    return not isinstance(given, Mapping) or way[2] in given


def _way(option: str) -> Way | None:
    """The way to a value in a mapping of arguments, or in a term of one's own; None for any other option."""
    name = option.removeprefix("--")
    if own := re.fullmatch(r"loss\.(.+?\.py:\w+)(?:\.(.+))?", name):
        return ("loss", own[1], *(own[2] or "").split(".")) if own[2] else ("loss", own[1])
    others = "|".join(re.escape(key) for key in mappings() if key != "loss")
    return tuple(name.split(".")) if re.fullmatch(rf"loss\.[^.]+\.args\..+|(?:{others})\..+", name) else None


def _is_plain(way: Way) -> bool:
    """Whether jsonargparse can go this way: a name in a mapping of arguments, that of a loss excepted."""
    return way[0] != "loss" and len(way) == 3


def dotted(way: Way) -> str:
    """The option that names a way.

    Example:
        >>> dotted(("loss", "mine.py:MyLoss", "weight"))
        '--loss.mine.py:MyLoss.weight'
    """
    return f"--{'.'.join(way)}"


def set_deep(values: dict[str, Any], way: Way, text: str) -> None:
    """Set a value within the mappings of a configuration; mappings on the way are made, and so is a term of the loss.

    Args:
        values: the fields of a configuration, changed in place.
        way: to the value.
        text: the value, as a word of the command line.

    Raises:
        UserError: what lies on the way is no mapping, or a term has no such key or not such a value.
    """
    first, *middle, last = way
    values[first] = place = deepcopy(values[first] or {})
    if first == "loss" and len(way) <= 3:
        _set_term(place.setdefault(way[1], TermConfig()), way, text)
        return
    for depth, part in enumerate(middle, 2):
        if first == "loss" and depth == 3:
            _check_key(part)
        if is_dataclass(place):
            place = getattr(place, part)
        else:
            place = place.setdefault(part, TermConfig() if first == "loss" and depth == 2 else {})
        if not isinstance(place, dict) and not is_dataclass(place):
            raise UserError(f"{dotted(way)}: {dotted(way[:depth])[2:]} is {place!r}, not {KINDS['dict']} {POINTER}")
    place[last] = as_yaml_value(text)


def _set_term(term: TermConfig, way: Way, text: str) -> None:
    """Set one key of a term of the loss, or those of a mapping, with their types."""
    given = as_yaml_value(text) if len(way) == 2 else {way[2]: None}
    if not isinstance(given, Mapping):
        raise UserError(f"{dotted(way)}={text}: expected {KINDS['dict']} {POINTER}")
    for key in given:
        _check_key(key)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--loss", type=TermConfig)
    made = parser.instantiate(parser.parse_args([f"{'.'.join(('--loss', *way[2:]))}={text}"])).loss
    for key in given:
        setattr(term, key, getattr(made, key))


def _check_key(key: str) -> None:
    if key not in (known := [item.name for item in fields(TermConfig)]):
        near = did_you_mean(key, known)
        raise UserError(
            f'"loss": Option {key!r} is not accepted{near}; arguments of the loss itself go to '
            f"--loss.TERM.args.NAME {POINTER}"
        )


def as_yaml_value(text: str) -> Any:
    """A word of the command line as a file's value: a number, a mapping, a word with or without quotes.

    Example:
        >>> as_yaml_value("1e-2"), as_yaml_value("mean"), as_yaml_value('"1"')
        (0.01, 'mean', '1')
    """
    if text[:1] in ("'", '"'):
        try:
            found = yaml.safe_load(text)
        except yaml.YAMLError:
            return text
        return found if isinstance(found, str) else text
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=Any)
    return parser.parse_args([f"--value={text}"]).value


def with_files(args: Sequence[str], terms: Iterable[str]) -> list[str]:
    """The command line where --loss.NAME is spelled --loss.path/to/file.py:NAME for a term of one's own.

    Args:
        args: the command line.
        terms: of the loss that it leads to.

    Raises:
        UserError: two of the terms have this name.

    Example:
        >>> with_files(["--loss.MyLoss.weight=2"], ["cross_entropy", "mine.py:MyLoss"])
        ['--loss.mine.py:MyLoss.weight=2']
    """
    return [_with_file(word, [term for term in terms if is_own(term)]) for word in args]


def _with_file(word: str, own: Sequence[str]) -> str:
    short = re.match(r"--loss\.(\w+)(?=[.=]|$)", word)
    meant = [term for term in own if short and term.rpartition(":")[2] == short[1]]
    if short is None or not meant:
        return word
    if len(meant) > 1:
        raise _ambiguous(word, meant)
    return f"--loss.{meant[0]}{word[short.end() :]}"


def refuse_ambiguous(args: Sequence[str], spelled: Sequence[str], terms: Iterable[str]) -> None:
    """Refuse a name that stands for a term of one's own where another term has it too.

    Args:
        args: the command line.
        spelled: the same by `with_files`.
        terms: of the loss that this leads to.
    """
    for word, full in zip(args, spelled, strict=True):
        same = [term for term in terms if re.match(rf"--loss\.{re.escape(term)}(?=[.=]|$)", word)]
        if word != full and same:
            raise _ambiguous(word, [*same, *(term for term in terms if full.startswith(f"--loss.{term}"))])


def _ambiguous(word: str, terms: Sequence[str]) -> UserError:
    ways = " or ".join(f"--loss.{term}" for term in terms if is_own(term))
    return UserError(
        f"{word.partition('=')[0]} may mean {' or '.join(terms)}: write {ways}, or all terms as --loss '{{TERM: ...}}'"
    )
