"""Out-of-distribution detection by layer: against hooks and scikit-learn by hand, the advice, models without layers."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from torch import nn

from ncreg.robustness import noise_images
from recipes.core.cli import parse
from recipes.evaluation.console_table import ood as lines_of
from recipes.evaluation.evaluations import ood
from recipes.evaluation.ood_layers import InnerLayers, advice
from recipes.evaluation.presets import PRESETS, Settings
from recipes.evaluation.results import plain
from recipes.evaluation.run_under_test import RunUnderTest
from recipes.robustness import main
from recipes.train import train

SMALL = ["--data.train_size", "256", "--data.batch_size", "64", "--tpt.max_epochs", "2", "--quiet", "true"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(parse(["two_spaces", *SMALL, "--out", str(tmp_path_factory.mktemp("runs"))]))


@pytest.fixture(scope="module")
def found(run):
    outcome, _ = ood(RunUnderTest.open(run, device="cpu"), Settings(PRESETS["quick"], sets=()))
    return outcome


def pooled(model, module, images):
    """What a module gives for images, averaged over positions, by a hook of one's own."""
    seen = []
    with torch.no_grad(), module.register_forward_hook(lambda _, inputs, output: seen.append(output)):
        model(images)
    rows = seen[0].double().numpy()
    return rows.mean(axis=(2, 3)) if rows.ndim == 4 else rows


@pytest.mark.parametrize("name", ["layer2", "encoder"])
def test_a_layers_auroc_is_that_of_its_own_nearest_neighbours(run, found, name):
    tested = RunUnderTest.open(run, device="cpu")
    module = tested.model.backbone if name == "encoder" else tested.model.backbone.layer2
    images = [tested.images(part)[0] for part in (tested.draw("train", 2000), tested.held_out(500))]
    noise = noise_images(images[1], "shuffle", seed=0)
    rows = [pooled(tested.model, module, part) for part in (*images, noise)]
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in rows]
    tree = NearestNeighbors(n_neighbors=found["neighbours"]).fit(unit[0])
    own, other = (-tree.kneighbors(part)[0][:, -1] for part in unit[1:])
    expected = roc_auc_score([1] * len(own) + [0] * len(other), np.concatenate([own, other]))
    assert found["by_layer"]["layers"][name]["auroc"]["shuffle"]["knn"] == pytest.approx(expected, abs=1e-4)


def test_the_last_row_is_what_the_report_says_of_the_features(found):
    last = found["by_layer"]["layers"]["features"]
    for name, row in found["detections"].items():
        for score, value in last["auroc"][name].items():
            assert value == pytest.approx(row[score].auroc, abs=1e-12)
    assert found["by_layer"]["not_watched"] is None and not found["by_layer"]["skipped"]
    assert list(found["by_layer"]["layers"])[-2:] == ["encoder", "features"]
    assert found["by_layer"]["compared"] == ["uniform", "gaussian", "shuffle"]  # nothing but noise was there


def layer(nc1, knn, mahalanobis=0.5):
    return {"nc1": nc1, "mean_auroc": {"knn": knn, "mahalanobis": mahalanobis}}


def test_the_advice_names_the_best_layer_and_says_whether_detection_follows_collapse():
    falling = {"stem": layer(9, 0.7), "deep": layer(2, 0.95), "features": layer(0.1, 0.8)}
    best = "score deep: AUROC 95.0 (knn), 80.0 where the head is"
    assert advice(falling) == f"{best}; over 3 layers it follows collapse, τ = +0.33"
    opposite = {"stem": layer(9, 0.9), "deep": layer(2, 0.8), "features": layer(0.1, 0.6, 0.7)}
    assert advice(opposite).startswith("score stem: AUROC 90.0 (knn), 70.0 where the head is")
    assert advice(opposite).endswith("it does not follow collapse, τ = -1.00")
    assert advice({"features": layer(1, 0.8)}) is None


class Pair(nn.Module):
    """Gives features beside something else, which no average over positions fits."""

    def __init__(self, width):
        super().__init__()
        self.line = nn.Linear(1, width)

    def forward(self, images):
        return self.line(images.flatten(1).mean(1, keepdim=True)), None


class First(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.pair, self.rest = Pair(width), nn.Linear(1, 1)

    def forward(self, images):
        return self.pair(images)[0]


def test_a_model_whose_layers_cannot_be_pooled_has_none_and_its_other_scores(run):
    tested = RunUnderTest.open(run, device="cpu")
    tested.model.backbone = First(tested.model.backbone_width)
    with InnerLayers(tested) as layers:
        assert "backbone.pair" in layers.reason and not layers.activations()
    outcome, _ = ood(tested, Settings(PRESETS["quick"], sets=()))
    assert list(outcome["by_layer"]["layers"]) == ["features"] and outcome["by_layer"]["advice"] is None
    assert any("backbone.pair" in line for line in lines_of(plain(outcome), "test"))


def test_the_table_shows_it_and_reads_results_from_before(run, capsys):
    assert main([str(run), "--parts", "ood", "--quick", "--sets", "digits", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "by layer, AUROC over" in printed and "advice, for these images" in printed
    old = {"detections": {"a": {}}, "nc5_centred": {"a": None}, "skipped": {}}
    assert len(lines_of(old, "test")) == 3
