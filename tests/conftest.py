"""Shape and type checks of every annotated signature are on under pytest, and only there."""

import gc
import sys
from importlib.util import find_spec
from pathlib import Path

import jaxtyping
import pytest

# The tower of PEP 484: an int is welcome where a float is.
jaxtyping.install_import_hook("ncreg", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

collect_ignore = [
    "ncreg/compile_heads.py",  # a script that a slow test runs
    "other_device.py",  # collected for doctests it would be imported again, and a device is registered once
]

INTEGRATIONS = Path(__file__).parents[1] / "ncreg" / "integrations"


def pytest_configure(config):
    """Leave out the doctests of modules whose package is an extra that is not installed."""
    missing = [name for name in ("lightning", "transformers") if find_spec(name) is None]
    config.option.ignore = [*(config.option.ignore or ()), *(str(INTEGRATIONS / f"{name}.py") for name in missing)]


def pytest_collection():
    """What is loaded while tests are collected, millions of objects, is not searched for garbage, then or later."""
    gc.disable()


def pytest_collection_finish():
    """Importing ncreg.integrations.timm, as collecting its tests does, changes timm for every other test."""
    gc.freeze()
    gc.enable()
    module = sys.modules.get("ncreg.integrations.timm")
    if module is not None:
        module.uninstall()


@pytest.fixture
def unchecked(monkeypatch):
    """Switch the annotations' checks off: a test of our own error messages sees what a user sees."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
