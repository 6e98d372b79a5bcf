"""The note on images that are scaled to many times their size where no data.image_size was given."""

import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recipes import compare as compare_script
from recipes.core.cli import parse
from recipes.core.distributed import Ranks
from recipes.data.image_folder import LOOKED_AT, Files
from recipes.training.image_side import smallest_side
from recipes.training.prepare import announce, build_state, load_data
from recipes.training.reporting import size_notes


def folder(place, sizes, classes=("a", "b")):
    """Images of these widths and heights for each class, by turns."""
    for name in classes:
        (place / name).mkdir(parents=True)
        for number in range(12):
            Image.new("RGB", sizes[number % len(sizes)]).save(place / name / f"{number}.png")
    return place


def notes(*words):
    """The notes, as train.py makes them."""
    config = parse(["etf", "--data.batch_size=2", *words])
    data = load_data(config, torch.device("cpu"))
    return size_notes(config, data, data.train.images.shape[-1])


OF_FOLDER = ("--data.name", "folder", "--data.root")


@pytest.mark.parametrize(
    ("sizes", "words", "told"),
    [
        ([(32, 48)], [], "have 32 pixels .* up to 160 for test_resnet: 25 times .* with --data.image_size 32$"),
        ([(40, 90), (300, 40), (40, 40), (500, 500)], [], "have 40 pixels .* 16 times .* --data.image_size 40$"),
        ([(12, 12)], [], "have 12 pixels .* 33 times .* --data.image_size 28$"),  # (160 / 28)²
        ([(32, 32)], ["--model.backbone", "resnet10t"], "176 for resnet10t: 30 times .* --data.image_size 32$"),
        ([(32, 32)], ["--model.start_from", "RUN"], "--data.image_size 32; weights that .* so try both$"),
        ([(79, 79)], [], "4 times .* --data.image_size 79$"),
        ([(80, 80)], [], None),
        ([(32, 32)], ["--data.image_size", "160"], None),
    ],
)
def test_the_note_names_both_sizes_the_cost_and_the_way_out(tmp_path, sizes, words, told):
    found = notes(*OF_FOLDER, str(folder(tmp_path / "set", sizes)), *words)
    assert len(found) == (told is not None)
    assert told is None or re.search(told, found[0]), found


def test_the_side_is_one_that_the_backbone_takes():
    assert smallest_side("resnet10t", 32, 176, {}) == 32
    assert smallest_side("vgg11", 28, 224, {}) == 32  # five poolings leave nothing of 28 pixels
    assert smallest_side("vit_tiny_patch16_224", 40, 224, {}) == 64  # whole patches
    assert smallest_side("torchvision:alexnet", 32, 224, {}) == 64
    assert smallest_side("torchvision:alexnet", 32, 64, {}) is None


@pytest.mark.parametrize("name", ["mine.py:load", "timm:"])
def test_the_note_says_whether_the_first_image_or_the_backbone_decided(name, tmp_path, monkeypatch):
    place = folder(tmp_path / "set", [(32, 32)])
    Image.new("RGB", (100, 90)).save(place / "a" / "0.png")  # the first of all
    with tarfile.open(tmp_path / "set.tar", "w") as packed:
        packed.add(place / "a" / "0.png", arcname="a/0.png")
        for path in sorted(place.glob("*/*.png"))[1:]:
            packed.add(path, arcname=str(path.relative_to(place)))
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "import torchvision\n\ndef load():\n    return torchvision.datasets.ImageFolder('set')\n"
    )
    words = [f"--data.name={name}", *(["--data.root=set.tar"] if name == "timm:" else [])]
    told = "have 32 pixels on their shorter edge .the median., but are scaled up to "
    (found,) = notes(*words)
    assert re.search(told + "90, that of the first image: 8 times as many .* with --data.image_size 32$", found), found
    (found,) = notes(*words, "--model.backbone", "vit_tiny_patch16_224")  # which takes no other size
    assert re.search(told + "224 for vit_tiny_patch16_224: 49 times", found), found


def test_sets_other_than_folders_are_judged_alike(tmp_path, monkeypatch):
    place, vit = folder(tmp_path / "set", [(32, 32)]), ("--model.backbone", "vit_tiny_patch16_224")
    with tarfile.open(tmp_path / "set.tar", "w") as packed:
        packed.add(place, arcname=".")
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "import torchvision\n\ndef load():\n    return torchvision.datasets.ImageFolder('set')\n"
    )
    expected = notes(*OF_FOLDER, str(place), *vit)
    assert "49 times" in expected[0]
    assert notes("--data.name=timm:", "--data.root=set.tar", *vit) == expected
    assert notes("--data.name=mine.py:load", *vit) == expected
    assert "8 pixels" in notes("--data.name=digits", *vit)[0]
    assert not notes("--data.name=digits")  # 28 pixels are the least


def test_few_headers_are_read_of_a_large_set_and_unreadable_ones_do_not_count(tmp_path, monkeypatch):
    Image.new("L", (30, 20)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    opened, before = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or before(path))
    paths = [str(tmp_path / ("bad.png" if number % 3 else "good.png")).encode() for number in range(5000)]
    assert Files(np.array(paths), 8).look() == (20, [])
    assert LOOKED_AT <= len(opened) <= 2 * LOOKED_AT
    assert Files(np.array(paths[1:3]), 8).look() == (None, [])


def test_train_and_compare_print_it_once(tmp_path, capsys):
    words, device = (
        [*OF_FOLDER, str(folder(tmp_path / "set", [(32, 32)])), "--data.batch_size", "4"],
        torch.device("cpu"),
    )
    for more, count in ([], 1), (["--quiet"], 0):
        config = parse(["etf", *words, *more])
        data = load_data(config, device)
        announce(config, data, build_state(config, data, device, Ranks()), 4).close()
        assert capsys.readouterr().err.count("25 times as many pixels") == count
    assert compare_script.main(["baseline", "etf", *words, "--plan", "--runs", str(tmp_path / "studies")]) == 0
    assert capsys.readouterr().err.count("25 times as many pixels") == 1
