"""README and docs: their Python runs, their links lead somewhere, and they are short enough to be read."""

import contextlib
import doctest
import importlib.util
import io
import json
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import resolve_model_data_config

from ncreg import param_groups, swap_head
from recipes.core.config import OptimConfig
from recipes.training.build import build_optimizer

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "examples" / "digits_classifier" / "README.md",
]
CARDS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
TIMM = "device-modules opt weight-decay sched epochs naflex-loader mixup cutmix no-resume-opt eval-metric"
TIMM += " val-split val-interval start-epoch min-lr head-init-bias model-ema amp model-dtype sched-on-updates"
TIMM += " recovery-interval grad-accum-steps grad-checkpointing clip-mode layer-decay split-bn train-img-sizes"
TIMM += " torchcompile initial-checkpoint"
TIMM += " head-init-scale torchscript"
OTHER_OPTIONS = {"--shm-size", "--model-kwargs", *(f"--{option}" for option in TIMM.split())}  # of docker; of timm
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}  # one namespace a page: later blocks go on with earlier ones
    for number, block in enumerate(blocks(page)):
        if ">>>" not in block:
            exec(compile(block, f"{page.name} block {number}", "exec"), names)
            continue
        test = doctest.DocTestParser().get_doctest(block, names, f"{page.name}[{number}]", str(page), 0)
        lines = []
        result = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=lines.append, clear_globs=False)
        assert result.attempted and not result.failed, "".join(lines)
        names = test.globs


def links(page):
    """The links of a page inside this repository: the file and the heading, either of which may be empty."""
    found = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", prose(page.read_text()))
    return [link for link in found if not link[0].startswith(("http", "mailto:"))]


def prose(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_lead_somewhere(page):
    for target, heading in links(page):
        path = page.parent / target if target else page
        assert path.exists(), f"{page.name} points to {target}"
        assert not heading or heading in anchors(path), f"{page.name} points to {target}#{heading}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_in_backticks_exist(page):
    named = re.findall(r"`((?:ncreg|recipes|benchmarks|tests|examples|docs|\.ci)/[\w./-]*\w\.\w+)`", page.read_text())
    for path in named:
        assert (ROOT / path).exists(), f"{page.name} names {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_begins_with_a_short_paragraph(page):
    title, first, *_ = page.read_text().split("\n\n")
    assert title.startswith("# ") and "\n" not in title
    assert len(first.splitlines()) <= 5 and max(map(len, first.splitlines())) <= 120


SCRIPTS = ("train", "evaluate", "predict", "robustness", "compare", "plot_collapse", "rank_backbones")
DATA_TAKERS = ("compare", "evaluate", "robustness", "plot_collapse", "rank_backbones")


@pytest.fixture(scope="module")
def options():
    """The options that each command's help shows; keys of train.py may follow where data or recipes are named."""
    shown = {}
    for name in SCRIPTS:
        with contextlib.redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit):
            importlib.import_module(f"recipes.{name}").main(["--help"])
        shown[name] = set(re.findall(r"--[a-z][\w.-]*\w", text.getvalue()))
    keys = shown["train"]
    return shown | {name: shown[name] | keys for name in DATA_TAKERS}


def is_known(option, known):
    """Whether an option, or the key that it is a part of (--loss.NAME.weight), is among the known ones."""
    words = option.split(".")
    return any(".".join(words[:count]) in known for count in range(len(words), 0, -1))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_of_commands_exist(page, options):
    text = page.read_text()
    for name, rest in re.findall(r"recipes/(\w+)\.py([^\n`#]*)", text):
        for option in re.findall(r"(?<=\s)--[a-z][\w.-]*\w", rest):
            assert is_known(option, options[name]), f"{page.name}: recipes/{name}.py has no {option}"
    everything = set().union(*options.values())
    for option in re.findall(r"`(--[a-z][\w.-]*\w)", prose(text)):
        assert option in OTHER_OPTIONS or is_known(option, everything), f"{page.name}: no command has {option}"


def test_the_tree_of_the_project_is_as_drawn():
    drawn, folder = {}, ""
    (tree,) = re.findall(r"^```\n(.*?)^```", (ROOT / "docs" / "contributing.md").read_text(), re.DOTALL | re.MULTILINE)
    for indent, names in re.findall(r"^( *)((?:[\w.]+(?:/|\.py) +)+)", tree, re.MULTILINE):
        folder = folder if indent else names.split()[0]
        drawn.setdefault(folder, set()).update(names.split() if indent else [])
    for folder in ("ncreg/", "recipes/"):
        paths = [path for path in (ROOT / folder).iterdir() if not path.name.startswith("_")]
        there = {f"{path.name}/" if path.is_dir() else path.name for path in paths if path.suffix in ("", ".py")}
        assert drawn[folder] == there
    assert all((ROOT / folder).is_dir() for folder in drawn)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 9 * 1024


def test_docs_are_listed_in_the_readme():
    listed = {target for target, _ in links(ROOT / "README.md")}
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= listed


@pytest.fixture
def build_recipes():
    spec = importlib.util.spec_from_file_location("build_recipes", ROOT / "docs" / "build_recipes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_recipes_says_what_the_cards_say(build_recipes):
    page = ROOT / "docs" / "recipes.md"
    assert build_recipes.filled(page.read_text()) == page.read_text(), "python docs/build_recipes.py makes it anew"
    assert len(re.findall(r"^### ", page.read_text(), re.MULTILINE)) == len(CARDS)


def test_another_card_makes_another_page(build_recipes, tmp_path):
    text = (ROOT / "recipes" / "configs" / "etf.yaml").read_text()
    (tmp_path / "mars.yaml").write_text(text.replace("# When to use it: ", "# When to use it: on Mars. Not on "))
    page = build_recipes.filled("a\n<!-- recipes -->\nstale\n<!-- end of recipes -->\nb\n", tmp_path)
    (row,) = [line for line in page.splitlines() if line.startswith("| [`mars`](#mars) | etf | fixed simplex-ETF head")]
    assert "| on Mars |" in row and "\n- **When to use it:** on Mars. Not on to have" in page
    assert page.startswith("a\n<!-- recipes -->\n\n| recipe |") and page.endswith("b\n") and "stale" not in page


OTHERS = ("When to use it", "Published", "What it costs")


@pytest.mark.parametrize(
    "lines",
    [
        ["# What it does: a", "# Formula: f", "# When to use it: b", "# Published: c", "# What it costs: d"],
        ["# title", "# What it does: a", "# Formula: f", "# When to use it: b", "# What it costs: d"],
        ["# title", "# What it does: a", "# Formula: f", "# When to use it: b", "# Published:", "# What it costs: d"],
        ["# title", "# What it does: a", "# When to use it: b", "# Published: c", "# What it costs: d"],
        ["# title", *(f"# {name}: a" for name in ("What it does", "Formula", *OTHERS)), "# Price: e"],
    ],
)
def test_a_card_without_its_fields_is_refused(lines, build_recipes, tmp_path):
    path = tmp_path / "odd.yaml"
    path.write_text("\n".join([*lines, "recipe: odd"]))
    with pytest.raises(ValueError, match="odd.yaml: a card has a title and What it does, Formula"):
        build_recipes.read_card(path)


def test_the_figure_for_a_paper_is_drawn_as_the_tutorial_says(tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    page = (ROOT / "docs" / "tutorials" / "a_figure_for_a_paper.md").read_text()
    panel, script = re.findall(r"^```py\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    base = {"nc1": 2.0, "nc2_equinorm": 4.0, "nc2_equiangularity": 3.0, "nc3": 1.5}
    measures = [{name: value**-n for name, value in base.items()} | {"nc4": 0.1 * (n < 2)} for n in range(4)]
    history = [{"epoch": n + 1, "measures": values} for n, values in enumerate(measures)]
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "history.jsonl").write_text("\n".join(map(json.dumps, history)))
    (tmp_path / "RUN" / "summary.json").write_text(json.dumps({"onset_epoch": 2}))
    view = {"samples": [[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]], "means": [[0.0, 1.0], [1.0, 0.0]], "target": [0, 1, 1]}
    (tmp_path / "RUN" / "collapse").mkdir()
    (tmp_path / "RUN" / "collapse" / "view-test.json").write_text(json.dumps({"views": [{}, view]}))
    monkeypatch.chdir(tmp_path)
    names = {}
    with plt.rc_context():
        exec(compile(panel, "paper_simplex.py", "exec"), names)
        assert names["axis"].collections[0].get_offsets().tolist() == view["samples"]
        plt.close(names["figure"])
        exec(compile(script, "paper_figure.py", "exec"), names)
    curves = {line.get_label(): list(line.get_ydata()) for line in names["axis"].get_lines()}
    assert curves["NC3"] == [values["nc3"] for values in measures] and len(curves) == 5
    assert list(names["below"].get_lines()[0].get_ydata()) == [10, 10, 0, 0]
    assert len({str(line.get_linestyle()) for line in names["axis"].get_lines()[:3]}) == 3  # told apart without colour
    plt.close(names["figure"])
    written = (tmp_path / "collapse.pdf").read_bytes()
    assert b"/FontFile2" in written and b"/Type3" not in written and (tmp_path / "simplex.pdf").is_file()


@pytest.mark.parametrize(("backbone", "project"), [("test_resnet", None), ("test_vit", 16)])
def test_the_two_rates_of_the_page_are_those_of_the_recipe(backbone, project):
    (block,) = [block for block in blocks(ROOT / "docs" / "integrations.md") if "def two_rates" in block]
    model = swap_head(backbone, "etf", num_classes=3, project=project)
    names = {"torch": torch, "param_groups": param_groups, "model": model}
    exec(compile(block, "two_rates", "exec"), names)
    recipe = build_optimizer(OptimConfig(lr=0.01, head_lr_factor=10, weight_decay=5e-4, momentum=0.9), model)

    def rates(optimizer):
        groups = optimizer.param_groups
        return {id(one): (group["lr"], group["weight_decay"]) for group in groups for one in group["params"]}

    assert rates(names["optimizer"]) == rates(recipe) and {rate for rate, _ in rates(recipe).values()} == {0.01, 0.1}


def run_own_images(splits, folder, monkeypatch, *, epochs):
    """The names of the page's script after it ran on images of three classes, so many of each in these parts."""
    page = (ROOT / "docs" / "integrations.md").read_text()
    (script,) = [block for block in re.findall(r"^```py\n(.*?)^```", page, re.DOTALL | re.MULTILINE) if "own_" in block]
    assert "max_epochs=30, min_terminal=3" in script
    generator = np.random.default_rng(0)
    for split, count in splits.items():
        for channel, name in enumerate(("cat", "dog", "owl")):
            (folder / "my_images" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 120, (40, 50, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(folder / "my_images" / split / name / f"{number}.png")
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    names = {"__name__": "own_images"}
    script = script.replace("max_epochs=30, min_terminal=3", f"max_epochs={epochs}, min_terminal={min(3, epochs)}")
    exec(compile(script, "own_images.py", "exec"), names)
    return names


@pytest.mark.parametrize("splits", [{"": 20}, {"train": 20, "test": 3}])
def test_own_images_are_never_in_training_and_validation(splits, tmp_path, monkeypatch):
    names = run_own_images(splits, tmp_path, monkeypatch, epochs=1)
    trained, held_out = (set(names[part].reader.samples) for part in ("train", "val"))
    assert len(trained) == 48 and len(held_out) == 12 and not trained & held_out
    assert not any("test" in file for file, _ in trained | held_out)
    assert all(sum(label == number for _, label in held_out) == 4 for number in range(3))
    assert "RandomHorizontalFlip" in str(names["augmented"].dataset.transform)  # the second loader left it alone
    assert "Random" not in str(names["closer"].batches.dataset.transform)


def test_own_images_in_an_own_loop_as_the_page_says(tmp_path, monkeypatch, capsys):
    names = run_own_images({"train": 16, "val": 4}, tmp_path, monkeypatch, epochs=30)
    said = capsys.readouterr().out
    assert "finished 1.000" in said and "12 of 12 validation images" in said
    told, taken = resolve_model_data_config(names["again"]), names["settings"]
    assert all(told[key] == taken[key] for key in told) and told["input_size"] == (3, 64, 64)
    assert names["again"].pretrained_cfg["label_names"] == ("cat", "dog", "owl")


def run_script(name, folder, monkeypatch, **names):
    """The names of a script of docs/integrations.md after it ran for two epochs in place of 200."""
    page = (ROOT / "docs" / "integrations.md").read_text()
    scripts = re.findall(r"^```py\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (script,) = [script for script in scripts if script.startswith(f"# {name}.py")]
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    exec(compile(re.sub(r"\bmax_epochs=\d+", "max_epochs=2", script), f"{name}.py", "exec"), names)
    return names


@pytest.mark.filterwarnings("ignore")  # what these packages advise on devices, workers and progress
@pytest.mark.parametrize(
    ("name", "package", "scheduler"),
    [
        ("lightning_images", "lightning", lambda names: names["collapse"].scheduler),
        ("trainer_images", "transformers", lambda names: names["tpt"]),
        ("accelerate_images", "accelerate", lambda names: names["scheduler"]),
        ("ddp", "torch", lambda names: names["scheduler"]),
    ],
)
def test_scripts_for_the_loops_of_others_close_their_epochs(name, package, scheduler, tmp_path, monkeypatch):
    pytest.importorskip(package)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for variable, value in alone.items() if name == "ddp" else ():
        monkeypatch.setenv(variable, str(value))
    found = scheduler(run_script(name, tmp_path, monkeypatch, __name__=name))
    assert (found.epoch, found.finished, found.max_epochs) == (2, True, 2)


@pytest.mark.filterwarnings("ignore")
def test_a_data_set_of_hugging_face_reaches_trainer_as_the_page_says(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "my_images" / name).mkdir(parents=True)
        Image.new("RGB", (50, 40), (250 * label,) * 3).save(tmp_path / "my_images" / name / "0.png")
    names = run_script("hf_images", tmp_path, monkeypatch, __name__="hf_images")
    model = torch.nn.Linear(1, 2)  # its forward names none of the columns
    batch = next(
        iter(transformers.Trainer(model, names["arguments"], train_dataset=names["train"]).get_train_dataloader())
    )
    mean, std = (torch.tensor(names["size"][key]).view(3, 1, 1) for key in ("mean", "std"))
    for found in (batch, next(iter(names["clean"]))):
        pixels = found["pixel_values"].cpu() * std + mean
        assert sorted(found["labels"].tolist()) == [0, 1] and pixels.shape == (2, 3, 64, 64)
    assert [round(float(image.mean()), 2) for image in pixels] == [0.0, 0.98]  # clean: as they are, 250 / 255
