"""The lower bounds of pyproject.toml are the versions that `make oldest` runs the suite with."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("recipes", "robust", "data")  # dev and export ask for the tools of today


def requirements():
    extras = PROJECT["optional-dependencies"]
    return [*PROJECT["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]


def versions(lines, sign):
    """Name → its versions; a requirement without one, or with another sign, is an error."""
    found = {}
    for line in lines:
        match = re.fullmatch(rf"([\w-]+){sign}(\d+(?:\.\d+)*)", line)
        assert match, f"{line!r} is not NAME{sign}VERSION"
        found.setdefault(match[1], set()).add(match[2])
    return found


def test_constraints_are_the_lower_bounds_name_by_name():
    lines = (ROOT / ".ci" / "oldest.txt").read_text().splitlines()
    pinned = versions([line for line in lines if line and not line.startswith("#")], "==")
    assert pinned == versions(requirements(), ">=")


def test_a_name_has_one_lower_bound_wherever_it_stands():
    assert all(len(bounds) == 1 for bounds in versions(requirements(), ">=").values())


def test_make_oldest_installs_what_is_held_with_the_oldest_python():
    makefile = (ROOT / "Makefile").read_text()
    assert f'-c .ci/oldest.txt -e ".[{",".join(EXTRAS)},dev]"' in makefile
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert f"python{oldest} -m venv $(OLDEST)" in makefile
