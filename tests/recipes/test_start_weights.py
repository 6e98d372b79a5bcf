"""--model.weights: a run that starts from a file, a run or a folder; and pretrained names without a network."""

import shutil
import time

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_faults_files import killed, one_line
from timm.models import save_for_hf

from ncreg import load_classifier
from ncreg.checkpoint import load_checkpoint
from recipes.core.cli import parse
from recipes.core.config import TrainConfig, as_yaml
from recipes.study.trials import config_hash, dotted_config
from recipes.train import main, train
from recipes.training.run_dir import RunDir

SHORT = ["--data.train_size", "64", "--data.batch_size", "32", "--tpt.max_epochs", "1", "--quiet", "true"]
ARGS = ["finetune", "--model.backbone", "test_resnet", "--tpt.min_terminal", "1", "--model.freeze_epochs", "1", *SHORT]


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(5)
    return timm.create_model("test_resnet", num_classes=7, in_chans=1).eval()


def prefixed(model, prefix):
    return {prefix + name: value for name, value in model.state_dict().items()}


def first_backbone(path):
    """The backbone of a run whose only epoch was frozen: the one that it began with."""
    return load_checkpoint(path / "checkpoints" / "last.pt")["model"]


@pytest.mark.parametrize(
    ("container", "prefix"),
    [(None, ""), (None, "module."), ("model", "backbone."), ("state_dict", "model."), ("net", "_orig_mod.module.")],
)
def test_a_file_under_any_prefix_in_any_container(tmp_path, capsys, trained, container, prefix):
    tensors = prefixed(trained, prefix)
    torch.save(tensors if container is None else {container: tensors, "epoch": 3}, tmp_path / "mine.pth")
    args = [*ARGS, "--model.weights", str(tmp_path / "mine.pth"), "--out", str(tmp_path / "runs")]
    found = first_backbone(train(parse(args)))
    for name, value in trained.state_dict().items():
        assert name.startswith("fc") or torch.equal(found[f"backbone.{name}"], value), name
    said = capsys.readouterr().err
    assert said.startswith(f"note: model.weights={tmp_path / 'mine.pth'}: ") and "not used: fc\n" in said


def test_the_average_before_the_weights_and_safetensors_too(tmp_path, trained):
    other = {name: value + 1 for name, value in trained.state_dict().items()}
    torch.save({"state_dict": other, "state_dict_ema": trained.state_dict()}, tmp_path / "timm.pth.tar")
    save_file(prefixed(trained, "module."), tmp_path / "plain.safetensors")
    save_for_hf(trained, str(tmp_path / "hub"), safe_serialization=True)
    for number, file in enumerate(("timm.pth.tar", "plain.safetensors", "hub")):
        args = [*ARGS, "--model.weights", str(tmp_path / file), "--out", str(tmp_path / str(number))]
        found = first_backbone(train(parse(args)))
        name, value = next(iter(trained.state_dict().items()))
        assert torch.equal(found[f"backbone.{name}"], value)


def test_a_run_and_its_checkpoint_with_their_own_normalisation(tmp_path, capsys):
    first = train(parse(["etf", *SHORT, "--model.backbone", "test_resnet", "--out", str(tmp_path / "first")]))
    load_classifier(first).save_pretrained(tmp_path / "hub")
    old = load_classifier(first).state_dict()
    for number, source in enumerate((first, first / "checkpoints" / "last.pt", tmp_path / "hub")):
        args = [*ARGS, "--model.weights", str(source), "--out", str(tmp_path / str(number)), "--data.train_size", "96"]
        found = first_backbone(train(parse(args)))
        assert all(torch.equal(found[n], v) for n, v in old.items() if n.startswith(("backbone.", "preprocess.")))
        said = capsys.readouterr().err
        assert "under " in said and "backbone." in said and "not used: " in said and "norm" in said, said


def test_weights_of_colour_on_gray_images_as_timm_adapts_them(tmp_path, trained):
    torch.manual_seed(5)
    colour = timm.create_model("test_resnet", num_classes=3)
    torch.save(prefixed(colour, "module."), tmp_path / "colour.pth")
    found = first_backbone(
        train(parse([*ARGS, "--model.weights", str(tmp_path / "colour.pth"), "--out", str(tmp_path)]))
    )
    name, weight = next(iter(colour.state_dict().items()))
    torch.testing.assert_close(found[f"backbone.{name}"], weight.sum(1, keepdim=True))
    mean = torch.tensor(timm.get_pretrained_cfg("test_resnet").mean).mean()
    torch.testing.assert_close(found["preprocess.mean"].flatten(), mean[None])


BAD = {
    "other names": (lambda m: {f"x{n}": v for n, v in prefixed(m, "").items()}, ["0 of the", "xconv1"]),
    "a part": (
        lambda m: {n: v for n, v in prefixed(m, "").items() if "layer4" not in n},
        ["match; missing are layer4"],
    ),
    "another width": (lambda m: {n: torch.cat([v, v]) if v.ndim else v for n, v in prefixed(m, "").items()}, ["shape"]),
    "no tensors": (lambda m: {"epoch": 3}, ["weights hold no tensor: their keys are epoch"]),
    "a list": (lambda m: [1, 2], ["hold list, not tensors by name"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_weights_that_do_not_fit_are_one_line(tmp_path, capsys, trained, kind):
    change, words = BAD[kind]
    path = tmp_path / "bad.pth"
    torch.save(change(trained), path)
    assert main([*ARGS, "--model.weights", str(path), "--out", str(tmp_path / "runs")]) == 2
    one_line(capsys, f"model.weights={path}", *words)
    assert not (tmp_path / "runs").exists()


def test_files_that_are_none_are_one_line(tmp_path, capsys):
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "empty").mkdir()
    for name, words in {
        "gone.pth": "does not exist",
        "text.pth": "it is a text file",
        "empty": "holds neither",
    }.items():
        assert main([*ARGS, "--model.weights", str(tmp_path / name), "--out", str(tmp_path / "runs")]) == 2
        one_line(capsys, f"model.weights={tmp_path / name}", words)


def test_a_run_resumes_when_its_start_is_gone(tmp_path, trained):
    torch.save(trained.state_dict(), tmp_path / "mine.pth")
    args = [*ARGS, "--model.weights", str(tmp_path / "mine.pth"), "--tpt.max_epochs", "2"]
    whole = train(parse([*args, "--out", str(tmp_path / "runs")]))
    path = killed(args, tmp_path / "runs", 3)
    (tmp_path / "mine.pth").unlink()
    assert main(["--resume", str(path)]) == 0
    for name in ("summary.json", "history.jsonl"):
        assert (whole / name).read_bytes() == (path / name).read_bytes()
    shutil.rmtree(tmp_path / "runs")


def test_a_pretrained_name_without_a_network_fails_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    began = time.perf_counter()
    assert main(["finetune", *SHORT, "--out", str(tmp_path / "runs")]) == 2
    assert time.perf_counter() - began < 15
    one_line(capsys, "resnet18", "--model.weights FILE", "local-dir:FOLDER", "out of reach")


def test_a_run_begun_before_the_key_came_is_found(tmp_path):
    config = parse(["etf", *SHORT, "--out", str(tmp_path)])
    path = killed(["etf", *SHORT], tmp_path, 1)
    text = (path / "config.yaml").read_text()
    assert "  weights: null\n" in text
    (path / "config.yaml").write_text(text.replace("  weights: null\n", ""))
    assert RunDir.unfinished(tmp_path, as_yaml(config)).path == path
    other = parse(["etf", *SHORT, "--out", str(tmp_path), "--model.weights", "mine.pth"])
    assert RunDir.unfinished(tmp_path, as_yaml(other)) is None
    (path / "config.yaml").write_text("[1, 2")
    assert RunDir.unfinished(tmp_path, as_yaml(config)) is None


def test_the_new_key_changes_no_identity():
    config = dotted_config(TrainConfig())
    assert config.pop("model.weights") is None
    assert config_hash(config) == config_hash(dotted_config(TrainConfig()))
    assert config_hash(config) != config_hash(config | {"model.weights": "mine.pth"})
