"""Measures of single layers in a run's history and in the plan: against closed forms, and changing nothing else."""

import json

import numpy as np
import pytest
import torch

from ncreg import load_classifier
from recipes import train
from recipes.core.cli import parse
from recipes.data.load import load
from recipes.training.layer_measures import IMAGES

SHORT = ["baseline", "--data.train_size=100", "--data.batch_size=50", "--data.image_size=32", "--tpt.max_epochs=1"]
SHORT += ["--tpt.extend=null", "--device=cpu", "--quiet"]


def trained(out, *words):
    assert train.main([*SHORT, f"--out={out}", *words]) == 0
    (folder,) = out.iterdir()
    return folder, json.loads((folder / "history.jsonl").read_text().splitlines()[-1])


def test_history_holds_them_and_the_rest_of_it_is_the_same(tmp_path):
    folder, record = trained(tmp_path / "with", "--extra_measures=[hessian_norms, condensation]")
    _, plain = trained(tmp_path / "without")
    layers = record.pop("layers")
    assert record == plain
    config = parse(SHORT)
    data = load(config.data, seed=0, image_size=lambda native: 32)
    assert len(data.train) <= IMAGES  # so that all training images are measured
    model = load_classifier(folder / "checkpoints" / "last.pt").eval()
    images, _ = next(data.train.in_batches(IMAGES))
    with torch.no_grad():
        logits, features = (part.double().numpy() for part in model(images, with_features=True))
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    # cross-entropy of a linear head: the mean of (diag p − ppᵀ) ⊗ hhᵀ, of which the largest eigenvalue is that of
    # AᵀA/N, A the stacked (diag p − ppᵀ)^½ ⊗ hᵀ
    blocks = []
    for p, h in zip(shares, features, strict=True):
        values, vectors = np.linalg.eigh(np.diag(p) - np.outer(p, p))
        blocks.append(np.kron((vectors * np.sqrt(values.clip(0))).T, h[None]))
    stacked = np.concatenate(blocks)
    wanted = np.linalg.norm(stacked, 2) ** 2 / len(images)
    assert wanted * 0.8 < layers["hessian_norms"]["head.weight"] < wanted * 1.001  # power iteration comes from below
    assert set(layers["condensation"]) == {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)
    }
    assert all(-1 <= value <= 1 + 1e-9 for value in layers["condensation"].values())


def test_a_model_without_batch_norm_is_refused_before_the_run(tmp_path, capsys):
    words = ["--model.backbone=test_vit", "--model.model_args={img_size: 32}", "--extra_measures=[condensation]"]
    assert train.main([*SHORT, f"--out={tmp_path}", *words]) == 2
    assert "extra_measures=condensation: no BatchNorm runs in this model; leave it out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--extra_measures=[hessian]"], ["--extra_measures=[condensation, condensation]"]])
def test_names_that_are_unknown_or_given_twice(words, tmp_path, capsys):
    assert train.main([*SHORT, f"--out={tmp_path}", *words]) == 2
    error = capsys.readouterr().err
    assert "extra_measures" in error and error.count("\n") == 1


def test_the_plan_shows_the_curvature_and_the_rate_it_bears(tmp_path, capsys):
    assert train.main([*SHORT, "--plan", f"--out={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith("curvature of the cross-entropy"))
    rows = [line.split() for line in lines[start + 2 :]]
    norms = [float(norm) for _, norm, _ in rows]
    assert len(rows) == 5 and norms == sorted(norms, reverse=True)
    for _, norm, rate in rows:
        assert float(norm) * float(rate) == pytest.approx(2 * 1.9, rel=0.02)
    assert train.main([*SHORT, "--plan", f"--out={tmp_path}", "--data.name=folder", "--data.root=/nowhere"]) == 0
    assert "note: no curvature of the loss by layer: data.root=/nowhere is not a folder" in capsys.readouterr().err


def test_heavy_ball_on_a_quadratic_diverges_beyond_that_rate():
    for factor, bounded in ((0.95, True), (1.05, False)):
        weight, velocity, curvature, momentum = 1.0, 0.0, 3.0, 0.9
        for _ in range(2000):
            velocity = momentum * velocity + curvature * weight
            weight -= factor * 2 * (1 + momentum) / curvature * velocity
            if abs(weight) > 1e6:
                break
        assert (abs(weight) < 1) is bounded


@pytest.mark.parametrize("backbone", ["test_efficientnet", "regnetx_002"])
def test_backbones_with_filter_response_norm(backbone, tmp_path):
    words = [f"--model.backbone={backbone}", "--model.model_args={norm_layer: frn}"]
    folder, record = trained(tmp_path, *words)
    model = load_classifier(folder / "checkpoints" / "last.pt")
    kinds = {type(module).__name__ for module in model.backbone.modules()}
    assert "FilterResponseNormAct2d" in kinds and not any("BatchNorm" in kind for kind in kinds)
    assert np.isfinite(record["train_loss"])


@pytest.mark.parametrize("name", ["frn", "nonsense"])
def test_a_norm_that_a_backbone_does_not_take(name, tmp_path, capsys):
    assert train.main([*SHORT, f"--out={tmp_path}", f"--model.model_args={{norm_layer: {name}}}"]) == 2
    error = capsys.readouterr().err
    assert f"model_args['norm_layer']='{name}' is no name that it knows; frn, frntlu" in error
    assert error.count("\n") == 1
