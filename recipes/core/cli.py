"""The command line of recipes/train.py, and the recipes that it knows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jsonargparse

from recipes.core.config import TermConfig, TrainConfig
from recipes.core.config_files import OF_PARSER, TERM_KEYS, spelled_out
from recipes.core.deep_keys import (
    KINDS,
    POINTER,
    as_yaml_value,
    keys,
    mappings,
    refuse_ambiguous,
    set_deep,
    split_deep,
    with_files,
)
from recipes.core.errors import UserError
from recipes.core.script import join_flags
from recipes.core.suggestions import USUAL_NAMES, did_you_mean
from recipes.core.train_help import help_text

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
BOUNDS = ("tpt.max_epochs", "tpt.extend", "tpt.min_terminal", "tpt.max_terminal", "tpt.stop_patience")
"""Keys that say when a run ends."""

ON_RESUME = ("quiet", "device", "tensorboard", "on_epoch", "data.root", "data.workers", "data.memory_limit", *BOUNDS)
"""Keys that may be given with --resume RUN: they change where, how and how long a run goes on, and nothing else."""

SHORT_NAMES = {"start-from": "model.start_from", "start_from": "model.start_from"}
"""Other names of keys on the command line."""


class Command(NamedTuple):
    """What a command line asks for: the run to resume is a folder, "auto" or None.

    `changes` are the words that change keys of the run to resume, see `ON_RESUME`.
    """

    config: TrainConfig
    resume: str | None
    plan: bool
    changes: tuple[str, ...] = ()


def recipes() -> dict[str, Path]:
    """The recipe cards by name."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}


def is_recipe_file(word: str) -> bool:
    """Whether a word names a recipe by its file, which may lie anywhere.

    Example:
        >>> is_recipe_file("experiments/mine.yaml"), is_recipe_file("baseline")
        (True, False)
    """
    return not word.startswith("-") and word.endswith((".yaml", ".yml"))


def card(path: Path) -> str:
    """The first comment line of a recipe card: what it is."""
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def boolean_keys() -> list[str]:
    """The keys that are true or false, as options: on a command line they need no value."""
    return [f"--{key}" for key, hint in keys().items() if hint is bool]


def with_flag_values(argv: Sequence[str]) -> list[str]:
    """The command line of train.py with `=true` behind every boolean key that has no value.

    Example:
        >>> with_flag_values(["etf", "--augment.flip", "--quiet", "false"])
        ['etf', '--augment.flip=true', '--quiet=false']
    """
    return join_flags(
        argv, [*boolean_keys(), "--plan"], lambda word: not word.startswith("-") and word not in recipes()
    )


def parse_command(argv: Sequence[str], names: Mapping[str, Sequence[str]] | None = None) -> Command:
    """The configuration that a command line asks for, and what to do with it.

    Args:
        argv: the words after the name of the script.
        names: what a key's value can be, by a title such as "heads"; shown at the end of --help.

    Raises:
        UserError: an unknown recipe, an unknown key, a value of the wrong type or out of range.
    """
    args = with_flag_values(argv)
    if not args:
        raise UserError(f"name a recipe ({', '.join(recipes())}), or give --config FILE; --help tells more")
    if "--help" in args or "-h" in args:
        print(help_text({name: card(path) for name, path in recipes().items()}, names or {}))
        raise SystemExit(0)
    if is_recipe_file(args[0]):
        args = [f"--recipe={Path(args[0]).stem}", "--config", args[0], *args[1:]]  # a name in the file comes later
    elif not args[0].startswith("-"):
        args = ["--config", str(_recipe(args[0])), *args[1:]]
    given, args = args, list(spelled_out(args))
    _refuse_unknown_keys(args)
    _refuse_parser_keys(args)
    try:
        values = _values(_with_own_terms(args))
        config = TrainConfig(**{item.name: values[item.name] for item in fields(TrainConfig)})
    except jsonargparse.ArgumentError as error:
        line = _one_line(str(error), recipe_given=not argv[0].startswith("-"))
        raise UserError(f"{_file_at_fault(given, error)}{line}") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    resume = values["resume"] and os.path.expanduser(values["resume"])
    changes: tuple[str, ...] = () if resume in (None, "auto") else _changes(args, resume)
    return Command(config, resume, values["plan"], changes)


def _values(args: Sequence[str]) -> dict[str, Any]:
    """The values of all keys and options on a command line."""
    shallow, deep = split_deep(args)
    parser = _parser()
    parsed = parser.parse_args([_full_name(word) for word in shallow])
    for group in ("model", "data", "augment", "adversarial", "optim", "tpt"):
        if not isinstance(parsed[group], jsonargparse.Namespace):
            value = "null" if parsed[group] is None else parsed[group]
            raise UserError(f"{group}={value}: expected keys and their values, such as {group}.KEY")
    values = dict(vars(parser.instantiate(parsed)))
    for way, text in deep:
        set_deep(values, way, text)
    return values


def _file_at_fault(words: Sequence[str], error: jsonargparse.ArgumentError) -> str:
    """The file that leads to an error by itself, and a colon; nothing if none does."""
    for word, behind in zip(words, [*words[1:], ""], strict=True):
        option, equals, file = word.partition("=")
        file = file if equals else behind
        if option != "--config" or not Path(file).is_file():
            continue
        try:
            _values(list(spelled_out(["--config", file])))
        except jsonargparse.ArgumentError as own:
            if str(own) == str(error):
                return f"{file}: "
        except (UserError, ValueError):
            pass
    return ""


def _with_own_terms(args: Sequence[str]) -> list[str]:
    """The command line with the names of own losses in full; the terms themselves may stand in files."""
    if not any(word.startswith("--loss.") for word in args):
        return list(args)
    terms = _values([word for word in args if not word.startswith("--print_config")])["loss"]
    spelled = with_files(args, terms or ())
    if spelled != args:
        refuse_ambiguous(args, spelled, _values([word for word in spelled if not word.startswith("--print")])["loss"])
    return spelled


def _changes(args: Sequence[str], run: str) -> tuple[str, ...]:
    """The words of a command line that change keys of the run to resume.

    Raises:
        UserError: names a key that cannot change any more.
    """
    words = list(args)
    changes: list[str] = []
    while words:
        option, equals, value = words.pop(0).partition("=")
        value = value if equals or not words else words.pop(0)
        if option == "--resume":
            continue
        if option.removeprefix("--") not in ON_RESUME:
            given = "a recipe or a file of keys" if option == "--config" else f"{option} {value}"
            raise UserError(
                f"--resume {run} takes the run's own configuration: give no other key with it, such as {given}, than "
                f"{', '.join(ON_RESUME)}"
            )
        changes.append(f"{option}={value}")
    return tuple(changes)


def _full_name(word: str) -> str:
    option, equals, value = word.partition("=")
    key = SHORT_NAMES.get(option.removeprefix("--")) if option.startswith("--") else None
    return word if key is None else f"--{key}{equals}{value}"


def parse(argv: Sequence[str]) -> TrainConfig:
    """The configuration alone, see `parse_command`."""
    return parse_command(argv).config


def config_of(run: Path, changes: Sequence[str] = ()) -> TrainConfig:
    """The configuration that a run folder keeps, with these words of a command line behind it.

    Raises:
        UserError: a word is wrong, or the file is; then it is named.
    """
    file = run / "config.yaml"
    try:
        known = deepcopy(_parsed(file, file.read_bytes() if file.is_file() else b""))
    except UserError as error:
        reason = str(error).removeprefix(f"{file}: ")
        raise UserError(f"{file} cannot be read: {reason}; it was changed or damaged after training began") from None
    return parse(["--config", str(file), *changes]) if changes else known


@lru_cache(maxsize=8)
def _parsed(file: Path, content: bytes) -> TrainConfig:
    """The configuration in a file with this content: an evaluation asks for the same one several times."""
    return parse(["--config", str(file)])


def check_recipe(args: Sequence[str]) -> None:
    """Refuse a command line that begins with the name of no recipe.

    Raises:
        UserError: with the names that there are.
    """
    if args and not args[0].startswith("-") and not is_recipe_file(args[0]) and not {"-h", "--help"} & set(args):
        _recipe(args[0])


def _recipe(name: str) -> Path:
    if name not in recipes():
        near = did_you_mean(name, recipes())
        raise UserError(f"recipe={name!r} is unknown: one of {', '.join(recipes())}, or a YAML file{near}")
    return recipes()[name]


@cache
def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(prog="train.py", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--resume")
    parser.add_argument("--plan", type=bool, default=False)
    parser.add_class_arguments(TrainConfig)
    parser.set_defaults(
        {"loss": {"cross_entropy": {"weight": 1.0, "phase": "always", "class_weights": "none", "args": {}}}}
    )
    return parser


def _refuse_unknown_keys(args: Sequence[str]) -> None:
    """Refuse the first unknown option, with a suggestion that jsonargparse's own message does not have."""
    known = [*keys(), *SHORT_NAMES, "config", "resume", "plan", "print_config", "help"]
    free = tuple(f"{key}." for key in mappings())
    for word in _option_names(args):
        if word not in known and not word.startswith(free):
            near = did_you_mean(word, known, USUAL_NAMES, prefix="--")
            raise UserError(f"--{word} is unknown{near} {POINTER}")


def _refuse_parser_keys(args: Sequence[str]) -> None:
    """Refuse the keys with which jsonargparse would take a term of the loss apart, in silence and past its own keys."""
    for word, behind in zip(args, [*args[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if not re.match(r"--loss(\.|$)", option) or ".args" in option:
            continue
        given = as_yaml_value(value if equals else behind)
        terms = given.values() if option == "--loss" and isinstance(given, Mapping) else [given]
        within = {key for term in terms if isinstance(term, Mapping) for key in term if key in OF_PARSER}
        if within or set(option.split(".")) & set(OF_PARSER):
            raise UserError(f"{option}{f': {min(within)}' if within else ''} is unknown: {TERM_KEYS} {POINTER}")


def _option_names(args: Sequence[str]) -> Iterator[str]:
    for word in args:
        if word.startswith("--"):
            yield word[2:].partition("=")[0]


def _one_line(message: str, *, recipe_given: bool) -> str:
    """The parser's message without line breaks and Python types, with the key or value that may have been meant."""
    line = " ".join(message.replace("Parser key ", "").split())
    line = re.sub(r"Problem with given class_path '[\w.]+': ", "", line)
    if line.startswith("unrecognized arguments: "):
        word = line.split()[2]
        if word in recipes() and not recipe_given:
            return f"recipe {word} must come first: train.py {word} --KEY VALUE ..."
        return f"{word} is unknown {POINTER}"
    return f"{_in_plain_words(line)} {POINTER}"


def _in_plain_words(line: str) -> str:
    if found := re.match(r'("[^"]+"): Does not validate .*Subtypes: \[(.*?)\] Errors:.*Given value: ?(.*)', line):
        key, types, value = found.groups()
        plain = re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing.Literal\[(.*?)\]", r"\1\2", types)
        words = plain.replace("NoneType", "null").split(", ")
        return f"{key}: expected one of {', '.join(sorted(words, key='null'.__eq__))}, got {value or 'nothing'}"
    if found := re.match(r"(.*): Not of type Path: .* not '?(\w+)", line):
        return f"{found[1]}: expected {KINDS['Path']}, got {found[2]}"
    if found := re.match(r"Key must be a string, got: (.*)\.", line):
        return f"{found[1]} stands where a key belongs: keys are words, and numbers have a point, no comma"
    if found := re.match(r"(?:Unexpected config:|\"config\": Path is not a file:) ?(.*)", line):
        return f"config={found[1]} is no file: give a YAML file of keys, or name a recipe in its place"
    if found := re.match(r"(.*): Expected a typing.Literal\[(.*?)\]. Got value: ?(.*)", line):
        key, choices, value = found.groups()
        near = did_you_mean(value, [choice.strip("' ") for choice in choices.split(",")])
        return f"{key}: expected one of {choices}, got {value}{near}"
    if found := re.match(r"(.*): Expected a <class '(\w+)'>. Got value: ?(.*)", line):
        key, kind, value = found.groups()
        return f"{key}: expected {KINDS.get(kind, kind)}, got {value or 'nothing'}"
    if found := re.match(
        r'"loss": (?:Expected a dot import path string: |Not a valid subclass of TermConfig. Got value: )(\S+)', line
    ):
        value = found[1].replace("None", "null")
        return f'"loss": a term takes {KINDS["dict"]} of its keys ({", ".join(keys(TermConfig))}), got {value}'
    if found := re.match(r"\"config\": File does not exist: '(.*)'", line):
        return f"config={found[1]} does not exist: give a YAML file of keys, or name a recipe in its place"
    if found := re.match(r"\"(\w+)\": Unable to load config '(.*?)'", line):
        group, value = found.groups()
        near = f"; did you mean --{USUAL_NAMES[group]}?" if group in USUAL_NAMES else ""
        return f"{group}={value}: expected keys and their values, such as {group}.KEY{near}"
    if found := re.match(r"(?:Group '([\w.]+)' does not accept option|.*Option) '([\w.]+)'", line):
        group, name = found.groups()
        if line.startswith('"loss"'):
            near = did_you_mean(name, keys(TermConfig))
            return f"{line}{near}; arguments of the loss itself go to --loss.TERM.args.NAME"
        return f"{line}{did_you_mean(f'{group}.{name}' if group else name, [*keys(), *keys(TermConfig)], USUAL_NAMES)}"
    return line
