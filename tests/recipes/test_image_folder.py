"""Folders of images as people have them: parts by their usual names, odd files, wide pixels."""

import os
import re
import resource
import struct
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import TiffImageFile
from torchvision.transforms.v2.functional import center_crop, resize

from recipes.core.config import DataConfig
from recipes.core.errors import UserError
from recipes.data.decode import decoded, pixels_of
from recipes.data.fingerprint import checksums
from recipes.data.image_folder import HIDDEN, Files, image_files, image_folder, read_image, split_folders
from recipes.data.load import load
from recipes.data.split import resized
from recipes.data.unreadable import Unreadable
from recipes.evaluation.predictions import notes_on_pages
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


def test_parts_in_capitals_are_parts(tmp_path):
    images(tmp_path / "Train", (20, 20))
    images(tmp_path / "TEST", (3, 2), first=30)
    parts = loaded(tmp_path)
    assert parts.class_names == ("a", "b") and levels(parts.test) == [30, 31, 32, 110, 111] and not parts.notes
    images(tmp_path / "testing", (3, 2))
    with pytest.raises(UserError, match="TEST and .*testing are both for test"):
        loaded(tmp_path)


def test_a_set_is_not_read_from_one_folder_too_high(tmp_path):
    images(tmp_path / "images" / "train", (5, 5))
    images(tmp_path / "images" / "Val", (5, 5))
    images(tmp_path / "labels", (5, 5))
    with pytest.raises(UserError, match=r"images holds Val, train, which are parts of a set"):
        loaded(tmp_path)
    for name in ("train", "val"):  # parts without classes
        images(tmp_path / "bare" / "source", (5,))
        (tmp_path / "bare" / "source" / "a").rename(tmp_path / "bare" / name)
    (tmp_path / "bare" / "source").rmdir()
    with pytest.raises(UserError, match=r"bare holds train, val, which are parts of a set"):
        loaded(tmp_path / "bare")
    images(tmp_path / "high" / "left", (5, 5))
    images(tmp_path / "high" / "right", (5, 5), first=20)
    (note,) = loaded(tmp_path / "high").notes
    assert (
        "each class (left, right) holds no image but the same folders (a, b)" in note and "one level too high" in note
    )
    images(tmp_path / "high" / "right" / "again", (1,), first=60)
    assert not loaded(tmp_path / "high").notes  # folders of their own


def test_linked_folders_are_followed_but_never_in_a_circle(tmp_path):
    images(tmp_path / "set", (20, 20))
    images(tmp_path / "more", (7,), first=30)
    inner = tmp_path / "set" / "a" / "more"
    inner.symlink_to(tmp_path / "more" / "a")
    (tmp_path / "more" / "a" / "back").symlink_to(inner)
    (tmp_path / "set" / "a" / "up").symlink_to(tmp_path / "set")
    found = image_files(tmp_path / "set" / "a")
    assert found == [
        *(tmp_path / "set" / "a" / f"{n:02}.png" for n in range(20)),
        *(inner / f"{n:02}.png" for n in range(7)),
    ]
    parts = loaded(tmp_path / "set")
    seen = sorted(level for split in (parts.train, parts.val, parts.test) for level in levels(split))
    assert seen == [*range(20), *range(30, 37), *range(80, 100)] and not parts.notes
    assert len(checksums(tmp_path / "set")) == 47


def test_links_into_a_circle_are_files_that_cannot_be_read_and_no_folders(tmp_path):
    images(tmp_path, (20, 20))
    (tmp_path / "a" / "round").symlink_to("round")
    (tmp_path / "there").symlink_to("back")
    (tmp_path / "back").symlink_to("there")
    parts = loaded(tmp_path)
    assert parts.class_names == ("a", "b") and sum(map(len, (parts.train, parts.val, parts.test))) == 40
    (tmp_path / "a" / "round.png").symlink_to("round.png")
    with pytest.raises(Unreadable, match=r"a/round\.png is not a readable image"):
        loaded(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes a pipe")
def test_a_pipe_that_is_named_as_an_image_is_refused_and_not_waited_for(tmp_path):
    images(tmp_path, (20, 20))
    os.mkfifo(tmp_path / "a" / "pipe.png")
    with pytest.raises(UserError, match=r"a/pipe\.png is a pipe, socket or device and no file: remove it"):
        loaded(tmp_path)
    (tmp_path / "a" / "pipe.png").rename(tmp_path / "a" / "pipe")
    assert len(loaded(tmp_path).notes) == 1  # counted among what is no image


def test_hidden_names_are_no_classes_and_no_images(tmp_path):
    images(tmp_path, (20, 20))
    for place in (tmp_path / ".git", tmp_path / "a" / ".ipynb_checkpoints"):
        images(place, (3,))
    (tmp_path / "b" / "._00.png").write_bytes(b"\0\5\x16\7")
    parts = loaded(tmp_path)
    assert parts.class_names == ("a", "b") and sum(map(len, (parts.train, parts.val, parts.test))) == 40
    assert parts.notes == (f"left out: hidden images in {tmp_path}, {HIDDEN} (7)",)
    (tmp_path / "a").rename(tmp_path / "train")  # a class all the same, though it holds a hidden folder
    assert loaded(tmp_path).class_names == ("b", "train")


def test_a_class_that_a_part_lacks_names_both_ways_out(tmp_path):
    images(tmp_path / "train", (5, 5, 5))
    images(tmp_path / "test", (2, 2))
    away = tmp_path / "train" / "c"
    said = f"no image of class c in {tmp_path / 'test'}: add some, or do without the class and remove {away} too, or"
    with pytest.raises(UserError, match=said):
        loaded(tmp_path)


@pytest.mark.parametrize("other", ["cafe\u0301", "caf\u00e9 ", "Caf\u00e9"])
def test_classes_that_only_look_alike_are_told_apart(tmp_path, other):
    """A Mac writes an accent as a letter of its own; a space at the end is not seen either."""
    for part, name in (("train", "caf\u00e9"), ("train", "tea"), ("test", other), ("test", "tea")):
        (tmp_path / part / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / part / name / "1.png")
    said = re.escape(f"{ascii(other)} and 'caf\\xe9' differ only in case, spaces or the composition of letters")
    with pytest.raises(UserError, match=said):
        image_folder(DataConfig(name="folder", root=tmp_path), lambda side: 8)
    with pytest.raises(UserError, match=said):
        image_folder(
            DataConfig(name="folder", root=tmp_path / "test"), lambda side: 8, class_names=("caf\u00e9", "tea")
        )


def test_a_class_may_be_called_train(tmp_path):
    for first, name in enumerate(("bus", "test", "train")):
        images(tmp_path / "source", (10,), first=50 * first)
        (tmp_path / "source" / "a").rename(tmp_path / name)
    (tmp_path / "source").rmdir()
    parts = loaded(tmp_path)
    assert parts.class_names == ("bus", "test", "train") and parts.test_drawn and parts.notes == ()
    assert split_folders(tmp_path) == {"train": tmp_path}


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


@pytest.mark.parametrize("most", [65535, 4095])
def test_sixteen_bits_of_pgm_are_scaled_by_their_maximum(tmp_path, most):
    wide = np.linspace(0, most, 28 * 28).reshape(28, 28).round().astype(np.uint16)
    (tmp_path / "gray.pgm").write_bytes(b"P5 28 28 %d\n" % most + wide.astype(">u2").tobytes())
    expected = np.floor(wide / most * 255 + 0.5)
    assert np.abs(read_image(tmp_path / "gray.pgm", 28, 1)[0].numpy() - expected).max() <= (most != 65535)


def test_alpha_and_orientation_change_no_pixel(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    turned = Image.fromarray(pixels[..., :3])
    exif = turned.getexif()
    exif[274] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    for name in ("clear.png", "turned.png"):
        np.testing.assert_array_equal(read_image(tmp_path / name, 28).permute(1, 2, 0), pixels[..., :3])


@pytest.mark.parametrize("transparency", [None, 3, bytes([0, 128, *[255] * 14])])
def test_a_palette_gives_its_colours_whatever_is_transparent(tmp_path, transparency):
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    few = Image.fromarray(pixels).quantize(16)
    few.save(tmp_path / "few.png", **({} if transparency is None else {"transparency": transparency}))
    colours = np.array(few.getpalette(), dtype=np.uint8).reshape(-1, 3)[np.asarray(few)]
    np.testing.assert_array_equal(read_image(tmp_path / "few.png", 28).permute(1, 2, 0), colours)
    gray = np.rint(colours @ [0.299, 0.587, 0.114])
    assert np.abs(read_image(tmp_path / "few.png", 28, 1)[0].numpy() - gray).max() <= 1


def tiff(path, levels, *, bits, white_is_zero=False, order="<", sample=1):
    """A gray TIFF written by hand: header, one strip, nine tags; 12 bits are packed, two pixels in three bytes."""
    height, width = levels.shape
    if bits == 12:
        pairs = levels.reshape(-1, 2)
        strip = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
        strip = strip.astype(np.uint8).tobytes()
    else:
        strip = levels.astype(f"{order}u{bits // 8}").tobytes()
    values = {256: width, 257: height, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 8, 277: 1}
    values |= {279: len(strip), 339: sample}
    tags = b"".join(
        struct.pack(f"{order}HHI", tag, 4 if tag in (273, 279) else 3, 1)
        + struct.pack(
            f"{order}I" if tag in (273, 279) else f"{order}HH", *([value] if tag in (273, 279) else [value, 0])
        )
        for tag, value in values.items()
    )
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(strip))
    path.write_bytes(head + strip + struct.pack(f"{order}H", len(values)) + tags + bytes(4))


@pytest.mark.parametrize(
    ("bits", "white_is_zero", "order"),
    [(8, False, "<"), (8, True, "<"), (8, True, ">"), (12, False, "<"), (16, False, "<"), (16, True, "<")],
)
def test_gray_tiff_is_read_as_its_header_says(tmp_path, bits, white_is_zero, order):
    most = 2**bits - 1
    levels = np.linspace(0, most, 28 * 28).reshape(28, 28).round().astype(np.int64)
    tiff(tmp_path / "gray.tif", levels, bits=bits, white_is_zero=white_is_zero, order=order)
    brightness = (most - levels if white_is_zero else levels) / most
    np.testing.assert_array_equal(read_image(tmp_path / "gray.tif", 28, 1)[0], np.floor(brightness * 255 + 0.5))


@pytest.mark.parametrize("size", [(60, 3), (61, 3), (3, 61), (200, 11), (1001, 51), (300, 1), (9001, 301), (901, 100)])
@pytest.mark.parametrize("side", [28, 65])
def test_a_very_narrow_image_is_scaled_and_cropped_as_any_other(size, side):
    """Against scaling the whole image in float, which torch's own bytes fail at for images of one column."""
    image = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    whole = center_crop(resize(image.double() / 255, [side], antialias=True), [side, side])
    difference = (resized(image, side) - 255 * whole).abs()  # of noise, where half a pixel aside is off by 40 levels
    assert difference.max() <= 5 and difference.mean() <= 1


def test_a_very_narrow_image_costs_no_more_memory_than_its_crop(tmp_path):
    levels = np.arange(60_000, dtype=np.int64).reshape(1, -1) % 200
    Image.fromarray(levels.astype(np.uint8)).save(tmp_path / "line.png")
    with resource_limit(2**31):
        found = read_image(tmp_path / "line.png", 224)
    middle = np.interp((np.arange(224) + 0.5) / 224 - 0.5 + 30_000 - 0.5, np.arange(60_000), levels[0])
    np.testing.assert_allclose(found[0, 100], middle, atol=1)


@contextmanager
def resource_limit(more):
    """Within the block, this process may take `more` bytes of address space beyond what it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_no_known_range_are_refused(tmp_path, mode):
    Image.new(mode, (28, 28)).save(tmp_path / "x.tif")
    with pytest.raises(
        UserError, match=rf"x\.tif is not a readable image \(signed, wide or real pixels .Pillow's mode {mode}"
    ):
        read_image(tmp_path / "x.tif", 28)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_signed_pixels_are_refused_and_not_wrapped(tmp_path, bits, order):
    """Of 8 bits too, which Pillow shows as gray from 0 to 255 with -1 as 255."""
    levels = np.linspace(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 28 * 28).reshape(28, 28).astype(np.int64)
    tiff(tmp_path / "x.tif", levels, bits=bits, order=order, sample=2)
    with pytest.raises(UserError, match=r"x\.tif is not a readable image \(signed, wide or real pixels"):
        read_image(tmp_path / "x.tif", 28)


def in_mode(mode, gray, colours, alpha):
    """A picture in one of Pillow's modes that hold all of it."""
    if mode == "1":
        return Image.fromarray(gray > 127)
    if mode.startswith("I;16"):
        return Image.frombytes(mode, gray.shape, (257 * gray).astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    picture = Image.fromarray(gray if mode in ("L", "LA", "La") else colours)
    if mode in ("LA", "La", "RGBA", "RGBa"):
        picture.putalpha(Image.fromarray(alpha))
        return picture.convert(mode)
    if mode == "LAB":
        profiles = [ImageCms.createProfile(kind) for kind in ("sRGB", "LAB")]
        return ImageCms.applyTransform(picture, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    return picture.quantize(256).convert(mode) if mode in ("P", "PA") else picture.convert(mode)


GRAY = ["1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N"]


@pytest.mark.parametrize("mode", [*GRAY, "RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_of_pillow_gives_the_picture(mode):
    """A smooth one in colours that every space holds, with an alpha that leaves them, so that no mode loses much."""
    across, down = np.meshgrid(np.arange(28), np.arange(28))
    colours = np.stack([90 + 3 * across, 80 + 3 * down, 110 + across + down], 2).astype(np.uint8)
    gray, alpha = colours[..., 0], (200 + across + down).clip(max=255).astype(np.uint8)
    picture = in_mode(mode, gray.astype(np.uint16) if ";" in mode else gray, colours, alpha)
    levels = 255.0 * (gray > 127) if mode == "1" else gray.astype(float)
    shown = np.stack(3 * [levels], 2) if mode in GRAY else colours.astype(float)
    lost = {"P": 12, "PA": 12, "LAB": 4, "HSV": 4, "YCbCr": 4, "RGBa": 1, "La": 1}.get(mode, 0)
    assert np.abs(decoded(picture, 3).permute(1, 2, 0).numpy() - shown).max() <= lost
    assert np.abs(decoded(picture, 1)[0].numpy() - shown @ [0.299, 0.587, 0.114]).max() <= lost + 1
    assert pixels_of(picture, 3).shape == (3, 28, 28)


def scans(path, pages):
    pictures = [Image.fromarray(np.full((8, 8), 10 * number, np.uint8)) for number in range(pages)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:])


@pytest.mark.parametrize("name", ["scan.tif", "film.png", "film.webp"])
def test_of_several_pages_the_first_is_read_and_that_is_said(tmp_path, name):
    images(tmp_path / "set", [20, 20, 20])
    assert not any("several images" in note for note in loaded(tmp_path / "set").notes)
    scans(tmp_path / "set" / "a" / name, 3)
    notes = [note for note in loaded(tmp_path / "set").notes if "several images" in note]
    place = tmp_path / "set" / "a" / name
    assert notes == [
        f"{place} holds several images (pages or frames): the first one is read (1 such of 61 files looked at)"
    ]
    assert int(read_image(place, 8, 1).max()) <= 1  # level 0, not 10
    assert notes_on_pages([place, tmp_path / "set" / "b" / "00.png"])[0].endswith(
        "is read (1 such of 2 files looked at)"
    )
    (tmp_path / "none.png").write_bytes(b"nothing")
    scans(tmp_path / "one.tif", 1)
    assert notes_on_pages([tmp_path / "none.png", tmp_path / "one.tif"]) == []


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow, of the first page
@pytest.mark.parametrize("kind", ["TIFF", "GIF"])
def test_damage_behind_the_first_page_costs_nothing(tmp_path, kind):
    """A file cut off anywhere: it is read, or refused as no image, as if nobody had asked for further pages."""
    whole = tmp_path / f"whole.{kind.lower()}"
    scans(whole, 3)
    content, read = whole.read_bytes(), 0
    for length in range(8, len(content), 7):
        cut = tmp_path / "cut.png"  # Pillow goes by the content
        cut.write_bytes(content[:length])
        notes_on_pages([cut])
        files = Files(np.array([str(cut).encode()]), 8)
        try:
            files.check(0)
            files.look()
            read += 1
            read_image(cut, 8)
        except Unreadable:
            continue
    assert read


def test_a_second_page_is_looked_for_without_reading_all_of_them(tmp_path, monkeypatch):
    scans(tmp_path / "scan.tif", 20)
    seeks, seek = [], TiffImageFile.seek
    monkeypatch.setattr(TiffImageFile, "seek", lambda image, page: seeks.append(page) or seek(image, page))
    assert "several images" in notes_on_pages([tmp_path / "scan.tif"])[0] and seeks == [1]


def test_one_name_in_two_compositions_is_not_two_classes(tmp_path):
    """A computer of Apple writes é as two signs, others as one; both folders may stand side by side."""
    images(tmp_path / "train", [2, 2])
    os.rename(tmp_path / "train" / "a", tmp_path / "train" / "caf\xe9")
    os.rename(tmp_path / "train" / "b", tmp_path / "train" / "cafe\u0301")
    said = re.escape(r"train: the classes 'cafe\u0301' and 'caf\xe9' differ only in the composition of letters")
    for partial in (False, True):
        with pytest.raises(UserError, match=said):
            image_folder(DataConfig(name="folder", root=tmp_path), lambda native: 8, partial=partial)
