"""head="keep": a model's own classifier stays, and the logits are the model's."""

import copy

import pytest
import timm
import torch
import torchvision
from test_models import ODD, TINY
from timm.models import get_model_input_config
from torch import nn

from ncreg import load_weights, param_groups
from ncreg.metrics import NeuralCollapse
from ncreg.models import Classifier, fold, load_matched, swap_head
from ncreg.models._keep import WholeModel

NOT_AFFINE = ("efficientvim_m1", "volo_d1_224", "squeezenet1_1")
FAMILIES = ["alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t"]
FAMILIES += ["mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5"]
FAMILIES += ["squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vgg11_bn", "vit_b_16"]


def as_after_training(model):
    """Biases, gains and running statistics unlike their initial values."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.named_buffers():
        if "running" in name:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    for parameter in model.parameters():
        if parameter.ndim == 1 or not parameter.any():
            parameter.data.copy_(torch.rand(parameter.shape, generator=generator) - 0.3)
    return model.eval()


@torch.no_grad()
def check_keep(name, model, x):
    """The logits of the model; the head is what turns features into them, unless something stands behind it."""
    as_after_training(model)
    before, logits = copy.deepcopy(model.state_dict()), model(x)
    kept = swap_head(model, "keep")
    got, features = kept(x, with_features=True)
    torch.testing.assert_close(got, logits, rtol=1e-5, atol=1e-5 * float(logits.abs().max()))
    assert kept.num_classes == logits.shape[1] and features.shape == (len(x), kept.head_hidden_size)
    affine = features @ kept.head.weight.T + (0 if kept.head.bias is None else kept.head.bias)
    close = torch.allclose(affine, logits, rtol=1e-3, atol=1e-4 * float(logits.abs().max()))
    assert close != (name in NOT_AFFINE)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", [*TINY, *ODD])
def test_timm_keeps_its_logits(name):
    model = timm.create_model(name, num_classes=10)
    check_keep(name, model, torch.rand(2, *get_model_input_config(model)["input_size"]))


def torchvision_case(name):
    aux = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    side = 299 if name == "inception_v3" else 224
    check_keep(
        name, torchvision.models.get_model(name, weights=None, num_classes=7, **aux), torch.rand(2, 3, side, side)
    )


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "googlenet", "shufflenet_v2_x0_5"])
def test_torchvision_keeps_its_logits(name):
    torchvision_case(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_torchvision_family_keeps_its_logits(name):
    torchvision_case(name)


class Tail(nn.Module):
    """A user's model: gray images, its last layer with or without a bias."""

    def __init__(self, bias):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.out = nn.Linear(6, 4, bias=bias)

    def forward(self, x):
        return self.out(self.body(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("path", [None, "out"])
@pytest.mark.parametrize("training", [True, False])
def test_a_module_of_ones_own(bias, path, training):
    model = Tail(bias).train(training)
    kept = swap_head(model, "keep", classifier=path, input_size=(1, 9, 9))
    x = torch.rand(3, 1, 9, 9)
    logits, features = kept(x, with_features=True)
    assert torch.equal(logits, model(x)) and torch.equal(features, model.body(x))
    assert (kept.head.bias is None) != bias and kept.training == training
    assert not {id(p) for p in model.parameters()} & {id(p) for p in kept.parameters()}


class LowRank(nn.Module):
    """A layer with a product of two thin ones beside it, as of an adapter; it says no number of outputs."""

    def __init__(self):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(6, 4), nn.Linear(6, 2, bias=False), nn.Linear(2, 4, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("num_classes", [None, 4])
def test_a_classifier_of_several_layers_is_kept_by_its_path(num_classes):
    model = Tail(True).eval()
    model.out = LowRank()
    kept = swap_head(model, "keep", classifier="out", input_size=(1, 9, 9), num_classes=num_classes)
    x = torch.rand(3, 1, 9, 9)
    logits, features = kept(x, with_features=True)
    weight = model.out.base.weight + model.out.up.weight @ model.out.down.weight
    torch.testing.assert_close(logits, model.body(x) @ weight.T + model.out.base.bias)
    assert torch.equal(features, model.body(x)) and kept.num_classes == 4
    torch.testing.assert_close(fold(kept)(x), logits)


SMALL_DEIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}


def small_deit(**more):
    """Two classifiers, each on a token of its own: the whole model gives the logits."""
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, **SMALL_DEIT, **more).eval()
    return model, swap_head(model, "keep")


def test_a_whole_model_keeps_timms_contract_under_its_own_names():
    model, kept = small_deit()
    assert isinstance(kept, WholeModel) and kept.in_chans == 3 and kept.num_features == model.num_features == 24
    names = {id(p): name.removeprefix("backbone.model.") for name, p in kept.named_parameters()}

    def rates(module, names):
        groups = param_groups(module, 0.1, layer_decay=0.5, lr=1.0)
        return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}

    own = rates(model, {id(p): name for name, p in model.named_parameters()})
    assert own["pos_embed"][1] == own["dist_token"][1] == 0 and own["blocks.0.mlp.fc1.weight"][1] == 0.1
    found = rates(kept, names)
    assert {name: pair[1] for name, pair in found.items() if name in own} == {n: pair[1] for n, pair in own.items()}
    ratios = {found[name][0] / own[name][0] for name in own if not name.startswith("head")}  # `head` is one layer above
    assert len(ratios) == 1
    kept.set_grad_checkpointing(True)
    assert kept.backbone.model.grad_checkpointing
    kept.backbone.model.get_submodule(kept.pretrained_cfg["first_conv"].removeprefix("backbone.model."))
    with pytest.raises(ValueError, match="whole model gives the logits"):
        kept.reset_classifier(0)
    with pytest.raises(AttributeError, match="no function of its pooled features"):
        kept.forward_head(kept.forward_features(torch.rand(1, 3, 32, 32)))


def test_the_head_of_a_whole_model_is_that_of_the_layers_as_they_are_now():
    """The mean of both layers' logits on their own tokens, after a training step as before it."""
    _, kept = small_deit()
    images, layers = torch.rand(3, 3, 32, 32), (kept.backbone.model.head, kept.backbone.model.head_dist)
    before = torch.zeros(())
    for _ in range(2):
        logits, features = kept.eval()(images, with_features=True)
        tokens = features.split(24, dim=1)
        wanted = sum(token @ layer.weight.T + layer.bias for token, layer in zip(tokens, layers, strict=True)) / 2
        torch.testing.assert_close(kept.head(features), wanted)
        torch.testing.assert_close(logits, wanted)
        assert not torch.allclose(kept.head.weight, before)
        before = kept.head.weight.clone()
        optimizer = torch.optim.SGD(kept.train().parameters(), lr=1.0)
        kept(images).square().sum().backward()
        optimizer.step()
    assert not kept.head.weight.requires_grad


@pytest.mark.parametrize("normalize", [None, "keep"])
def test_fold_gives_a_whole_model_back_as_it_was(normalize):
    model, kept = small_deit()
    x = torch.rand(2, 3, 32, 32)
    folded = fold(kept, normalize=normalize)
    assert torch.equal(folded(x), model(x)) and folded is not kept.backbone.model
    assert folded.pretrained_cfg["architecture"] == "deit_tiny_distilled_patch16_224"
    model.load_state_dict(folded.state_dict())
    layers = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    squeezed = nn.Sequential(*layers).eval()
    kept = swap_head(squeezed, "keep", input_size=(3, 8, 8))
    assert isinstance(kept, WholeModel)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(fold(kept, normalize=normalize)(x), squeezed(x))


@torch.no_grad()
def test_another_head_on_a_whole_model_is_that_on_the_model_itself():
    """A distilled pair gives way to its averaged tokens; the copy of its layers' weights takes no part in training."""
    model, kept = small_deit()
    assert {name for name, p in kept.named_parameters() if not p.requires_grad} == {"head.weight", "head.bias"}
    x = torch.rand(2, 3, 32, 32)
    swapped = swap_head(kept, "linear", num_classes=3).eval()
    torch.testing.assert_close(swapped.backbone(x), model.forward_features(x)[:, :2].mean(1))
    torch.testing.assert_close(fold(swapped)(x), swapped(x), rtol=1e-4, atol=1e-5)
    layers = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    squeezed = nn.Sequential(*layers)
    kept = swap_head(squeezed, "keep", input_size=(3, 8, 8))
    own, again = (swap_head(start, "linear", input_size=(3, 8, 8), num_classes=3).eval() for start in (squeezed, kept))
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(again.backbone(x), own.backbone(x))
    with pytest.raises(ValueError, match="can't hold the folded one"):
        fold(again)


def test_a_whole_model_is_saved_with_the_arguments_that_built_it(tmp_path):
    _, kept = small_deit(in_chans=1, drop_path_rate=0.2)
    kept.save_pretrained(tmp_path)
    again = Classifier.from_pretrained(tmp_path)
    x = torch.rand(2, 1, 32, 32)
    assert torch.equal(again(x), kept(x)) and again.in_chans == 1
    drops = [part.drop_prob for part in again.modules() if hasattr(part, "drop_prob")]
    assert max(drops) == pytest.approx(0.2)


def test_a_kept_classifier_is_measured_folded_and_kept_again():
    model = timm.create_model("test_resnet", num_classes=3).eval()
    kept = swap_head(model, "keep")
    x = torch.rand(12, 3, 32, 32)
    logits, features = kept(x, with_features=True)
    metric = NeuralCollapse(3, kept.head_hidden_size, classifier=kept.head)
    metric.update(features, torch.arange(12) % 3)
    right = (model(x).argmax(1) == torch.arange(12) % 3).double().mean()
    assert metric.compute()["classifier_accuracy"] == pytest.approx(float(right))
    torch.testing.assert_close(fold(kept)(x), logits)
    again = swap_head(kept, "keep")
    assert again is not kept and torch.equal(again(x), logits)


def test_a_kept_classifier_is_saved_and_read(tmp_path):
    """Reading it draws a model first, of which no warning is given."""
    kept = swap_head(timm.create_model("test_resnet", num_classes=5), "keep").eval()
    kept.save_pretrained(tmp_path)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(Classifier.from_pretrained(tmp_path)(x), kept(x))


@pytest.mark.parametrize("name", ["test_resnet", "torchvision:mobilenet_v3_small"])
@pytest.mark.parametrize("under", ["", "module.", "backbone."])
def test_weights_of_a_file_bring_their_classifier_and_its_classes(name, under, tmp_path):
    with pytest.warns(UserWarning, match=f"head='keep' on random weights: .*'{name}' are drawn"):
        trained = as_after_training(swap_head(name, "keep", num_classes=7, model_args={"in_chans": 1}))
    plain = fold(trained)
    stored = {f"{under}{key}": value for key, value in plain.state_dict().items()}
    worse = {key: torch.zeros_like(value) for key, value in stored.items()}
    torch.save({"epoch": 3, "state_dict": worse, "state_dict_ema": stored}, tmp_path / "file.pth")
    kept = swap_head(name, "keep", model_args={"in_chans": 1}, weights=load_weights(tmp_path / "file.pth")).eval()
    x = torch.rand(2, 1, 64, 64)
    torch.testing.assert_close(kept(x), trained(x))
    assert kept.num_classes == 7
    args = {"dropout": 0.0} if ":" in name else {}
    started = swap_head(name, "linear", num_classes=3, model_args=args, weights=load_weights(tmp_path / "file.pth"))
    gray = torch.rand(2, 1, 64, 64)
    assert started.num_classes == 3
    if ":" in name:  # it takes the channels of its weights
        torch.testing.assert_close(started.eval().backbone(gray), trained.backbone(gray))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"norm": "batch"}, "norm='batch' with head='keep'"),
        ({"project": 4}, "project=4 with head='keep'"),
        ({"head_args": {"scale": 2.0}}, "head_args={'scale': 2.0} with head='keep'"),
        ({"num_classes": 9}, "num_classes=9, but the model's own classifier has 4 outputs"),
    ],
)
def test_what_a_kept_classifier_cannot_honour_is_refused(more, words):
    with pytest.raises(ValueError, match=words.replace("{", r"\{")):
        swap_head(Tail(True), "keep", input_size=(1, 9, 9), **more)


@pytest.mark.parametrize("head", ["keep", "linear"])
@pytest.mark.parametrize("name", ["test_resnet", "deit_tiny_distilled_patch16_224"])
def test_what_a_classifier_cannot_be_built_with_again_is_refused(name, head):
    """It has its weights and its head already: a file that is handed in would not be read."""
    small = {"depth": 1, "embed_dim": 12} if name.startswith("deit") else {}
    classifier = swap_head(timm.create_model(name, num_classes=4, **small), "keep")
    for more, words in (
        ({"weights": {"fc.weight": torch.ones(4, 96)}}, "weights is for timm names"),
        ({"model_args": {"in_chans": 1}}, "model_args=.* is for timm names"),
        ({"classifier": "fc"}, "classifier='fc' is for other modules"),
    ):
        with pytest.raises(ValueError, match=words):
            swap_head(classifier, head, **more)


def test_a_model_without_classifier_has_none_to_keep():
    with pytest.raises(ValueError, match="no classifier to keep"):
        swap_head(timm.create_model("test_resnet", num_classes=0), "keep")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("out.bias"), "missing are out.bias"),
        (lambda s: s.update({"out.weight": torch.zeros(9, 6)}), "out.weight .9, 6. instead of .4, 6."),
        (lambda s: s["out.bias"].fill_(torch.nan), "hold NaN: out.bias"),
    ],
)
def test_weights_that_do_not_cover_a_whole_model_are_refused_and_change_nothing(change, words):
    model = Tail(True)
    before, stored = copy.deepcopy(model.state_dict()), copy.deepcopy(model.state_dict())
    stored["body.0.weight"] += 1
    change(stored)
    with pytest.raises(ValueError, match=words):
        load_matched(model, {"state_dict": stored})
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_torchvision_takes_other_channels(channels):
    backbone = swap_head("torchvision:resnet18", "etf", num_classes=4, model_args={"in_chans": channels})
    assert backbone.eval()(torch.rand(2, channels, 64, 64)).shape == (2, 4)
    assert not isinstance(backbone, WholeModel)


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("torchvision:resnet19", {}, "no classifier of torchvision .*close: resnet18"),
        ("torchvision:resnet18", {"model_args": {"num_classes": 4}}, "model_args holds num_classes"),
        ("torchvision:resnet18", {"model_args": {"depth": 4}}, "does not take model_args={'depth': 4}"),
        ("torchvision:resnet18", {"weights": {"a": torch.zeros(2)}}, "weights: 0 of the 122 tensors"),
        ("torchvision:resnet18", {"classifier": "fc"}, "classifier='fc' is for modules"),
    ],
)
def test_torchvision_refusals(name, more, words):
    with pytest.raises(ValueError, match=words):
        swap_head(name, "linear", num_classes=4, **more)
