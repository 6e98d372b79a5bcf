"""Vision transformers at another side than their usual one: built for it, in training and under test alike."""

import csv
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from PIL import Image
from torchvision.transforms.v2.functional import to_dtype, to_image

from ncreg import load_classifier
from recipes import evaluate, plot_collapse, predict, robustness, train
from recipes.evaluation.model_images import stated_sides
from recipes.training.image_side import side_args, trained_side

VIT, DYNAMIC, SIDE = "vit_tiny_patch16_224", "test_vit", 32
DIGITS = ["--data.name", "digits", "--data.train_size", "64", "--data.batch_size", "32"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Weights trained at another side than the model's, and an image."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for name in (VIT, DYNAMIC):
        torch.save(timm.create_model(name, num_classes=10, img_size=SIDE).state_dict(), f"{name}.pth")
    noise = torch.randint(0, 256, (SIDE, SIDE, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save("noise.png")
    return tmp_path


def probabilities(file):
    with open(file) as lines:
        (row,) = csv.DictReader(lines)
    return torch.tensor([float(value) for name, value in row.items() if name.startswith("p(")])


@pytest.mark.parametrize("size", [["--image-size", "32"], []], ids=["given", "from the file"])
@pytest.mark.parametrize("name", [VIT, DYNAMIC])
def test_a_vision_transformer_of_another_side_gives_its_own_probabilities(here, name, size, capsys):
    """Against the model as timm builds and normalises it: the position embedding is not resampled."""
    words = [f"timm:{name}", "noise.png", "--weights", f"{name}.pth", *size, "--crop-pct", "1", "--out", "p.csv"]
    assert predict.main(words) == 0, capsys.readouterr().err
    model = timm.create_model(name, num_classes=10, img_size=SIDE).eval()
    model.load_state_dict(torch.load(f"{name}.pth"))
    image = to_dtype(to_image(Image.open("noise.png")), torch.float32, scale=True)
    cfg = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        expected = model(((image - mean) / std)[None]).softmax(1)[0]
    assert torch.allclose(probabilities("p.csv"), expected, atol=1e-5)
    assert ("its position embedding is of images of 32 pixels" in capsys.readouterr().err) == (not size)


def test_a_resampled_position_embedding_is_said(here, capsys):
    assert predict.main([f"timm:{VIT}", "noise.png", "--weights", f"{VIT}.pth", "--image-size", "48"]) == 0
    said = capsys.readouterr().err
    assert "resampled to MODEL's shape: pos_embed (1, 5, 192) instead of (1, 10, 192); --image-size N" in said


def test_every_command_takes_the_side(here):
    model = [f"timm:{VIT}", "--weights", f"{VIT}.pth", *DIGITS]
    assert evaluate.main([*model, "--image-size", "32"]) == 0
    assert plot_collapse.main([*model, "--data.image_size", "32", "--images", "40"]) == 0
    assert robustness.main([*model, "--quick", "--parts", "calibration", "--quiet"]) == 0


@pytest.mark.parametrize("script", [evaluate, plot_collapse, robustness])
def test_a_side_that_no_patch_fits_is_one_line(here, script, capsys):
    assert script.main([f"timm:{VIT}", "--weights", f"{VIT}.pth", "--image-size", "8", *DIGITS]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "MODEL cannot take images of 3 x 8 x 8 (AssertionError" in printed.err


@pytest.mark.parametrize(
    "key", [pytest.param(["--data.image_size", "32"], marks=pytest.mark.slow), ["--model.model_args", "{img_size: 32}"]]
)
def test_training_at_another_side(here, key, capsys):
    size = key if key[0] == "--data.image_size" else [*key, "--data.image_size", "32"]
    words = ["baseline", *DIGITS, "--model.backbone", VIT, *size, "--tpt.max_epochs", "1", "--out", "runs", "--quiet"]
    assert train.main(words) == 0, capsys.readouterr().err
    (run,) = (here / "runs").iterdir()
    classifier = load_classifier(run)
    assert classifier.backbone.pos_embed.shape == (1, 5, 192) and classifier.image_shape[1:] == (32, 32)
    assert evaluate.main([str(run)]) == 0


def test_a_side_that_cannot_be_trained_names_one_that_can(here, capsys):
    assert train.main(["baseline", *DIGITS, "--model.backbone", VIT, "--data.image_size", "8", "--out", "runs"]) == 2
    assert f"{VIT} cannot take images of 8 pixels" in (said := capsys.readouterr().err)
    assert "--data.image_size 224 fits" in said


def test_sides_from_files():
    """The grids' squares beside the class token, and for every side the one that weights were trained at."""
    for side in (32, 64, 96, 224):
        with torch.device("meta"):
            weights = torchvision.models.vit_b_32(num_classes=2, image_size=side).state_dict()
        small = {name: value for name, value in weights.items() if "pos_embed" in name}
        assert trained_side("torchvision:vit_b_32", small).pixels == side
    stem = {"conv1.weight": torch.zeros(64, 3, 7, 7)}
    assert trained_side("resnet18", stem) is None  # a convolution takes any side
    for beside in (
        {"image_shape": [3, 48, 48]},
        {"args": Namespace(img_size=48, input_size=None)},
        {"args": Namespace(img_size=None, input_size=(3, 48, 48))},
        {"args": Namespace(train_crop_size=40, val_crop_size=48)},
    ):
        assert trained_side("resnet18", {"state_dict": stem, **beside}).pixels == 48
    assert trained_side("resnet18", {**stem, "args": Namespace(lr=1)}) is None


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("swin_tiny_patch4_window7_224", {64: 64, 128: 128, 224: None, 448: None}),  # windows of 7 fit both
        pytest.param("maxvit_tiny_tf_224", {96: 96, 224: 224}, marks=pytest.mark.slow),
        ("beit_base_patch16_224", {64: 64, 224: 224}),
        ("mixer_s32_224", {64: 64, 224: 224}),
        ("swinv2_tiny_window8_256", {128: None, 256: None}),  # its tensors are the same at every side
    ],
)
def test_sides_from_the_shapes_of_tensors(name, sides):
    for side, told in sides.items():
        with torch.device("meta"):
            weights = timm.create_model(name, num_classes=3, img_size=side).state_dict()
        found = trained_side(name, {"model": weights})
        assert (found and found.pixels) == told, (side, found)


class Sized(torch.nn.Module):
    """Takes one size, which its configuration names as in Hugging Face's models."""

    def __init__(self, image_size):
        super().__init__()
        self.config = SimpleNamespace(image_size=image_size)
        self.fc = torch.nn.Linear(3 * 48 * 48, 10)

    def forward(self, images):
        return self.fc(images.flatten(1))


@pytest.mark.parametrize("image_size", [48, (48, 48), [48, 48]])
def test_the_side_that_a_configuration_names(here, image_size, capsys):
    assert stated_sides(Sized(image_size)) == (48, 48)
    source = f"from test_image_side import Sized\ndef build():\n    return Sized({image_size})\n"
    Path("sized.py").write_text(source)
    assert predict.main(["sized.py:build", "noise.png"]) == 0
    assert "images: 3 x 48 x 48" in capsys.readouterr().err


def test_what_a_file_does_not_tell_is_said(here, capsys):
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), "resnet.pth")
    words = ["timm:test_resnet", "noise.png", "--weights", "resnet.pth"]
    assert predict.main(words) == 0
    said = "the file does not tell the side of the images that it was trained on: 160 pixels, the usual of MODEL"
    assert said in capsys.readouterr().err
    assert predict.main([*words, "--image-size", "32"]) == 0
    assert "the file does not tell" not in capsys.readouterr().err


def test_only_a_fixed_size_is_changed():
    assert side_args(VIT, 32, {}) == {"img_size": 32}
    assert side_args("torchvision:vit_b_32", 64, {}) == {"image_size": 64}
    assert side_args(VIT, 224, {}) == side_args(VIT, 32, {"dynamic_img_size": True}) == side_args(DYNAMIC, 32, {}) == {}
    assert side_args(VIT, 32, {"img_size": 48}) == side_args("resnet18", 32, {}) == {}
