"""The cross-entropy in chunks as a recipe's loss: the same run as with torch's own, and refusals in one line."""

import pytest
import torch

from ncreg.checkpoint import load_checkpoint
from recipes.core.cli import parse
from recipes.core.errors import UserError
from recipes.train import train
from recipes.training import metrics

SHORT = "--data.train_size 64 --data.batch_size 32 --tpt.max_epochs 1 --quiet true --optim.lr 0.001".split()
CHUNKED = ["--loss", "{chunked_cross_entropy: {args: {chunk: 3}}}"]


def last(folder, *words):
    path = train(parse(["baseline", *SHORT, *words, "--out", str(folder)]))
    return load_checkpoint(path / "checkpoints" / "last.pt")


@pytest.mark.parametrize("head", ["linear", "code"])
def test_run_is_that_of_torch_s_cross_entropy(tmp_path, head, monkeypatch):
    words = ["--model.head", head, "--model.norm", "batch", "--precision", "float64"]
    plain = last(tmp_path / "plain", *words)
    monkeypatch.setattr(metrics, "CLASSES_AT_ONCE", 1)  # measured in chunks as well
    chunked = last(tmp_path / "chunked", *words, *CHUNKED)
    left_out = chunked["history"][-1]["measures"]
    assert torch.tensor([left_out["nc1"], left_out["cdnv"]]).isnan().all()  # over all pairs of classes
    assert set(plain["model"]) == set(chunked["model"])
    for name, tensor in plain["model"].items():
        assert (chunked["model"][name] - tensor).abs().max() < 1e-9, name
    for name, value in plain["history"][-1].items():
        if isinstance(value, float) and name in ("loss", "train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            assert chunked["history"][-1][name] == pytest.approx(value, rel=1e-9)


@pytest.mark.usefixtures("unchecked")
def test_soft_labels_are_refused_before_the_run(tmp_path):
    with pytest.raises(UserError, match="loss.chunked_cross_entropy with augment.mixup.*soft labels"):
        last(tmp_path, *CHUNKED, "--augment.smoothing", "0.1")
    assert not list(tmp_path.iterdir())
