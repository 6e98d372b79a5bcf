"""Checkpoints: whole or not at all, and never code."""

import os
import pickle

import pytest
import torch

from ncreg import checkpoint
from ncreg.checkpoint import load_checkpoint, load_classifier, save_checkpoint
from recipes.config import parse
from recipes.train import train


def test_round_trip_is_exact(tmp_path):
    state = {
        "epoch": 3,
        "rate": 0.1,
        "names": ["a", "b"],
        "none": None,
        "nested": {"weight": torch.randn(4, 3, dtype=torch.float64), 7: (1, 2)},
    }
    save_checkpoint(tmp_path / "last.pt", state)
    back = load_checkpoint(tmp_path / "last.pt")
    assert torch.equal(back["nested"].pop("weight"), state["nested"].pop("weight"))
    assert back == {"format": checkpoint.FORMAT, **state}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch, failing):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, {"epoch": 2})
    monkeypatch.undo()
    assert load_checkpoint(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


class Harmful:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.usefixtures("unchecked")
def test_pickled_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "model": Harmful()}, "zip.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps({"format": 1, "model": Harmful()}))
    for name in ("zip.pt", "raw.pt"):
        with pytest.raises(ValueError, match=f"{name} (is refused|cannot be read)"):
            load_checkpoint(name)
    assert not (tmp_path / "executed").exists()


def test_every_truncation_is_a_clear_error(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"weight": torch.arange(1000.0)})
    whole = path.read_bytes()
    for share in range(20):
        path.write_bytes(whole[: len(whole) * share // 20])
        with pytest.raises(ValueError, match="last.pt (is refused|cannot be read)"):
            load_checkpoint(path)


def test_wrong_files_and_states_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pt does not exist"):
        load_checkpoint(tmp_path / "none.pt")
    torch.save({"weight": torch.ones(1)}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="format None; this version reads 1"):
        load_checkpoint(tmp_path / "foreign.pt")
    torch.save({"format": 99}, tmp_path / "newer.pt")
    with pytest.raises(ValueError, match="format 99"):
        load_checkpoint(tmp_path / "newer.pt")
    with pytest.raises(ValueError, match=r"state\['a'\]\[1\] is a object"):
        save_checkpoint(tmp_path / "never.pt", {"a": [1, object()]})
    assert not (tmp_path / "never.pt").exists()


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A run of a head that re-aims, with a moving average of the weights."""
    args = ["nearest_etf", "--data.train_size", "128", "--data.batch_size", "64", "--tpt.max_epochs", "2"]
    out = tmp_path_factory.mktemp("averaged")
    return train(parse([*args, "--optim.ema", "0.9", "--quiet", "true", "--out", str(out)]))


@pytest.mark.parametrize("file", [".", "checkpoints/best.pt"])
def test_load_classifier_takes_the_weights_or_their_moving_average(averaged, file):
    state = load_checkpoint(averaged / ("checkpoints/last.pt" if file == "." else file))
    for ema, key in ((False, "model"), (True, "ema")):
        found = load_classifier(averaged / file, ema=ema)
        assert not found.training and type(found.head).__name__ == "NearestETFHead"
        assert all(torch.equal(value, state[key][name]) for name, value in found.state_dict().items())
    assert any(not torch.equal(state["model"][name], state["ema"][name]) for name in state["model"])
    images = torch.rand(4, 1, 28, 28)
    with torch.no_grad():
        assert not torch.equal(load_classifier(averaged)(images), load_classifier(averaged, ema=True)(images))


def test_a_moving_average_that_was_not_kept_is_refused(averaged, tmp_path):
    state = load_checkpoint(averaged / "checkpoints" / "last.pt")
    torch.save(state | {"ema": None}, tmp_path / "without.pt")
    assert load_classifier(tmp_path / "without.pt").num_classes == 10
    with pytest.raises(ValueError, match="ema=True: checkpoint .*without.pt holds no moving average"):
        load_classifier(tmp_path / "without.pt", ema=True)
