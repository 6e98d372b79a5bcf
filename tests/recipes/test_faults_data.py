"""Faults of data that other libraries had reported: splits numbered apart, no labels, names that repeat."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from recipes import evaluate, predict
from recipes.core.config import DataConfig
from recipes.core.errors import UserError
from recipes.data.class_names import distinct
from recipes.data.image_folder import image_files
from recipes.data.load import load
from recipes.data.map_style import source_of

LEVELS = {"cat": 40, "dog": 120, "owl": 200}
"""Gray level of each class, so that an image tells what it shows."""


def images(folder, counts):
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.fromarray(np.full((8, 8, 3), LEVELS[name] + number, np.uint8)).save(folder / name / f"{number}.png")


def loaded(given=None, **keys):
    return load(DataConfig(batch_size=4, **keys), seed=0, image_size=lambda own: 8, given=given)


def shown(split, names):
    """Whether each image's level is that of the class its label stands for."""
    levels = split.read()[:, 0, 0, 0].tolist()
    return [
        LEVELS[names[label]] <= level < LEVELS[names[label]] + 20
        for label, level in zip(split.target, levels, strict=True)
    ]


@pytest.fixture
def apart(tmp_path):
    """A set whose test images have none of the first class, so that a reader by itself numbers the others anew."""
    images(tmp_path / "train", {"cat": 10, "dog": 10, "owl": 10})
    images(tmp_path / "test", {"dog": 4, "owl": 4})
    return tmp_path


class Levels:
    """A map-style dataset of `each` gray images of each class, whose level is the number of the item."""

    def __init__(self, shown, each, label=lambda shown: shown, **attributes):
        self.count, self.label, self.each = shown * each, label, each
        vars(self).update(attributes)

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        if number >= self.count:
            raise IndexError(number)
        return np.full((8, 8), number, np.uint8), self.label(number // self.each)


def labels_by_level(data):
    """The label of every image, in the order of their levels."""
    parts = (data.train, data.val, data.test)
    levels, labels = torch.cat([part.read()[:, 0, 0, 0] for part in parts]), torch.cat([part.target for part in parts])
    return labels[levels.argsort()].tolist()


@pytest.mark.parametrize("attribute", ["targets", "labels"])
def test_a_list_of_labels_that_is_not_that_of_the_items_is_not_taken(attribute):
    """Items change two classes, which none of the few items has that are looked at in any case."""
    own = np.repeat(np.arange(13), 19)
    listed = own.tolist() if attribute == "targets" else own[:, None]  # a column, as MedMNIST has it
    swapped = {2: 5, 5: 2}
    changed = Levels(13, 19, lambda shown: swapped.get(shown, shown), **{attribute: listed})
    assert labels_by_level(loaded(changed)) == [swapped.get(label, label) for label in own.tolist()]
    assert labels_by_level(loaded(Levels(13, 19, **{attribute: listed}))) == own.tolist()


@pytest.mark.parametrize("form", [np.array, lambda label: np.array([label]), lambda label: torch.tensor([label])])
def test_a_label_may_stand_in_an_array_of_one(form):
    assert labels_by_level(loaded(Levels(3, 10, form))) == np.repeat(np.arange(3), 10).tolist()


@pytest.mark.parametrize(
    "names", [{"dog": 1, "cat": 0}, {0: "cat", 1: "dog"}, {"cat", "dog"}, "cd", lambda: ["cat", "dog"]]
)
def test_classes_that_are_no_list_of_names_are_refused(names):
    """A mapping or a set has no order of numbers."""
    with pytest.raises(UserError, match="data: its `classes` are .*: a list of names is wanted there") as error:
        loaded(Levels(2, 20, classes=names))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("names", [np.array(["cat", "dog"]), {"cat": 0, "dog": 1}.keys()])
def test_classes_may_be_any_row_of_names(names):
    splits = {"train": Levels(2, 20, classes=names), "test": Levels(2, 2, classes=np.array(["dog", "cat"]))}
    data = loaded(splits)
    assert data.class_names == ("cat", "dog") and data.test.target.tolist() == [1, 1, 0, 0]
    assert loaded(Levels(2, 20, classes=2)).class_names == ("0", "1")  # their number, as it is often called


def test_an_iterable_dataset_is_none_though_its_length_is_known():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(Levels(3, 3))

        def __len__(self):
            return 9

    with pytest.raises(UserError, match="train is a Stream: a map-style dataset has __len__ and __getitem__"):
        loaded(Stream())


def parquet(folder, columns):
    """A folder of one file with a column of images, as on the hub, and further columns; no card says what they are."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    kinds = {"img": datasets.Image()} | {name: feature for name, (feature, _) in columns.items()}
    rows = {name: [value(number) for number in range(40)] for name, (_, value) in columns.items()}
    rows["img"] = [Image.fromarray(np.full((8, 8, 3), number, np.uint8)) for number in range(40)]
    folder.mkdir()
    datasets.Dataset.from_dict(rows, datasets.Features(kinds)).to_parquet(folder / "train-00000-of-00001.parquet")
    return f"timm:hfds/{folder}"


def test_columns_of_hugging_face_sets_are_found_in_the_files(tmp_path):
    names = pytest.importorskip("datasets").ClassLabel
    fine, coarse = (names(names=list("abcd")), lambda number: number % 4), (names(names=["x", "y"]), lambda _: 0)
    name = parquet(tmp_path / "cifar", {"fine_label": fine, "coarse_label": coarse})
    data = loaded(name=name, root=tmp_path / "cache")
    assert data.class_names == ("a", "b", "c", "d") and labels_by_level(data) == [number % 4 for number in range(40)]
    assert any("its labels are the column fine_label; not taken: coarse_label" in note for note in data.notes)
    name = parquet(tmp_path / "bare", {"text": (pytest.importorskip("datasets").Value("string"), str)})
    with pytest.raises(UserError, match="has the columns text, img: none is called label or is of the kind ClassLabel"):
        loaded(name=name, root=tmp_path / "cache")


class Damaged(Levels):
    """Some items of it raise."""

    def __getitem__(self, number):
        if number in (0, 33):
            raise OSError("the disk failed")
        return super().__getitem__(number)


@pytest.mark.parametrize("listed", [{}, {"targets": np.repeat(np.arange(2), 20)}], ids=["read", "listed"])
def test_skip_leaves_out_items_that_fail_wherever_labels_come_from(listed):
    with pytest.raises(UserError) as error:
        loaded(Damaged(2, 20, **listed))
    assert [f"its image {number} is not readable" in str(error.value) for number in (0, 1, 33)] == [True, False, True]
    data = loaded(Damaged(2, 20, **listed), unreadable="skip")
    levels = sorted(level for part in (data.train, data.val, data.test) for level in part.read()[:, 0, 0, 0].tolist())
    assert levels == [number for number in range(40) if number not in (0, 33)]
    assert labels_by_level(data) == [int(level >= 20) for level in levels]
    assert "left out as data.unreadable=skip says: 2 unreadable images (data: its image 0 is" in " ".join(data.notes)


@pytest.mark.parametrize("how", ["datasets", "timm"])
def test_splits_that_number_their_classes_apart_are_taken_by_name(apart, how):
    parts = {part: ImageFolder(str(apart / part)) for part in ("train", "test")}
    assert parts["test"].class_to_idx == {"dog": 0, "owl": 1}  # and {"cat": 0, "dog": 1, "owl": 2} for training
    data = loaded(parts) if how == "datasets" else loaded(name="timm:", root=apart)
    assert data.class_names == ("cat", "dog", "owl") and len(data.test) == 8
    for split in (data.train, data.val, data.test):
        assert all(shown(split, data.class_names))
    assert any(
        "test numbers its classes differently from train (dog is 0 there and 1 in train)" in n for n in data.notes
    )


def test_a_class_that_training_does_not_know_is_refused_by_name(apart):
    images(apart / "other", {"cat": 8, "owl": 8})
    parts = {"train": ImageFolder(str(apart / "other")), "test": ImageFolder(str(apart / "test"))}
    with pytest.raises(UserError, match="test has images of dog, which train does not know; its classes are cat, owl"):
        loaded(parts)


def test_names_without_images_may_stand_in_any_split(apart):
    parts = {part: ImageFolder(str(apart / part)) for part in ("train", "test")}
    parts["test"].classes = ["dog", "owl", "a name that no image has"]
    assert all(shown(loaded(parts).test, ("cat", "dog", "owl")))


@pytest.mark.parametrize("val", [True, False])
def test_test_images_without_labels_are_left_out(apart, val):
    bare = ImageFolder(str(apart / "test"))
    bare.samples = [(path, -1) for path, _ in bare.samples]
    bare.targets = [-1] * len(bare.samples)
    parts = {"train": ImageFolder(str(apart / "train")), "test": bare}
    if val:
        parts["val"] = ImageFolder(str(apart / "test"))
    data = loaded(parts)
    assert any("test has no labels (all are negative)" in note for note in data.notes)
    assert len(data.test) == (8 if val else 6) and all(shown(data.test, data.class_names))


def test_labels_some_of_which_are_negative_are_refused(apart):
    some = ImageFolder(str(apart / "train"))
    some.samples[3] = (some.samples[3][0], -1)
    some.targets = [label for _, label in some.samples]
    with pytest.raises(UserError, match="labels run from -1 to 2"):
        loaded(some)


def test_names_that_repeat_get_their_number():
    assert distinct(["crane", "owl", ("crane",), 3]) == ("crane (0)", "owl", "crane (2)", "3")
    assert distinct([]) == ()


def test_two_outputs_of_one_name_keep_a_probability_each(tmp_path, monkeypatch):
    """ImageNet has two classes called crane: by name, the second would take the place of the first."""
    images(tmp_path / "set", {"cat": 3, "owl": 3})
    (tmp_path / "two.py").write_text(
        "import timm, torch\n"
        "def model():\n"
        "    torch.manual_seed(0)\n"
        "    made = timm.create_model('test_resnet', num_classes=4)\n"
        "    made.class_names = ['cat', 'crane', 'crane', 'owl']\n"
        "    return made\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ["two.py:model", "set", "--image-size", "32", "--format", "json", "--out", "rows.json"]
    assert predict.main(words) == 0
    for row in json.loads((tmp_path / "rows.json").read_text()):
        assert list(row["probabilities"]) == ["cat", "crane (1)", "crane (2)", "owl"]
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert row["probability"] == max(row["probabilities"].values())
    data = ["--data.name", "folder", "--data.root", "set", "--split", "all", "--train-images", "0"]
    assert evaluate.main([*words[:1], "--image-size", "32", *data]) == 0
    (file,) = (tmp_path / "evaluations").rglob("evaluation-*.json")
    result = json.loads(file.read_text())
    assert len(result["per_class"]) == len(result["confusion"]) == 4


@pytest.mark.parametrize("name", ["@eaDir", "__MACOSX", "lost+found", "System Volume Information", "$RECYCLE.BIN"])
def test_folders_of_the_system_are_no_classes_and_hold_no_images(tmp_path, name):
    """A network drive keeps thumbnails of all images in @eaDir: copies of test images among those of training."""
    images(tmp_path, {"cat": 10, "dog": 10})
    images(tmp_path / "cat" / name / "0.png", {"cat": 3})
    images(tmp_path / name, {"owl": 2})
    assert len(image_files(tmp_path / "cat")) == 10
    data = loaded(name="folder", root=tmp_path)
    assert data.class_names == ("cat", "dog") and sum(map(len, (data.train, data.val, data.test))) == 20
    assert len(data.notes) == 1 and "hidden images" in data.notes[0] and "(5)" in data.notes[0]


def test_predict_names_the_files_of_a_folder_that_it_leaves_out(tmp_path, monkeypatch, capsys):
    images(tmp_path / "set", {"cat": 2})
    for name in ("a.heic", "b.gif", "c.gif", ".hidden.gif", "d"):
        (tmp_path / "set" / name).write_bytes(b"")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=2).state_dict(), tmp_path / "two.pth")
    monkeypatch.chdir(tmp_path)
    assert predict.main(["timm:test_resnet", "set", "--weights", "two.pth"]) == 0
    said = capsys.readouterr()
    assert "note: files in set are left out (2 .gif, 1 .heic, 1 without a suffix)" in said.err
    assert said.out.count("\n") == 3


def test_class_names_of_a_file_with_a_byte_order_mark(tmp_path, monkeypatch, capsys):
    """Windows editors begin a file with one: the first name would have an invisible letter."""
    images(tmp_path / "set", {"cat": 2, "owl": 2})
    torch.save(timm.create_model("test_resnet", num_classes=2).state_dict(), tmp_path / "two.pth")
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfowl\r\ncat\r\n")
    monkeypatch.chdir(tmp_path)
    assert predict.main(["timm:test_resnet", "set", "--weights", "two.pth", "--class-names", "names.txt"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "file,class,probability,p(owl),p(cat)"


def test_test_images_that_were_trained_on_are_counted(tmp_path):
    """Copies among test images make a classifier look better than it is on new ones."""
    images(tmp_path / "train", {"cat": 10, "dog": 10})
    images(tmp_path / "test", {"cat": 3, "dog": 2})  # levels that training has too
    Image.fromarray(np.full((8, 8, 3), 1, np.uint8)).save(tmp_path / "test" / "dog" / "new.png")
    data = loaded(name="folder", root=tmp_path)
    trained = set(data.train.images[:, 0, 0, 0].tolist())
    both = sum(level in trained for level in data.test.images[:, 0, 0, 0].tolist())
    (note,) = data.notes
    assert both >= 2 and note.startswith(
        f"{both} test images are among the training images too, to the last pixel, of 6"
    )


def test_images_under_two_classes_are_counted(tmp_path):
    images(tmp_path, {"cat": 10, "dog": 10})
    for number in range(12):
        shade = np.full((8, 8, 3), 220 + number, np.uint8)
        for name in ("cat", "dog"):
            Image.fromarray(shade).save(tmp_path / name / f"same{number}.png")
    data = loaded(name="folder", root=tmp_path)
    held = {}
    for level, label in zip(data.train.images[:, 0, 0, 0].tolist(), data.train.target.tolist(), strict=True):
        held.setdefault(level, set()).add(label)
    twice = sum(len(labels) == 2 for labels in held.values())
    assert twice > 1 and data.notes[0].startswith(f"{twice} training images are there under another class too")
    assert "the first as cat and dog" in data.notes[0]
    assert not any("another class" in note for note in loaded(name="folder", root=tmp_path, label_noise=0.1).notes)


def test_images_in_their_files_are_not_read_to_find_copies(tmp_path):
    images(tmp_path / "train", {"cat": 10, "dog": 10})
    images(tmp_path / "test", {"cat": 3, "dog": 2})
    assert loaded(name="folder", root=tmp_path, memory_limit=0).notes == ()


@pytest.mark.parametrize(
    ("named", "note"),
    [
        (np.array(["cat", "dog", "owl"]), None),
        (3, None),
        ([0, 1, 2], None),
        (["owl", "owl", "cat"], None),
        (["Cat", "Dog", "Owl"], "names its classes Cat, Dog, Owl, which fit neither"),
        (["cat", "dog"], "names its classes cat, dog, which fit neither"),
    ],
)
def test_names_that_cannot_be_matched_leave_the_numbers_as_they_are(named, note):
    class Named(torch.utils.data.Dataset):
        def __init__(self, classes):
            self.classes = classes

        def __len__(self):
            return 30

        def __getitem__(self, index):
            return torch.full((3, 8, 8), index, dtype=torch.uint8), index % 3

    sets = {"train": Named(["cat", "dog", "owl"]), "test": Named(named)}
    source = source_of(sets, DataConfig(), lambda native: 8, what="mine")
    assert source.test.target.tolist() == [index % 3 for index in range(30)]
    assert (
        [text for text in source.notes if "names its classes" in text] == []
        if note is None
        else note in source.notes[0]
    )
