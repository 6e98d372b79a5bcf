"""The cross-entropy in chunks as a recipe's loss: the same run as with torch's own, and refusals in one line."""

import pytest
import torch
from PIL import Image

from ncreg.checkpoint import load_checkpoint
from ncreg.models import swap_head
from recipes.core import memory
from recipes.core.cli import parse
from recipes.core.errors import UserError
from recipes.evaluation import predictions
from recipes.evaluation.decisions import Decisions
from recipes.evaluation.predictions import predict
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


def test_class_weights_are_those_of_torch_s_cross_entropy(tmp_path):
    words = ["--model.head", "linear", "--precision", "float64", "--data.imbalance", "2", "--data.batch_size", "16"]
    plain = last(tmp_path / "plain", *words, "--loss", "{cross_entropy: {class_weights: inverse}}")
    chunked = last(
        tmp_path / "chunked", *words, "--loss", "{chunked_cross_entropy: {class_weights: inverse, args: {chunk: 3}}}"
    )
    for name, tensor in plain["model"].items():
        assert (chunked["model"][name] - tensor).abs().max() < 1e-9, name


def test_the_table_of_confusions_is_refused_with_its_bytes(monkeypatch):
    monkeypatch.setattr(memory, "physical_memory", lambda: 2**34)
    said = r"confusions of 1,000,000 classes take 8,000,000,000,000 bytes, and this machine has 17,179,869,184"
    with pytest.raises(UserError, match=said):
        Decisions(1_000_000)
    Decisions(10)


def test_logits_of_a_batch_do_not_grow_with_the_classes():
    cpu = torch.device("cpu")
    assert (
        metrics.images_at_once(8, cpu, 10) == metrics.images_at_once(8, cpu, metrics.CLASSES_AT_ONCE) == metrics.BATCH
    )
    assert metrics.images_at_once(8, cpu, 1_000_000) * 1_000_000 <= metrics.BATCH * metrics.CLASSES_AT_ONCE
    assert metrics.images_at_once(8, cpu, 10**9) == 1


def test_large_images_go_sixteen_at_once_on_a_cpu_as_long_as_memory_has_room():
    cpu, other = torch.device("cpu"), torch.device("meta")
    assert [metrics.images_at_once(side, cpu) for side in (32, 64, 181, 182, 224, 448)] == [512, 128, 16, 16, 16, 16]
    assert [metrics.images_at_once(side, cpu) for side in (449, 1024)] == [2, 1]
    assert [metrics.images_at_once(side, other) for side in (32, 224, 448, 1024)] == [512, 64, 16, 3]


@pytest.fixture
def pictures(tmp_path):
    for number in range(5):
        pixels = torch.randint(256, (8, 8), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{number}.png")
    return sorted(tmp_path.glob("*.png"))


def test_predictions_in_small_batches_are_the_same_and_too_many_are_refused(pictures, monkeypatch):
    model = swap_head("test_resnet", "linear", num_classes=7, model_args={"in_chans": 1}).eval()
    model.image_shape, model.class_names = (1, 8, 8), tuple("abcdefg")
    whole, unreadable = predict(model, pictures)
    monkeypatch.setattr(predictions, "images_at_once", lambda *_: 2)
    by_two, _ = predict(model, pictures)
    assert not unreadable
    assert len(whole) == 5
    for one, other in zip(whole, by_two, strict=True):
        assert (one["file"], one["class"]) == (other["file"], other["class"])
        assert one["probabilities"] == pytest.approx(other["probabilities"], rel=1e-5)
    monkeypatch.setattr(memory, "physical_memory", lambda: 100 * 5 * 7)
    said = "5 images' probabilities of 7 classes take 3,500 bytes.*fewer images at a time"
    with pytest.raises(UserError, match=said):
        predict(model, pictures)
