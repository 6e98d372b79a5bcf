"""Modules of no library, and parts of one's own."""

import pickle
import warnings
from collections import deque
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune

from ncreg._copies import copied
from ncreg.models import Classifier, Normalize, fold, swap_head
from ncreg.quantization import round_weights


def stirred(classifier):
    """Eval mode, with running statistics and γ unlike their initial values, as after training."""
    generator = torch.Generator().manual_seed(1)
    for tensor in (*classifier.norm.parameters(), *classifier.norm.buffers()):
        if tensor.is_floating_point():
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return classifier.eval()


class Net(nn.Module):
    """A classifier of no library, its layers under names of their own."""

    def __init__(self, last=None):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.out = nn.ModuleDict({"logits": nn.Linear(8, 5)})
        self.last = last or nn.Identity()

    def forward(self, x):
        return self.last(self.out["logits"](self.body(x)))


@pytest.mark.parametrize("path", [None, "out.logits"])
@pytest.mark.parametrize("input_size", [None, (1, 16, 16)])
def test_any_module_by_its_classifiers_path(path, input_size):
    model = Net()
    classifier = stirred(swap_head(model, "linear", classifier=path, input_size=input_size))
    x = torch.rand(3, 1, 16, 16)
    torch.testing.assert_close(classifier.backbone(x), model.body(x))
    assert classifier.num_classes == 5 and isinstance(model.out["logits"], nn.Linear)
    folded = fold(classifier)
    torch.testing.assert_close(folded(x), classifier(x))
    model.load_state_dict(folded.state_dict())


def test_vectors_instead_of_images():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.rand(5, 4)
    for args in ({"classifier": "2"}, {"input_size": (4,)}):
        classifier = swap_head(model, "etf", **args)
        torch.testing.assert_close(classifier.backbone(x), model[:2](x))


def keeping(model):
    """Its layers keep their last outputs, one of them in a list."""
    model.body[1].register_forward_hook(lambda module, inputs, output: setattr(module, "seen", [output]))
    return model


COMPUTED = {  # tensors with a history among a model's attributes, which copy.deepcopy refuses
    "pruned": lambda model: prune.l1_unstructured(model.out["logits"], "weight", amount=0.5),
    "weight norm": lambda model: nn.utils.parametrizations.weight_norm(model.out["logits"]),
    "pruned body": lambda model: prune.l1_unstructured(model.body[0], "weight", amount=0.5),
    "kept outputs": keeping,
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_model_that_keeps_computed_tensors_is_swapped_kept_and_folded(kind):
    model, x = Net(), torch.rand(3, 1, 16, 16)
    COMPUTED[kind](model)
    wanted = model(x)
    kept = swap_head(model, "keep", norm="none").eval()
    torch.testing.assert_close(kept(x), wanted)
    kept(x)
    torch.testing.assert_close(fold(kept)(x), wanted)
    swapped = swap_head(model, "etf").eval()
    torch.testing.assert_close(swapped.backbone(x), model.body(x))
    for parameter in (*swapped.parameters(), *kept.parameters()):
        parameter.data.zero_()
    torch.testing.assert_close(model(x), wanted)  # they hold copies
    if kind == "kept outputs":
        torch.testing.assert_close(round_weights(model, 16)(x), wanted, rtol=1e-3, atol=1e-4)
    else:
        with pytest.raises(ValueError, match="computes its weight from others"):
            round_weights(model, 16)


class OfTokens(nn.Module):
    """A linear map of every token, their mean, and a classifier: vectors are no input of it."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        batch, _, _ = x.shape
        return self.out(self.embed(x).mean(1).view(batch, -1))


def test_a_named_classifier_is_trusted_where_the_first_layers_width_is_no_input():
    classifier, x = swap_head(OfTokens(), "linear", classifier="out"), torch.rand(2, 5, 6)
    assert classifier.head_hidden_size == 8 and classifier(x).shape == (2, 3)
    torch.testing.assert_close(classifier.backbone(x), classifier.backbone.embed(x).mean(1))


def test_a_head_and_a_norm_of_ones_own_are_copied():
    head, norm = nn.Linear(96, 7), nn.LayerNorm(96)
    classifier = swap_head("test_resnet", head, norm=norm)
    assert classifier.num_classes == 7 and classifier.head_hidden_size == 96
    assert classifier.head is not head and classifier.norm is not norm
    assert torch.equal(classifier.head.weight, head.weight)


def test_a_swapped_vector_classifier_swaps_and_folds_again():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    again = stirred(swap_head(swap_head(model, classifier="2", project=5), "linear", project=6))
    assert again.project.in_features == 8 and again.num_classes == 3
    x = torch.rand(5, 4)
    torch.testing.assert_close(fold(again)(x), again(x))


def test_new_parts_go_with_the_parameters_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for model in ("test_resnet", Net()):
            assert swap_head(model, "linear", num_classes=5).head.weight.dtype == torch.float32


def test_a_classifier_survives_pickling():
    classifier = swap_head("test_resnet", "etf", num_classes=5, project=4).eval()
    again = pickle.loads(pickle.dumps(classifier))
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(x), classifier(x))
    again.reset_classifier(3)
    assert again.head.num_classes == 3


def test_a_classifier_that_took_a_parametrized_ones_place_survives_pickling():
    """A parametrization gives each layer a class of its own, which pickle does not find."""
    model = Net()
    nn.utils.parametrizations.weight_norm(model.out["logits"])
    classifier = swap_head(model, "linear", input_size=(1, 16, 16)).eval()
    again, x = pickle.loads(pickle.dumps(classifier)), torch.rand(3, 1, 16, 16)
    assert torch.equal(again(x), classifier(x))
    torch.testing.assert_close(fold(again)(x), classifier(x))


def test_a_swapped_classifier_can_be_swapped_again():
    first = swap_head("test_resnet", "etf", num_classes=10)
    first.preprocess = Normalize([0.5] * 3, [0.5] * 3)
    second = swap_head(first, "linear", norm="none")
    assert isinstance(second, Classifier) and isinstance(second.preprocess, Normalize)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(second.eval()(x, with_features=True).features, first.eval().backbone((x - 0.5) / 0.5))


def test_dropout_before_the_norm_is_announced():
    for model in ("test_resnet", "test_vit"):
        with pytest.warns(UserWarning, match="dropout of rate 0.3"):
            swap_head(model, num_classes=10, model_args={"drop_rate": 0.3})


@pytest.mark.parametrize("build", [torchvision.models.mobilenet_v3_small, torchvision.models.alexnet])
def test_what_the_warning_of_dropout_says_removes_it(build):
    model = build(weights=None)
    with pytest.warns(
        UserWarning, match=r"model\.get_submodule\('classifier\.\d'\)\.p = 0\.0 before swap_head"
    ) as told:
        swap_head(model, "etf", num_classes=10)
    remedy = str(told[0].message).partition("; ")[2].partition(" before")[0]
    exec(remedy, {"model": model})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swap_head(model, "etf", num_classes=10)


@pytest.mark.parametrize("name", ["test_resnet", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("head", ["linear", "keep"])
def test_the_remedy_for_dropout_names_the_backbone_of_a_classifier(name, head):
    args = {"depth": 1, "embed_dim": 12} if name.startswith("deit") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = swap_head(timm.create_model(name, num_classes=3, drop_rate=0.3, **args), head)
    with pytest.warns(UserWarning, match=r"dropout of rate 0\.3") as told:
        swap_head(model, "etf")
    exec(str(told[0].message).partition("; ")[2].partition(" before")[0], {"model": model})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swap_head(model, "etf")


class Scaled(nn.Module):
    """Dropout under a name of its own, in a model with a parameter of its own; one layer has dropout inside."""

    def __init__(self, inside, last):
        super().__init__()
        self.scale, self.inside, self.last = nn.Parameter(torch.ones(())), nn.Dropout(inside), nn.Dropout(last)
        self.body, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.last(torch.relu(self.body(self.inside(x * self.scale)))))


def test_dropout_of_a_model_of_ones_own_is_announced_where_it_stands_last():
    """The remedy leaves the same features in training and eval mode; dropout in the body is the body's own."""
    x = torch.rand(64, 6)
    for model in (Scaled(0.0, 0.5), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))):
        with pytest.warns(UserWarning, match=r"dropout of rate 0\.5.*get_submodule\('(last|2)'\)\.p = 0\.0") as told:
            swap_head(model, "linear", input_size=(6,))
        exec(str(told[0].message).partition("; ")[2].partition(" before")[0], {"model": model})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            backbone = swap_head(model, "linear", input_size=(6,)).backbone
        torch.testing.assert_close(backbone.train()(x), backbone.eval()(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swap_head(Scaled(0.5, 0.0), "linear", input_size=(6,))


class Twice(nn.Module):
    """A classifier under two names."""

    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(8, 3), nn.Linear(6, 8)
        self.fc = self.head

    def forward(self, x):
        return self.fc(self.body(x).relu())


@pytest.mark.parametrize("path", [None, "fc", "head"])
def test_a_classifier_under_two_names_is_one(path):
    model, x = Twice(), torch.rand(4, 6)
    classifier = stirred(swap_head(model, "linear", classifier=path, input_size=(6,)))
    torch.testing.assert_close(classifier.backbone(x), model.body(x).relu())
    assert [name for name, _ in classifier.backbone.named_parameters()] == ["body.weight", "body.bias"]
    for folded in (fold(classifier), fold(classifier, normalize="keep")):
        torch.testing.assert_close(folded(x), classifier(x))
        assert folded.fc is folded.head
    model.load_state_dict(fold(classifier).state_dict())
    torch.testing.assert_close(model(x), classifier(x))
    torch.testing.assert_close(swap_head(model, "keep", classifier=path, input_size=(6,))(x), model(x))


def test_a_classifier_of_several_layers_gives_way_to_one():
    mlp = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), mlp)
    classifier = stirred(swap_head(model, "linear", classifier="3", num_classes=4))
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(classifier.backbone(x), model[:3](x))
    folded = fold(classifier)
    assert isinstance(folded[3], nn.Linear)
    torch.testing.assert_close(folded(x), classifier(x))


def test_the_path_of_a_timm_models_classifier_will_do():
    model = timm.create_model("test_resnet", num_classes=7)
    classifier = stirred(swap_head(model, "linear", classifier="fc", num_classes=5))
    x = torch.rand(2, 3, 32, 32)
    folded = fold(classifier)
    torch.testing.assert_close(folded(x), classifier(x))
    assert folded.num_classes == 5


@dataclass
class Kept:
    last: Any


class Slotted:
    __slots__ = ("last",)


def test_a_copy_leaves_out_history_and_never_unties_a_view():
    model = nn.Sequential(nn.Linear(4, 3))
    model.kept = model(torch.ones(2, 4))
    model.cfg = {}
    model.cfg["self"] = model.cfg
    again = copied(model)
    assert again.cfg["self"] is again.cfg and torch.equal(again.kept, model.kept) and not again.kept.requires_grad
    del model.kept
    model.holders = [deque([model(torch.ones(2, 4))]), Kept(model(torch.ones(2, 4))), {"slots": Slotted()}]
    model.holders[2]["slots"].last = (model(torch.ones(2, 4)),)
    last, box, nested = copied(model).holders
    for found in (last[0], box.last, nested["slots"].last[0]):
        assert torch.equal(found, model.holders[0][0]) and not found.requires_grad
    model.holders[1].last = model.holders[2]["slots"].last = None
    model.holders[0].clear()
    model.tied = model[0].weight.t()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copied(model)


class RemembersBiases(nn.Module):
    """As timm's LeViT and TinyViT: in eval mode what follows from the weights is kept until training mode comes."""

    def __init__(self) -> None:
        super().__init__()
        self.biases = nn.Parameter(torch.zeros(6))
        self.kept: torch.Tensor | None = None

    def train(self, mode: bool = True) -> "RemembersBiases":
        self.kept = None if mode else self.kept
        return super().train(mode)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if self.training:
            return rows + self.biases
        self.kept = self.biases.detach().clone() if self.kept is None else self.kept
        return rows + self.kept


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("head", ["linear", "keep"])
def test_weights_loaded_after_the_swap_reach_a_backbone_that_remembers(head, training):
    def plain():
        return nn.Sequential(nn.Flatten(), RemembersBiases(), nn.Linear(6, 3)).train(training)

    new = swap_head(plain(), head, num_classes=3, input_size=(6,))
    moved = {name: tensor + 1 if "biases" in name else tensor for name, tensor in new.state_dict().items()}
    assert sum("biases" in name for name in moved) == 1
    new.load_state_dict(moved)
    images = torch.rand(4, 6)
    first = new(images, with_features=True)[1]
    assert {part.training for part in new.modules()} == {training}
    if head == "keep":
        torch.testing.assert_close(first, images + 1)
    elif not training:
        torch.testing.assert_close(first, (images + 1) / (1 + new.norm.eps) ** 0.5)


def test_tiny_vit_in_eval_mode_computes_with_weights_that_are_loaded_after_the_swap():
    torch.manual_seed(0)
    old = swap_head("tiny_vit_5m_224", "linear", num_classes=5)
    with torch.no_grad():
        for name, weight in old.named_parameters():
            if "attention_biases" in name:
                weight.normal_()
    new = swap_head(timm.create_model("tiny_vit_5m_224").eval(), "linear", num_classes=5)
    new.load_state_dict(old.state_dict())
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(new(images), old.eval()(images))
