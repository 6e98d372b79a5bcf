"""Data and parts of one's own: docs/your_model_your_data.md is run as it stands, on data that these tests make."""

import io
import json
import re
import shlex
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from ncreg.heads import HEADS
from ncreg.norms import NORMS
from recipes import compare, evaluate
from recipes import train as train_script
from recipes.core import own_code
from recipes.core.cli import parse
from recipes.core.config import DataConfig, TermConfig
from recipes.core.errors import UserError
from recipes.data.load import load
from recipes.study.trials import config_hash, dotted_config
from recipes.train import main, train
from recipes.training.loss_terms import build_terms
from recipes.training.run_dir import RunDir

PAGE = (Path(__file__).parents[2] / "docs" / "your_model_your_data.md").read_text()
SHORT = ["--tpt.max_epochs=1", "--data.batch_size=8", "--data.image_size=28", "--quiet"]
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # webdataset leaves its tars open
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # a machine of one core
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # from Python 3.12 on
]


def picture(index, number):
    draw = np.random.default_rng([index, number])
    return Image.fromarray(draw.integers(70 * index, 70 * index + 100, (28, 28, 3), dtype=np.uint8))


def shard(path, count):
    """A tar of webdataset: the image and its class under one key."""
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            file = io.BytesIO()
            picture(number % 3, number).save(file, "png")
            for suffix, content in (("png", file.getvalue()), ("cls", str(number % 3).encode())):
                info = tarfile.TarInfo(f"{number:05}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def here(tmp_path, monkeypatch, request):
    """A working folder that holds what the page names: images, a tar, shards, and the page's own files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(own_code, "_copies", {})
    known = [(table, dict(table)) for table in (HEADS, NORMS)]
    request.addfinalizer(lambda: [(table.clear(), table.update(before)) for table, before in known])
    for index, name in enumerate("abc"):
        for number in range(20):
            path = Path("my_images", name, f"{number:02}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(index, number).save(path)
    with tarfile.open("my_images.tar", "w") as tar:
        tar.add("my_images", arcname="")
    Path("my_set").symlink_to("my_images")
    Path("my_shards").mkdir()
    about = {}
    for part, count in (("train", 45), ("validation", 15)):
        shard(f"my_shards/{part}.tar", count)
        about[part] = {"name": part, "num_samples": count, "filenames": [f"{part}.tar"], "shard_lengths": [count]}
    Path("my_shards/_info.json").write_text(json.dumps({"splits": about}))
    for text in re.findall(r"^```(?:py|yaml)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE):
        Path(text.split()[1]).write_text(text)
    return tmp_path


def commands(heading):
    section = PAGE.partition(f"## {heading}")[2].partition("\n## ")[0]
    return re.findall(r"^\$ python recipes/(\w+)\.py ([^#\n]*)", section, re.MULTILINE)


@pytest.mark.parametrize(
    ("script", "words"),
    [pair for title in ("Your data", "Your loss, head, norm", "A log of your own") for pair in commands(title)],
)
def test_a_command_of_the_page_runs(here, script, words):
    if "timm:hfds" in words:
        pytest.importorskip("datasets")
    if "timm:wds" in words:
        pytest.importorskip("webdataset")
    more = SHORT if "--data.name" in words else ["--tpt.max_epochs=1", "--data.train_size=128", "--quiet"]
    if script == "compare":
        more = ["--workers=0", "--seeds=1", *more[:2]]
    assert {"train": train_script, "compare": compare}[script].main([*shlex.split(words), *more]) == 0


def test_the_python_of_the_page_runs(here):
    exec(compile(Path("in_python.py").read_text(), "in_python.py", "exec"), {"__name__": "page"})
    (path,) = Path("runs").iterdir()
    assert path.name.startswith("python-etf-") and (path / "summary.json").is_file()


def pixels(name, root="my_images", **keys):
    """All that a set gives, as bytes by split."""
    loaded = load(DataConfig(name=name, root=Path(root), batch_size=4, **keys), seed=3, image_size=lambda own: 28)
    splits = {part: getattr(loaded, part).in_memory() for part in ("train", "val", "test")}
    return loaded.class_names, {part: (split.images, split.target) for part, split in splits.items()}


@pytest.mark.parametrize(
    ("name", "root"),
    [
        ("timm:", "my_images.tar"),
        ("timm:", "my_images"),
        ("timm:torch/image_folder", "my_images"),
        ("timm:hfds/my_set", "cache"),
        ("my_data.py:load", "nowhere"),
    ],
)
@pytest.mark.parametrize("keys", [{}, {"train_size": 30, "label_noise": 0.2, "memory_limit": 0.0, "workers": 2}])
def test_every_source_gives_the_images_splits_thinning_and_noise_of_the_folder(here, name, root, keys):
    if "hfds" in name:
        pytest.importorskip("datasets")
    names, expected = pixels("folder", **keys)
    again, found = pixels(name, root, **keys)
    assert names == again
    for part, (images, target) in expected.items():
        assert torch.equal(images, found[part][0]) and torch.equal(target, found[part][1])


def test_shards_are_read_whole_with_their_own_splits(here):
    pytest.importorskip("webdataset")
    names, found = pixels("timm:wds/my_set", "my_shards")
    assert names == ("0", "1", "2")
    images, target = found["test"]
    assert target.tolist() == [number % 3 for number in range(15)]
    for number, image in enumerate(images):
        np.testing.assert_array_equal(image.permute(1, 2, 0), np.asarray(picture(number % 3, number)))
    assert len(found["train"][1]) + len(found["val"][1]) == 45


def test_unreadable_images_of_shards_are_not_passed_over_in_silence(here, capsys):
    pytest.importorskip("webdataset")
    whole = Path("my_shards/train.tar").read_bytes()
    place = whole.index(b"PNG", whole.index(b"00007.png"))
    Path("my_shards/train.tar").write_bytes(whole[:place] + b"???" + whole[place + 3 :])
    args = ["etf", "--data.name=timm:wds/my_set", "--data.root=my_shards", *SHORT]
    assert main(args) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "1 of its 45 train images are not readable" in said
    assert main([*args, "--data.unreadable=skip"]) == 0
    assert "left out: 1 of its 45 train images are not readable" in capsys.readouterr().err


class Pairs:
    """A map-style dataset of the images above in another form, without a list of its labels."""

    classes = ("a", "b", "c")

    def __init__(self, form):
        self.form = form

    def __len__(self):
        return 60

    def __getitem__(self, number):
        if number >= 60:
            raise IndexError(number)
        return self.form(picture(number // 20, number % 20)), number // 20


FORMS = {
    "Pillow": lambda image: image,
    "array": np.asarray,
    "tensor": lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1),
    "floats": lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_datasets_given_in_python_are_the_folder_whatever_their_images_are(here, form):
    _, expected = pixels("folder")
    loaded = load(DataConfig(batch_size=4), seed=3, image_size=lambda own: 28, given=Pairs(form))
    for part, (images, target) in expected.items():
        split = getattr(loaded, part)
        assert torch.equal(split.images, images) and torch.equal(split.target, target)


def test_splits_by_name_and_gray_images(here):
    gray = [(np.full((9, 9), 20 * label + number, np.uint8), label) for label in range(2) for number in range(10)]
    given = {"train": gray, "validation": gray[:12]}
    loaded = load(DataConfig(batch_size=4), seed=0, image_size=lambda own: own, given=given)
    assert len(loaded.test) == 12 and not loaded.test_drawn and loaded.train.images.shape[1:] == (1, 9, 9)
    assert loaded.class_names == ("0", "1") and loaded.test.images[:, 0, 0, 0].tolist() == [*range(10), 20, 21]


@pytest.mark.parametrize("part", ["train", "validation"])
@pytest.mark.parametrize("form", [Image.fromarray, np.asarray])
def test_colour_is_not_lost_where_the_first_images_are_gray(here, part, form):
    gray = [(Image.new("L", (9, 9), 10 * number), number % 2) for number in range(20)]
    given = {"train": list(gray), "validation": gray[:12]}

    def load_with(rgb):
        given[part][3] = (form(rgb), 1)  # the images 0, 2, 4 and so on are looked at
        return load(DataConfig(batch_size=4), seed=0, image_size=lambda own: own, given=given)

    rgb = np.full((9, 9, 3), 200, np.uint8)  # three channels, and yet gray
    loaded = load_with(rgb)
    assert (
        sum(int((split.images == 200).all((1, 2, 3)).sum()) for split in (loaded.train, loaded.val, loaded.test)) == 1
    )
    rgb[8, 8, 2] = 201
    with pytest.raises(UserError, match=r"its image 3 is not readable \(it has colours, .*convert\(\"RGB\"\)"):
        load_with(rgb)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (7, "data: train is an int: a map-style dataset has"),
        ([], "data: train has no items"),
        ({"test": [1]}, "data has the splits test: one of them must be train"),
        ({"train": [1], "extra": [1]}, "data has the splits train, extra"),
        ([(Image.new("L", (9, 9)), 0.5)], "the label of its image 0 is 0.5 (a float): the number of one class"),
        ([(Image.new("L", (9, 9)), np.eye(2)[0])], "the label of its image 0 is array([1., 0.]) (a ndarray)"),
        ([(Image.new("L", (9, 9)), -1)] * 9, "but must be the numbers of classes, which count from 0"),
        ([(Image.new("L", (9, 9)), label) for label in (0, 10**9)], "labels run from 0 to 1000000000"),
        (
            [(Image.new("L", (9, 9)), 1 + n % 3) for n in range(99)],
            "no training image of class 0: classes count from 0",
        ),
        (
            [(Image.new("L", (9, 9)), 999 * (n % 2)) for n in range(99)],
            "no training image of class 1, 2, 3, 4, 5 and 993",
        ),
        ([(Image.new("L", (9, 9)), -1)] * 9, "labels run from -1"),
        ([(torch.randn(3, 9, 9) * 9, 0)], "take Normalize out"),
        ([(torch.rand(3, 9, 9) * 0 + 255, 0)], "from 255 to 255: divide levels of 0 to 255 by 255"),
        ([(torch.zeros(4, 9, 9), 0)], "has 4 channels"),
        (
            [(np.zeros((3, 9, 8), np.uint8), 0)],
            "ndarray of shape (3, 9, 8) has 8 channels: 1 (gray) or 3 (RGB) come last",
        ),
        ([(np.zeros((0, 9, 3), np.uint8), 0)], "ndarray of shape (0, 9, 3) has no pixels"),
        ([("image.png", 0)], "str is no image"),
        ([(1, 2, 3)], "an item is a tuple of 3, not a pair"),
    ],
)
def test_data_that_are_no_pairs_of_image_and_label_are_one_line(here, given, words):
    with pytest.raises(UserError, match=re.escape(words)) as error:
        load(DataConfig(batch_size=4), seed=0, image_size=lambda own: own or 9, given=given)
    assert "\n" not in str(error.value)


def test_a_run_on_data_given_in_python_goes_on_with_the_same_data_alone(here, capsys):
    config = parse(["etf", *SHORT, "--tpt.max_epochs=2"])
    run = train(config, data=Pairs(FORMS["Pillow"]))
    (run / "summary.json").unlink()
    assert main(["--resume", str(run)]) == 2
    assert "the images were given in Python" in capsys.readouterr().err
    with pytest.raises(UserError, match="its data are not those that it began with"):
        train(config, resume=RunDir(run), data=ImageFolder("my_images", lambda x: x, lambda label: 2 - label))
    assert train(config, resume=RunDir(run), data=Pairs(FORMS["array"])) == run


BAD = {
    "--data.name=none.py:load": "there is no file none.py",
    "--data.name=my_data.py:lod": "my_data.py has no 'lod'; did you mean load?",
    "--data.name=my_data.py:torchvision": "it is a module, not a function or class",
    "--data.name=broken.py:load": "importing broken.py fails at line 2: ZeroDivisionError: division by zero",
    "--data.name=raising.py:load": "the function fails: KeyError: 'lost'",
    "--data.name=timm:nonsense/x": "'nonsense' is none of hfds",
    "--data.name=timm:torch/nonsense": "Unknown torchvision dataset nonsense",
    "--data.name=timm:wds/my_set": "has no _info.json",
    "--loss={my_loss.py:UnitLenth: {}}": "did you mean UnitLength?",
    "--loss={my_loss.py:UnitLength: {args: {powr: 1}}}": "powr",
    "--loss={raising.py:loss: {}}": "loss.raising.py:loss: KeyError: 'target'",
    "--loss={raising.py:Learned: {}}": "has parameters to learn (scale)",
    "--loss={raising.py:unknown: {}}": "its arguments are rows: a loss names what it reads, of features, logits",
    "--loss={raising.py:nothing: {}}": "it has no arguments",
    "--loss={raising.py:rows: {}}": "gives 4 numbers for 4 images: return their mean",
    "--loss={raising.py:detached: {}}": "loss.raising.py:detached has no gradient",
    "--loss={cross_entropy: {}, raising.py:not_a_number: {}}": "nan, from raising.py:not_a_number at step 1",
    "--model.backbone=timm:test_resnet": "timm's name alone: --model.backbone test_resnet",
    "--model.head=raising.py:Head": "the measures of collapse read its .weight, a tensor (10, 96)",
    "--loss={raising.py:leaving: {}}": "loss.raising.py:leaving: SystemExit: 0",
    "--model.norm=raising.py:Norm": "raising.py:Norm: TypeError",
}


@pytest.mark.parametrize(("word", "said"), BAD.items(), ids=BAD)
def test_own_code_that_does_not_work_is_one_line(here, capsys, word, said):
    if "timm:wds" in word:
        pytest.importorskip("webdataset")
    Path("broken.py").write_text("def load(): ...\n1 / 0\n")
    Path("raising.py").write_text(
        "import torch\n"
        "def load(): raise KeyError('lost')\n"
        "def loss(logits, target): raise KeyError('target')\n"
        "def unknown(rows): return rows.mean()\n"
        "def nothing(): return torch.zeros(())\n"
        "def rows(logits): return logits.mean(1)\n"
        "def detached(logits): return logits.detach().mean()\n"
        "def not_a_number(logits): return logits.mean() * float('nan')\n"
        "def leaving(logits): raise SystemExit(0)\n"
        "class Learned(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.scale = torch.nn.Parameter(torch.ones(1))\n"
        "class Head(torch.nn.Module):\n"
        "    def __init__(self, d, c):\n"
        "        super().__init__()\n"
        "        self.last = torch.nn.Linear(d, c)\n"
        "    def forward(self, x): return self.last(x)\n"
        "class Norm(torch.nn.Module):\n"
        "    def __init__(self): super().__init__()\n"
    )
    root = ["--data.root=my_images"] if "wds" in word else []
    assert main(["baseline", word, *root, "--quiet", "--tpt.max_epochs=1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and said in error
    assert Path("runs").exists() == ("not_a_number" in word)


def test_own_code_is_part_of_a_runs_identity(here, capsys, monkeypatch):
    args = ["baseline", *SHORT, "--tpt.max_epochs=2", "--data.train_size=64", "--model.head=my_parts.py:Head"]
    args += ["--loss={cross_entropy: {}, my_loss.py:UnitLength: {weight: 0.1}}"]
    run, key = train(parse(args)), config_hash(dotted_config(parse(args)))
    text = Path("my_loss.py").read_text()
    Path("elsewhere").mkdir()
    Path("elsewhere/my_loss.py").write_text(text)
    moved = [word.replace("my_loss.py", "elsewhere/my_loss.py") for word in args]
    assert config_hash(dotted_config(parse(moved))) == key  # as a folder of images, code may lie anywhere
    Path("my_loss.py").write_text(text.replace("- 1", "- 2"))
    assert config_hash(dotted_config(parse(args))) != key
    (run / "summary.json").unlink()
    assert main(["--resume", str(run)]) == 2
    said = capsys.readouterr().err
    assert "my_loss.py of loss.my_loss.py:UnitLength has changed since it began" in said and said.count("\n") == 1
    (copy,) = (run / "code").glob("*my_loss.py")
    Path("my_loss.py").write_text(copy.read_text())
    assert main(["--resume", str(run)]) == 0
    absolute = run.resolve()
    monkeypatch.chdir("elsewhere")  # a run is evaluated with its own copy of the head
    assert evaluate.main([str(absolute)]) == 0


def test_an_own_loss_gives_the_run_of_the_same_loss_of_ours(here):
    Path("same.py").write_text(
        "import torch\ndef loss(logits, target, factor=1.0):\n"
        "    return factor * torch.nn.functional.cross_entropy(logits, target)\n"
    )
    args = ["baseline", *SHORT, "--data.train_size=64"]
    ours = train(parse(args))
    own = train(parse([*args, "--loss={same.py:loss: {args: {factor: 1.0}}}"]))
    assert (ours / "history.jsonl").read_text() == (own / "history.jsonl").read_text()


PARTS = """
import torch
def energy(features): return features.square().mean()
def confidence(logits, *, power=2.0): return logits.square().mean() ** (power / 2)
def reversed_order(target, num_classes, logits): return torch.nn.functional.cross_entropy(logits, target) * num_classes
def unnamed(x, y): return torch.nn.functional.cross_entropy(x, y)
class Anything(torch.nn.CrossEntropyLoss):
    def forward(self, *args): return super().forward(*args)
class Margin(torch.nn.MultiMarginLoss): pass
class Energy(torch.nn.Module):
    def forward(self, features): return features.square().mean()
"""


def test_a_loss_reads_what_its_arguments_name(here):
    """Each against its formula; two unnamed arguments, as torch's own input and target, are logits and classes."""
    Path("parts.py").write_text(PARTS)
    torch.manual_seed(0)
    logits, features, target = torch.randn(6, 3), torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    made_up = {"logits": logits, "features": features, "target": target}
    log_p = logits.double().log_softmax(1)
    mean_nll = -float(log_p[range(6), target].mean())
    margins = (1 - logits.gather(1, target[:, None]) + logits).clamp_min(0)
    margins[range(6), target] = 0
    wanted = {
        "energy": float(features.square().mean()),
        "Energy": float(features.square().mean()),
        "confidence": float(logits.square().mean()),
        "reversed_order": 3 * mean_nll,
        "unnamed": mean_nll,
        "Anything": mean_nll,
        "Margin": float(margins.sum() / 18),
    }
    config = {f"parts.py:{name}": TermConfig() for name in wanted}
    terms = build_terms(config, class_counts=torch.tensor([2, 2, 2]), num_features=4)
    got = {term.name.removeprefix("parts.py:"): float(term(made_up)) for term in terms}
    assert got == pytest.approx(wanted, abs=1e-6)


def test_a_study_compares_a_recipe_file_that_lies_anywhere(here, capsys):
    assert compare.main(["baseline", "my_recipe.yaml", "--plan", "--tpt.max_epochs=1"]) == 0
    assert "my_recipe" in capsys.readouterr().out
    assert compare.main(["baseline", "no_recipe.yaml", "--plan"]) == 2
    assert "no_recipe.yaml" in capsys.readouterr().err


HOOK = (
    "import json\n"
    "def log(record):\n"
    "    record['measures'].clear()\n"
    "class Log:\n"
    "    def __init__(self): self.begun = 0\n"
    "    def __call__(self, record):\n"
    "        self.begun += 1\n"
    "        with open('seen.jsonl', 'a') as file: file.write(json.dumps([self.begun, record]) + '\\n')\n"
    "def bad(record):\n"
    "    if record['epoch'] == 2: raise KeyError('lost')\n"
)


def test_a_log_of_ones_own_gets_what_the_history_gets(here):
    Path("hook.py").write_text(HOOK)
    args = ["etf", *SHORT, "--tpt.max_epochs=3", "--data.train_size=64"]
    plain = train(parse([*args, "--out=plain"]))
    history = (plain / "history.jsonl").read_bytes()
    for name in ("Log", "log"):  # what a hook does to its record changes nothing of the run
        assert (
            train(parse([*args, f"--on_epoch=hook.py:{name}", f"--out={name}"])) / "history.jsonl"
        ).read_bytes() == history
    records = [json.loads(row) for row in history.decode().splitlines()]
    seen = [json.loads(row) for row in Path("seen.jsonl").read_text().splitlines()]
    assert seen == [[number + 1, record] for number, record in enumerate(records)]
    found = []
    train(parse([*args, "--out=python"]), on_epoch=found.append)
    assert found == records
    key = config_hash(dotted_config(parse([*args, "--on_epoch=hook.py:Log"])))
    assert key == config_hash(dotted_config(parse(args)))


def test_a_log_that_fails_costs_nothing(here, capsys):
    Path("hook.py").write_text(HOOK)
    args = ["etf", *SHORT, "--tpt.max_epochs=3", "--data.train_size=64", "--out=mine"]
    for name, words in {
        "nowhere.py:log": "there is no file",
        "hook.py:lock": "hook.py has no 'lock'",
        "log": "names no code",
    }.items():
        assert main([*args, f"--on_epoch={name}"]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1 and not Path("mine").exists()
    assert main([*args, "--on_epoch=hook.py:bad"]) == 2
    said = capsys.readouterr().err
    (path,) = Path("mine").iterdir()
    assert (
        "on_epoch=hook.py:bad failed: KeyError: 'lost'" in said and f"--resume {path}" in said and said.count("\n") == 1
    )
    assert main(["--resume", str(path), "--on_epoch=hook.py:Log"]) == 0
    whole = train(parse([*args, "--out=whole"]))
    assert (path / "history.jsonl").read_bytes() == (whole / "history.jsonl").read_bytes()
    with pytest.raises(UserError, match="on_epoch: 3 cannot be called"):
        train(parse(args), on_epoch=3)


OWN_SET = """
import torch
from beside import LEVEL

class Squares:
    def __init__(self, transform=None):
        self.transform = transform

    def __len__(self):
        return 12

    def __getitem__(self, number):
        image = torch.full((3, 28, 28), LEVEL + number, dtype=torch.uint8)
        return (self.transform(image) if self.transform else image), number % 3

def load():
    return {"train": Squares(), "test": Squares()}

def inverted():
    return {"train": Squares(transform=lambda image: 255 - image)}
"""


def test_own_data_in_workers_that_start_anew(here, monkeypatch):
    """As on macOS and Windows, where a worker has nothing of what this process has loaded; seconds, to import torch."""
    Path("beside.py").write_text("LEVEL = 40\n")
    Path("squares.py").write_text(OWN_SET)
    monkeypatch.setattr("recipes.data.lazy_images._start_method", lambda workers: "spawn" if workers else None)
    config = DataConfig(name="squares.py:load", workers=1, memory_limit=0.0, batch_size=2, val_share=0.25)
    train_split = load(config, seed=0, image_size=lambda side: side).train
    assert not isinstance(train_split.images, torch.Tensor)
    Path("squares.py").write_text("this is no Python any more")  # a run goes on with the text that it began with
    images, targets = zip(*train_split.in_batches(4), strict=True)
    levels = (torch.cat(images)[:, 0, 0, 0] * 255).round().long()
    assert levels.tolist() == [40 + number for number in train_split.images.numbers.tolist()] and len(levels) == 9
    assert torch.equal((levels - 40) % 3, torch.cat(targets))

    Path("squares.py").write_text(OWN_SET)
    inverted = load(replace(config, name="squares.py:inverted"), seed=0, image_size=lambda side: side).train
    with pytest.raises(UserError, match=r"cannot be sent to the processes .*lambda.*--data.workers 0"):
        next(inverted.in_batches(2))
