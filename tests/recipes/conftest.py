"""What the tests of several files share: the miniature study, run once, and figures of runs that nobody looks at."""

from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import jaxtyping
import pytest
from matplotlib.figure import Figure
from miniature_study import run, write_study

LOOK_AT_FIGURES = ("test_compare_report", "test_compare_tables", "test_fonts", "test_zero_error_label")
"""Files with tests that look at figures."""

RENDERED = Figure.savefig
EMPTY = '<svg xmlns="http://www.w3.org/2000/svg" width="1pt" height="1pt" viewBox="0 0 1 1"></svg>'


@contextmanager
def figures_unrendered(*, of_pages: bool):
    """Figures are made, but not rendered, up to a second each: PNG files and figures of pages stay empty."""

    def savefig(figure, place, *more, **settings):
        if isinstance(place, Path) and place.suffix == ".png":
            place.touch()
        elif isinstance(place, StringIO) and of_pages:
            place.write(EMPTY)
        else:
            RENDERED(figure, place, *more, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield


@pytest.fixture(scope="module", autouse=True)
def figures_of_runs(request):
    """Rendered for the tests that look at them alone."""
    if request.module.__name__ in LOOK_AT_FIGURES:
        yield
        return
    with figures_unrendered(of_pages=True):
        yield


@pytest.fixture(scope="module", autouse=True)
def annotations_unchecked():
    """The application is tried as its users have it; the library's own tests check the annotations of what it calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


@pytest.fixture(scope="session")
def miniature(tmp_path_factory):
    """The study file of a finished study in a folder of its own; tests leave that folder as it is."""
    path = write_study(tmp_path_factory.mktemp("first"))
    with figures_unrendered(of_pages=False):
        assert run(path) == 0
    return path
