"""Data of the user's own: a function in a file, data.name=my_data.py:load, or datasets given in Python."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from recipes.core.config import DataConfig
from recipes.core.errors import UserError
from recipes.core.own_code import in_a_line, load_own
from recipes.data.map_style import Size, source_of
from recipes.data.names import IN_PYTHON
from recipes.data.split import SPLIT_NAMES, Source


def own_set(config: DataConfig, image_size: Size) -> Source:
    """The set that a function of the user's gives: a map-style dataset, or a dict of them by split.

    The function is called without arguments, or with `root` if it has a parameter of that name.

    Raises:
        UserError: no such function, an error in it, or something that is no such dataset.
    """
    what = f"data.name={config.name}"
    function = load_own(config.name, "data.name")
    try:
        takes_root = "root" in inspect.signature(function).parameters
        given = function(root=config.root) if takes_root else function()
    except UserError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise UserError(f"{what}: the function fails: {in_a_line(error)}") from None
    source = given_set(given, config, image_size, what=what)
    return source if takes_root else noting_unread_root(source, config)


def noting_unread_root(source: Source, config: DataConfig) -> Source:
    """A source that reads no files of data.root, with a note where that was given all the same."""
    if config.root == type(config).root:
        return source
    note = f"data.root={config.root} is not read: data.name={config.name} needs none; --data.name folder reads it"
    return replace(source, notes=(*source.notes, note))


def given_set(given: Any, config: DataConfig, image_size: Size, *, what: str = "data") -> Source:
    """A source from a map-style dataset, which is then divided, or from a dict of them by split.

    Raises:
        UserError: it is neither, or a dict without train.
    """
    splits = _named(given, what) if isinstance(given, Mapping) else {"train": given}
    return source_of(splits, config, image_size, what=what)


def no_set(config: DataConfig, image_size: Size) -> Source:
    """Refuse the name that stands for data which only a Python program has.

    Raises:
        UserError: always.
    """
    raise UserError(
        f"data.name={IN_PYTHON}: the images were given in Python and lie in no file that is known here; there, "
        "train(config, data=…, resume=RunDir(…)) goes on, and a set of its own is named by --data.name"
    )


def _named(given: Mapping[Any, Any], what: str) -> dict[str, Any]:
    """Datasets by split, from the usual names of splits; one of val and test alone is the test split."""
    splits: dict[str, Any] = {}
    for name, found in given.items():
        part = next((part for part, names in SPLIT_NAMES.items() if str(name).lower() in names), None)
        if part is None or part in splits:
            raise UserError(f"{what} has the splits {', '.join(map(str, given))}: train, val and test are known")
        splits[part] = found
    if "train" not in splits:
        raise UserError(f"{what} has the splits {', '.join(map(str, given)) or 'none'}: one of them must be train")
    if "val" in splits and "test" not in splits:
        splits["test"] = splits.pop("val")
    return splits
