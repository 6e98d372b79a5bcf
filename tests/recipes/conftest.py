"""The miniature study, run once for all tests that look at its results."""

import pytest
from miniature_study import run, write_study


@pytest.fixture(scope="session")
def miniature(tmp_path_factory):
    """The study file of a finished study in a folder of its own; tests leave that folder as it is."""
    path = write_study(tmp_path_factory.mktemp("first"))
    assert run(path) == 0
    return path
