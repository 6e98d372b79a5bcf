"""A key that is set and that nothing reads is said, and no recipe has one."""

import pytest

from recipes.core.cli import parse, recipes
from recipes.core.idle_keys import idle_notes
from recipes.train import main


@pytest.mark.parametrize("recipe", recipes())
def test_no_recipe_sets_a_key_that_nothing_reads(recipe):
    assert idle_notes(parse([recipe])) == []


@pytest.mark.parametrize(
    ("words", "note"),
    [
        (["etf", "--adversarial.steps=10"], "adversarial.steps=10 changes nothing: adversarial.epsilon is 0"),
        (
            ["adversarial", "--adversarial.epsilon=0", "--adversarial.norm=l2", "--adversarial.steps=3"],
            "adversarial.steps=3, adversarial.norm=l2 change nothing: adversarial.epsilon is 0",
        ),
        (
            ["baseline", "--tpt.min_terminal=100", "--tpt.terminal=constant"],
            "tpt.min_terminal=100, tpt.terminal=constant change nothing: tpt.extend is null, which trains on to "
            "tpt.max_epochs",
        ),
        (["etf", "--tpt.stop_measure=nc3"], "tpt.stop_measure=nc3 changes nothing: tpt.stop_patience is null"),
        (
            ["etf", "--tpt.ramp_epochs=9"],
            "tpt.ramp_epochs=9 changes nothing: every term of the loss acts in all phases",
        ),
        (["etf", "--tpt.target=clean_subset"], "tpt.target=clean_subset changes nothing: data.label_noise is 0"),
    ],
)
def test_a_key_that_another_turns_off_is_said(words, note):
    assert idle_notes(parse(words)) == [note]


@pytest.mark.parametrize(
    "words",
    [
        ["etf", "--adversarial.steps=10", "--adversarial.epsilon=0.03"],
        ["baseline", "--tpt.min_terminal=100", "--tpt.extend=1"],
        ["etf", "--tpt.stop_measure=nc3", "--tpt.stop_patience=4"],
        ["etf", "--tpt.ramp_epochs=9", "--loss.intra_cosine.weight=1", "--loss.intra_cosine.phase=terminal"],
        ["etf", "--tpt.target=clean_subset", "--data.label_noise=0.2"],
    ],
)
def test_a_key_that_is_read_is_not(words):
    assert idle_notes(parse(words)) == []


def test_the_note_comes_before_the_first_epoch(tmp_path, capsys):
    words = ["baseline", "--tpt.max_epochs=1", "--data.train_size=200", "--adversarial.steps=3", f"--out={tmp_path}"]
    assert main([*words, "--data.root=my_images"]) == 0
    said = capsys.readouterr().err
    assert "note: adversarial.steps=3 changes nothing: adversarial.epsilon is 0\n" in said
    assert "note: data.root=my_images is not read: data.name=digits needs none; --data.name folder reads it\n" in said
