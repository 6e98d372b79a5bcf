import copy
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from ncreg.models import Classifier, Normalize, fold, swap_head
from tests.stand_ins import quantize


def trained(name="test_resnet", head="linear", **args):
    """A swapped model whose γ and running statistics are no longer the initial ones."""
    torch.manual_seed(0)
    classifier = swap_head(name, head, **{"num_classes": 10} | args).eval()
    for tensor in (*classifier.norm.parameters(), *classifier.norm.buffers()):
        if tensor.is_floating_point():
            tensor.data.copy_(torch.rand(tensor.shape) + 0.5)
    return classifier


def images(n=64):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("project", [None, 9])
@pytest.mark.parametrize("head, head_args", [("linear", {}), ("etf", {"normalize": False, "scale": 3.0})])
def test_logits_are_the_same_where_features_are_not_normalised(norm, project, head, head_args):
    classifier = trained(head=head, norm=norm, project=project, head_args=head_args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded = fold(classifier)
    torch.testing.assert_close(folded(images()), classifier(images()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", ["none", "batch", "layer", "rms"])
@pytest.mark.parametrize("head", ["etf", "cosine"])
def test_predictions_are_the_same_where_features_are_normalised(norm, head):
    classifier = trained(head=head, norm=norm, project=16)
    with pytest.warns(UserWarning, match="predictions are the same, logits are not"):
        folded = fold(classifier)
    logits, features = classifier(images(), with_features=True)
    got = folded(images())
    assert torch.equal(got.argmax(1), logits.argmax(1))
    torch.testing.assert_close(F.normalize(got), F.normalize(logits), rtol=1e-4, atol=1e-4)
    if norm == "batch":  # one length, ‖γ‖, for every sample in place of its own
        length = features.norm(dim=1, keepdim=True) / classifier.norm.weight.norm()
        torch.testing.assert_close(got, logits * length, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head, norm", [("etf", "batch"), ("cosine", "layer"), ("linear", "layer"), ("linear", "rms")])
@pytest.mark.parametrize("name", ["test_resnet", "dla46x_c"])
def test_keep_has_the_same_logits_whatever_norm_and_head(name, head, norm):
    classifier = trained(name, head, norm=norm, project=9)
    folded = fold(classifier, normalize="keep")
    x = images(2)
    torch.testing.assert_close(folded(x), classifier(x), rtol=0, atol=1e-5)
    assert not isinstance(folded, Classifier) and folded.num_classes == 10


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "dla46x_c", "levit_128s", "repvit_m1"])
def test_the_checkpoint_loads_with_timm_alone(name, tmp_path):
    classifier = trained(name)
    torch.save(fold(classifier).state_dict(), tmp_path / "folded.pth")
    model = timm.create_model(name, num_classes=10, checkpoint_path=tmp_path / "folded.pth").eval()
    side = timm.models.get_model_input_config(model)["input_size"][-1]
    x = torch.rand(2, 3, side, side)
    torch.testing.assert_close(model(x), classifier(x), rtol=0, atol=1e-5)


def test_the_classifier_is_not_changed_and_modes_and_randomness_are_kept():
    classifier = trained(head="etf").train()
    classifier.backbone.layer1.eval()
    before = copy.deepcopy(classifier.state_dict())
    modes = [m.training for m in classifier.modules()]
    state = torch.get_rng_state()
    folded = fold(classifier, normalize="drop")
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in classifier.modules()] == modes
    assert folded.training and not folded.layer1.training and folded.fc.training
    assert folded.fc.weight.requires_grad
    assert all(torch.equal(before[key], value) for key, value in classifier.state_dict().items())


@pytest.mark.parametrize("name", ["test_resnet", "torchvision:shufflenet_v2_x0_5", None])
def test_another_default_device_plays_no_part(name):
    """`meta` plays the GPU of torch.set_default_device("cuda")."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.ReLU(), nn.Linear(8, 4))
    classifier = trained(net, input_size=(3, 32, 32)) if name is None else trained(name)
    wanted = fold(classifier)
    with torch.device("meta"):
        folded = fold(classifier)
    torch.testing.assert_close(dict(folded.state_dict()), dict(wanted.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype):
    classifier = trained().to(dtype)
    folded = fold(classifier)
    assert {p.dtype for p in folded.parameters()} == {dtype}
    tolerance = 1e-12 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(folded(images().to(dtype)), classifier(images().to(dtype)), rtol=0, atol=tolerance)


@pytest.mark.parametrize("head, normalize", [("linear", None), ("etf", "drop"), ("etf", "keep")])
def test_autocast_around_the_call_changes_no_weight(head, normalize):
    """At the end of a mixed-precision step."""
    classifier = trained(head=head, project=11)
    expected = fold(classifier, normalize=normalize)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fold(classifier, normalize=normalize)
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_preprocessing_is_told_to_timm():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    classifier = trained()
    classifier.preprocess = Normalize(mean, std)
    with pytest.warns(UserWarning, match="preprocess is not part"):
        folded = fold(classifier)
    config = timm.data.resolve_model_data_config(folded)
    assert config["mean"] == pytest.approx(mean) and config["std"] == pytest.approx(std)
    ready = Normalize(config["mean"], config["std"])(images())
    torch.testing.assert_close(folded(ready), classifier(images()), rtol=0, atol=1e-5)


def test_a_gamma_that_has_decayed_to_zero():
    classifier = trained(head="etf")
    nn.init.zeros_(classifier.norm.weight)
    assert fold(classifier, normalize="drop")(images()).abs().max() == 0


def test_two_classes_and_one_feature():
    classifier = trained(head="etf", num_classes=2, project=1, head_args={"normalize": False})
    torch.testing.assert_close(fold(classifier)(images()), classifier(images()), rtol=0, atol=1e-5)


class Mlp(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 10))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "arguments, normalize, message",
    [
        ({"head": Mlp()}, None, "Mlp is not linear in the features.*normalize='keep'"),
        ({"norm": "layer"}, None, "LinearHead adds a bias after features were normalised.*normalize='keep'"),
        ({}, "leave", "normalize='leave' must be"),
        ({"name": "levit_128s"}, "keep", "one classifier layer, this has 2"),
    ],
)
def test_what_does_not_fold_is_refused_with_a_way_out(arguments, normalize, message):
    with pytest.raises(ValueError, match=message):
        fold(trained(**arguments), normalize=normalize)


@pytest.mark.parametrize("part", ["project", "head"])
def test_quantized_weights_are_refused_with_a_way_out(part):
    classifier = trained(head="linear", project=5)
    quantize(getattr(classifier, part))
    with pytest.raises(ValueError, match=rf"{part}\.weight is of class Quantized.* fold the classifier first"):
        fold(classifier)


@pytest.mark.usefixtures("unchecked")
def test_only_a_whole_classifier_folds():
    with pytest.raises(TypeError, match="takes a Classifier, got Linear"):
        fold(nn.Linear(2, 2))
    classifier = trained()
    with pytest.raises(ValueError, match="meta"):
        fold(copy.deepcopy(classifier).to("meta"))
    classifier.reset_classifier(0)
    with pytest.raises(ValueError, match="reset_classifier"):
        fold(classifier)
    bare = Classifier(nn.Flatten(), nn.Identity(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="build it by swap_head"):
        fold(bare)


@pytest.mark.filterwarnings("ignore")  # the exporter's own deprecations
@pytest.mark.parametrize("head, folded", [("etf", False), ("etf", True)])
def test_onnx_gives_the_same_outputs(head, folded, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    classifier = trained(head=head)
    model = fold(classifier, normalize="drop") if folded else classifier
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (images(2),), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: images(2).numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(images(2)), rtol=1e-4, atol=1e-4)
