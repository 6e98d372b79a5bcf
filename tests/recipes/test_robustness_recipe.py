"""recipes/robustness.py on small runs: parts held against direct computations, files, resuming, refusals."""

import json
import math
import shutil
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import recipes.evaluation.run_under_test as run_under_test_module
from ncreg import robustness
from ncreg.checkpoint import load_classifier
from ncreg.models import Classifier
from ncreg.quantization import round_weights
from recipes.core.cli import parse
from recipes.core.errors import UserError
from recipes.core.files import environment, locked
from recipes.data.load import load
from recipes.data.split import Split, as_floats
from recipes.evaluation import console_table
from recipes.evaluation.console_table import table, whole
from recipes.evaluation.evaluations import EVALUATIONS, turned
from recipes.evaluation.label_evaluations import label_noise, long_tail, no_threshold, true_classes
from recipes.evaluation.options import number, parse_options
from recipes.evaluation.presets import PRESETS, NotAvailable, Preset, Settings
from recipes.evaluation.results import SCHEMA, Result, plain
from recipes.evaluation.run import evaluate_run
from recipes.evaluation.run_under_test import RunUnderTest, with_channels
from recipes.robustness import main, newest_run
from recipes.train import train
from recipes.training import metrics
from recipes.training.build import build_model

TINY = Preset("quick", attacked=12, curve=12, distances=12, corrupted=12, features=150, outside=40, draws=2)
SETTINGS = Settings(TINY, epsilon=0.05, sets=())
SHORT = ["--data.train_size", "256", "--data.batch_size", "64", "--quiet", "true", "--tpt.min_terminal", "2"]


@pytest.fixture(scope="module", autouse=True)
def short_attacks():
    """The command is tried here: the attacks, with as many steps as are published, have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ncreg.robustness.adversarial.report.run_autoattack", partial(robustness.autoattack, steps=8))
        patch.setattr(robustness, "minimum_norm", partial(robustness.minimum_norm, steps=4))
        yield


def run_in(out, *more, recipe="etf"):
    """A threshold below chance: the onset comes, whatever this version of torch draws from a seed."""
    return train(parse([recipe, *SHORT, "--tpt.max_epochs", "4", "--tpt.threshold", "0.05", "--out", str(out), *more]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_in(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def result(run):
    return evaluate_run(run, SETTINGS, quiet=True)


def test_parts_agree_with_what_the_classifier_says(run, result):
    found, folder = result
    config = parse(["--config", str(run / "config.yaml")])
    data, model = load(config.data, seed=0, image_size=lambda native: 28), load_classifier(run)
    with torch.no_grad():
        logits = model(as_floats(data.test.images))
    right = (logits.argmax(1) == data.test.target).double().mean()
    summary = json.loads((run / "summary.json").read_text())
    assert found.parts["calibration"]["accuracy"] == pytest.approx(float(right), abs=1e-12)
    assert found.parts["calibration"]["accuracy"] == pytest.approx(summary["at_end"]["test"]["accuracy"], abs=1e-12)
    assert found.parts["terminal_phase"]["before"] == pytest.approx(summary["at_onset"]["test"]["accuracy"], abs=1e-12)
    nll = torch.nn.functional.cross_entropy(logits.double(), data.test.target)
    assert found.parts["calibration"]["before"]["nll"] == pytest.approx(float(nll), rel=1e-6)
    rows = found.parts["adversarial"]["rows"]
    assert rows[0]["name"] == "clean" and found.parts["adversarial"]["headline"]["accuracy"] <= min(
        row["accuracy"] for row in rows
    )
    assert found.parts["adversarial"]["curve"]["accuracy"][0] == rows[0]["accuracy"]
    least = found.parts["distances"]["minimum_norm"]
    assert (least["median"] > 0) == (rows[0]["correct"] > TINY.distances / 2) and found.parts["distances"]["rho"] > 0
    assert least["clean_correct"] == rows[0]["correct"]
    assert set(found.parts["ood"]["groups"]) == {"uniform", "gaussian", "shuffle"}
    assert set(found.parts["transfer"]["tasks"]) == {"quarter_turns"}
    assert set(found.skipped) == {"long_tail", "label_noise"}
    assert {path.stem for path in (folder / "figures").glob("*.png")} == {
        *("adversarial", "adversarial-margins", "bits", "calibration", "corruptions", "ood")
    }


def test_large_images_are_taken_a_few_at_a_time_with_the_same_results(run, result, monkeypatch):
    """256 images of 224 by 224 and their gradients need tens of gigabytes of a ResNet-50."""
    most, forward = [], Classifier.forward

    def counted(model, x, *args, **options):
        most.append(len(x))
        return forward(model, x, *args, **options)

    monkeypatch.setattr(Classifier, "forward", counted)
    monkeypatch.setattr(metrics, "PIXELS", dict.fromkeys(metrics.PIXELS, 5 * 28 * 28))
    parts = ["adversarial", "corruptions", "distances", "calibration", "ood", "transfer"]
    found, _ = evaluate_run(run, SETTINGS, evaluations=parts, out="few", quiet=True)
    assert max(most) == 5
    whole = result[0].parts
    assert found.parts["corruptions"] == whole["corruptions"]
    for key in ("rho", "failures"):
        assert found.parts["distances"][key] == pytest.approx(whole["distances"][key], rel=1e-4)
    theirs = {row["name"]: row["correct"] for row in whole["adversarial"]["rows"]}
    assert {row["name"]: row["correct"] for row in found.parts["adversarial"]["rows"]}.keys() == theirs.keys()
    assert found.parts["adversarial"]["curve"] == whole["adversarial"]["curve"]
    assert found.parts["calibration"]["before"]["nll"] == pytest.approx(whole["calibration"]["before"]["nll"], rel=1e-6)


def fake_quantized(model, bits):
    """Every kernel, matrix and class vector through torch's fake quantization, one scale a row.

    Halfway between two levels, up to the rounding of float32, both are right, and torch's choice is that of its
    product with 1/scale: there, and only there, the level of `round_weights` is taken.
    """
    largest, ours = 2 ** (bits - 1) - 1, round_weights(model, bits).state_dict()
    names = {name for name, value in model.state_dict().items() if name.endswith("weight") and value.ndim > 1}
    for name, value in model.state_dict().items():
        if name in names:
            scale = value.flatten(1).abs().amax(1).clamp_min(1e-30) / largest
            zeros = torch.zeros(len(scale), dtype=torch.int32)
            theirs = torch.fake_quantize_per_channel_affine(value.contiguous(), scale, zeros, 0, -largest, largest)
            steps = value.double() / scale.double().view(-1, *[1] * (value.ndim - 1))
            halfway = ((steps.abs() % 1) - 0.5).abs() < 1e-5
            assert halfway.sum() <= 1 + value.numel() // 1000
            assert ((ours[name] / scale.view(-1, *[1] * (value.ndim - 1)) - steps).abs() < 0.5 + 1e-4).all()
            value.copy_(torch.where(halfway, ours[name], theirs))
    return names


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_few_bits_are_torchs_fake_quantization_of_every_weight(run, result, bits):
    found = result[0].parts["bits"]
    tested = RunUnderTest.open(run, device="cpu")
    before = {name: value.clone() for name, value in tested.model.state_dict().items()}
    (images, target), (train, own) = tested.images(tested.held_out(150)), tested.images(tested.draw("train", 150))
    with torch.no_grad():
        full = tested.model(images).argmax(1)
        names = fake_quantized(tested.model, bits)
        logits, (_, features) = tested.model(images), tested.model(train, with_features=True)
    assert set(found["rounded"]) == names and set(found["left"]) == {
        name for name, value in before.items() if value.is_floating_point() and name not in names
    }
    assert "head.weight" in names and found["head_rounded"]
    row, p = found["levels"][str(bits)], logits.double().softmax(1).numpy()
    right = (logits.argmax(1) == target).numpy()
    assert row["accuracy"] == right.mean() and row["agreement"] == (logits.argmax(1) == full).double().mean()
    assert row["change"] == pytest.approx(right.mean() - (full == target).double().mean().item(), abs=1e-12)
    place = np.ceil(p.max(1) * 15).astype(int)
    gaps = [abs(right[place == b].mean() - p.max(1)[place == b].mean()) * (place == b).mean() for b in set(place)]
    assert row["ece"] == pytest.approx(sum(gaps), abs=1e-6)
    h, y = features.double().numpy(), own.numpy()
    means = np.stack([h[y == c].mean(0) for c in range(10)])
    within = (h - means[y]).T @ (h - means[y]) / len(h)
    centred = means - means.mean(0)
    between = np.linalg.pinv(centred.T @ centred / 10, rcond=1e-9)
    assert row["nc1"] == pytest.approx(np.trace(within @ between) / 10, rel=1e-4)


def test_few_bits_leave_the_model_and_say_what_they_cannot_round(run):
    tested = RunUnderTest.open(run, device="cpu")
    before = {name: value.clone() for name, value in tested.model.state_dict().items()}
    found, _ = EVALUATIONS["bits"](tested, SETTINGS)
    assert all(torch.equal(before[name], value) for name, value in tested.model.state_dict().items())
    assert found["levels"]["full"]["change"] == 0 and found["levels"]["full"]["agreement"] == 1
    assert found["numbers_rounded"] + found["numbers_left"] == sum(
        value.numel() for value in before.values() if value.is_floating_point()
    )
    torch.nn.utils.parametrizations.weight_norm(
        next(m for m in tested.model.modules() if isinstance(m, torch.nn.Conv2d))
    )
    with pytest.raises(NotAvailable, match="computes its weight from others"):
        EVALUATIONS["bits"](tested, SETTINGS)


def test_the_file_reads_back_and_the_table_shows_every_part(result):
    found, folder = result
    assert Result.read(folder / "results.json") == found
    text = table(found)
    assert "ROBUST ACCURACY" in text and "not done" in text and f"ε = {SETTINGS.epsilon:.4g}" in text
    for name, value in zip(found.parts["corruptions"]["names"], found.parts["corruptions"]["accuracy"], strict=True):
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [name]]
        assert line.split()[1:] == [f"{100 * share:.1f}" for share in value]


def test_the_same_again_does_nothing_and_elsewhere_gives_the_same_bits(run, result, tmp_path):
    _, folder = result
    before = (folder / "results.json").read_bytes()
    evaluate_run(run, SETTINGS, quiet=True)
    assert (folder / "results.json").read_bytes() == before
    copy = tmp_path / run.name
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("robustness"))
    again, _ = evaluate_run(
        copy, SETTINGS, quiet=True, evaluations=["ood", "adversarial", "corruptions", "transfer", "distances"]
    )
    assert {name: result[0].parts[name] for name in again.parts} == again.parts


def test_parts_are_done_one_by_one_and_what_is_there_stays(run, monkeypatch):
    calls = []
    for name in EVALUATIONS:
        monkeypatch.setitem(
            EVALUATIONS, name, lambda s, t, name=name: (calls.append(name), ({"n": len(calls)}, ["odd"]))[1]
        )
    monkeypatch.setattr("recipes.evaluation.run.draw", lambda *_, **__: None)
    first, _ = evaluate_run(run, SETTINGS, evaluations=["ood"], out="one-by-one", quiet=True)
    both, _ = evaluate_run(run, SETTINGS, evaluations=["ood", "calibration"], out="one-by-one", quiet=True)
    assert calls == ["ood", "calibration"] and both.parts["ood"] == first.parts["ood"]
    assert both.warnings == ["ood: odd", "calibration: odd"]
    third, _ = evaluate_run(run, SETTINGS, evaluations=["ood"], out="one-by-one", quiet=True, fresh=True)
    assert calls == ["ood", "calibration", "ood"] and third.parts == {"calibration": {"n": 2}, "ood": {"n": 3}}
    assert sorted(third.warnings) == ["calibration: odd", "ood: odd"]
    other, _ = evaluate_run(
        run, Settings(TINY, epsilon=0.3), evaluations=["ood"], out="one-by-one", quiet=True, fresh=True
    )
    assert set(other.parts) == {"ood"}


def test_a_part_that_another_commit_did_is_named_and_stays(run, monkeypatch, capsys):
    for name in ("ood", "calibration"):
        monkeypatch.setitem(EVALUATIONS, name, lambda s, t: ({"n": 1}, []))
    monkeypatch.setattr("recipes.evaluation.run.draw", lambda *_, **__: None)
    at_commit = {}
    monkeypatch.setattr(
        "recipes.evaluation.run.environment", lambda command: environment(command) | {"git_commit": at_commit["now"]}
    )

    def evaluate(commit, **more):
        at_commit["now"] = commit
        result, _ = evaluate_run(run, SETTINGS, **{"evaluations": ["ood"], "out": "commits", "quiet": True} | more)
        return result, capsys.readouterr().err

    assert evaluate("a" * 40)[1] == ""
    assert evaluate("a" * 40)[1] == ""
    assert evaluate(None)[1] == ""  # outside a repository nothing is known
    both, said = evaluate("b" * 40, evaluations=["ood", "calibration"])
    assert said == f"note: ood done before, at commit {'a' * 40}; --fresh repeats it\n"
    assert both.commits == {"ood": "a" * 40, "calibration": "b" * 40}
    _, said = evaluate("c" * 40, evaluations=["ood", "calibration"])
    assert "ood, calibration done before" in said and said.endswith("--fresh repeats them\n")
    assert evaluate("c" * 40, fresh=True)[1] == ""


def test_a_part_that_fails_is_one_line_and_keeps_the_parts_before(run, monkeypatch):
    def broken(tested, settings):
        raise ValueError("the model returns\nprobabilities")

    monkeypatch.setitem(EVALUATIONS, "ood", broken)
    monkeypatch.setattr("recipes.evaluation.run.draw", lambda *_, **__: None)
    with pytest.raises(UserError, match="part ood: the model returns probabilities"):
        evaluate_run(run, SETTINGS, evaluations=["ood", "calibration"], out="failing", quiet=True)
    assert set(Result.read(run / "failing" / "results.json").parts) == {"calibration"}


def test_other_settings_never_overwrite(run, result):
    other = Settings(TINY, epsilon=0.1, sets=())
    with pytest.raises(UserError, match=r"epsilon=0.05, now it is 0.1: --out NAME keeps both"):
        evaluate_run(run, other, quiet=True)
    with pytest.raises(UserError, match="has no checkpoint 'nothing'; there: best, last, onset, previous"):
        evaluate_run(run, SETTINGS, checkpoint="nothing", quiet=True)


def test_the_number_of_attacked_images_is_for_the_attacks_alone(run, result):
    settings = replace(SETTINGS, attacked=20)
    found, folder = evaluate_run(run, settings, evaluations=["adversarial", "calibration"], out="twenty", quiet=True)
    assert found.about.attacked == 20 and Result.read(folder / "results.json") == found
    assert found.parts["calibration"] == result[0].parts["calibration"]
    attacks, fewer = found.parts["adversarial"], result[0].parts["adversarial"]
    assert attacks["images"] == 20 and fewer["images"] == TINY.attacked
    assert attacks["curve"]["images"] == fewer["curve"]["images"] == TINY.curve
    with pytest.raises(UserError, match=r"attacked=20, now it is None"):
        evaluate_run(run, SETTINGS, out="twenty", quiet=True)
    tested = RunUnderTest.open(run)
    images, target = tested.images(tested.held_out(20))
    with torch.no_grad():
        right = int((load_classifier(run)(images).argmax(1) == target).sum())
    assert attacks["rows"][0]["name"] == "clean" and attacks["rows"][0]["correct"] == right


def test_the_onset_goes_into_a_folder_of_its_own(run):
    found, folder = evaluate_run(
        run, SETTINGS, checkpoint="onset", evaluations=["calibration", "terminal_phase"], quiet=True
    )
    assert folder.name == "robustness-onset" and set(found.skipped) == {"terminal_phase"}
    summary = json.loads((run / "summary.json").read_text())
    assert found.parts["calibration"]["accuracy"] == pytest.approx(summary["at_onset"]["test"]["accuracy"], abs=1e-12)


def test_only_the_parts_asked_for_are_shown_and_drawn(run, result, capsys):
    found, folder = result
    text = table(found, ["ood", "long_tail", "adversarial"])
    assert "out of distribution" in text and "corruptions (" not in text and "transfer of" not in text
    assert "long_tail: the training classes" in text and "label_noise:" not in text
    assert "kept from before, not shown: calibration, transfer, terminal_phase, bits, corruptions, distances" in text
    drawn = {path.stem: path.stat().st_mtime_ns for path in (folder / "figures").glob("*.png")}
    (folder / "figures" / "ood.png").unlink()
    evaluate_run(run, SETTINGS, evaluations=["ood"], quiet=True)
    again = {path.stem: path.stat().st_mtime_ns for path in (folder / "figures").glob("*.png")}
    assert {name for name in again if again[name] != drawn[name]} == {"ood"} and again.keys() == drawn.keys()


def test_a_figure_does_not_outlive_its_part(run):
    words = {"evaluations": ["corruptions"], "out": "figures-go", "quiet": True}
    _, folder = evaluate_run(run, SETTINGS, **words)
    assert (folder / "figures" / "corruptions.png").exists()
    evaluate_run(run, replace(SETTINGS, epsilon=0.1), **words | {"evaluations": ["terminal_phase"]}, fresh=True)
    assert not (folder / "figures" / "corruptions.png").exists()


@pytest.mark.parametrize(
    ("percent", "shown"),
    [(0, "0"), (0.3, "0.3"), (0.01, "0.1"), (49.6, "50"), (99.5, "99.5"), (99.97, "99.9"), (100, "100")],
)
def test_nothing_is_rounded_to_none_or_all(percent, shown):
    assert whole(percent) == shown


def test_files_from_before_the_split_was_recorded_are_of_test_images(result, tmp_path):
    content = json.loads((result[1] / "results.json").read_text())
    del content["about"]["split"]
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert Result.read(tmp_path / "results.json") == result[0]


def test_a_damaged_or_foreign_result_is_refused(tmp_path):
    path = tmp_path / "results.json"
    for text, said in (
        ("{", "is damaged .*: --fresh replaces it, --out NAME leaves it"),
        (json.dumps({"schema": SCHEMA + 1}), "has schema"),
        (json.dumps({"schema": SCHEMA, "about": {}, "parts": {}}), "needs the keys"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            Result.read(path)


def test_a_damaged_result_is_passed_by_with_fresh(run, capsys):
    words = [str(run), "--quick", "--quiet", "--parts", "terminal_phase", "--out", "damaged"]
    assert main(words) == 0
    path = run / "damaged" / "results.json"
    whole_text = path.read_bytes()
    for damaged in (whole_text[:200], b"", b"\xff" + whole_text):
        path.write_bytes(damaged)
        capsys.readouterr()
        assert main(words) == 2
        assert "--fresh replaces it" in (said := capsys.readouterr().err) and said.count("\n") == 1
        assert path.read_bytes() == damaged
        assert main([*words, "--fresh"]) == 0
        assert Result.read(path).parts["terminal_phase"] == json.loads(whole_text)["parts"]["terminal_phase"]
    path.write_text(json.dumps({"schema": SCHEMA + 1}))  # not ours to replace
    assert main([*words, "--fresh"]) == 2 and "move it away" in capsys.readouterr().err


def test_long_tailed_and_mislabelled_runs_get_their_parts(tmp_path):
    spoilt = ["--data.imbalance", "8", "--data.train_size", "900", "--data.label_noise", "0.25"]
    path = run_in(tmp_path, *spoilt, recipe="bn_wd")
    tested = RunUnderTest.open(path)
    found, _ = long_tail(tested, SETTINGS)
    clean = parse(["--config", str(path / "config.yaml"), "--data.label_noise", "0"]).data
    counts = load(clean, seed=0, image_size=lambda native: 28).class_counts()
    assert found["class_counts"].tolist() == counts.tolist() == torch.bincount(true_classes(tested)).tolist()
    assert found["label_counts"].tolist() == tested.data.class_counts().tolist() != counts.tolist()
    test = tested.outputs_on("test")
    right = test.logits.argmax(1) == test.target
    per_class = [float(right[test.target == label].double().mean()) for label in range(10)]
    assert found["test"].per_class == pytest.approx(per_class)
    assert found["test"].imbalance == pytest.approx(float(counts.max() / counts.min()))
    lines = console_table.long_tail(plain(found), "test")
    assert lines[1].endswith(f"(n = {len(right)})")
    for line, group in zip(lines[2:5], found["test"].groups.values(), strict=True):
        assert line.endswith(f"(n = {sum(int((test.target == label).sum()) for label in group.classes)})")
    assert found["minority_collapse"].threshold == pytest.approx(int(counts.sum()) * 2e-3 * 2e-3)
    assert found["minority_collapse"].smallest == int(tested.data.class_counts().min())
    noise, _ = label_noise(tested, SETTINGS)
    assert noise["num_wrong"] == round(0.25 * len(tested.data.train))
    assert noise["num_wrong"] == int((~tested.data.clean).sum())
    assert noise["label_accuracy"] == pytest.approx(
        float((tested.outputs_on("train").logits.argmax(1) == tested.data.train.target).double().mean())
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bn_wd"], None),
        (["etf"], "learned linear head"),
        (["normface"], "learned linear head"),
        (["baseline"], "last BatchNorm"),
        (["bn_wd", "--optim.name", "adamw"], "coupled"),
        (["bn_wd", "--optim.weight_decay", "0"], "coupled"),
    ],
)
def test_the_threshold_of_minority_collapse_only_where_the_theory_holds(run, words, said):
    tested = RunUnderTest.open(run)
    tested.config = parse(words)
    tested.model = build_model(tested.config.model, tested.data, seed=tested.config.seed)
    reason = no_threshold(tested)
    assert reason is None if said is None else said in reason


def test_a_run_on_clean_balanced_data_has_neither(run):
    tested = RunUnderTest.open(run)
    for part in (long_tail, label_noise):
        with pytest.raises(NotAvailable):
            part(tested, SETTINGS)


def test_a_missing_package_is_named_with_the_command_that_installs_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_ood.detector", None)
    with pytest.raises(NotAvailable, match=r'needs? pytorch-ood: pip install -e "\.\[robust\]"$'):
        EVALUATIONS["ood"](RunUnderTest.open(run), SETTINGS)
    monkeypatch.setattr("recipes.evaluation.evaluations.is_installed", lambda module: False)
    outcome, warnings = EVALUATIONS["adversarial"](RunUnderTest.open(run), SETTINGS)
    assert outcome["autoattack"] is None and warnings[-1].endswith('pyautoattack: pip install -e ".[robust]"')


def test_quarter_turns_are_numpys():
    images = torch.randint(0, 256, (11, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = turned(Split(images, torch.zeros(11, dtype=torch.long)), seed=4)
    for before, after, turns in zip(images.numpy(), found.images.numpy(), found.target.tolist(), strict=True):
        np.testing.assert_array_equal(after, np.rot90(before, turns, (1, 2)))
    assert torch.bincount(found.target, minlength=4).tolist() == [3, 3, 3, 2]


@pytest.mark.parametrize("count", [4, 7, 8])
def test_quarter_turns_are_probed_from_two_training_images_of_each_on(run, count):
    tested = RunUnderTest.open(run)
    tested.data = replace(tested.data, train=tested.data.train[torch.arange(count)])
    if count < 8:
        with pytest.raises(NotAvailable, match=f"quarter turns need 8 training images, there are {count}; and no"):
            EVALUATIONS["transfer"](tested, SETTINGS)
        return
    outcome, warnings = EVALUATIONS["transfer"](tested, SETTINGS)
    assert outcome["tasks"]["quarter_turns"]["linear"].num_train == 8 and not warnings


def test_other_sets_get_the_channels_and_size_of_the_run(run):
    tested = RunUnderTest.open(run)
    gray = Split(torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4), torch.zeros(1, dtype=torch.long))
    weights = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601
    expected = (gray.images[0].float() * weights[:, None, None]).sum(0)
    assert (with_channels(gray, 1).images[0, 0].float() - expected).abs().max() <= 1
    assert tested.other_set("digits", run).test.images.shape[1:] == (1, 28, 28)


def test_sets_of_the_runs_own_classes_are_not_out_of_distribution(run, monkeypatch):
    monkeypatch.setattr(run_under_test_module, "SETS", ("digits",))
    assert RunUnderTest.open(run).other_sets(None, run) == {}
    found, _ = EVALUATIONS["ood"](RunUnderTest.open(run), Settings(TINY, sets=("digits",)))
    assert set(found["groups"]) == {"uniform", "gaussian", "shuffle"}


@pytest.mark.parametrize("split", ["test", "val"])
def test_classes_held_out_of_training_are_the_near_images(tmp_path, split):
    """By scikit-learn's digits alone: the images of the classes 3 and 8, none of which the run has seen."""
    path = run_in(tmp_path, "--data.hold_out", "[3, 8]", "--tpt.max_epochs", "1")
    tested = RunUnderTest.open(path, split=split)
    assert tested.data.class_names == tuple("01245679") and tested.model.num_classes == 8
    unseen = tested.unseen_classes()
    assert sorted(unseen.target.tolist()) == sorted(c for c in load_digits().target if c in (3, 8))
    own = {image.numpy().tobytes() for part in ("train", "val", "test") for image in getattr(tested.data, part).read()}
    assert len(own) > 256 and not own & {image.numpy().tobytes() for image in unseen.read()}
    found, _ = EVALUATIONS["ood"](tested, SETTINGS)
    assert found["groups"]["held_out"] == "held_out" and set(found["mean_auroc"]) == {"held_out", "far"}
    assert found["mean_auroc"]["held_out"]["msp"] == found["detections"]["held_out"]["msp"].auroc


def test_a_run_on_all_classes_has_none_held_out(run):
    assert RunUnderTest.open(run).unseen_classes() is None


def test_results_hold_plain_values_only():
    assert plain({"a": (1, math.nan, torch.tensor([0.5, math.inf]))}) == {"a": [1, None, [0.5, None]]}
    with pytest.raises(TypeError, match=r"x\.y is a set"):
        plain({"y": {1}}, "x")
    with pytest.raises(TypeError, match="keep a summary"):
        plain(torch.zeros(100_001))


def test_quick_takes_fewer_of_large_images_and_says_so(tmp_path):
    quick, full = PRESETS["quick"], PRESETS["full"]
    for side in (8, 28, 32):
        assert quick.for_images(side, side) == quick
    assert full.for_images(224, 224) == full
    large = quick.for_images(160, 160)
    assert large == replace(
        quick, attacked=13, curve=13, distances=20, corrupted=40, features=400, outside=100, fraction=0.2
    )
    assert quick.for_images(64, 256) == quick.for_images(128, 128)
    assert quick.for_images(4096, 4096).attacked == 10
    assert replace(quick, attacked=4, curve=None).for_images(64, 64).attacked == 4

    path = run_in(tmp_path, "--data.image_size", "64", "--data.train_size", "64", "--data.batch_size", "32")
    found, _ = evaluate_run(path, Settings(TINY, sets=("mnist5k",)), evaluations=["transfer", "distances"], quiet=True)
    assert found.about.image_share == 0.5 and "50 % of the preset's number of images" in table(found)
    assert found.parts["distances"]["images"] == 10
    tasks = found.parts["transfer"]["tasks"]
    assert tasks["mnist5k"]["linear"]["num_train"] == 75 and tasks["mnist5k"]["linear"]["num_test"] == 500


def test_fractions_are_numbers():
    assert number("8/255") == 8 / 255 and number("0.5") == 0.5
    with pytest.raises(ValueError, match="divides by zero"):  # which argparse makes one line of
        number("1/0")


def test_two_evaluations_at_once_do_not_lose_each_others_parts(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("robustness*"))
    with locked(copy / "robustness"), pytest.raises(UserError, match="another evaluation is writing to .*robustness"):
        evaluate_run(copy, SETTINGS, evaluations=["calibration"], quiet=True)
    assert not (copy / "robustness" / "results.json").exists()
    assert list(evaluate_run(copy, SETTINGS, evaluations=["calibration"], quiet=True)[0].parts) == ["calibration"]


def test_the_curve_stays_within_the_range_of_images(run):
    found = EVALUATIONS["adversarial"](RunUnderTest.open(run), replace(SETTINGS, epsilon=0.3))[0]
    assert found["curve"]["epsilons"] == pytest.approx((0, 0.075, 0.15, 0.3, 0.6))


@pytest.mark.parametrize(
    ("counts", "size", "kept"),
    [((21,) * 10, 200, (20,) * 10), ((200, 100, 1), 75, (49, 25, 1)), ((200, 100, 4), 76, (50, 25, 1))],
)
def test_draws_keep_every_class_whatever_their_sizes(run, counts, size, kept):
    tested = RunUnderTest.open(run)
    target = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    split = Split(torch.arange(len(target)).to(torch.uint8).view(-1, 1, 1, 1), target)
    tested.data = replace(tested.data, test=split)
    drawn = tested.draw("test", size)
    assert torch.bincount(drawn.target).tolist() == list(kept)
    assert len(torch.unique(drawn.images.flatten() + 256 * drawn.target)) == len(drawn)
    assert torch.equal(tested.draw("test", size).images, drawn.images)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--parts", "nothing"], "--parts nothing is unknown: one of calibration"),
        (["--epsilon=-1/255"], "--epsilon -0.0039"),
        (["--epsilon", "nan"], "--epsilon nan"),
        (["--epsilon", "8"], "--epsilon 8.0: at most 1, in units of [0, 1]; 8/255?"),
        (["--attacked", "0"], "--attacked 0: must be at least one image"),
        (["--attacked", "361"], "has 360 test images"),
        (["--attacked", "9"], "--attacked 9: RUN has 360 test images of 10 classes, so 10 (one of each) to 360"),
        (["--attacked", "1.5"], "argument --attacked: invalid int value: '1.5'"),
        (["--epsilon", "8/0"], "argument --epsilon: invalid number value: '8/0'"),
        (["--norm", "l1"], "argument --norm: invalid choice: 'l1'"),
        (["--strange"], "--strange is unknown (--help lists the options)"),
        (["--checkpoint", "../checkpoints/last"], "no checkpoint '../checkpoints/last'"),
        (["--out", "../beside"], "--out '../beside': must be the name of a folder inside the run"),
        (["--out", "/tmp/elsewhere"], "--out '/tmp/elsewhere': must be the name"),
        (["--out", "checkpoints"], "--out checkpoints: RUN/checkpoints is there and is no evaluation"),
        (["--out", "config.yaml"], "--out config.yaml: RUN/config.yaml is there and is no evaluation"),
        (["--sets", "mnist5k, nothing"], "--sets 'nothing' is unknown: one of digits"),
        (["--sets", "mnist5k, nothing", "--fresh"], "--sets 'nothing' is unknown: one of digits"),
        (["--checkpoint", "third"], "no checkpoint 'third'"),
    ],
)
def test_wrong_commands_are_one_line(run, words, said, capsys):
    assert main([str(run), "--quick", "--quiet", "--out", "wrong", *words]) == 2
    printed = capsys.readouterr()
    assert said.replace("RUN", str(run)) in printed.err and printed.err.count("\n") == 1


def test_the_command_line_raises_what_a_caller_can_catch(capsys):
    for words in (["--nothing"], ["--attacked", "x"], ["--preset", "slow"], ["--out", "a/b"], ["--parts", ""]):
        with pytest.raises(UserError):
            parse_options(words)
    with pytest.raises(SystemExit) as end:
        parse_options(["--help"])
    assert end.value.code == 0 and "--attacked N" in capsys.readouterr().out


def test_the_runs_own_set_among_those_asked_for_is_told_of(run, capsys):
    settings = replace(SETTINGS, sets=("digits",))
    evaluate_run(run, settings, evaluations=["terminal_phase"], out="own-set", quiet=True)
    assert capsys.readouterr().err == "note: --sets digits is the run's own data: left out\n"


def test_what_cannot_be_written_and_a_stop_by_hand_are_one_line(run, monkeypatch, capsys):
    words = [str(run), "--quick", "--quiet", "--parts", "calibration", "--out"]
    assert main([*words, "x" * 300]) == 2
    assert "File name too long" in (said := capsys.readouterr().err) and said.count("\n") == 1

    def stopped(tested, settings):
        raise KeyboardInterrupt

    monkeypatch.setitem(EVALUATIONS, "calibration", stopped)
    assert main([*words, "stopped"]) == 130
    assert "parts that are done are kept" in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_a_folder_that_is_no_run_is_refused(tmp_path, monkeypatch, capsys):
    assert main([str(tmp_path), "--quick"]) == 2
    assert "is no run folder" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(["--quick"]) == 2
    assert "no finished run in runs" in capsys.readouterr().err


def test_without_a_run_the_newest_finished_one_is_taken(run):
    assert newest_run(run.parent) == run
