"""The view of collapse: exact simplices land on their corners, C = 3 loses nothing, and stored features are enough."""

import json
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes import plot_collapse
from recipes.core.cli import parse
from recipes.core.errors import UserError
from recipes.evaluation.simplex_plot import View, corners, draw, project
from recipes.evaluation.snapshots import Snapshot, read_snapshots, write_snapshots
from recipes.train import train


def simplex(classes, dim, seed):
    """Vertices of length 1 by subtracting the mean of the unit vectors, turned by a random rotation."""
    vertices = np.eye(classes) - 1 / classes
    vertices /= np.linalg.norm(vertices, axis=1, keepdims=True)
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(max(dim, classes),) * 2))[0]
    return np.pad(vertices, ((0, 0), (0, max(0, dim - classes)))) @ turn


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 7), st.integers(0, 5), st.integers(0, 1000), st.floats(0.1, 50))
def test_a_collapsed_classifier_is_its_corners(classes, more, seed, length):
    draw_ = np.random.default_rng(seed)
    vertices = simplex(classes, classes + more, seed)
    target = np.repeat(np.arange(classes), 3)
    features = length * vertices[target] + draw_.normal(size=vertices.shape[1])  # any offset and scale
    view = project(Snapshot("end", features, target, 7 * vertices))
    assert np.allclose(view.means, corners(classes), atol=1e-6)
    assert np.allclose(view.samples, corners(classes)[target], atol=1e-6)
    assert np.allclose(view.vectors, corners(classes), atol=1e-6)
    assert view.share == pytest.approx(min(1.0, 2 / (classes - 1)), abs=1e-6)  # every plane sees as much of a simplex


def test_three_classes_lose_nothing():
    """For C = 3 distances in the plane of the means are kept, in units of the means' mean length."""
    draw_ = np.random.default_rng(0)
    target = np.repeat(np.arange(3), 20)
    flat = np.concatenate([3 * simplex(3, 3, 1)[target] + draw_.normal(size=(60, 3))], axis=0)
    means = np.stack([flat[target == label].mean(0) for label in range(3)])
    basis = np.linalg.svd(means - means.mean(0))[2][:2]  # the plane of the means
    planar = (flat - means.mean(0)) @ basis.T
    length = np.linalg.norm(means - means.mean(0), axis=1).mean()
    view = project(Snapshot("", flat, target, means))
    ours = np.linalg.norm(view.samples[:, None] - view.samples, axis=-1)
    theirs = np.linalg.norm(planar[:, None] - planar, axis=-1) / length
    assert np.allclose(ours, theirs, atol=1e-9) and view.share == pytest.approx(1)


def test_two_classes_are_a_line_and_the_widest_direction_across_it():
    draw_ = np.random.default_rng(0)
    target = np.repeat([0, 1], 50)
    features = np.zeros((100, 4))
    features[:, 0] = 1 - 2 * target
    features[:, 2] = 3 * draw_.normal(size=100)
    features[:, 2] -= np.where(target == 0, features[:50, 2].mean(), features[50:, 2].mean())
    view = project(Snapshot("", features, target, np.eye(2, 4)))
    assert np.allclose(view.samples[:, 0], 1 - 2 * target, atol=1e-9)
    assert np.allclose(np.abs(view.samples[:, 1]), np.abs(features[:, 2]), atol=1e-9)


def test_features_that_cannot_be_shown_are_refused():
    target = np.array([0, 1, 2, 3])
    with pytest.raises(UserError, match="2 dimensions hold no simplex of 4"):
        project(Snapshot("", np.ones((4, 2)), target, np.ones((4, 2))))
    with pytest.raises(UserError, match="no image of class 3"):
        project(Snapshot("", np.eye(3, 4), target[:3], np.eye(4)))


def test_what_is_stored_draws_the_same_picture(tmp_path):
    target = np.repeat(np.arange(3), 5)
    snapshots = [
        Snapshot(f"epoch {epoch}", np.random.default_rng(epoch).normal(size=(15, 4)), target, np.eye(3, 4))
        for epoch in (0, 9)
    ]
    write_snapshots(tmp_path / "features.npz", snapshots)
    again = read_snapshots(tmp_path / "features.npz")
    assert [item.title for item in again] == ["epoch 0", "epoch 9"]
    assert all(np.array_equal(a.features, b.features) for a, b in zip(snapshots, again, strict=True))
    views = [[project(item) for item in items] for items in (snapshots, again)]
    assert draw(views[0], "abc")[1] == draw(views[1], "abc")[1]
    read = View.read(json.loads(json.dumps(views[0][1].plain())))
    assert read.title == "epoch 9" and np.allclose(read.samples, views[0][1].samples, atol=6e-4)
    (tmp_path / "features.npz").write_text("no archive")
    with pytest.raises(UserError, match="holds no stored features"):
        read_snapshots(tmp_path / "features.npz")


def test_the_legend_tells_features_means_class_vectors_and_outline_apart():
    target = np.repeat(np.arange(3), 5)
    view = project(Snapshot("end", np.random.default_rng(0).normal(size=(15, 4)), target, np.eye(3, 4)))
    canvas, _ = draw([view], "abc")
    (legend,) = canvas.legends
    words = ("feature of an image", "class mean", "class vector of the head", "the simplex")
    assert [word in text.get_text() for word, text in zip(words, legend.get_texts(), strict=True)] == [True] * 4
    small, large, vector, outline = legend.get_lines()
    drawn = canvas.axes[0].get_lines()
    assert small.get_markersize() < large.get_markersize() and outline.get_linestyle() != vector.get_linestyle()
    assert drawn[0].get_linestyle() == outline.get_linestyle() != drawn[2].get_linestyle() == vector.get_linestyle()
    plt.close(canvas)


def test_a_run_is_drawn_from_its_first_to_its_last_epoch(tmp_path, capsys, monkeypatch):
    short = [
        "--data.train_size=128",
        "--data.batch_size=64",
        "--tpt.max_epochs=3",
        "--tpt.threshold=0.02",
        "--quiet=true",
    ]
    run = train(parse(["etf", *short, "--device=cpu", f"--out={tmp_path}"]))
    assert plot_collapse.main([str(run), "--images", "60"]) == 0
    said = capsys.readouterr().out
    assert "epoch 0:" in said and "epoch 1 (2 % right)" in said and "epoch 3 (end)" in said
    figure = run / "collapse" / "simplex-train.png"
    page = figure.with_suffix(".pdf").read_bytes()
    assert b"/FontFile2" in page and b"/Type3" not in page  # a TrueType font comes with it
    figure.unlink()
    assert len(json.loads((run / "collapse" / "view-train.json").read_text())["views"]) >= 3
    monkeypatch.setattr("recipes.evaluation.snapshots.read_classifier", None)  # stored features are enough
    stored = run / "collapse" / "features-train.npz"
    former = [replace(item, title=item.title.replace("2 % right", "zero error")) for item in read_snapshots(stored)]
    write_snapshots(stored, former)  # as earlier versions named it
    assert plot_collapse.main([str(run), "--images", "60"]) == 0 and figure.exists()
    assert "epoch 1 (2 % right)" in capsys.readouterr().out
    monkeypatch.undo()
    points = (run / "collapse" / "view-train.json").read_text()
    whole = stored.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:200] + bytes(200) + whole[400:], b""):  # as a kill leaves it
        stored.write_bytes(damaged)
        assert plot_collapse.main([str(run), "--images", "60"]) == 0
        assert (run / "collapse" / "view-train.json").read_text() == points
    assert {path.name for path in stored.parent.iterdir()} == {
        *("features-train.npz", "view-train.json"),
        *(f"simplex-train.{kind}" for kind in ("png", "svg", "pdf")),
    }
    capsys.readouterr()
    assert plot_collapse.main([str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err
