"""Files of a configuration as they are meant: no key is named twice, and the order of keys tells nothing.

jsonargparse keeps the last of two equal keys without a word, puts a section in place of dotted keys of that section
that stand before it, and does not take dotted keys within mappings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from recipes.core.deep_keys import mappings
from recipes.core.errors import UserError

OF_PARSER = ("class_path", "init_args")
"""Keys with which jsonargparse itself would take a term of the loss apart, past the names of its keys."""

TERM_KEYS = "a term of the loss is named by its key, its arguments stand under loss.TERM.args"


def spelled_out(args: Sequence[str]) -> Iterator[str]:
    """The command line where keys within mappings that a file has in the dotted form stand behind it as words.

    A section of a file comes before its dotted keys. A file that needs none of this, or cannot be read, is left as it
    is. Values keep the text that they have in the file, so that numbers are read as everywhere.

    Raises:
        UserError: the file names a key twice, or has dotted keys that it must be torn from, and anchors.
    """
    words = iter(args)
    for word in words:
        option, equals, file = word.partition("=")
        if option != "--config":
            yield word
            continue
        file = file if equals else next(words, "")
        rest, deep = _divided(file)
        yield "--config"
        yield file if rest is None else rest
        yield from deep


def _divided(file: str) -> tuple[str | None, list[str]]:
    """The text of a file without its dotted keys within mappings, None for the file itself, and those keys as words."""
    try:
        text = Path(file).read_text(encoding="utf-8")
        top = yaml.compose(text, Loader=yaml.SafeLoader)
        anchors = any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text))
    except (OSError, ValueError, yaml.YAMLError):
        return None, []  # jsonargparse says what is wrong with it
    pairs = top.value if isinstance(top, yaml.MappingNode) else []
    try:
        _refuse_twice(file, pairs, (), {})
    except RecursionError:
        raise UserError(
            f"{file}: an anchor (&) stands around an alias (*) of itself: write out what it means"
        ) from None
    inside = tuple(f"{key}." for key in mappings())
    words = [pair for pair in pairs if _name(pair[0]).startswith(inside)]
    rest = [pair for pair in pairs if pair not in words]
    if _section_comes_later([_name(key) for key, _ in rest]):
        rest.sort(key=lambda pair: _name(pair[0]).count("."))
    if rest == pairs:
        return None, []
    if anchors:
        torn = next(_name(key) for key, _ in (words or pairs) if "." in _name(key))
        raise UserError(f"{file}: write {torn} as a mapping within a mapping, it stands beside anchors (&, *)")
    parts = [_text(text, key, value) for key, value in rest]
    flow = getattr(top, "flow_style", False)
    return f"{{{', '.join(parts)}}}" if flow else "\n".join(parts) or "{}", [_word(text, *pair) for pair in words]


def _name(key: yaml.Node) -> str:
    return key.value if isinstance(key, yaml.ScalarNode) else ""


def _section_comes_later(names: Sequence[str]) -> bool:
    """Whether a dotted key stands before a section that would replace it."""
    return any(early.startswith(f"{late}.") for at, late in enumerate(names) for early in names[:at])


def _refuse_twice(file: str, pairs: Sequence[tuple[Any, Any]], before: tuple[str, ...], seen: dict[str, int]) -> None:
    """Refuse two values for one key, whether it is dotted or stands in a section.

    Args:
        file: for the message.
        pairs: keys and values of a mapping.
        before: the way to it.
        seen: lines of values, and of mappings that would replace one another; filled here.
    """
    here: dict[str, int] = {}
    for key, value in pairs:
        name, line = ".".join((*before, _name(key))), key.start_mark.line + 1
        if len(before) == 2 and before[0] == "loss" and _name(key) in OF_PARSER:
            raise UserError(f"{file}: {name} in line {line} is unknown: {TERM_KEYS}")
        replaces = not isinstance(value, yaml.MappingNode) or name in mappings()
        if name in here or (replaces and name in seen):
            first = (seen | here)[name]
            raise UserError(f"{file}: {name} is named in line {first} and again in line {line}: leave one of them out")
        if key.tag != "tag:yaml.org,2002:merge":
            here[name] = line
            seen |= {name: line} if replaces else {}
        if isinstance(value, yaml.MappingNode):
            _refuse_twice(file, value.value, (*before, _name(key)), seen)


def _word(text: str, key: yaml.Node, value: yaml.Node) -> str:
    """A key and its value as a word of the command line."""
    empty = isinstance(value, yaml.ScalarNode) and value.style is None and not value.value
    return f"--{key.value}={'null' if empty else _text(text, value, value)}"


def _text(text: str, first: yaml.Node, last: yaml.Node) -> str:
    """The text of a file from one node to another, as far to the right as it stands there."""
    indent = " " * first.start_mark.column if getattr(first, "flow_style", None) is False else ""
    return indent + text[first.start_mark.index : last.end_mark.index].rstrip()
