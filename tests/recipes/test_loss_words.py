"""--loss.NAME.KEY sets a key of a loss of one's own too; quoted words lose their quotes as in a file."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml

from recipes.core.cli import parse, parse_command
from recipes.core.config import TermConfig
from recipes.core.errors import UserError
from recipes.core.two_readings import two_readings
from recipes.core.unique_keys import UniqueKeyLoader
from recipes.study.load import study_from_dict
from recipes.study.trials import comparison_trials

CODE = """
import torch

class Scaled(torch.nn.Module):
    def __init__(self, tau=1.0, mode="a"):
        super().__init__()
        self.tau, self.mode = tau, mode

    def forward(self, logits, target):
        return torch.nn.functional.cross_entropy(logits / self.tau, target)
"""
LOSS = {"cross_entropy": {}, "my.losses/mine.py:Scaled": {"weight": 0.5, "args": {"tau": 2.0}}}
OWN = "my.losses/mine.py:Scaled"
WHOLE = f"--loss={json.dumps(LOSS)}"


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "my.losses").mkdir()
    (tmp_path / "my.losses" / "mine.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["Scaled", OWN])
@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (["args.tau", "3"], {"args": {"tau": 3}}),
        (["args.tau=1e-1"], {"args": {"tau": 0.1}}),
        (["args.mode", '"1"'], {"args": {"tau": 2.0, "mode": "1"}}),
        (["args.a.b", "[1, x]"], {"args": {"tau": 2.0, "a": {"b": [1, "x"]}}}),
        (["args", "{mode: b}"], {"args": {"mode": "b"}}),
        (["weight", "3"], {"weight": 3.0}),
        (["phase=terminal"], {"phase": "terminal"}),
    ],
)
def test_one_key_of_a_loss_of_ones_own_leaves_its_others(name, words, changed):
    found = parse(["etf", WHOLE, f"--loss.{name}.{words[0]}", *words[1:]]).loss
    assert found == {"cross_entropy": TermConfig(), OWN: TermConfig(**{"weight": 0.5, "args": {"tau": 2.0}} | changed)}


def test_a_mapping_of_keys_a_new_term_and_the_last_word():
    found = parse(["etf", WHOLE, "--loss.Scaled", "{weight: 3, phase: terminal}"]).loss[OWN]
    assert found == TermConfig(3.0, "terminal", args={"tau": 2.0})
    assert parse(["etf", "--loss.other.py:New.weight", "2"]).loss["other.py:New"] == TermConfig(2.0)
    assert parse(["etf", WHOLE, "--loss.Scaled.weight=7", WHOLE]).loss[OWN].weight == 0.5
    assert parse(["etf", WHOLE, "--loss.Scaled.weight=7", "--loss.Scaled.weight=8"]).loss[OWN].weight == 8


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--loss.Scaled.weight", "heavy"], '"weight": expected float, got heavy'),
        (["--loss.Scaled.phase", "allways"], "got allways; did you mean always?"),
        (["--loss.Scaled.wieght", "1"], "'wieght' is not accepted; did you mean weight?"),
        ([f"--loss.{OWN}.phase", "allways"], "got allways; did you mean always?"),
        ([f"--loss.{OWN}.wieght", "1"], "'wieght' is not accepted; did you mean weight?"),
        ([f"--loss.{OWN}.tau.x", "1"], "'tau' is not accepted; arguments of the loss itself go to --loss.TERM.args"),
        ([f"--loss.{OWN}", "3"], f"--loss.{OWN}=3: expected {{KEY: VALUE}}"),
        ([f"--loss.{OWN}.weight"], f"--loss.{OWN}.weight needs a value"),
        (
            [f"--loss.{OWN}.phase=fitting", "--loss.cross_entropy.weight=0"],
            "no term of positive weight acts in the terminal phase",
        ),
        (["--loss.Scaled.args.tau=1", "--config", "x.yaml"], "stands before --config, which may set it too"),
    ],
)
def test_a_wrong_key_or_value_of_it_is_one_line(words, line):
    with pytest.raises(UserError) as said:
        parse(["etf", WHOLE, *words])
    assert line in str(said.value)


@pytest.mark.parametrize(
    ("terms", "word", "ways"),
    [
        (["a.py:L", "b/c.py:L"], "--loss.L.weight", "--loss.a.py:L or --loss.b/c.py:L"),
        (["cross_entropy", "a.py:cross_entropy"], "--loss.cross_entropy.args.label_smoothing", "a.py:cross_entropy"),
    ],
)
def test_a_name_that_two_terms_have_is_refused_with_the_ways_out(terms, word, ways):
    whole = f"--loss={json.dumps({term: {} for term in terms})}"
    with pytest.raises(UserError) as said:
        parse(["etf", whole, word, "0.5"])
    assert str(said.value).startswith(f"{word} may mean {' or '.join(terms)}: write ") and ways in str(said.value)
    full = word.replace(f".{terms[1].rpartition(':')[2]}.", f".{terms[1]}.")
    before, after = (parse(["etf", whole, *words]).loss for words in ([], [full, "0.5"]))
    assert [term for term in terms if before[term] != after[term]] == [terms[1]]


def test_a_file_takes_the_dotted_form_and_words_behind_it_win(tmp_path):
    content = {"loss": LOSS, "loss.Scaled.args.tau": 9, "loss.Scaled.args.mode": "1", "model.head_args.scale": "true"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content | {"optim.lr": 0.3}))
    for words, tau in (([], 9), (["--loss.Scaled.args.tau", "11"], 11)):
        config = parse([str(tmp_path / "mine.yaml"), *words])
        assert config.loss[OWN] == TermConfig(0.5, args={"tau": tau, "mode": "1"})
        assert (config.model.head_args, config.optim.lr, config.recipe) == ({"scale": "true"}, 0.3, "mine")


def test_a_study_s_overrides_take_it_and_give_the_same_run_as_the_mapping(here):
    Path("mine.yaml").write_text(yaml.safe_dump({"loss": LOSS}))
    whole = LOSS | {OWN: {"weight": 0.5, "args": {"tau": 4}}}
    arms = {
        "dotted": {"recipe": "mine.yaml", "overrides": {"loss.Scaled.args.tau": 4}},
        "mapping": {"recipe": "mine.yaml", "overrides": {"loss": whole}},
        "other": {"recipe": "mine.yaml"},
    }
    study = study_from_dict({"question": "?", "arms": arms, "seeds": [0]})
    keys = [trial.key for trial in comparison_trials(study, {("digits", arm): {} for arm in arms})]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize("key", ["loss.ntce.args.name", "model.head_args.name", "model.model_args.inner.name"])
@pytest.mark.parametrize(
    "text", ['"mean"', "'mean'", '"1"', "'null'", "mean", "1", "1e-3", "true", "null", "[a, '1']", '{a: "1"}']
)
def test_a_word_is_read_as_a_file_reads_it(key, text):
    config = parse(["etf", f"--{key}", text])
    place = {"loss": lambda: config.loss["ntce"].args, "model": lambda: getattr(config.model, key.split(".")[1])}
    found = place[key.split(".")[0]]()
    found = found["inner"] if "inner" in key else found
    exact = {"1e-3": 0.001}  # YAML 1.1, which PyYAML reads, wants a dot there
    assert found["name"] == exact.get(text, yaml.safe_load(text))


def test_print_config_shows_keys_of_ones_own_or_says_that_it_does_not(capsys):
    with pytest.raises(UserError, match=f"--print_config does not show --loss.{OWN}.weight: leave one"):
        parse_command(["etf", WHOLE, "--loss.Scaled.weight=2", "--print_config"])
    assert capsys.readouterr().out == ""


def test_a_misspelled_name_of_ones_own_gets_a_suggestion(here, capsys):
    from recipes.train import main

    assert main(["baseline", WHOLE, "--loss.Scalde.args.tau=3"]) == 2
    assert capsys.readouterr().err.endswith("; did you mean Scaled?\n")


def test_dotted_keys_of_a_file_are_read_as_nested_ones(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "recipe: baseline\nmodel: {backbone: test_resnet}\n"
        "loss.koleo.args:\n  eps: 1e-4  # small\n  b: .inf\nloss.cross_entropy.weight: 1e-1\n"
        "model.head_args.scale: 1e-3\nmodel.model_args: {1: 2, x: .inf}\n"
    )
    config = parse([str(file)])
    assert config.loss["koleo"].args == {"eps": 1e-4, "b": math.inf} and config.loss["cross_entropy"].weight == 0.1
    assert config.model.head_args == {"scale": 1e-3} and config.model.model_args == {1: 2, "x": math.inf}
    file.write_text('{"recipe": "baseline", "loss.koleo.args.eps": 1e-3, "optim": {"lr": 1e-2}}')
    assert parse([str(file)]).loss["koleo"].args == {"eps": 1e-3} and parse([str(file)]).optim.lr == 0.01
    file.write_text("recipe: baseline\nmodel: &m {backbone: test_resnet}\nloss.koleo.args.eps: 1\ndata: *m\n")
    with pytest.raises(UserError, match=r"write loss\.koleo\.args\.eps as a mapping within a mapping"):
        parse([str(file)])


def test_a_mapping_for_a_term_leaves_the_keys_that_it_does_not_name(here):
    smooth = ["baseline", "--loss.cross_entropy.args.label_smoothing", "0.1"]
    assert parse([*smooth, "--loss.cross_entropy", "{weight: 2}"]).loss["cross_entropy"] == TermConfig(
        weight=2.0, args={"label_smoothing": 0.1}
    )
    for later in (
        ["--loss.cross_entropy", "{args: {}}"],
        ["--loss.cross_entropy.args={}"],
        ["--loss={cross_entropy: {}}"],
    ):
        assert parse([*smooth, *later]).loss["cross_entropy"].args == {}
    words = ["baseline", f"--loss.{OWN}.weight=5", f"--loss.{OWN}", "{phase: terminal}"]
    assert parse(words).loss[OWN] == TermConfig(weight=5.0, phase="terminal")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("optim.lr: 3\noptim: {weight_decay: 0.5}\n", {"optim": {"lr": 3.0, "weight_decay": 0.5}}),
        ("{optim.lr: 3, optim: {weight_decay: 0.5}}", {"optim": {"lr": 3.0, "weight_decay": 0.5}}),
        (
            "model.head_args: {scale: 3}\nmodel.norm: batch\nmodel:\n  head: etf\n",
            {"model": {"head": "etf", "norm": "batch", "head_args": {"scale": 3}}},
        ),
        (
            "model.head_args.scale: 3\nmodel: {head_args: {normalize: false}}\n",
            {"model": {"head_args": {"scale": 3, "normalize": False}}},
        ),
        ("? optim.lr\n: 0.2\n? optim\n: weight_decay: 0.1\n", {"optim": {"lr": 0.2, "weight_decay": 0.1}}),
        ("model: {model_args: {'a.b': 1, a: {b: 2}}}\n", {"model": {"model_args": {"a.b": 1, "a": {"b": 2}}}}),
        ("model: {model_args: {1: 2, '1': 3}}\n", {"model": {"model_args": {1: 2, "1": 3}}}),
        ("model.model_args.b.d: 2\nmodel.model_args.b: {c: 3}\n", {"model": {"model_args": {"b": {"c": 3, "d": 2}}}}),
        (
            "loss.ntce.weight: 2\nloss: {cross_entropy: {}}\n",
            {"loss": {"cross_entropy": TermConfig(), "ntce": TermConfig(weight=2.0)}},
        ),
    ],
)
def test_the_order_of_keys_in_a_file_tells_nothing(text, found, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    config = parse([str(tmp_path / "mine.yaml")])
    for group, expected in found.items():
        part = getattr(config, group)
        assert (part if group == "loss" else {key: getattr(part, key) for key in expected}) == expected


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("optim: {lr: 3}\noptim: {weight_decay: 0.5}\n", "optim is named in line 1 and again in line 2"),
        ("optim.lr: 3\nseed: 1\noptim.lr: 4\n", "optim.lr is named in line 1 and again in line 3"),
        ("model:\n  head: etf\nmodel.head: linear\n", "model.head is named in line 2 and again in line 3"),
        ("model: {head_args: {a: 1}}\nmodel.head_args: {b: 2}\n", "model.head_args is named in line 1 and again in"),
        ("model: {head_args: {a: 1}}\nmodel.head_args.a: 2\n", "model.head_args.a is named in line 1 and again in"),
        ("loss: {ntce: {weight: 1}}\nloss.ntce.weight: 2\n", "loss.ntce.weight is named in line 1 and again in"),
        ("optim.lr: 3\noptim: &x {momentum: 0.5}\nmodel: {head_args: *x}\n", "write optim.lr as a mapping within"),
        (
            "model.model_args.d: |\n  k: 1\n  l\n",
            "write model.model_args.d as a mapping within a mapping: a dotted key",
        ),
        ("optim: &x\n  lr: *x\n", r"an anchor \(&\) stands around an alias \(\*\) of itself"),
    ],
)
def test_a_key_named_twice_in_a_file_is_refused(text, line, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=line):
        parse([str(tmp_path / "mine.yaml")])


@pytest.mark.parametrize("words", [["--loss.ntce={args: {init_args: 2}}"], ["--loss.ntce", "{args: {init_args: 2}}"]])
def test_arguments_of_a_loss_may_have_names_that_the_parser_uses_elsewhere(words):
    assert parse(["etf", *words]).loss["ntce"].args == {"init_args": 2}


@pytest.mark.parametrize(("word", "value"), [("--loss.koleo=3", "3"), ("--loss.koleo=null", "null")])
def test_a_term_that_is_no_mapping_is_refused_in_plain_words(word, value):
    with pytest.raises(UserError) as said:
        parse(["etf", word])
    assert str(said.value).startswith('"loss": a term takes {KEY: VALUE} of its keys (weight, phase, class_weights,')
    assert f"got {value} (" in str(said.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 010", "line 2: 010 is 8 in YAML 1.1 and 10 in 1.2: write 8 or 10"),
        ("optim: {lr: 1:30}", "line 2: 1:30 is a number to the base of 60"),
        ("data:\n  hold_out: [3, -0_17]", "line 3: -0_17 is -15 in YAML 1.1 and -17 in 1.2"),
        ("loss.koleo.args.eps: 190:20:30.15", "line 2: 190:20:30.15 is a number to the base of 60"),
    ],
)
def test_numbers_that_versions_of_yaml_read_differently_are_refused(text, said, tmp_path):
    file = tmp_path / "keys.yaml"
    file.write_text(f"recipe: baseline\n{text}\n")
    with pytest.raises(UserError, match=re.escape(f"{file}, {said}")):
        parse([str(file)])


@pytest.mark.parametrize("words", [["--seed", "1:30"], ["--optim.lr=1:30.5"], ["--model.head_args", "{scale: 010}"]])
def test_so_they_are_on_the_command_line(words):
    with pytest.raises(UserError, match=r"(to the base of 60|is 8) in YAML 1\.1"):
        parse(["baseline", *words])


def test_numbers_with_one_reading_are_taken(tmp_path):
    file = tmp_path / "keys.yaml"
    file.write_text("recipe: baseline\nseed: 007\noptim: {lr: 1e-3}\ndata: {name: folder, root: '1:30'}\n")
    config = parse([str(file), "--data.image_size", "010", "--tpt.extend", "0.5"])
    assert (config.seed, config.optim.lr, str(config.data.root), config.data.image_size) == (7, 1e-3, "1:30", 10)
    assert str(parse(["baseline", "--data.name=folder", "--data.root", "1:30"]).data.root) == "1:30"
    assert two_readings("08") is two_readings("0") is two_readings("0.10") is two_readings("12") is None
    costs = "{'010': {a: 1}}", "{010: {a: 1}}"
    assert yaml.load(costs[0], UniqueKeyLoader) == {"010": {"a": 1}}
    with pytest.raises(yaml.YAMLError, match="line 1: 010 is 8"):
        yaml.load(costs[1], UniqueKeyLoader)
