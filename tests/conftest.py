"""Shape and type checks of every annotated signature are on under pytest, and only there."""

import jaxtyping
import pytest

# The tower of PEP 484: an int is welcome where a float is.
jaxtyping.install_import_hook("ncreg", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

collect_ignore = ["ncreg/compile_heads.py"]  # a script that a slow test runs


@pytest.fixture
def unchecked(monkeypatch):
    """Switch the annotations' checks off: a test of our own error messages sees what a user sees."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
