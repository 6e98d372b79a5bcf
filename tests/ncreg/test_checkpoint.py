"""Checkpoints: whole or not at all, and never code."""

import collections
import enum
import errno
import os
import pickle
import types

import numpy as np
import pytest
import torch

from ncreg import checkpoint
from ncreg.checkpoint import classifier_header, load_checkpoint, load_classifier, save_checkpoint
from recipes.core.cli import parse
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


@pytest.mark.skipif(os.name != "posix", reason="the limit on a file's size is POSIX's")
@pytest.mark.parametrize("limit", [0, 4_000, 600_000, 1_900_000])
def test_a_file_that_finds_no_room_is_an_os_error_wherever_the_room_ends(tmp_path, limit):
    """torch's archive turns such an error into one of its own, about positions, where the end comes within a tensor."""
    resource = pytest.importorskip("resource")
    path, before = tmp_path / "last.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    save_checkpoint(path, {"epoch": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            save_checkpoint(path, {"epoch": 2, "weight": torch.zeros(500_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert load_checkpoint(path)["epoch"] == 1 and [file.name for file in tmp_path.iterdir()] == ["last.pt"]


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


class Subclass(torch.Tensor):
    pass


class Word(enum.IntEnum):
    ONE = 1


def with_an_attribute():
    tensor = torch.ones(1)
    tensor.owner = Subclass
    return tensor


Pair = collections.namedtuple("Pair", "left right")  # noqa: PYI024
REFUSED = {
    "a number of numpy's": (np.float64(0.5), " is a numpy.float64"),
    "a string of numpy's": (np.str_("a"), " is a numpy.str_"),
    "a dict that fills itself": (collections.defaultdict(list), " is a collections.defaultdict"),
    "what torch.max gives": (torch.eye(2).max(0), " is a torch.return_types.max"),
    "a tuple with names": (Pair(1, 2), " is a .*Pair"),
    "a dict that can't be written": (types.MappingProxyType({}), " is a mappingproxy"),
    "an enumeration": (Word.ONE, " is a .*Word"),
    "a key that is an object": ({object(): 1}, ": the key <object object .*> is a object"),
    "a key of numpy's": ({np.str_("a"): 1}, r": the key np.str_\('a'\) is a numpy.str_"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_could_not_be_read_back_is_not_written(tmp_path, kind):
    value, words = REFUSED[kind]
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})
    with pytest.raises(ValueError, match=r"state\['history'\]\[0\]\['loss'\]" + words):
        save_checkpoint(path, {"epoch": 2, "history": [{"loss": value}]})
    assert load_checkpoint(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("tensor", [torch.ones(1).as_subclass(Subclass), with_an_attribute()])
def test_what_only_reading_shows_is_not_kept_either(tmp_path, tensor):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})
    with pytest.raises(ValueError, match="load_checkpoint would refuse .*Subclass"):
        save_checkpoint(path, {"epoch": 2, "weight": tensor})
    assert load_checkpoint(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.usefixtures("unchecked")
def test_states_that_are_none(tmp_path):
    path, endless = tmp_path / "last.pt", []
    endless.append(endless)
    with pytest.raises(ValueError, match="holds itself"):
        save_checkpoint(path, {"a": endless})
    with pytest.raises(TypeError, match="state must be a dict, not list"):
        save_checkpoint(path, [1])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", ["mine", 2, True, None])
def test_the_format_is_the_checkpoints_own(tmp_path, given):
    with pytest.raises(ValueError, match=rf"state\['format'\]={given!r}: this key"):
        save_checkpoint(tmp_path / "last.pt", {"format": given})
    assert not list(tmp_path.iterdir())


def test_what_was_read_can_be_written_again(tmp_path):
    """Also what state dicts of modules, optimizers and schedules are made of."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    optimizer.step()
    state = {"model": torch.nn.BatchNorm1d(2).state_dict(), "optimizer": optimizer.state_dict()}
    save_checkpoint(tmp_path / "one.pt", state | {"schedule": schedule.state_dict(), "size": torch.ones(2, 3).shape})
    save_checkpoint(tmp_path / "two.pt", load_checkpoint(tmp_path / "one.pt"))
    back = load_checkpoint(tmp_path / "two.pt")
    assert back["schedule"] == schedule.state_dict() and back["size"] == (2, 3)


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


@pytest.mark.usefixtures("unchecked")
def test_the_average_is_asked_for_by_true_or_false(averaged):
    with pytest.raises(TypeError, match="ema='False' must be True or False"):
        load_classifier(averaged, ema="False")


def diverged(state):
    return {
        "model": state["model"] | {name: v * torch.nan for name, v in state["model"].items() if v.is_floating_point()}
    }


def bad_statistics(state):
    return {"model": state["model"] | {"norm.running_mean": state["model"]["norm.running_mean"] * torch.nan}}


def infinite_gamma(state):
    return {"model": state["model"] | {"norm.weight": state["model"]["norm.weight"] * torch.inf}}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda state: {"model": None}, "holds no weights: its model is None"),
        (lambda state: {"image_shape": []}, r"image_shape=\[\] must be \(channels, height, width\)"),
        (lambda state: {"image_shape": ["1", 28, 28]}, "image_shape='1' must be an integer"),
        (lambda state: {"class_names": ["a", "b"]}, "2 class_names for a classifier of 10 classes"),
        (lambda state: {"class_names": "0123456789"}, "class_names='0123456789' must be a list of names"),
        (diverged, "is of a diverged run: .* holds NaN"),
        (bad_statistics, "is of a diverged run: norm.running_mean holds NaN"),
        (infinite_gamma, "is of a diverged run: norm.weight holds"),
    ],
)
def test_a_checkpoint_that_gives_no_classifier_says_why(averaged, tmp_path, change, words):
    state = load_checkpoint(averaged / "checkpoints" / "last.pt")
    save_checkpoint(tmp_path / "changed.pt", state | change(state))
    with pytest.raises(ValueError, match=f"changed.pt .*{words}"):
        load_classifier(tmp_path / "changed.pt")


def test_the_header_holds_what_a_run_writes(averaged):
    state = load_checkpoint(averaged / "checkpoints" / "last.pt")
    written = {name: state[name] for name in ("build", "class_names", "image_shape")}
    assert classifier_header(**written) == written
    assert classifier_header(**written | {"image_shape": torch.Size([1, 28, 28])}) == written


def test_loading_a_classifier_draws_nothing_from_the_global_generator(averaged):
    before = torch.get_rng_state()
    load_classifier(averaged)
    assert torch.equal(torch.get_rng_state(), before)
