"""What the tests of several files share: the miniature study, run once, and figures of runs that nobody looks at."""

from contextlib import contextmanager

import pytest
from miniature_study import run, write_study

from recipes.training import plots

LOOK_AT_FIGURES = ("test_longer", "test_recipes", "test_zero_error_label")
"""Files with tests that look at the figures of a training run."""


@contextmanager
def figures_unrendered():
    """Figures of training runs are made, but not rendered, which takes a second a run: the files stay empty."""
    finish = plots._finish

    def unrendered(figure, *more):
        figure.savefig = lambda path, **settings: path.touch()
        finish(figure, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_finish", unrendered)
        yield


@pytest.fixture(scope="module", autouse=True)
def figures_of_runs(request):
    """Rendered for the tests that look at them alone."""
    if request.module.__name__ in LOOK_AT_FIGURES:
        yield
        return
    with figures_unrendered():
        yield


@pytest.fixture(scope="session")
def miniature(tmp_path_factory):
    """The study file of a finished study in a folder of its own; tests leave that folder as it is."""
    path = write_study(tmp_path_factory.mktemp("first"))
    with figures_unrendered():
        assert run(path) == 0
    return path
