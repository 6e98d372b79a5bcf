"""Files of a configuration as they are meant: no key is named twice, and the order of keys tells nothing.

jsonargparse keeps the last of two equal keys without a word, puts a section in place of dotted keys of that section
that stand before it, and does not take dotted keys within mappings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from recipes.core.deep_keys import keys, mappings
from recipes.core.errors import UserError
from recipes.core.two_readings import readings_of, two_readings

OF_PARSER = ("class_path", "init_args")
"""Keys with which jsonargparse itself would take a term of the loss apart, past the names of its keys."""

TERM_KEYS = "a term of the loss is named by its key, its arguments stand under loss.TERM.args"


def spelled_out(args: Sequence[str]) -> Iterator[str]:
    """The command line with the text of each file in its place, read as UTF-8 wherever it runs.

    Keys within mappings that the file has in the dotted form stand behind it as words, and a section comes before its
    dotted keys. Values keep the text that they have in the file, so that numbers are read as everywhere. What is no
    file is left as it is.

    Raises:
        UserError: the file is no YAML of keys, names a key twice, or has dotted keys that it must be torn from, and
            anchors.
    """
    words, before = iter(args), ""
    for word in words:
        option, equals, file = word.partition("=")
        if option != "--config":
            _refuse_two_readings(*((option, file) if equals else (before, word)))
            before = word
            _refuse_twice_in(word if word.startswith("{") else file)
            yield word
            continue
        file = file if equals else next(words, "")
        if not Path(file).is_file():
            yield f"--config={file}"  # jsonargparse says what is wrong with it
            continue
        text, deep = _divided(file)
        yield f"--config={text}\n#"  # without the comment, jsonargparse takes a single key without a value for a path
        yield from deep


def _divided(file: str) -> tuple[str, list[str]]:
    """The text of a file without its dotted keys within mappings, and those keys as words."""
    text, top = _composed(file)
    anchors = any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text))
    pairs = top.value
    _refuse_twice(file, pairs, (), {})
    inside = tuple(f"{key}." for key in mappings())
    words = _ordered([pair for pair in pairs if _name(pair[0]).startswith(inside)])
    rest = _ordered([pair for pair in pairs if not _name(pair[0]).startswith(inside)])
    if rest == pairs and (anchors or text.isascii()):
        return text, []
    if anchors:
        torn = next(_name(key) for key, _ in (words or pairs) if "." in _name(key))
        raise UserError(f"{file}: write {torn} as a mapping within a mapping, it stands beside anchors (&, *)")
    parts = [_text(text, key, value) for key, value in rest]  # without comments, which a locale may lack letters for
    flow = top.flow_style
    return f"{{{', '.join(parts)}}}" if flow else "\n".join(parts) or "{}", [_word(file, text, *pair) for pair in words]


def _refuse_two_readings(option: str, value: str) -> None:
    """Refuse 1:30 behind a key that takes a number; 010 is 10 there."""
    key = option.removeprefix("--")
    takes_text = any(kind in str(keys().get(key, "str")) for kind in ("str", "Path"))
    if ":" in value and not takes_text and (said := two_readings(value)) is not None:
        raise UserError(f"{option}: {said}")


def _refuse_twice_in(value: str) -> None:
    """Refuse a mapping of the command line that names a key twice; what is no mapping is not looked at."""
    if not value.startswith("{"):
        return
    try:
        top = yaml.compose(value, Loader=yaml.SafeLoader)
    except (ValueError, yaml.YAMLError):
        return  # jsonargparse says what is wrong with it
    except RecursionError:
        raise UserError(f"the command line: {value[:40]} ... is nested too deeply") from None
    if isinstance(top, yaml.MappingNode):
        _check_nodes("the command line", top, frozenset(), set())
        _refuse_twice("the command line", top.value, (), {})


def _composed(file: str) -> tuple[str, yaml.MappingNode]:
    """The text of a file and its mapping of keys."""
    form = "keys are written KEY: VALUE, one a line"
    try:
        text = Path(file).read_text(encoding="utf-8")
        top = yaml.compose(text, Loader=yaml.SafeLoader)
        yaml.safe_load(text)  # tags and keys that no value can be made of
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no text in UTF-8 (byte {error.start}): save it in that encoding") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise UserError(f"{file} is no YAML{line}: {error.problem or error.context}; {form}") from None
    except RecursionError:
        raise UserError(f"{file} is nested too deeply: {form}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{file} is no YAML: {' '.join(str(error).split())}; {form}") from None
    if not isinstance(top, yaml.MappingNode):
        found = "nothing" if top is None else "a list" if isinstance(top, yaml.SequenceNode) else "a single value"
        raise UserError(f"{file} holds {found} and no keys: {form}")
    _check_nodes(file, top, frozenset(), set())
    return text, top


def _check_nodes(file: str, node: yaml.Node, above: frozenset[int], seen: set[int]) -> None:
    """Refuse a node within itself, and a number that YAML 1.1 and 1.2 read differently.

    Args:
        file: for the message.
        node: is looked at with all that is in it.
        above: the nodes around it.
        seen: those that were looked at; filled here, as aliases may name one many times.
    """
    if id(node) in above:
        raise UserError(f"{file}: an anchor (&) stands around an alias (*) of itself: write out what it means")
    if (said := readings_of(node)) is not None:
        raise UserError(f"{file}, line {node.start_mark.line + 1}: {said}")
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))
    for item in node.value:
        for part in item if isinstance(item, tuple) else (item,):
            _check_nodes(file, part, above | {id(node)}, seen)


def _name(key: yaml.Node) -> str:
    return key.value if isinstance(key, yaml.ScalarNode) else ""


def _ordered(pairs: list[tuple[yaml.Node, yaml.Node]]) -> list[tuple[yaml.Node, yaml.Node]]:
    """The pairs, sections first where one would replace a dotted key that stands before it."""
    names = [_name(key) for key, _ in pairs]
    late = any(early.startswith(f"{name}.") for at, name in enumerate(names) for early in names[:at])
    return sorted(pairs, key=lambda pair: _name(pair[0]).count(".")) if late else pairs


Way = tuple[str, ...]


def _refuse_twice(file: str, pairs: Sequence[tuple[Any, Any]], before: Way, seen: dict[Way, int]) -> None:
    """Refuse two values for one key, whether it is dotted or stands in a section.

    Args:
        file: for the message.
        pairs: keys and values of a mapping.
        before: the way to it; a dot in a key below the top is no step.
        seen: lines of values, and of mappings that would replace one another; filled here.
    """
    here: dict[Way, int] = {}
    for key, value in pairs:
        number = key.tag if key.tag != "tag:yaml.org,2002:str" else ""  # 1 and "1" are two keys
        way = (*before, number + _name(key)) if before else tuple(_name(key).split("."))
        line = key.start_mark.line + 1
        if len(before) == 2 and before[0] == "loss" and _name(key) in OF_PARSER:
            raise UserError(f"{file}: {'.'.join((*before, _name(key)))} in line {line} is unknown: {TERM_KEYS}")
        replaces = not isinstance(value, yaml.MappingNode) or ".".join(way) in mappings()
        if way in here or (replaces and way in seen):
            name, first = ".".join((*before, _name(key))), (seen | here)[way]
            raise UserError(f"{file}: {name} is named in line {first} and again in line {line}: leave one of them out")
        if key.tag != "tag:yaml.org,2002:merge":
            here[way] = line
            seen |= {way: line} if replaces else {}
        if isinstance(value, yaml.MappingNode):
            _refuse_twice(file, value.value, way, seen)


def _word(file: str, text: str, key: yaml.Node, value: yaml.Node) -> str:
    """A key and its value as a word of the command line."""
    written = _text(text, value, value)
    if isinstance(value, yaml.ScalarNode) and (value.style in ("|", ">") or written.startswith("!")):
        raise UserError(
            f"{file}: write {key.value} as a mapping within a mapping: a dotted key takes a value in one line"
        )
    empty = isinstance(value, yaml.ScalarNode) and value.style is None and not value.value
    return f"--{key.value}={'null' if empty else written}"


def _text(text: str, first: yaml.Node, last: yaml.Node) -> str:
    """The text of a file from one node to another, as far to the right as it stands there."""
    start, column = first.start_mark.index, first.start_mark.column
    before = text[:start].rstrip(" ")
    if first is not last and before.endswith("?"):  # a key may be written "? key"
        start, column = len(before) - 1, column - (start - len(before) + 1)
    indent = " " * column if getattr(first, "flow_style", None) is False or start != first.start_mark.index else ""
    return indent + text[start : last.end_mark.index].rstrip()
