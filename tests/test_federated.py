"""The federated example and its study: division, averaging, and tests against references written differently."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from benchmarks.studies import federated as study

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "studies" / "federated-cpu.json"


@pytest.mark.parametrize("alpha", [0.05, 0.5, 1e6])
def test_every_image_goes_to_one_client_by_dirichlet_proportions(alpha):
    target = torch.arange(4000) % 4
    shares = []
    for seed in range(30):
        rows = study.example.divide(target, 5, alpha, seed)
        assert torch.equal(torch.cat(rows).sort().values, torch.arange(4000))
        shares += [target[part].bincount(minlength=4).numpy() / 1000 for part in rows]
    shares = np.array(shares)
    assert shares.mean() == pytest.approx(0.2, abs=1e-9)
    variance = 0.2 * 0.8 / (5 * alpha + 1)  # of one proportion of Dirichlet(alpha, …, alpha)
    assert shares.var() == pytest.approx(variance, rel=0.25, abs=1e-6)


def test_the_shared_model_is_the_weighted_mean():
    first, second = (study.example.build("linear", "batch", seed) for seed in (0, 1))
    mean = study.example.mean_state([first.state_dict(), second.state_dict()], [3, 1])
    for name, value in mean.items():
        expected = 0.75 * first.state_dict()[name].double() + 0.25 * second.state_dict()[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    frame = study.example.build("etf", "none", 0)
    same = study.example.mean_state([frame.state_dict()] * 3, [1, 5, 2])
    assert all(torch.allclose(same[name], value, atol=1e-7) for name, value in frame.state_dict().items())


def test_one_client_is_plain_training():
    example = study.example
    found = list(example.federated_averaging("linear", "none", adjusted=False, alpha=1.0, seed=3, rounds=2, clients=1))
    images, target, test_images, test_target = example.data(3)
    (rows,) = example.divide(target, 1, 1.0, 3)
    model = example.build("linear", "none", 3)
    for accuracy in found:
        model = copy.deepcopy(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p.ndim > 1]
        optimizer.add_param_group({"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0})
        for batch in torch.randperm(len(rows)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows][batch]), target[rows][batch]).backward()
            optimizer.step()
        predicted = model.eval()(test_images).argmax(1)
        assert accuracy == pytest.approx(float((predicted == test_target).double().mean()), abs=1e-9)
        model.train()


def test_the_tests_of_the_contrasts():
    generator = np.random.default_rng(0)
    drawn = {str(a): {arm: list(generator.random(10)) for arm in study.ARMS} for a in study.ALPHAS}
    drawn["0.1"]["linear, batch, plain"] = [value + 2 for value in drawn["0.1"]["linear, none, plain"]]
    drawn["0.1"]["linear, batch, plain"][0] += 0.01
    rows = study.tests(drawn)
    assert len(rows) == 15
    for row in rows:
        ours, theirs = (drawn[str(row["alpha"])][arm] for arm in study.CONTRASTS[row["contrast"]])
        expected = stats.ttest_rel(ours, theirs)
        assert row["p"] == pytest.approx(expected.pvalue, rel=1e-6)
        interval = expected.confidence_interval()
        assert (row["low"], row["high"]) == pytest.approx((100 * interval.low, 100 * interval.high), rel=1e-6)
        assert row["p_holm"] >= row["p"]
    best = next(row for row in rows if row["contrast"].endswith("no last norm") and row["alpha"] == 0.1)
    assert best["verdict"] == "better" and best["difference"] == pytest.approx(200.1)


@pytest.mark.skipif(not RESULTS.is_file(), reason="the study has not ended")
def test_the_page_says_what_the_results_say():
    (content,) = json.loads(RESULTS.read_text())["settings"]
    assert study.table(content) in (ROOT / "docs" / "evidence.md").read_text()
    assert content["tests"] == study.tests(content["accuracy"])
    known = content["search"]
    assert study.chosen_rates(known) == content["rates"]
