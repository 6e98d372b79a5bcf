"""Shape and type checks of every annotated signature are on under pytest, and only there."""

import jaxtyping
import pytest

jaxtyping.install_import_hook("ncreg", "beartype.beartype")


@pytest.fixture
def unchecked(monkeypatch):
    """Switch the annotations' checks off: a test of our own error messages sees what a user sees."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
