"""Wrong configurations and command lines: each is refused in one line that names the key, before a folder is made."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.core import cli
from recipes.core.cli import recipes
from recipes.train import main
from tests import warm_start

ROOT = Path(__file__).parents[2]

# What is typed after the recipe, and what the line must name.
WRONG = {
    # values out of range
    "--data.batch_size 0": "data.batch_size=0",
    "--data.batch_size -8": "data.batch_size=-8",
    "--data.val_share 0": "data.val_share=0",
    "--data.val_share 1": "data.val_share=1",
    "--data.val_share .nan": "data.val_share=nan",
    "--data.image_size 0": "data.image_size=0",
    "--data.train_size 0": "data.train_size=0",
    "--data.train_size -5": "data.train_size=-5",
    "--data.label_noise 1": "data.label_noise=1",
    "--data.label_noise -0.1": "data.label_noise=-0.1",
    "--data.imbalance 0.5": "data.imbalance=0.5",
    "--data.imbalance .inf": "data.imbalance=inf",
    "--adversarial.epsilon -0.1": "adversarial.epsilon=-0.1",
    "--adversarial.epsilon .nan": "adversarial.epsilon=nan",
    "--adversarial.epsilon 8": "adversarial.epsilon in linf=8.0",
    "--adversarial.steps 0": "adversarial.steps=0",
    "--adversarial.step_size -1": "adversarial.step_size=-1",
    "--adversarial.norm l1": "adversarial.norm",
    "--loss.cross_entropy.class_weights sqrt": "loss.*class_weights",
    "--loss.supcon.class_weights inverse --loss.supcon.weight 1": "loss.supcon.class_weights=inverse",
    "--measure_size 0": "measure_size=0",
    "--seed -1": "seed=-1",
    "--seed 9223372036854775808": r"seed=9223372036854775808: must be a whole number from 0 to 2\^63 - 1",
    "--optim.lr 0": "optim.lr=0",
    "--optim.lr=": "optim.lr.: expected float, got nothing",
    "--optim.clip=": "optim.clip.: expected one of float, null, got nothing",
    "--optim.lr .nan": "optim.lr=nan",
    "--optim.lr .inf": "optim.lr=inf",
    "--optim.momentum 1": "optim.momentum=1",
    "--optim.momentum -0.5": "optim.momentum=-0.5",
    "--optim.name adamw --optim.momentum 0.8": "optim.momentum of adamw=0.8",
    "--tpt.stop_patience 3 --tpt.stop_measure nc9": "tpt.stop_measure='nc9' is unknown: one of accuracy, loss",
    "--optim.weight_decay -1": "optim.weight_decay=-1",
    "--optim.warmup_epochs -1": "optim.warmup_epochs=-1",
    "--optim.clip 0": "optim.clip=0",
    "--optim.clip .nan": "optim.clip=nan",
    "--optim.accumulate 0": "optim.accumulate=0",
    "--optim.accumulate 3": "optim.accumulate=3",
    "--optim.accumulate 128": "optim.accumulate=128",
    "--optim.head_lr_factor 0": "optim.head_lr_factor=0",
    "--optim.ema 1": "optim.ema=1",
    "--optim.ema 0": "optim.ema=0",
    "--model.freeze_epochs -1": "model.freeze_epochs=-1",
    "--augment.crop -1": "augment.crop=-1",
    "--augment.mixup -0.2": "augment.mixup=-0.2",
    "--augment.cutmix .inf": "augment.cutmix=inf",
    "--augment.smoothing 1": "augment.smoothing=1",
    "--augment.mixup 0.2 --data.batch_size 65": "data.batch_size.*65.*even",
    "--augment.mixup 0.2 --model.head nearest_etf": "augment.*nearest_etf",
    "--tpt.max_epochs 0": "tpt.max_epochs=0",
    "--tpt.max_epochs 10000000000": "tpt.max_epochs=10000000000.*between 1 and 1,000,000",
    "--tpt.threshold 0": "threshold=0",
    "--tpt.threshold 1.5": "threshold=1.5",
    "--tpt.patience 0": "patience=0",
    "--tpt.extend -1": "error: tpt.extend=-1.0: a finite factor >= 0, or null to record the onset only$",
    "--tpt.extend .inf": "extend=inf",
    "--tpt.min_terminal -1": "min_terminal=-1",
    "--tpt.min_terminal 9 --tpt.max_terminal 3": "max_terminal=3.*min_terminal=9",
    "--tpt.terminal_lr 0": "error: tpt.terminal_lr=0.*, or null for the rate",
    "--tpt.ramp_epochs -2": "ramp_epochs=-2",
    "--tpt.stop_patience 0": "stop_patience=0",
    # values of the wrong type
    "--seed 1.5": "seed",
    "--data.batch_size many": "batch_size",
    "--data.train_size 3.5": "train_size",
    "--optim.lr fast": "optim.lr",
    "--optim.ema yes_please": "optim.ema",
    "--optim.accumulate 2.5": "accumulate",
    "--optim.schedule linear": "optim.schedule",
    "--tpt.terminal exponential": "tpt.terminal",
    "--tpt.target val": "tpt.target",
    "--precision int8": "precision",
    "--model.pretrained perhaps": "model.pretrained",
    "--augment.flip sometimes": "augment.flip",
    "--compile maybe": "compile",
    "--tensorboard 3": "tensorboard",
    "--quiet loud": "quiet",
    "--model.model_args [1]": "model.model_args",
    "--loss.cross_entropy.phase late": "phase",
    "--loss.cross_entropy.weight heavy": "weight",
    # keys and names that do not exist
    "--optim.rate 0.1": "optim.rate",
    "--data.batch 64": "data.batch",
    "--augment.rotate 3": "augment.rotate",
    "--tpt.stop 3": "tpt.stop",
    "--modl.head etf": "modl.head",
    "--plan 4": '"plan": expected true or false, got 4',
    "extra": "extra",
    "--data.name torchvision.CIFAR12": "data.name='torchvision.CIFAR12'",
    "--data.name torchvision.": "data.name='torchvision.'",
    "--data.name folder --data.root nowhere": "data.root=nowhere",
    "--model.backbone resnet0": "model.backbone='resnet0'",
    "--model.norm spectral": "norm.*spectral",
    "--model.project -1": "project.*-1",
    "--model.project 3": "3",
    "--model.head_args.scale -1": "scale.*-1",
    "--model.model_args.depths 3": "depths",
    "--loss.crossentropy.weight 1": "loss.crossentropy is unknown",
    "--loss.ntce.args {colour: 1}": "loss.ntce.args.*colour",
    "--loss.cross_entropy.weight 0": "no term of positive weight acts",
    "--loss.cross_entropy.weight -1": "no term of positive weight acts",
    "--loss.cross_entropy.weight null": "loss.cross_entropy.weight=null: needs a value",
    "--loss.cross_entropy.args null": "loss.cross_entropy.args=null: needs a value",
    "--loss.supcon.weight 1 --augment.smoothing 0.1": "loss.supcon with augment",
    "--device cuda:99": "device='cuda:99'",
    "--device abacus": "device='abacus'",
    "--data.train_size 10000": "data.train_size=10000",
    "--data.train_size 100": "data.batch_size=128",
}
FILES = {
    "no mapping": ("- 1\n- 2\n", "card.yaml holds a list and no keys: keys are written KEY: VALUE"),
    "one word": ("etf\n", "card.yaml holds a single value and no keys"),
    "empty": ("", "card.yaml holds nothing and no keys"),
    "comments alone": ("# of mine\n", "card.yaml holds nothing and no keys"),
    "not YAML": ("model: {head: [\n", "card.yaml is no YAML in line 2: "),
    "a tab": ("optim:\n\tlr: 3\n", "card.yaml is no YAML in line 2: .*tab|character"),
    "two documents": ("seed: 1\n---\nseed: 2\n", "card.yaml is no YAML in line 2: but found another document"),
    "an unknown anchor": ("seed: *x\n", "card.yaml is no YAML in line 1: found undefined alias"),
    "code": ("seed: !!python/object/apply:os.getpid []\n", "card.yaml is no YAML in line 1: could not determine"),
    "a date that is none": ("recipe: 2001-99-99\n", "card.yaml is no YAML: month must be in 1..12"),
    "too deep": (f"seed: {'[' * 3000}{']' * 3000}\n", "card.yaml is nested too deeply"),
    "many aliases of one": (
        "model: {head_args: {scale: &a [1], b: &b [*a, *a], c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b, *b]}}\n",
        "head_args",
    ),
    "a list within itself": (
        "model: {head_args: {seed: &a [*a]}}\n",
        "card.yaml: an anchor .&. stands around an alias",
    ),
    "unknown key": ("modle:\n  head: etf\n", "modle"),
    "unknown key within": ("model:\n  hed: etf\n", "'model'.*'hed'"),
    "wrong type": ("optim:\n  lr: quick\n", r"card.yaml: \"optim.lr\": expected float, got quick"),
    "a number for a path": ("data: {root: 2024}\n", r"card.yaml: \"data.root\": expected a path, in quotes .* got int"),
    "a number for a path or null": ("data: {cost: 5}\n", "card.yaml: .data.cost.: expected one of Path, null, got 5"),
    "no for a word": ("model: {norm: no}\n", "card.yaml: .model.norm.: expected a text, in quotes .*, got False"),
    "a comma in a number": ("optim: {lr: 1,0}\n", "card.yaml: 0 stands where a key belongs"),
    "null where a number belongs": ("seed: null\n", "seed"),
    "nothing behind the only key": ("seed:\n", "seed=null: needs a value"),
    "nothing behind the only keys": ("{seed, quiet}\n", "seed=null: needs a value"),
    "nothing in the only group": ("data:\n", "data=null: expected keys and their values"),
    "null within": ("optim:\n  lr: null\n", "optim.lr"),
    "a list where a mapping belongs": ("data: [digits]\n", "data"),
    "binary": ("\x00\x01", "card.yaml is no YAML: unacceptable character"),
}


def refused(args, words, capsys, out):
    """One line on stderr that matches `words`, nothing else printed, nothing written."""
    assert main([*args, "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured
    assert re.search(words, captured.err), captured.err
    assert not out.exists()


@pytest.mark.parametrize("typed", WRONG)
def test_wrong_keys_and_values_are_one_line(typed, capsys, tmp_path):
    args = re.findall(r"\{.*?\}|\S+", typed)
    refused(
        ["etf", *args, "--quiet", "true"] if "quiet" not in typed else ["etf", *args],
        WRONG[typed],
        capsys,
        tmp_path / "runs",
    )


@pytest.mark.parametrize("kind", FILES)
def test_wrong_files_are_one_line(kind, capsys, tmp_path):
    text, words = FILES[kind]
    (tmp_path / "card.yaml").write_text(text)
    refused(["--config", str(tmp_path / "card.yaml")], words, capsys, tmp_path / "runs")


@pytest.mark.parametrize(
    "said",
    [
        "expected str, bytes or os.PathLike object, not int",  # Python 3.11
        "argument should be a str or an os.PathLike object where __fspath__ returns a str, not 'int'",  # from 3.12 on
    ],
)
def test_a_number_for_a_path_is_named_in_the_words_of_every_python(said):
    line = cli._one_line(f'Parser key "data.root": Not of type Path: {said}', recipe_given=True)
    assert line.startswith('"data.root": expected a path, in quotes') and ", got int (" in line


def test_a_file_in_another_encoding_is_named(capsys, tmp_path):
    (tmp_path / "card.yaml").write_text("optim: {lr: 0.1}\n", encoding="utf-16")  # as an editor may save it
    words = r"card\.yaml is no text in UTF-8 \(byte 0\): save it in that encoding"
    refused(["--config", str(tmp_path / "card.yaml")], words, capsys, tmp_path / "runs")


def test_recipes_are_read_where_the_locale_lacks_their_letters():
    """Cards have formulas in their comments; a plain C locale without Python's own remedies knows ASCII alone."""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    code = "from recipes.core.cli import parse, recipes; print([parse([name]).recipe for name in recipes()])"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | locale, capture_output=True, text=True)
    assert done.stdout == f"{list(recipes())}\n", done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["etf", "--loss={cross_entropy: {}, cross_entropy: {weight: 2}}"],
            "the command line: cross_entropy is named in",
        ),
        (["etf", "--model.head_args", "{scale: 1, scale: 2}"], "the command line: scale is named in line 1 and again"),
        (["etf", "--model.head_args", "{scale: &a [*a]}"], "the command line: an anchor .&. stands around an alias"),
        (
            ["etf", "--model.head_args", f"{{scale: {'[' * 3000}{']' * 3000}}}"],
            "the command line: .* is nested too deeply",
        ),
        (["etf", "--optim.lr"], "optim.lr"),
        (["etf", "--seed"], "seed"),
        (["--config"], "config"),
        (["--config", "."], r"config='\S*' is no file: give a YAML file of keys"),
        (["--config", ""], "config= is no file: give a YAML file of keys"),
        (["etf", "--resume"], "resume"),
        (["etf", "--plan", "--optim.lr", "-1"], "optim.lr=-1"),
        (["ETF"], "recipe='ETF'"),
        ([""], "recipe=''"),
    ],
)
def test_broken_command_lines_are_one_line(args, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and re.search(words, captured.err), captured
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "typed",
    [
        "--optim.ema 2",
        *(
            pytest.param(typed, marks=pytest.mark.slow)
            for typed in ("--optim.rate 1", "--device abacus", "--data.train_size 100", "--tpt.target val")
        ),
    ],
)
def test_real_commands_exit_with_2(typed, tmp_path):
    command = [ROOT / "recipes" / "train.py", "etf", *typed.split(), "--quiet", "true"]
    done = warm_start.run(command, folder=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert typed.split()[0].lstrip("-").split(".")[-1] in done.stderr or "batch_size" in done.stderr
    assert not list(tmp_path.iterdir())
