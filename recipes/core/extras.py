"""Packages that an extra of pyproject.toml installs: how to get one that is missing."""

from __future__ import annotations

import sys
from importlib.util import find_spec

REQUIRED = ("jsonargparse", "docstring_parser", "yaml", "sklearn", "scipy", "matplotlib", "jinja2", "tqdm")
"""Modules of the extra `recipes` without which no script starts."""


def pip_install(extra: str) -> str:
    """The command that installs an extra, from the project's root.

    Example:
        >>> pip_install("data")
        'pip install -e ".[data]"'
    """
    return f'pip install -e ".[{extra}]"'


def is_installed(module: str) -> bool:
    """Whether a module can be imported."""
    return find_spec(module) is not None


def require_recipes() -> None:
    """End the process with exit code 2 and one line where a package of the extra `recipes` is missing.

    A script calls it before its other imports, so that none of them ends in a traceback.
    """
    missing = [module for module in REQUIRED if not is_installed(module)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        print(f"error: {', '.join(missing)} {verb} not installed: {pip_install('recipes')}", file=sys.stderr)
        raise SystemExit(2)
