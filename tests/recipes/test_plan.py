"""train.py --plan refuses what training refuses, in the same words, before it prints or writes anything."""

import pytest

from recipes.train import main

REFUSED = {
    "norm": ["--model.norm", "nonorm"],
    "head": ["--model.head_args.colour", "1"],
    "geometry": ["--model.project", "3"],
    "weights": ["--model.weights", "nope.pth"],
    "start": ["--start-from", "nope"],
    "loss": ["--loss.ntcee.weight", "1"],
    "loss argument": ["--loss.cross_entropy.args.tau", "1"],
    "loss that cannot be computed": ["--loss.cross_entropy.args.reduction", "none"],
    "image size": ["--model.backbone", "densenet121", "--data.image_size", "8"],
    "frozen": ["--model.norm", "none", "--model.freeze_epochs", "1"],
    "stop measure": ["--tpt.stop_patience", "3", "--tpt.stop_measure", "nc77"],
    "shift": ["--augment.crop", "32"],
    "batch": ["--data.batch_size", "5000"],
    "measured images": ["--measure_size", "2"],
    "layer measure": [
        *("--extra_measures", "[condensation]", "--model.norm", "none"),
        *("--model.backbone", "test_vit", "--model.model_args", "{img_size: 32}", "--data.image_size", "32"),
    ],
    "set": ["--data.name", "digitz"],
    "hook": ["--on_epoch", "nope.py:log"],
}


@pytest.mark.parametrize("words", REFUSED.values(), ids=REFUSED)
def test_the_plan_refuses_what_training_refuses(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = []
    for plan in ([], ["--plan"]):
        assert main(["etf", *words, *plan]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and not list(tmp_path.iterdir())
        said.append(printed.err)
    assert said[0] == said[1] and said[0].startswith("error: ") and said[0].count("\n") == 1


@pytest.mark.parametrize("name", ["folder", "timm:torch/image_folder"])
def test_where_the_images_are_not_the_plan_shows_rates_and_says_that_nothing_was_tried_out(name, tmp_path, capsys):
    words = ["--data.name", name, "--data.root", str(tmp_path / "images"), "--out", str(tmp_path)]
    assert main(["etf", "--plan", *words]) == 0
    printed = capsys.readouterr()
    assert "zero error" in printed.out and printed.err.endswith("; so model and loss were not tried out\n")
    assert main(["etf", *words]) == 2
