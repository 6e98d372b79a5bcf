"""The command line of recipes/train.py, and the recipes that it knows."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import jsonargparse

from recipes.core.config import TrainConfig
from recipes.core.errors import UserError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def recipes() -> dict[str, Path]:
    """The recipe cards by name."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}


def card(path: Path) -> str:
    """The first comment line of a recipe card: what it is."""
    return path.read_text().splitlines()[0].lstrip("# ")


class _Help(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Keeps the line breaks of the recipe list."""


def _parser() -> jsonargparse.ArgumentParser:
    listed = "\n".join(f"  {name:<21}{card(path)}" for name, path in recipes().items())
    parser = jsonargparse.ArgumentParser(
        prog="train.py",
        usage="train.py [RECIPE] [--config FILE] [--KEY VALUE ...]",
        description=f"Train a classifier into neural collapse and measure it.\n\nrecipes:\n{listed}",
        formatter_class=_Help,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="a YAML file of keys; later ones win over earlier ones")
    parser.add_argument(
        "--resume", help="a run folder to go on with, or auto for the furthest unfinished run of this configuration"
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="show the learning rates for assumed epochs of zero error, and train nothing",
    )
    parser.add_class_arguments(TrainConfig)
    parser.set_defaults(
        {"loss": {"cross_entropy": {"weight": 1.0, "phase": "always", "class_weights": "none", "args": {}}}}
    )
    return parser


def _one_line(message: str) -> str:
    """The parser's message without its line breaks and the list of all that was tried."""
    line = " ".join(message.replace("Parser key ", "").split())
    union = re.match(r'("[^"]+"): Does not validate .*Subtypes: \[(.*?)\] Errors:.*Given value: (.*)', line)
    if union:
        key, types, value = union.groups()
        names = re.sub(r"<class '(\w+)'>", r"\1", types).replace("NoneType", "null").split(", ")
        line = f"{key}: expected one of {', '.join(sorted(names, key='null'.__eq__))}, got {value}"
    return f"{line} (--help lists the keys, --print_config shows all values)"


def parse_command(argv: Sequence[str]) -> tuple[TrainConfig, str | None]:
    """The configuration that a command line asks for, and the run to resume: a folder, "auto" or None.

    Raises:
        UserError: an unknown recipe, an unknown key, a value of the wrong type or out of range.
    """
    args = list(argv)
    if not args:
        raise UserError(f"name a recipe ({', '.join(recipes())}), or give --config FILE; --help tells more")
    if not args[0].startswith("-"):
        name = args.pop(0)
        if name not in recipes():
            raise UserError(f"recipe={name!r} is unknown: one of {', '.join(recipes())}, or --config FILE")
        args = ["--config", str(recipes()[name]), *args]
    parser = _parser()
    try:
        parsed = parser.parse_args(args)
        for group in ("model", "data", "augment", "adversarial", "optim", "tpt"):
            if not isinstance(parsed[group], jsonargparse.Namespace):
                raise UserError(f"{group}={parsed[group]}: expected keys and their values, such as {group}.KEY")
        values = parser.instantiate(parsed)
        config = TrainConfig(**{item.name: values[item.name] for item in fields(TrainConfig)})
    except jsonargparse.ArgumentError as error:
        raise UserError(_one_line(str(error))) from None
    except ValueError as error:
        raise UserError(str(error)) from None
    if values.resume not in (None, "auto") and len(args) > 2 - ("=" in args[0]):
        raise UserError(f"--resume {values.resume} takes the run's own configuration: give no other key with it")
    return config, values.resume


def parse(argv: Sequence[str]) -> TrainConfig:
    """The configuration alone, see `parse_command`."""
    return parse_command(argv)[0]
