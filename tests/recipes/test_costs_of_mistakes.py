"""Costs of mistakes: the file by class names, training with them, the expected cost in both reports."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from recipes.core.cli import parse
from recipes.core.config import AdversarialConfig, TermConfig
from recipes.core.costs import read_costs
from recipes.core.errors import UserError
from recipes.data.augment import Batch
from recipes.evaluate import main as evaluate
from recipes.evaluation.console_table import table
from recipes.evaluation.decisions import Decisions
from recipes.evaluation.options import parse_options
from recipes.evaluation.presets import Preset, Settings
from recipes.evaluation.run import evaluate_run
from recipes.evaluation.run_under_test import RunUnderTest
from recipes.study.trials import config_hash, dotted_config
from recipes.train import main, train
from recipes.training.adversarial import attacked
from recipes.training.loss_terms import build_terms
from recipes.training.run_dir import RunDir

NAMES = ("cat", "dog", "car")
MATRIX = [[0.0, 1.0, 9.0], [1.0, 0.0, 5.0], [2.0, 1.0, 0.0]]
AS_CSV = "true,dog,car,cat\ncar,1,0,2\ncat,1,9,\ndog,0,5,1\n"
AS_YAML = "default: 1\ncat: {car: 9}\ndog: {car: 5}\ncar: {cat: 2}\n"


def written(folder, text, name="costs.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name, text", [("costs.csv", AS_CSV), ("costs.yaml", AS_YAML), ("bom.csv", "\ufeff" + AS_CSV)])
def test_both_kinds_of_file_give_the_matrix_in_the_order_of_the_classes(tmp_path, name, text):
    assert read_costs(written(tmp_path, text, name), NAMES).tolist() == MATRIX


def test_names_that_yaml_reads_as_numbers_are_names(tmp_path):
    found = read_costs(written(tmp_path, "default: 2\n0: {1: 7}\n"), ("0", "1"))
    assert found.tolist() == [[0, 7], [2, 0]]


def test_a_class_may_be_called_default(tmp_path):
    found = read_costs(written(tmp_path, "default: {cat: 3}\ncat: {default: 4}\n"), ("cat", "default"))
    assert found.tolist() == [[0, 4], [3, 0]]


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("a.yaml", "cat: {dgo: 9}\n", r"unknown class dgo.*did you mean dog"),
        ("a.yaml", "cat: {dog: -9}\n", r"the cost of taking cat for dog is -9: must be finite, not negative"),
        ("a.yaml", "default: 1\ncat: {dgo: 9}\n", r"unknown class dgo.*did you mean dog.*the data has cat, dog, car"),
        ("a.yaml", "cat: {car: 9}\n", r"no cost for cat -> dog, dog -> cat, dog -> car, car -> cat, car -> dog"),
        ("a.yaml", "default: 1\ncat: {car: -2}\n", r"taking cat for car is -2: must be finite, not negative"),
        ("a.yaml", "default: 1\ncat: {car: .inf}\n", r"taking cat for car is inf"),
        ("a.yaml", "default: 1\ncat: {cat: 2}\n", r"taking cat for cat, which is right, is 2: must be 0"),
        ("a.yaml", "default: 1\ncat: {car: 1}\ncat: {dog: 2}\n", r"line 3: cat is named twice"),
        ("a.yaml", "default: 1\nno: {cat: 1}\n", r"YAML reads a class as False"),
        ("a.yaml", "default: 1\ncat: {car: much}\n", r"taking cat for car is 'much', not a number"),
        ("a.yaml", "default: 0\n", r"no mistake costs anything"),
        ("a.yaml", "- 1\n", r"must map true classes"),
        ("a.yaml", "cat: [", r"a.yaml: while parsing"),
        ("a.csv", "true,cat,dog,car\ncat,0,1,9\ndog,1,0,5\n", r"2 rows and 3 columns, car in one of them alone"),
        ("a.csv", "true,cat,dog\ncat,0,1\ndog,1,0\n", r"no cost for cat -> car, dog -> car, car -> cat, car -> dog"),
        ("a.csv", "true,cat,cat\ncat,0,1\ndog,1,0\n", r"the first row names cat twice"),
        ("a.csv", "true,cat,dog,car\ncat,0,1\ndog,1,0,5\ncar,1,1,0\n", r"the row of cat has 2 costs for 3 classes"),
        ("a.csv", "", r"needs the predicted classes in the first row"),
        ("a.txt", "", r"must end in .csv, .yaml or .yml"),
    ],
)
def test_wrong_files_are_refused_by_name(tmp_path, name, text, said):
    with pytest.raises(UserError, match=said):
        read_costs(written(tmp_path, text, name), NAMES)


def test_a_file_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        read_costs(tmp_path / "gone.yaml", NAMES)
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        read_costs(tmp_path / "bytes.csv", NAMES)


# ---- training


@pytest.mark.parametrize("soft", [False, True])
def test_the_attack_raises_the_expected_cost_to_its_closed_form(soft):
    """Two classes of an affine model: M[y,j]·p_j grows along w_j − w_y alone, whatever M; to the corner of the cube."""
    weight = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images = torch.full((4, 1, 3, 3), 0.5, dtype=torch.float64)
    target = torch.tensor([0, 1, 0, 1])
    given = torch.eye(2, dtype=torch.float64)[target] if soft else target
    config = AdversarialConfig(epsilon=0.1, steps=30, step_size=0.02, loss="cost")
    cost = torch.tensor([[0.0, 3.0], [0.5, 0.0]])
    model = lambda x: x.flatten(1) @ weight.T  # noqa: E731
    found = attacked(model, Batch(images, given, target), torch.zeros_like(images), config, cost)
    uphill = (weight[1 - target] - weight[target]).sign().view_as(images)
    torch.testing.assert_close(found, images + 0.1 * uphill)


def test_costs_choose_where_the_attack_goes():
    """Three classes on two pixels: from class 0 the dear class lies along the first, the cheap one along the second."""
    weight = torch.tensor([[0.0, 0.0], [3.0, -1.0], [-1.0, 3.0]], dtype=torch.float64)
    model = lambda x: x.flatten(1) @ weight.T  # noqa: E731
    images = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64)
    config = AdversarialConfig(epsilon=0.2, steps=20, loss="cost")
    for dear, wanted in ((1, [0.7, 0.3]), (2, [0.3, 0.7])):
        cost = 1.0 - torch.eye(3)
        cost[0, dear] = 50
        batch = Batch(images, torch.tensor([0]), torch.tensor([0]))
        found = attacked(model, batch, torch.zeros_like(images), config, cost)
        torch.testing.assert_close(found.flatten().tolist(), wanted)


def test_the_loss_takes_the_costs_of_the_file():
    counts, cost = torch.ones(3), torch.tensor(MATRIX)
    (term,) = build_terms({"expected_cost": TermConfig()}, class_counts=counts, num_features=4, cost=cost)
    assert float(term({"logits": torch.zeros(1, 3), "target": torch.tensor([0])})) == pytest.approx(10 / 3)
    with pytest.raises(UserError, match="loss.expected_cost.args"):
        build_terms({"expected_cost": TermConfig()}, class_counts=counts, num_features=4)


def test_costs_without_use_and_use_without_costs_are_refused(tmp_path):
    file = str(written(tmp_path, AS_YAML))
    for words, said in (
        (["adversarial", "--adversarial.loss", "cost"], "data.cost FILE names them"),
        (["baseline", "--data.cost", file], "nothing uses it in training"),
        (
            ["baseline", "--adversarial.loss", "cost", "--data.cost", file],
            "nothing is attacked at adversarial.epsilon=0",
        ),
        (
            ["baseline", "--data.cost", file, "--loss", '{"expected_cost": {"args": {"cost": [[0, 1], [1, 0]]}}}'],
            "has a cost of its own",
        ),
    ):
        with pytest.raises(UserError, match=said):
            parse(words)


def test_the_hash_of_a_run_follows_what_the_file_says_not_where_it_lies(tmp_path):
    def hashed(path):
        return config_hash(
            dotted_config(parse(["adversarial", "--adversarial.loss", "cost", "--data.cost", str(path)]))
        )

    one, other = written(tmp_path, AS_YAML), written(tmp_path, AS_YAML, "elsewhere.yaml")
    changed = written(tmp_path, AS_YAML + "# and\n", "changed.yaml")
    assert hashed(one) == hashed(other) != hashed(changed)
    assert config_hash(dotted_config(parse(["adversarial"]))) != hashed(one)


SHORT = ["--data.train_size", "128", "--data.batch_size", "64", "--quiet", "true", "--tpt.max_epochs", "1"]


def test_a_run_keeps_the_costs_that_it_was_trained_with(tmp_path, capsys):
    file = written(tmp_path, "default: 1\n3: {8: 20}\n")
    words = ["adversarial", *SHORT, "--adversarial.steps", "1", "--adversarial.loss", "cost", "--out", str(tmp_path)]
    run = train(parse([*words, "--data.cost", str(file)]))
    (kept,) = RunDir(run).code().values()
    assert kept.read_text() == file.read_text()
    plain = train(parse([word if word != "cost" else "cross_entropy" for word in words]))
    losses = [json.loads((path / "history.jsonl").read_text())["loss"] for path in (run, plain)]
    assert losses[0] != losses[1]
    assert main([*words, "--data.cost", str(written(tmp_path, "default: 1\n3: {x: 2}\n", "x.yaml"))]) == 2
    assert "data.cost" in (said := capsys.readouterr().err) and "unknown class x" in said and "Traceback" not in said


# ---- reports


def test_costs_of_decisions_by_numpy():
    generator = torch.Generator().manual_seed(1)
    logits, target = 2 * torch.randn(50, 3, generator=generator), torch.randint(0, 3, (50,), generator=generator)
    seen = Decisions(3, torch.tensor(MATRIX, dtype=torch.float64))
    for part in range(0, 50, 20):
        seen.add(logits[part : part + 20], target[part : part + 20])
    z, y, m = logits.double().numpy(), target.numpy(), np.array(MATRIX)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    cheapest = np.array([min(range(3), key=lambda j: sum(row[c] * m[c, j] for c in range(3))) for row in p])
    measures = seen.measures()
    assert measures["expected_cost"] == pytest.approx(np.mean([row @ m[c] for row, c in zip(p, y, strict=True)]))
    assert measures["decision_cost"] == pytest.approx(m[y, z.argmax(1)].mean())
    assert measures["cheapest_decision_cost"] == pytest.approx(m[y, cheapest].mean())
    assert measures["cheapest_decision_accuracy"] == pytest.approx((cheapest == y).mean())
    assert "expected_cost" not in Decisions(3).__dict__ and not Decisions(3).costs


def test_costs_go_with_the_part_that_uses_them(tmp_path):
    with pytest.raises(UserError, match="the part adversarial alone uses it"):
        parse_options(["RUN", "--parts", "calibration", "--cost", str(written(tmp_path, AS_YAML))], None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    words = ["etf", *SHORT, "--data.image_size", "28", "--out", str(tmp_path_factory.mktemp("runs"))]
    return train(parse(words))


def test_the_report_says_what_attacked_mistakes_cost(run, tmp_path):
    preset = Preset("quick", attacked=20, curve=10, distances=10, corrupted=10, features=50, outside=10, draws=1)
    file = written(tmp_path, "default: 1\n3: {8: 20}\n4: {9: 30}\n")
    settings = Settings(preset, epsilon=0.05, sets=(), cost=file)
    found, folder = evaluate_run(run, settings, evaluations=["adversarial"], out="costs", quiet=True)
    costs, cost = found.parts["adversarial"]["costs"], read_costs(file, tuple("0123456789"))
    assert costs["expected"] >= costs["expected_clean"] and costs["decided"] >= costs["decided_clean"]
    confusion = torch.tensor(costs["confusion"])
    assert costs["decided"] == pytest.approx(float((confusion * cost).sum() / 20))
    tested = RunUnderTest.open(run, device="cpu")
    images, target = tested.images(tested.held_out(20))
    with torch.no_grad():
        p = tested.model(images).double().softmax(1)
    assert costs["expected_clean"] == pytest.approx(float((p * cost[target]).sum(1).mean()), rel=1e-5)
    for pair, (y, j) in zip(costs["pairs"], ((4, 9), (3, 8)), strict=True):
        count = int((target == y).sum())
        assert (pair["true"], pair["predicted"], pair["images"]) == (str(y), str(j), count)
        assert pair["robust"] == pytest.approx(1 - float(confusion[y, j]) / count)
    assert "4 not for 9 (30)" in table(found) and "expected cost, clean and attacked" in table(found)
    with pytest.raises(UserError, match="was made with cost='.*', now it is None"):
        evaluate_run(run, replace(settings, cost=None), evaluations=["adversarial"], out="costs", quiet=True)
    with pytest.raises(UserError, match="unknown class cat"):
        bad = written(tmp_path, "default: 1\ncat: {8: 20}\n", "bad.yaml")
        evaluate_run(run, replace(settings, cost=bad), evaluations=["adversarial"], out="costs", quiet=True)


def test_evaluate_says_what_mistakes_cost(run, tmp_path, capsys):
    file = written(tmp_path, "default: 1\n3: {8: 20}\n")
    assert evaluate([str(run), "--cost", str(file), "--train-images", "0", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    result = json.loads(next(run.glob("evaluation-*.json")).read_text())
    cost = read_costs(file, tuple("0123456789")).numpy()
    assert result["decision_cost"] == pytest.approx((np.array(result["confusion"]) * cost).sum() / result["images"])
    assert f"{result['expected_cost']:.4f}" in said and "accuracy of the cheapest decisions" in said
    assert evaluate([str(run), "--cost", str(tmp_path / "gone.csv"), "--device", "cpu"]) == 2
    assert "there is no file" in capsys.readouterr().err
