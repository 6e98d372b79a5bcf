"""Figures and lines say what accuracy "zero error" stands for; curves differ in their dashes, not by colour alone."""

from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from recipes.core.config import TrainConfig
from recipes.core.errors import NotHere
from recipes.evaluation import collapse_plots, snapshots
from recipes.evaluation import plots as evaluation_plots
from recipes.training import plots
from recipes.training.plan import show_plan
from recipes.training.reporting import closing_lines, zero_error, zero_error_means

HISTORY = [
    {
        "epoch": epoch,
        **{f"{split}_{name}": 0.9 / epoch for split in ("train", "val") for name in ("accuracy", "loss")},
        "measures": dict.fromkeys([*plots.DISTANCES, *plots.GAPS], 0.5 / epoch),
    }
    for epoch in (1, 2, 3)
]


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they are before they are closed."""
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    yield kept
    monkeypatch.undo()
    plt.close("all")


@pytest.mark.parametrize(
    ("threshold", "word"),
    [(0.999, "99.9 % right"), (0.9995, "99.95 % right"), (0.5, "50 % right"), (1.0, "zero error")],
)
def test_the_dotted_line_says_what_it_marks(drawn, tmp_path, threshold, word):
    plots.plot_run(tmp_path, HISTORY, 2, title="run", threshold=threshold)
    assert len(drawn) == 2
    for figure in drawn:
        for panel in figure.axes:
            assert [text.get_text().strip() for text in panel.texts] == [word]
    assert zero_error(threshold) == word
    assert snapshots.title_of(2, "onset", threshold) == f"epoch 2 ({word})"


def test_no_onset_no_mark(drawn, tmp_path):
    plots.plot_run(tmp_path, HISTORY, None, title="run", threshold=0.999)
    assert all(not panel.texts for figure in drawn for panel in figure.axes)


@pytest.mark.parametrize("epochs", [1, 3])
def test_figures_show_the_history(drawn, tmp_path, epochs):
    """Also one epoch alone, a measure that runs lack, and values that a logarithmic axis cannot show."""
    kept = [name for name in (*plots.DISTANCES, *plots.GAPS) if name != "nc3"]
    values = {name: np.linspace(0.0, 0.5 + place, epochs + 1)[-epochs:] for place, name in enumerate(kept)}
    values["nc1"][0] = 0.0
    history = [
        record | {"measures": {name: float(values[name][place]) for name in kept}}
        for place, record in enumerate(HISTORY[:epochs])
    ]
    plots.plot_run(tmp_path, history, 1, title="run", threshold=0.999)
    shown = [[line.get_ydata() for line in panel.get_lines()[:-1]] for figure in drawn for panel in figure.axes]
    falling = 0.9 / np.arange(1, epochs + 1)
    np.testing.assert_allclose(shown[:2], [[100 * falling] * 2, [falling] * 2])
    values |= {"nc1": np.where(values["nc1"] > 0, values["nc1"], np.nan), "nc3": np.full(epochs, np.nan)}
    np.testing.assert_allclose(shown[2], [values[name] for name in plots.DISTANCES])
    np.testing.assert_allclose(shown[3], [values[name] for name in plots.GAPS])
    assert all(plt.imread(tmp_path / name).std() > 0.05 for name in ("accuracy.png", "collapse.png"))


def test_curves_of_a_panel_are_told_apart_without_colour(drawn, tmp_path):
    plots.plot_run(tmp_path, HISTORY, None, title="run", threshold=0.999)
    for figure in drawn:
        for panel in figure.axes:
            dashes = [(str(line.get_linestyle()), str(line._dash_pattern)) for line in panel.get_lines()]
            assert len(dashes) >= 2 and len(set(dashes)) == len(dashes)


@pytest.mark.parametrize("threshold", [0.9999, 1.0])
def test_lines_of_text_say_the_threshold_to_its_last_digit(threshold):
    said = {0.9999: "training accuracy of 99.99% or more", 1.0: "training accuracy of 100%"}[threshold]
    ends = {"train": {}, "val": {}, "test": {}}
    summary = {"at_onset": None, "at_end": ends, "epochs": 4, "threshold": threshold, "best_train_accuracy": 0.97}
    first = closing_lines(summary, "run").splitlines()[0]
    assert first.startswith(f"zero error not found in 4 epochs ({said}; the best was 97.00%): raise")
    first = closing_lines(summary | {"at_onset": ends, "onset_epoch": 3}, "run").splitlines()[0]
    assert first == f"zero error ({said}) at epoch 3, terminal phase to epoch 4"
    assert zero_error_means(threshold) == said


def test_the_plan_says_it_in_print_and_figure(drawn, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("recipes.training.plan.load_data", lambda *args: (_ for _ in ()).throw(NotHere("elsewhere")))
    config = replace(TrainConfig(), out=tmp_path)
    show_plan(config)
    said = f"zero error: training accuracy of {100 * config.tpt.threshold:g}% or more"
    assert said in capsys.readouterr().out.splitlines()
    assert said in drawn[0].axes[0].get_title()


def dashes(panel):
    return [str(line._dash_pattern) for line in panel.get_lines()]


def test_spectra_and_reliability_are_told_apart_without_colour(monkeypatch):
    drawn = []
    monkeypatch.setattr(collapse_plots, "_svg", lambda figure, *style: drawn.append(figure) or "")
    record = {"spectrum": {"within": [1.0, 0.5], "between": [2.0, 1.0]}}
    collapse_plots.spectrum([SimpleNamespace(name=name, record=record) for name in ("train", "test")])
    bins = {"count": [3, 4], "confidence": [0.2, 0.8], "accuracy": [0.3, 0.9], "edges": [0.0, 0.5, 1.0]}
    scores = {"reliability": bins, "ece": 0.1}
    drawn.append(evaluation_plots.calibration({"temperature": 2.0, "before": scores, "after": scores, "samples": 7}))
    spectrum, top, below = dashes(drawn[0].axes[0]), dashes(drawn[1].axes[0])[1:], dashes(drawn[1].axes[1])
    assert [len(set(found)) for found in (spectrum, top, below)] == [4, 2, 2] and top == below
    for figure in drawn:
        plt.close(figure)
