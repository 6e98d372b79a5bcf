"""recipes/robustness.py --split val: its numbers by hand, and no test image looked at."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from test_robustness_recipe import SETTINGS, run_in, short_attacks  # noqa: F401, a fixture

import recipes.evaluation.run_under_test as run_under_test_module
from ncreg import robustness
from ncreg.checkpoint import load_classifier
from recipes.core.cli import parse
from recipes.core.errors import UserError
from recipes.data.load import load
from recipes.data.split import Split, as_floats, stratified
from recipes.evaluation.console_table import table
from recipes.evaluation.evaluations import halves
from recipes.evaluation.options import folder_name
from recipes.evaluation.run import evaluate_run
from recipes.study.records import evaluation_results
from recipes.study.spec import Evaluations


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_in(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def on_validation(run):
    """The run evaluated on its validation images, every test image of every set replaced by noise."""
    honest = run_under_test_module.load

    def spoilt(*args, **more):
        data = honest(*args, **more)
        noise = torch.randint(0, 256, data.test.images.shape, dtype=torch.uint8)
        return replace(data, test=Split(noise, data.test.target.flip(0)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_under_test_module, "load", spoilt)
        return evaluate_run(run, replace(SETTINGS, sets=("mnist5k",)), split="val", quiet=True)


def test_validation_images_give_the_numbers_by_hand(run, on_validation):
    found, folder = on_validation
    assert folder.name == "robustness-val" and found.about.split == "val"
    config = parse(["--config", str(run / "config.yaml")])
    data, model = load(config.data, seed=0, image_size=lambda native: 28), load_classifier(run)
    images, target = as_floats(data.val.images), data.val.target
    with torch.no_grad():
        logits = model(images).double()
    summary = json.loads((run / "summary.json").read_text())
    assert found.parts["terminal_phase"]["before"] == pytest.approx(summary["at_onset"]["val"]["accuracy"], abs=1e-12)
    assert found.parts["terminal_phase"]["after"] == pytest.approx(summary["at_end"]["val"]["accuracy"], abs=1e-12)
    assert found.parts["terminal_phase"]["images"] == len(target)

    # The temperature of one half, put to the test on the other half.
    fit, held = halves(target, 0)
    ours = found.parts["calibration"]
    assert torch.equal(torch.cat([fit, held]).sort().values, torch.arange(len(target)))
    assert ours["samples"] == len(held) and ours["validation_images"] == len(fit)
    assert "half" in ours["temperature_from"]
    nll = [float(torch.nn.functional.cross_entropy(logits[half], target[half])) for half in (held, fit)]
    assert abs(nll[0] - nll[1]) > 1e-4  # so that the two cannot be taken for each other
    assert ours["before"]["nll"] == pytest.approx(nll[0], rel=1e-6)
    scaled = [
        float(torch.nn.functional.cross_entropy(logits[fit] / (ours["temperature"] * factor), target[fit]))
        for factor in (0.99, 1, 1.01)
    ]
    assert scaled[1] == min(scaled)

    drawn = stratified(data.val, 12, seed=0, what="")
    few = as_floats(drawn.images), drawn.target
    assert found.parts["distances"]["rho"] == pytest.approx(robustness.deepfool(model, few[0]).rho, rel=1e-12)
    corrupted = robustness.corruption_accuracy(model, *few, seed=0)
    assert found.parts["corruptions"]["accuracy"] == corrupted.accuracy.tolist()
    clean = float((model(few[0]).argmax(1) == few[1]).double().mean())
    assert found.parts["adversarial"]["rows"][0]["accuracy"] == pytest.approx(clean, abs=1e-12)
    assert found.parts["adversarial"]["curve"]["accuracy"][0] == pytest.approx(clean, abs=1e-12)


def test_no_test_image_is_looked_at_with_validation_images(run, on_validation, tmp_path):
    """Bit for bit the same whether the test images of all sets are noise or themselves."""
    copy = tmp_path / run.name
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("robustness*"))
    parts = ["calibration", "ood", "transfer", "terminal_phase"]  # the test above holds the others by hand
    found, _ = evaluate_run(copy, replace(SETTINGS, sets=("mnist5k",)), evaluations=parts, split="val", quiet=True)
    assert found.parts == {name: on_validation[0].parts[name] for name in parts}
    assert "validation images" in (text := table(on_validation[0])) and " test " not in text


def test_splits_are_never_mixed_and_studies_read_the_one_they_asked_for(run, on_validation):
    tested = evaluate_run(run, SETTINGS, evaluations=["distances"], quiet=True)
    with pytest.raises(UserError, match=r"split='test', now it is 'val': --out NAME keeps both"):
        evaluate_run(run, SETTINGS, split="val", out="robustness", quiet=True)
    for args, (found, _) in (([], tested), (["--split", "val"], on_validation)):
        read = evaluation_results(run, Evaluations(args=args))["last"]
        assert read["parts"]["distances"] == found.parts["distances"]
    assert folder_name("onset", "val") == "robustness-onset-val"


@pytest.mark.parametrize("sizes", [(1, 7, 4), (3, 3, 1), (2,), (1,) * 6])
def test_halves_share_every_class(sizes):
    target = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    first, second = halves(target, 5)
    assert torch.equal(torch.cat([first, second]).sort().values, torch.arange(len(target)))
    counts = [torch.bincount(target[half], minlength=len(sizes)) for half in (first, second)]
    assert int((counts[0] - counts[1]).abs().max()) <= 1 and abs(len(first) - len(second)) <= 1
