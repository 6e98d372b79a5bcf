"""Folders of images as people have them: parts by their usual names, odd files, wide pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.config import DataConfig, UserError
from recipes.data import load
from recipes.image_folder import parts_of, read_image
from recipes.run_folder import checksums
from recipes.train import main


def images(folder, counts, *, first=0):
    """Gray images of one level each, so that a level names its file; classes a, b, ... of the given sizes."""
    for index, count in enumerate(counts):
        (folder / "abc"[index]).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            level = first + 80 * index + number
            Image.fromarray(np.full((8, 8), level, np.uint8)).save(folder / "abc"[index] / f"{number:02}.png")


def levels(split):
    return split.images[:, 0, 0, 0].tolist()


def loaded(root, **keys):
    return load(DataConfig(name="folder", root=root, batch_size=4, **keys), seed=0, image_size=lambda own: 8)


@pytest.mark.parametrize("val", ["val", "valid", "validation", "eval", "evaluation"])
@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("training", "testing")])
def test_three_parts_are_taken_as_they_are(tmp_path, train, val, test):
    for name, counts, first in ((train, (9, 8), 0), (val, (3, 2), 20), (test, (2, 4), 40)):
        images(tmp_path / name, counts, first=first)
    parts = loaded(tmp_path)
    assert levels(parts.train) == [*range(9), *range(80, 88)]
    assert levels(parts.val) == [20, 21, 22, 100, 101] and parts.val.target.tolist() == [0, 0, 0, 1, 1]
    assert levels(parts.test) == [40, 41, 120, 121, 122, 123]
    assert not parts.test_drawn and parts.notes == ()
    assert len(checksums(tmp_path)) == 28  # all of them are watched for changes


def test_of_two_parts_the_one_beside_training_is_the_test_part(tmp_path):
    images(tmp_path / "train", (20, 20))
    images(tmp_path / "valid", (3, 2), first=30)
    parts = loaded(tmp_path)
    assert levels(parts.test) == [30, 31, 32, 110, 111] and len(parts.val) == 4


def test_a_class_may_be_called_train(tmp_path):
    for name in ("bus", "test", "train"):
        images(tmp_path / "source", (10,), first=ord(name[-1]))
        (tmp_path / "source" / "a").rename(tmp_path / name)
    (tmp_path / "source").rmdir()
    parts = loaded(tmp_path)
    assert parts.class_names == ("bus", "test", "train") and parts.test_drawn and parts.notes == ()
    assert parts_of(tmp_path) == {"train": tmp_path}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("train", "training"), "train and .*training are both for train: remove one"),
        (("train", "val", "eval"), "val and .*eval are both for val"),
        (("test", "val"), "val has no .*train beside it: put the training images there"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(tmp_path, names, said):
    for name in names:
        images(tmp_path / name, (5, 5))
    with pytest.raises(UserError, match=said):
        loaded(tmp_path)


def test_what_is_left_out_is_said(tmp_path, capsys):
    images(tmp_path / "train", (20, 20))
    images(tmp_path / "old", (1, 1))
    (tmp_path / "train" / "a" / "moving.GIF").write_bytes(b"GIF89a")
    (tmp_path / "train" / "b" / "notes.txt").write_text("blurred")
    (tmp_path / "train" / "b" / ".DS_Store").write_text("")
    (tmp_path / "train" / "a" / "00.png").rename(tmp_path / "train" / "lost.png")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "0.png").write_bytes(b"")  # images without a class: no part to measure on
    parts = loaded(tmp_path)
    beside, files = parts.notes
    assert beside == f"left out: {tmp_path / 'old'}, {tmp_path / 'test'}, beside {tmp_path / 'train'}"
    assert "(1 .GIF, 1 .txt, 1 images outside class folders)" in files
    assert len(parts.train) + len(parts.val) + len(parts.test) == 39 and parts.test_drawn

    short = ["baseline", "--data.name", "folder", "--data.root", str(tmp_path), "--data.batch_size", "8"]
    assert main([*short, "--tpt.max_epochs", "1", "--quiet", "true", "--out", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr().err
    assert f"note: {beside}\n" in said and f"note: {files}\n" in said


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path, order):
    wide = np.linspace(0, 65535, 28 * 28).reshape(28, 28).round().astype(np.uint16)
    path = tmp_path / ("gray.png" if order == "<u2" else "gray.tif")
    if order == "<u2":
        Image.fromarray(wide).save(path)
    else:
        Image.frombytes("I;16B", (28, 28), wide.astype(order).tobytes()).save(path)
    expected = torch.from_numpy(np.floor(wide / 257 + 0.5).astype(np.uint8))
    for channels in (1, 3):
        found = read_image(path, 28, channels)
        assert found.shape == (channels, 28, 28) and all(torch.equal(plane, expected) for plane in found)
    assert len(found.unique()) == 256


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_no_known_range_are_refused(tmp_path, mode):
    Image.new(mode, (28, 28)).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match=rf"x\.tif is not a readable image \(pixels of 32 bits, mode {mode}"):
        read_image(tmp_path / "x.tif", 28)
