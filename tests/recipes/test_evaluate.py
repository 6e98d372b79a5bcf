"""evaluate.py and predict.py on a real run, against counts made by hand."""

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from test_data import fashion

from ncreg.checkpoint import load_classifier
from recipes import evaluate, predict
from recipes.core.cli import parse
from recipes.data.load import SOURCES, load
from recipes.data.split import Source, Split
from recipes.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    args = ["tpt", "--data.train_size", "256", "--data.batch_size", "64", "--tpt.max_epochs", "2", "--quiet", "true"]
    return train(parse([*args, "--out", str(tmp_path_factory.mktemp("runs"))]))


@pytest.fixture(scope="module")
def expected(run):
    """Test images, their classes and the run's probabilities."""
    test = load(parse(["tpt"]).data, seed=0, image_size=lambda native: 28).test
    with torch.no_grad():
        return test, load_classifier(run)(test.images.float() / 255).softmax(1)


def test_evaluate_counts_each_class(run, expected, capsys):
    test, shares = expected
    assert evaluate.main([str(run)]) == 0
    result = json.loads((run / "evaluation-digits-test.json").read_text())
    guess, truth = shares.argmax(1).numpy(), test.target.numpy()
    counts = np.array([[((truth == row) & (guess == column)).sum() for column in range(10)] for row in range(10)])
    assert result["confusion"] == counts.tolist() and result["images"] == 360
    assert result["accuracy"] == pytest.approx((guess == truth).mean())
    for name, value in result["per_class"].items():
        assert value == pytest.approx((guess == truth)[truth == int(name)].mean())
    summary = json.loads((run / "summary.json").read_text())
    assert result["nc1"] == pytest.approx(summary["at_end"]["test"]["nc1"], rel=1e-4)
    said = capsys.readouterr().out
    assert "accuracy of each class" in said and "nc2_equinorm" not in said  # names for people; keys are in the file
    printed = {label.strip(): value for label, value in (line.rsplit(None, 1) for line in said.splitlines() if line)}
    assert printed["accuracy"] == f"{result['accuracy']:.2%}"
    right = int((guess == truth).sum())
    interval = binomtest(right, 360).proportion_ci(method="wilson")
    (line,) = (line for line in said.splitlines() if line.startswith("  its 95 % interval"))
    assert line.split("interval")[1].strip() == f"{interval.low:.1%} to {interval.high:.1%}"
    for label, value in result["per_class"].items():
        assert f"  {label:<36}{value:>14.2%} of {int((truth == int(label)).sum())}" in said
    assert float(printed["NC1  within-class variability"]) == pytest.approx(result["nc1"], rel=1e-3)
    assert float(printed["cross-entropy (nats)"]) == pytest.approx(result["loss"], abs=1e-4)


@pytest.fixture(scope="module")
def on_files(expected, tmp_path_factory):
    """The test images as files, and a run on them with wrong labels and classes of unequal size."""
    (known, _), place = expected, tmp_path_factory.mktemp("files")
    for number, (image, label) in enumerate(zip(known.images, known.target.tolist(), strict=True)):
        (place / "other" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(place / "other" / str(label) / f"{number}.png")
    args = ["tpt", "--data.batch_size", "64", "--tpt.max_epochs", "1", "--quiet", "true", "--out", str(place / "runs")]
    args += ["--data.label_noise", "0.4", "--data.imbalance", "2", "--model.model_args", "{in_chans: 3}"]
    return place / "other", train(parse([*args, "--data.name", "folder", "--data.root", str(place / "other")]))


@pytest.mark.parametrize("limit", ["0", pytest.param("8", marks=pytest.mark.slow)])
def test_other_images_are_taken_whole_and_as_they_are(expected, on_files, tmp_path, capsys, limit):
    """Of a folder without parts a fifth is drawn, which is said; --split all leaves out none, with their own labels."""
    (known, _), (whole, run) = expected, on_files
    noisy = shutil.copytree(run, tmp_path / run.name)
    asked = [str(noisy), "--data.name", "folder", "--data.root", str(whole), "--data.memory_limit", limit]
    assert evaluate.main(asked) == 0
    said = capsys.readouterr()
    assert "72 images, folder test" in said.out and "a fifth was drawn; --split all takes every image" in said.err
    assert evaluate.main([*asked, "--split", "all"]) == 0
    assert "360 images, folder all" in capsys.readouterr().out
    (file,) = noisy.glob("evaluation-folder-other-*-all.json")
    result = json.loads(file.read_text())
    assert result["data_keys"] | {"root": str(whole), "train_size": None, "label_noise": 0} == result["data_keys"]
    assert evaluate.main([str(noisy), "--split", "all"]) == 0
    assert (
        "all is what the run had of its data, with data.imbalance=2.0, data.label_noise=0.4" in capsys.readouterr().err
    )
    own = json.loads((noisy / "evaluation-folder-all.json").read_text())
    assert own["images"] < 360 and own["data_keys"]["imbalance"] == 2
    assert np.sum(result["confusion"], 1).tolist() == torch.bincount(known.target).tolist()
    with torch.no_grad():
        guess = load_classifier(noisy)(known.images.expand(-1, 3, -1, -1).float() / 255).argmax(1)
    right = (guess == known.target).double().mean()
    assert result["accuracy"] == pytest.approx(float(right), abs=1e-9)


@pytest.fixture
def few(expected, monkeypatch):
    """A set that is the images of the run's test part, its first ones but no 9, in parts that the roots name."""
    known, _ = expected
    rows = torch.stack([(known.target == label).nonzero()[0, 0] for label in range(10)])
    whole, names = Split(known.images[rows], known.target[rows]), tuple(map(str, range(10)))
    tens = whole[torch.arange(10).repeat(10)]
    sources = {"ten": Source(names, whole, None), "nine": Source(names, tens, whole[torch.arange(9)])}
    monkeypatch.setitem(SOURCES, "made", lambda config, image_size: sources[config.root.name])


def test_a_class_without_images_has_no_accuracy(run, few, capsys):
    assert evaluate.main([str(run), "--data.name", "made", "--data.root", "nine"]) == 0
    said = capsys.readouterr()
    assert "  9" + "no image".rjust(49) in said.out and "nan" not in said.out
    assert "note: no test image of class 9" in said.err
    (file,) = run.glob("evaluation-made-nine-*-test.json")
    result = json.loads(file.read_text())
    assert result["per_class"]["9"] is None and result["images"] == 9
    assert result["accuracy"] == pytest.approx(np.mean([result["per_class"][str(label)] for label in range(9)]))


def test_all_takes_a_set_that_is_too_small_to_be_divided(run, few, capsys):
    asked = [str(run), "--data.name", "made", "--data.root"]
    assert evaluate.main([*asked, "ten"]) == 2 and "the test part, a drawn share of 0.2" in capsys.readouterr().err
    for root, count in (("ten", 10), ("nine", 109)):
        assert evaluate.main([*asked, root, "--split", "all"]) == 0
        (file,) = run.glob(f"evaluation-made-{root}-*-all.json")
        result = json.loads(file.read_text())
        assert result["images"] == count and result["data_keys"]["root"].endswith(f"/{root}")


def named_accuracy(run, config):
    """Of the test images of some data, by the names of its classes and of the run's."""
    data, model = load(config, seed=0, image_size=lambda native: 28), load_classifier(run)
    with torch.no_grad():
        guess = model(data.test.images.float() / 255).argmax(1).tolist()
    right = [model.class_names[g] == data.class_names[t] for g, t in zip(guess, data.test.target.tolist(), strict=True)]
    return np.mean(right), len(right)


def test_a_run_on_some_of_its_classes_takes_them_by_name_and_leaves_the_result_on_all_of_them(run):
    assert evaluate.main([str(run), "--train-images", "0"]) == 0
    whole = (run / "evaluation-digits-test.json").read_bytes()
    assert evaluate.main([str(run), "--train-images", "0", "--data.hold_out", "[3, 1]"]) == 0
    assert (run / "evaluation-digits-test.json").read_bytes() == whole
    found = [json.loads(path.read_text()) for path in run.glob("evaluation-digits-*-test.json")]
    (without,) = (result for result in found if "hold_out" in result["data_keys"])
    assert without["data_keys"]["hold_out"] == [1, 3]
    assert [name for name, share in without["per_class"].items() if share is None] == ["1", "3"]
    config = replace(parse(["tpt"]).data, hold_out=[3, 1])
    assert (without["accuracy"], without["images"]) == pytest.approx(named_accuracy(run, config))


def test_a_run_without_some_classes_is_evaluated_on_its_own_data_and_on_others(tmp_path, monkeypatch):
    args = ["tpt", "--data.train_size", "64", "--data.batch_size", "32", "--tpt.max_epochs", "1", "--quiet", "true"]
    config = parse([*args, "--data.hold_out", "[3, 1]", "--out", str(tmp_path)])
    run = train(config)
    assert evaluate.main([str(run), "--train-images", "0"]) == 0
    own = json.loads((run / "evaluation-digits-test.json").read_text())
    assert (own["accuracy"], own["images"]) == pytest.approx(named_accuracy(run, config.data))
    data = load(config.data, seed=0, image_size=lambda native: 28)
    source = Source(data.class_names, data.test, None)
    monkeypatch.setitem(SOURCES, "made", lambda config, image_size: source)
    words = ["--data.name", "made", "--data.root", "eight", "--split", "all"]
    assert evaluate.main([str(run), *words]) == 0  # its fourth class is not the one that was held out
    (file,) = run.glob("evaluation-made-eight-*-all.json")
    assert json.loads(file.read_text())["accuracy"] == own["accuracy"]


def test_names_that_are_no_text_are_written_as_they_are(run, expected, tmp_path, capsys):
    odd = tmp_path / os.fsdecode(b"x\xff.png")
    Image.fromarray(expected[0].images[0, 0].numpy()).save(tmp_path / "y.png")
    (tmp_path / "y.png").rename(odd)
    (tmp_path / ".hidden.png").write_bytes(b"no picture")
    output = tmp_path / "out.csv"
    assert predict.main([str(run), str(tmp_path), "--out", str(output)]) == 0
    assert output.read_bytes().splitlines()[1].startswith(os.fsencode(odd) + b",")
    assert f"note: hidden images in {tmp_path} are left out (1)" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["csv", "json"])
def test_predict_gives_the_models_probabilities(run, expected, tmp_path, form):
    test, shares = expected
    for number in range(5):
        Image.fromarray(test.images[number, 0].numpy()).save(tmp_path / f"{number}.png")
    output = tmp_path / f"out.{form}"
    assert predict.main([str(run), str(tmp_path), "--format", form, "--out", str(output)]) == 0
    rows = json.loads(output.read_text()) if form == "json" else list(csv.DictReader(output.read_text().splitlines()))
    assert [row["file"] for row in rows] == [str(tmp_path / f"{number}.png") for number in range(5)]
    for row, share in zip(rows, shares, strict=False):
        each = [row["probabilities"][str(c)] if form == "json" else float(row[f"p({c})"]) for c in range(10)]
        np.testing.assert_allclose(each, share.numpy(), atol=1e-5)
        assert row["class"] == str(int(share.argmax()))
        assert float(row["probability"]) == pytest.approx(share.max().item(), abs=1e-5)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0)])
def test_predict_gives_the_rows_it_can_and_names_the_files_it_cannot(run, expected, tmp_path, capsys, order):
    """Also where rows go to the terminal, and a file is named twice."""
    names = [str(tmp_path / name) for name in ("bad.png", "good.png", "worse.png")]
    for name in (names[0], names[2]):
        Path(name).write_bytes(b"no picture")
    Image.fromarray(expected[0].images[0, 0].numpy()).save(names[1])
    asked = [str(run), *(names[number] for number in order), names[1]]
    assert predict.main(asked) == 3
    said = capsys.readouterr()
    rows = list(csv.DictReader(said.out.splitlines()))
    assert [row["file"] for row in rows] == [names[1]] * 2
    assert all(float(row["p(3)"]) == pytest.approx(float(expected[1][0, 3]), abs=1e-5) for row in rows)
    assert said.err.count("\n") == 1 and "the other 2 images have their rows" in said.err
    assert all(f"{name} is not a readable image" in said.err for name in (names[0], names[2]))
    assert predict.main([*asked, "--out", str(tmp_path / "p.csv")]) == 3
    assert (tmp_path / "p.csv").read_text().count("\n") == 3
    assert predict.main([str(run), names[0], names[2], "--out", str(tmp_path / "q.csv")]) == 2  # no row at all
    assert not (tmp_path / "q.csv").exists()


def test_a_run_of_gray_images_says_how_it_takes_colour(run, expected, tmp_path, capsys):
    test, _ = expected
    for number, (image, label) in enumerate(zip(test.images[:60], test.target[:60].tolist(), strict=True)):
        place = tmp_path / "colour" / str(label) / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        red = np.zeros((28, 28, 3), dtype=np.uint8)
        red[..., 0] = image[0]
        Image.fromarray(red).save(place)
    asked = ["--data.name", "folder", "--data.root", str(tmp_path / "colour"), "--split", "all"]
    assert evaluate.main([str(run), *asked]) == 2
    assert "images of 1 channel, the data has 3; its model in a folder takes both" in capsys.readouterr().err
    load_classifier(run).save_pretrained(tmp_path / "saved")
    assert evaluate.main([str(tmp_path / "saved"), *asked, "--out-dir", str(tmp_path / "out")]) == 0
    (file,) = (tmp_path / "out").glob("*.json")
    with torch.no_grad():  # red is 0.299 of gray (ITU-R BT.601), in whole levels as images in files have them
        levels = (0.299 * test.images[:60].double()).round()
        gray = load_classifier(run).double()(levels / 255).softmax(1)
    assert json.loads(file.read_text())["accuracy"] == pytest.approx(
        float((gray.argmax(1) == test.target[:60]).double().mean())
    )
    assert json.loads(file.read_text())["loss"] == pytest.approx(
        float(-gray[range(60), test.target[:60]].log().mean()), rel=1e-5
    )


@pytest.mark.parametrize(
    ("command", "args", "words"),
    [
        (evaluate, ["nowhere"], "nowhere is no run folder"),
        (evaluate, ["RUN", "--data.name", "fashion_mnist", "--data.val_share", "0.5"], "classes differ"),
        (evaluate, ["RUN", "--seed", "3"], "--seed is unknown"),
        (evaluate, ["RUN", "--data.image_size", "64"], "data.image_size=64: the run takes images of side 28"),
        (
            evaluate,
            ["RUN", "--data.name=digits", "--split=all", "--data.train_size=9"],
            "--data.train_size does nothing",
        ),
        (predict, ["nowhere", "image.png"], "nowhere is no run folder"),
        (predict, ["RUN", "none.png"], "none.png does not exist"),
        (predict, ["RUN", "BAD"], "is not a readable image"),
        (predict, ["RUN", "EMPTY"], "no images"),
        (predict, ["RUN", "GOOD", "--out", "nowhere/out.csv"], "--out nowhere/out.csv cannot be written"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, capsys, monkeypatch, command, args, words):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "worse.png").write_bytes(b"none either")
    (tmp_path / "empty").mkdir()
    Image.new("L", (9, 5)).save(tmp_path / "good.png")
    monkeypatch.setattr("recipes.data.gray_sets.DEBIAN", made_fashion(tmp_path / "fashion"))
    named = {word: tmp_path / f"{word.lower()}.png" for word in ("BAD", "WORSE", "GOOD")}
    known = named | {"RUN": run, "EMPTY": tmp_path / "empty"}
    assert command.main([str(known.get(arg, arg)) for arg in args]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and words in captured.err


def made_fashion(folder):
    folder.mkdir()
    fashion(folder)
    return folder
