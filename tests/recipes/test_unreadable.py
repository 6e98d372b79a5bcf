"""Images that cannot be read: named before the first epoch, left out on request, and no reason to lose a run."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_faults_files import killed

from ncreg import load_classifier
from ncreg.checkpoint import load_checkpoint
from recipes import evaluate, plot_collapse, rank_backbones, robustness
from recipes.core.cli import parse
from recipes.core.config import DataConfig
from recipes.data.load import load
from recipes.data.unreadable import Unreadable
from recipes.train import main, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # a machine of one core
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # from Python 3.12 on
]
STREAMED = ["--data.memory_limit", "0", "--data.workers", "0"]


def make(root, count=20, classes="abc"):
    draw = np.random.default_rng(0)
    for index, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = draw.integers(70 * index, 70 * index + 100, (28, 28, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:02}.png")


@pytest.fixture
def folder(tmp_path):
    make(tmp_path / "images")
    return tmp_path / "images"


def arguments(folder, tmp_path):
    words = ["baseline", "--data.name", "folder", "--data.root", str(folder), "--data.image_size", "28"]
    words += ["--data.batch_size", "8", "--tpt.max_epochs", "2", "--tpt.threshold", "1", "--quiet"]
    return [*words, "--out", str(tmp_path / "runs")]


@pytest.fixture
def args(folder, tmp_path):
    return arguments(folder, tmp_path)


def broken(path, *, header):
    """Make a file unreadable; with its header left as it is, only its pixels are."""
    path.write_bytes(path.read_bytes()[:60] if header else b"no picture")
    return path


def same_run(one, two):
    """Two runs ended alike: measures to the last bit, and so the weights."""
    for name in ("summary.json", "history.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    first, second = (load_checkpoint(path / "checkpoints" / "last.pt")["model"] for path in (one, two))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_all_unreadable_files_are_named_before_the_first_epoch(args, folder, tmp_path, capsys):
    """In memory those with damaged pixels too; of sets that stay on disk those without the header of an image."""
    bad = [broken(folder / name / "07.png", header=False) for name in "abc"]
    cut = broken(folder / "b" / "11.png", header=True)
    for more, expected in (([], [*bad, cut]), (STREAMED, bad), ([*STREAMED[:2], "--data.workers", "2"], bad)):
        assert main([*args, *more]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.count("is not a readable image") == len(expected)
        assert all(str(path) in said for path in expected)
        assert said.endswith("; or leave out what is unreadable: --data.unreadable skip\n")
    assert not (tmp_path / "runs").exists()


def test_of_many_unreadable_files_some_are_named_and_the_rest_counted(args, folder, capsys):
    for path in (folder / "c").iterdir():
        broken(path, header=False)
    assert main([*args, *STREAMED]) == 2
    said = capsys.readouterr().err
    assert said.count("is not a readable image") == 10 and "; and 10 more; or leave out" in said


@pytest.mark.parametrize("limit", ["8", "0"])
def test_skip_leaves_them_out_with_a_count_and_is_the_run_without_them(args, folder, tmp_path, capsys, limit):
    bad = [broken(folder / "a" / "03.png", header=True), broken(folder / "c" / "19.png", header=False)]
    skipping = [*args, "--data.memory_limit", limit, "--data.workers", "0", "--data.unreadable", "skip"]
    assert main(skipping) == 0
    said = capsys.readouterr().err
    assert "note: left out as data.unreadable=skip says: 2 unreadable images" in said
    assert all(str(path) in said for path in bad)
    (path,) = (tmp_path / "runs").iterdir()
    for file in bad:
        file.unlink()
    same_run(train(parse([*args, "--out", str(tmp_path / "without")])), path)


def split_file(folder, part):
    """A file of a split as the arguments above draw it."""
    config = DataConfig(name="folder", root=folder, memory_limit=0, workers=0, batch_size=8)
    images = getattr(load(config, seed=0, image_size=lambda own: 28), part).images
    return images.read.path(int(images.numbers[0]))


@pytest.mark.parametrize(
    ("way_out", "command", "threshold"), [("mended", "same", "1"), ("gone", "resume", "0.1"), ("gone", "same", "0.999")]
)
def test_a_run_that_cannot_be_measured_keeps_its_training(args, folder, tmp_path, capsys, way_out, command, threshold):
    """At the onset, whose epoch is not trained again, or at the end."""
    args = [*args, "--tpt.threshold", threshold]
    test_image = split_file(folder, "test")
    whole = test_image.read_bytes()
    expected = train(parse([*args, "--out", str(tmp_path / "whole")]))
    broken(test_image, header=True)
    assert main([*args, *STREAMED]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(test_image) in said and "the same command goes on with it" in said
    (path,) = (tmp_path / "runs").iterdir()
    trained = load_checkpoint(path / "checkpoints" / "last.pt")
    assert trained["epoch"] == (1 if threshold == "0.1" else 2) and not (path / "summary.json").exists()
    again = [*args, *STREAMED] if command == "same" else ["--resume", str(path)]
    assert main(again) == 2  # not mended yet: the same answer, and nothing trained anew
    assert str(test_image) in capsys.readouterr().err and len(list((tmp_path / "runs").iterdir())) == 1
    test_image.write_bytes(whole) if way_out == "mended" else test_image.unlink()
    assert main(again) == 0
    assert ("left out, as they are gone" in capsys.readouterr().err) == (way_out == "gone")
    assert len(list((tmp_path / "runs").iterdir())) == 1 and (path / "unreadable.json").exists() == (way_out == "gone")
    now = load_checkpoint(path / "checkpoints" / "last.pt")
    if trained["epoch"] == 2:
        assert all(torch.equal(now["model"][name], value) for name, value in trained["model"].items())
    if way_out == "mended":
        same_run(expected, path)
    else:  # the splits stay as they were drawn
        measured = json.loads((path / "summary.json").read_text())["at_end"]
        before = json.loads((expected / "summary.json").read_text())["at_end"]
        assert measured["train"] == before["train"] and measured["val"] == before["val"]
        assert measured["test"]["loss"] != before["test"]["loss"]
    if way_out == "gone":  # evaluated as it was divided, not with training images among those tested
        assert evaluate.main([str(path)]) == 0
        summary = json.loads((path / "summary.json").read_text())["at_end"]["test"]
        (result,) = path.glob("evaluation-*.json")
        assert json.loads(result.read_text())["accuracy"] == pytest.approx(summary["accuracy"], abs=1e-9)
        return
    assert main([*args, *STREAMED]) == 0  # a finished run is left alone: the command begins another one
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_training_image_may_be_gone_once_training_is_done_and_not_before(args, folder, tmp_path, capsys):
    lost = split_file(folder, "train")
    trained, underway = train(parse([*args, *STREAMED])), killed([*args, *STREAMED], tmp_path / "killed", 6)
    (trained / "summary.json").unlink()
    for path in (trained, underway):
        (path / "unreadable.json").write_text(json.dumps({"images": [str(lost)]}))
    lost.unlink()
    assert main(["--resume", str(trained)]) == 0
    assert f"left out, as they are gone: {lost}" in capsys.readouterr().err
    assert main(["--resume", str(underway)]) == 2
    assert "of the images that are gone, 1 are for training, which is not done" in capsys.readouterr().err


OFFER = "or leave out what is unreadable: --data.unreadable skip"


def test_evaluations_of_other_data_say_that_they_can_skip_and_a_run_keeps_its_own_parts(args, folder, tmp_path, capsys):
    """Where images are left out, others are drawn as held out: a run's own are never divided anew."""
    run = train(parse(args))
    load_classifier(run).save_pretrained(model := tmp_path / "model")
    make(other := tmp_path / "other")
    for place in (other, folder):
        broken(place / "a" / "03.png", header=False)
    others = ["--data.name", "folder", "--data.root", str(other), "--out-dir", str(tmp_path / "found")]
    capsys.readouterr()
    for script, words in (
        (evaluate, [str(run), *others, "--split", "all"]),
        (evaluate, [str(model), *others, *STREAMED]),
        (robustness, [str(model), *others, "--quick"]),
        (plot_collapse, [str(model), *others]),
        (rank_backbones, ["timm:test_resnet=untrained", *others, "--data.image_size", "28"]),
    ):
        assert script.main(words) == 2
        assert capsys.readouterr().err.endswith(f"{OFFER}\n")
    assert evaluate.main([str(run), *others, "--split", "all", "--data.unreadable", "skip"]) == 0
    for script, words in ((evaluate, []), (robustness, ["--quick"]), (plot_collapse, [])):
        capsys.readouterr()
        assert script.main([str(run), *words]) == 2
        said = capsys.readouterr().err
        assert "03.png is not a readable image" in said and OFFER not in said
        assert script.main([str(run), *words, "--data.unreadable", "skip"]) == 2
    for key, value, then in (("unreadable", "skip", "refuse"), ("val_share", "0.5", "0.1")):
        capsys.readouterr()
        assert evaluate.main([str(run), f"--data.{key}", value]) == 2
        assert f"--data.{key} {value}: the run divided its images with data.{key}={then}" in capsys.readouterr().err


@pytest.mark.parametrize("script", [evaluate, robustness, plot_collapse])
@pytest.mark.parametrize("change", ["is gone", "is new"])
def test_a_finished_run_does_not_divide_other_images_than_its_own(args, folder, capsys, change, script):
    run = train(parse(args))
    image = split_file(folder, "train")
    image.rename(image.with_name("new.png") if change == "is new" else folder.parent / "away.png")
    assert script.main([str(run), *(["--quick"] if script is robustness else [])]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "since the run divided its images" in said
    if script is evaluate:
        other = shutil.copytree(folder, folder.parent / "other")
        assert script.main([str(run), "--data.name", "folder", "--data.root", str(other), "--split", "all"]) == 0


def test_other_data_with_some_of_the_classes_is_evaluated(args, tmp_path, capsys):
    run = train(parse(args))
    other = tmp_path / "other"
    make(other, count=6, classes="ab")
    for path in (other / "a").iterdir():
        path.rename(other / f"_{path.name}")
    (other / "a").rmdir()
    (other / "a").mkdir()  # an empty class folder, and no folder c at all
    for path in other.glob("_*"):
        path.unlink()
    asked = [str(run), "--data.name", "folder", "--data.root", str(other), "--split", "all"]
    assert evaluate.main(asked) == 0
    (file,) = run.glob("evaluation-folder-other-*-all.json")
    result = json.loads(file.read_text())
    assert result["images"] == 6 and result["per_class"]["a"] is None and result["per_class"]["c"] is None
    assert result["per_class"]["b"] == result["accuracy"] and np.sum(result["confusion"]) == 6
    assert np.sum(result["confusion"][1]) == 6
    capsys.readouterr()
    (other / "zebra").mkdir()
    assert evaluate.main(asked) == 2
    assert "classes differ: the run knows ('a', 'b', 'c'), the data has ('a', 'b', 'zebra')" in capsys.readouterr().err


def test_errors_of_images_survive_the_way_from_a_worker(tmp_path):
    import pickle

    error = Unreadable({"a.png": "a.png is empty", "b.png": "b.png is cut"})
    again = pickle.loads(pickle.dumps(error))
    assert again.images == error.images and str(again) == "a.png is empty; b.png is cut"
