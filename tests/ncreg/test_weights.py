"""Weights that come from a file: all of the backbone's, or a refusal that says what is there."""

import re
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models import save_for_hf

from ncreg import Classifier, load_weights, swap_head
from ncreg.models import match_weights
from ncreg.models._weights import complete_loading

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(4)
    return timm.create_model("test_resnet", num_classes=1000)


def holds(classifier, source):
    own = source.state_dict()
    return all(torch.equal(value, own[name]) for name, value in classifier.backbone.state_dict().items())


def prefixed(model, prefix):
    return prefixed_names(model.state_dict(), prefix)


def prefixed_names(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def overlay(path):
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}


def test_timms_own_ways_to_a_file_load_all_of_it(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "mine.pth")
    for args in (overlay(tmp_path / "mine.pth"), {"checkpoint_path": str(tmp_path / "mine.pth")}):
        assert holds(swap_head("test_resnet", num_classes=5, model_args=args), source)
    in_memory = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": source.state_dict()}}
    assert holds(swap_head("test_resnet", num_classes=5, model_args=in_memory), source)


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "net.module."])
def test_a_prefix_that_timm_does_not_know_is_named(source, tmp_path, prefix):
    torch.save(prefixed(source, prefix), tmp_path / "mine.pth")
    total = len(swap_head("test_resnet", num_classes=5).backbone.state_dict())
    words = f"mine.pth: 0 of the {total} tensors .* match; {total} have the right names without the prefix {prefix!r}"
    with pytest.raises(ValueError, match=words):
        swap_head("test_resnet", num_classes=5, model_args=overlay(tmp_path / "mine.pth"))
    assert holds(swap_head("test_resnet", num_classes=5, weights=load_weights(tmp_path / "mine.pth")), source)
    by_path = {"checkpoint_path": str(tmp_path / "mine.pth")}
    assert holds(swap_head("test_resnet", num_classes=5, model_args=by_path), source)


def test_parts_that_were_compiled_or_checkpointed_alone_are_known(source):
    """As torch.compile(stage) and activation checkpointing of a part lengthen names in the middle."""
    marks = {"layer1.": "layer1._orig_mod.", "layer2.": "layer2._checkpoint_wrapped_module."}
    state = source.state_dict()
    for plain, marked in marks.items():
        state = {name.replace(plain, marked, 1): value for name, value in state.items()}
    assert sum("._" in name for name in state) > 5
    assert holds(
        swap_head("test_resnet", num_classes=5, weights={"state_dict": prefixed_names(state, "module.")}), source
    )


def test_a_folder_of_other_weights_is_refused(source, tmp_path):
    save_for_hf(source, str(tmp_path / "mine"))
    torch.save(prefixed(source, "net."), tmp_path / "mine" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="0 of the .* without the prefix 'net.'"):
        swap_head(f"local-dir:{tmp_path / 'mine'}", num_classes=5, model_args={"pretrained": True})


def test_a_part_of_a_backbone_is_refused_and_more_than_it_is_said(tmp_path):
    small, large = (timm.create_model(name, num_classes=3) for name in ("resnet18", "resnet34"))
    for name, model in {"small": small, "large": large}.items():
        torch.save(model.state_dict(), tmp_path / f"{name}.pth")
    with pytest.raises(ValueError, match=r"120 of the 216 tensors .*missing are layer1\.2\.conv1\.weight"):
        swap_head("resnet34", num_classes=3, model_args=overlay(tmp_path / "small.pth"))
    with pytest.warns(UserWarning, match=r"large\.pth hold more, not used: layer1\.2\."):
        swap_head("resnet18", num_classes=3, model_args=overlay(tmp_path / "large.pth"))
    with pytest.raises(ValueError, match=r"of another shape are layer1\.0\.conv1\.weight \(64, 64, 3, 3\) instead of"):
        swap_head("resnet26", num_classes=3, weights=small.state_dict())


def test_loading_leaves_torch_and_the_models_description_as_they_were(source):
    before, state = torch.nn.Module.load_state_dict, torch.get_rng_state()
    started = swap_head("test_resnet", num_classes=5, weights=source.state_dict())
    assert torch.nn.Module.load_state_dict is before
    assert started.backbone.pretrained_cfg == swap_head("test_resnet", num_classes=5).backbone.pretrained_cfg
    torch.set_rng_state(state)
    swap_head("test_resnet", num_classes=5)
    plain = torch.get_rng_state()
    torch.set_rng_state(state)
    swap_head("test_resnet", num_classes=5, weights=source.state_dict())
    assert torch.equal(torch.get_rng_state(), plain)  # later draws do not depend on where weights came from


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_are_adapted_as_timm_adapts_them(source, channels, tmp_path):
    torch.save(source.state_dict(), tmp_path / "mine.pth")
    args = {"in_chans": channels}
    ours = swap_head("test_resnet", num_classes=5, model_args=args, weights={"model": prefixed(source, "module.")})
    timms = swap_head("test_resnet", num_classes=5, model_args=args | overlay(tmp_path / "mine.pth"))
    assert all(torch.equal(v, timms.backbone.state_dict()[n]) for n, v in ours.backbone.state_dict().items())


def test_weights_of_gray_images_go_on_gray_images():
    gray = timm.create_model("test_vit", in_chans=1, num_classes=3)
    started = swap_head("test_vit", num_classes=5, model_args={"in_chans": 1}, weights=gray.state_dict())
    assert torch.equal(started.backbone.patch_embed.proj.weight, gray.patch_embed.proj.weight)


def test_position_embeddings_are_resized():
    model = timm.create_model("test_vit", num_classes=3)
    started = swap_head("test_vit", num_classes=5, model_args={"img_size": 64}, weights=prefixed(model, "module."))
    assert started.backbone.pos_embed.shape != model.pos_embed.shape
    assert torch.equal(started.backbone.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)


def test_the_best_prefix_and_what_is_beside_it(source):
    mine = swap_head("test_resnet", num_classes=5, project=9)
    found = match_weights({"model": mine.state_dict(), "optimizer": {"state": {0: torch.ones(3)}}}, mine.backbone)
    assert found.prefix == "model.backbone." and not found.missing and not found.misshapen
    assert {name.partition(".")[0] for name in found.unused} == {"project", "norm", "head"}
    pair = {"state_dict": source.state_dict(), "state_dict_ema": {n: v + 1 for n, v in source.state_dict().items()}}
    assert match_weights(pair, mine.backbone).prefix == "state_dict_ema."


def test_weights_of_a_diverged_run_are_refused(source):
    broken = {
        name: value * torch.nan if value.is_floating_point() else value for name, value in prefixed(source, "").items()
    }
    with pytest.raises(ValueError, match="weights hold NaN: conv1.0.weight, .*diverged"):
        swap_head("test_resnet", num_classes=5, weights=broken)


BESIDE = {
    "args": Namespace(lr=0.1, output=Path("runs") / "first"),
    "best": {"top1": np.float64(76.5), "epoch": np.int64(89), "kept": np.bool_(True), "of": np.str_("val")},
    "class_counts": np.array([500, 50, 5]),
    "rng": np.random.RandomState(0).get_state(),  # noqa: NPY002 - what scripts save
}


@pytest.mark.parametrize("other", [{}, {b"numpy._core.": b"numpy.core."}, {b"PosixPath": b"WindowsPath"}], ids=str)
def test_what_training_scripts_keep_beside_the_weights_is_read(source, tmp_path, other):
    """Also by the names that numpy 1, an older Python and another system have for it."""
    path = tmp_path / "checkpoint.pth"
    torch.save(BESIDE | {"state_dict": source.state_dict()}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    for own, theirs in other.items():
        assert own in data
        data = data.replace(own, theirs)
    path.write_bytes(data)
    found = load_weights(path)
    assert holds(swap_head("test_resnet", num_classes=5, weights=found), source)
    assert found["best"] == {"top1": 76.5, "epoch": 89, "kept": True, "of": "val"}
    assert found["class_counts"].tolist() == [500, 50, 5]
    assert found["args"].output.parts == ("runs", "first")


def test_an_object_that_could_run_code_is_refused(source, tmp_path):
    torch.save({"state_dict": source.state_dict(), "call": re.compile("a+")}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=r"checkpoint.pth hold objects of Python \(re._compile\)"):
        load_weights(tmp_path / "checkpoint.pth")


def test_another_threads_loading_is_its_own(source):
    with complete_loading("mine", strict=True), ThreadPoolExecutor() as pool:
        pool.submit(torch.nn.Linear(2, 2).load_state_dict, {}, strict=False).result()
        with pytest.raises(ValueError, match="mine: 0 of the 2 tensors"):
            torch.nn.Linear(2, 2).load_state_dict({}, strict=False)


def test_bad_weights_are_named(tmp_path):
    with pytest.raises(TypeError, match="ncreg.load_weights reads a file"):
        swap_head("test_resnet", num_classes=5, weights="mine.pth")
    with pytest.raises(ValueError, match="weights hold no tensor: their keys are none"):
        swap_head("test_resnet", num_classes=5, weights={})
    with pytest.raises(ValueError, match="weights is for timm names"):
        swap_head(timm.create_model("test_resnet"), weights={"a": torch.ones(1)})
    with pytest.raises(FileNotFoundError, match=r"checkpoint_path'\]='gone.pth' does not exist"):
        swap_head("test_resnet", num_classes=5, model_args={"checkpoint_path": "gone.pth"})
    torch.save({"a": torch.ones(10_000)}, tmp_path / "flipped.pth")
    data = bytearray((tmp_path / "flipped.pth").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "flipped.pth").write_bytes(data)
    with pytest.raises(ValueError, match="flipped.pth cannot be read .*checksum"):
        load_weights(tmp_path / "flipped.pth")


def test_without_a_network_a_pretrained_name_fails_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    began = time.perf_counter()
    args = {"cache_dir": str(tmp_path)}
    for name, words in {"resnet18": "timm/resnet18.a1_in1k", "hf-hub:some/model@v1": "some/model"}.items():
        with pytest.raises(ConnectionError, match=re.escape(words) + " is not on this disk, and http.*load_weights"):
            swap_head(name, num_classes=5, model_args=args | {"pretrained": True})
    with pytest.raises(ConnectionError, match="some/model is not on this disk"):
        Classifier.from_pretrained("some/model")
    assert time.perf_counter() - began < 15
    swap_head("resnet18", num_classes=5)  # without pretrained weights nothing is looked up
