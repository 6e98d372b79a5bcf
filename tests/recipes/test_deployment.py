"""Every way from a run to a prediction gives what recipes/evaluate.py measures."""

import csv
import json
import warnings

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf

from ncreg import Classifier, fold, load_classifier
from recipes import predict
from recipes.core.cli import parse
from recipes.data.image_folder import image_files, read_image
from recipes.evaluation.run_under_test import RunUnderTest
from recipes.train import train

SHORT = ["--data.batch_size", "32", "--quiet", "true", "--measure_size", "64"]


def stripes(folder, *, sizes):
    """Classes that differ in the width of stripes alone, so that an image of another scale is of another class."""
    draw = np.random.default_rng(0)
    for label, width in enumerate((3, 5, 8, 13)):
        place = folder / f"width {width}"
        place.mkdir(parents=True)
        for number in range(40):
            height, across = sizes[number % len(sizes)]
            phase = draw.uniform(0, 2 * np.pi)
            wave = np.sin(2 * np.pi * np.arange(across) / width * min(height, across) / 48 + phase)
            image = np.tile(127 + 90 * wave, (height, 1)) + draw.normal(0, 20, (height, across))
            pixels = np.clip(image, 0, 255).astype(np.uint8)
            colours = np.stack([pixels, 255 - pixels, np.full_like(pixels, 40 * label)], axis=2) // 2 + 40
            Image.fromarray(pixels if number % 4 == 0 else colours).save(place / f"{number:02d}.png")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run at 32 pixels on files of other sizes and shapes, in colour and gray."""
    out = tmp_path_factory.mktemp("deployed")
    stripes(out / "images", sizes=[(48, 48), (56, 72), (75, 50)])
    args = ["etf", "--data.name", "folder", "--data.root", str(out / "images"), "--data.image_size", "32"]
    return train(parse([*args, *SHORT, "--tpt.max_epochs", "12", "--tpt.extend", "0", "--out", str(out / "runs")]))


@pytest.fixture(scope="module")
def judged(run):
    """The test images' files, their classes, and the logits that recipes/evaluate.py judges."""
    tested = RunUnderTest.open(run, device="cpu")
    split = tested.data.test
    outputs = tested.outputs_on("test")
    return split, outputs.target, outputs.logits.float()


def files_of(run, split):
    root = parse(["--config", str(run / "config.yaml")]).data.root
    classes = sorted(path for path in root.iterdir())
    everything = [file for place in classes for file in image_files(place)]
    read = {read_image(file, 32).numpy().tobytes(): file for file in everything}
    return [read[image.numpy().tobytes()] for image in split.read()]


def by_timm(model, files):
    """Logits of a model on the images as timm's own evaluation prepares them."""
    config = resolve_model_data_config(model)
    transform = create_transform(**config)
    assert config == resolve_model_data_config(model, use_test_size=True)  # as timm's validate.py reads it
    mode = {1: "L", 3: "RGB"}[config["input_size"][0]]
    with torch.inference_mode():
        return model.eval()(torch.stack([transform(Image.open(file).convert(mode)) for file in files]))


def same(logits, judged, *, scale=False):
    split, target, expected = judged
    assert (expected.argmax(1) == target).float().mean() > 0.8  # a run that learned, or nothing is shown
    if scale:  # a folded ETF head: every image's logits up to a positive factor
        logits, expected = (torch.nn.functional.normalize(x) for x in (logits, expected))
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()  # Pillow rounds pixels otherwise
    assert torch.equal(logits.argmax(1), expected.argmax(1))


def test_the_classifier_with_timms_transform(run, judged):
    files, model = files_of(run, judged[0]), load_classifier(run)
    same(by_timm(model, files), judged)
    config = resolve_model_data_config(model)
    assert config["input_size"] == (3, 32, 32) and config["crop_pct"] == 1 and config["interpolation"] == "bilinear"
    assert model.pretrained_cfg["label_names"] == ("width 13", "width 3", "width 5", "width 8")
    assert model.default_cfg == model.pretrained_cfg and "test_input_size" not in model.pretrained_cfg


def test_the_classifier_on_the_recipes_own_images(run, judged):
    with torch.inference_mode():
        same(load_classifier(run)(judged[0].read().float() / 255), judged)


def test_predict(run, judged, tmp_path):
    files = files_of(run, judged[0])
    assert predict.main([str(run), *map(str, files), "--out", str(tmp_path / "p.csv"), "--device", "cpu"]) == 0
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    names = load_classifier(run).class_names
    assert [row["class"] for row in rows] == [names[index] for index in judged[2].argmax(1)]


def folded(run, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that lengths and preprocessing stay outside
        return fold(load_classifier(run), **options)


@pytest.mark.parametrize("normalize", ["drop", "keep"])
def test_the_folded_model_with_timms_transform(run, judged, normalize):
    model = folded(run, normalize=normalize)
    same(by_timm(model, files_of(run, judged[0])), judged, scale=normalize == "drop")
    assert model.default_cfg is model.pretrained_cfg and len(model.pretrained_cfg["label_names"]) == 4


def test_the_folded_models_state_in_a_new_model(run, judged, tmp_path):
    model = folded(run, normalize="drop")
    torch.save(model.state_dict(), tmp_path / "folded.pt")
    again = timm.create_model(
        "test_resnet", pretrained_cfg=model.pretrained_cfg, checkpoint_path=tmp_path / "folded.pt"
    )
    same(by_timm(again, files_of(run, judged[0])), judged, scale=True)


def test_the_folded_model_through_timms_folder_for_the_hub(run, judged, tmp_path):
    model = folded(run, normalize="drop")
    save_for_hf(model, str(tmp_path / "hub"), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    images = torch.rand(3, 3, 32, 32)
    assert torch.equal(again(images), model(images))
    same(by_timm(again, files_of(run, judged[0])), judged, scale=True)
    assert list(again.pretrained_cfg["label_names"]) == list(model.pretrained_cfg["label_names"])


def test_our_folder_for_the_hub(run, judged, tmp_path):
    load_classifier(run).save_pretrained(tmp_path / "hub")
    again = Classifier.from_pretrained(tmp_path / "hub")
    assert again.pretrained_cfg == load_classifier(run).pretrained_cfg
    same(by_timm(again, files_of(run, judged[0])), judged)


@pytest.mark.filterwarnings("ignore")  # the exporter's own deprecations
@pytest.mark.parametrize("fold_first", [False, True])
def test_onnx_with_the_images_in_its_metadata(run, judged, tmp_path, fold_first):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = folded(run, normalize="drop") if fold_first else load_classifier(run)
    program = torch.onnx.export(model.eval(), (torch.rand(2, *model.pretrained_cfg["input_size"]),), dynamo=True,
                                dynamic_shapes=({0: "batch"},), verbose=False)  # fmt: skip
    program.model.metadata_props["data_config"] = json.dumps(resolve_model_data_config(model))
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    config = json.loads(session.get_modelmeta().custom_metadata_map["data_config"])
    transform = create_transform(**config)
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files_of(run, judged[0])])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    same(torch.from_numpy(logits), judged, scale=fold_first)


def test_a_run_on_gray_images(tmp_path):
    args = ["baseline", "--data.train_size", "500", "--tpt.max_epochs", "6", *SHORT, "--out", str(tmp_path)]
    path = train(parse(args))
    tested = RunUnderTest.open(path, device="cpu")
    judged = tested.data.test, tested.outputs_on("test").target, tested.outputs_on("test").logits.float()
    files = []
    for number, image in enumerate(judged[0].read()):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(image[0].numpy()).save(files[-1])
    assert resolve_model_data_config(load_classifier(path))["input_size"] == (1, 28, 28)
    same(by_timm(load_classifier(path), files), judged)
    same(by_timm(folded(path), files), judged)
