"""The classifier in examples/digits_classifier is what its card says."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch

from ncreg import NeuralCollapse, swap_head
from recipes.core.cli import parse
from recipes.data.load import load

FOLDER = Path(__file__).parents[1] / "examples" / "digits_classifier"


@pytest.fixture(scope="module")
def card():
    """Row of the card's table → its numbers of training and test images."""
    rows = re.findall(r"^\| ([^|]+?) \| ([\d.e-]+)[^|]*\| ([\d.e-]+)", (FOLDER / "README.md").read_text(), re.MULTILINE)
    return {name: (float(train), float(test)) for name, train, test in rows}


@pytest.fixture(scope="module")
def measured():
    """Accuracy in per cent and measures of training and test images, by timm's loader and plain tensors."""
    network = timm.create_model(f"local-dir:{FOLDER}", pretrained=True)
    model, config = swap_head(network, "keep").eval(), network.pretrained_cfg
    data = load(parse(["cosine"]).data, seed=0, image_size=lambda side: 28)
    found = []
    for split in (data.train, data.test):
        images = (split.images.float() / 255 - config["mean"][0]) / config["std"][0]
        with torch.no_grad():
            logits, features = model(images, with_features=True)
        collapse = NeuralCollapse(10, 96, classifier=model.head)
        collapse.update(features, split.target)
        right = int((logits.argmax(1) == split.target).sum())
        found.append({"right": right, "accuracy": 100 * right / len(split)} | collapse.compute())
    return found


def test_accuracy_and_collapse_are_those_of_the_card(card, measured):
    train, test = measured
    assert "(358 of 360)" in (FOLDER / "README.md").read_text() and test["right"] == 358
    for row, key in {
        "accuracy": "accuracy",
        "NC1, within-class variability": "nc1",
        "cosine within classes": "intra_cosine",
        "NC2, mean abs(cosine + 1/(C−1))": "nc2_equiangularity",
        "NC3, means against class vectors": "nc3",
    }.items():
        assert card[row] == pytest.approx(
            (float(train[key]), float(test[key])), abs=6e-3 if row == "accuracy" else 1e-3
        )


def test_report_is_that_of_the_model(measured):
    report = json.loads((FOLDER / "report.json").read_text())
    assert report["part"] == "test" and report["images"] == 360 and report["data_keys"]["root"] == "data"
    for key in ("nc1", "nc3", "intra_cosine", "etf_distance"):
        assert report[key] == pytest.approx(float(measured[1][key]), rel=1e-3)


def test_files_are_small():
    assert (FOLDER / "model.safetensors").stat().st_size < 2_000_000
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 2_000_000
