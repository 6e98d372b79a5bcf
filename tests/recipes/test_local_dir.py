"""Backbones from a folder that timm wrote: local-dir:FOLDER in swap_head and in a run."""

import shutil

import pytest
import timm
import torch
from test_faults_files import killed, one_line
from timm.models import save_for_hf

from ncreg import fold, swap_head
from ncreg.checkpoint import load_checkpoint, load_classifier
from recipes.core.cli import parse
from recipes.train import main, train
from recipes.training.build import image_size

SHORT = ["--data.train_size", "64", "--data.batch_size", "32", "--tpt.max_epochs", "2", "--quiet", "true"]


def written(folder, name, **args):
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=5, **args).eval()
    save_for_hf(model, str(folder), model_args=args, safe_serialization=True)
    return model


def test_swap_head_takes_weights_from_a_folder(tmp_path):
    source = written(tmp_path / "mine", "test_resnet")
    name = f"local-dir:{tmp_path / 'mine'}"
    model = swap_head(name, "linear", num_classes=5, norm="none", model_args={"pretrained": True}).eval()
    with torch.no_grad():
        model.head.weight.copy_(source.get_classifier().weight)
        model.head.bias.copy_(source.get_classifier().bias)
        images = torch.rand(2, 3, 64, 64)
        torch.testing.assert_close(model(images), source(images))
        torch.testing.assert_close(fold(model).eval()(images), source(images))


def test_a_run_on_a_folder_s_backbone_resumes_and_outlives_the_folder(tmp_path):
    source = written(tmp_path / "mine", "test_resnet", in_chans=1)
    args = ["etf", "--model.backbone", f"local-dir:{tmp_path / 'mine'}", "--model.pretrained", "true", *SHORT]
    out = tmp_path / "runs"
    whole = train(parse([*args, "--out", str(out)]))
    assert whole.name.startswith("digits-etf-mine-seed0-")
    path = killed(args, out, 2)
    first = load_checkpoint(path / "checkpoints" / "last.pt")["model"]
    for name, value in source.state_dict().items():
        if not name.startswith("fc"):
            assert torch.equal(first[f"backbone.{name}"], value), name
    assert main(["--resume", str(path)]) == 0
    for name in ("summary.json", "history.jsonl"):
        assert (whole / name).read_bytes() == (path / name).read_bytes()
    images = torch.rand(2, 1, 28, 28)
    before = load_classifier(path)(images)
    shutil.rmtree(tmp_path / "mine")
    assert torch.equal(load_classifier(path)(images), before)


def size_of(config, native):
    """Side of the images of a run on a data set of the given side."""
    return image_size(native, backbone=config.model.backbone, requested=config.data.image_size)


def test_images_have_the_size_that_the_folder_s_backbone_was_made_for(tmp_path):
    written(tmp_path / "vit", "test_vit", img_size=48)
    written(tmp_path / "free", "test_resnet")
    args = ["etf", *SHORT, "--out", str(tmp_path / "runs"), "--tpt.max_epochs", "1", "--model.backbone"]
    config = parse([*args, f"local-dir:{tmp_path / 'vit'}"])
    assert size_of(config, 8) == size_of(config, None) == 48
    free = parse([*args, f"local-dir:{tmp_path / 'free'}"])
    assert size_of(free, 8) == 28 and size_of(free, None) == timm.get_pretrained_cfg("test_resnet").input_size[-1]
    path = train(config)
    shutil.rmtree(tmp_path / "vit")
    model = load_classifier(path)
    assert model.image_shape == (1, 48, 48) and model(torch.rand(2, 1, 48, 48)).shape == (2, 10)


@pytest.mark.parametrize("content", [None, "no json", "{}"])
def test_a_folder_that_is_no_model_is_one_line(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert main(["etf", "--model.backbone", f"local-dir:{tmp_path}", *SHORT, "--out", str(tmp_path / "runs")]) == 2
    one_line(capsys, f"local-dir:{tmp_path}")
