import pytest
import torch
from torch import nn

from ncreg.models import swap_head
from ncreg.norms import LastBatchNorm
from ncreg.optim import param_groups


def names(model, decayed):
    """Names of the parameters that decay, or of those that don't, each of which must occur once."""
    known = {parameter: name for name, parameter in model.named_parameters()}
    found = [known[p] for g in param_groups(model, 5e-4) if (g["weight_decay"] > 0) == decayed for p in g["params"]]
    assert len(found) == len(set(found))
    return set(found)


@pytest.mark.parametrize("head, learned", [("linear", {"head.weight"}), ("cosine", {"head.weight"}), ("etf", set())])
@pytest.mark.parametrize("norm, gamma", [("batch", {"norm.weight"}), ("layer", {"norm.weight"}), ("none", set())])
def test_gamma_and_learned_head_decay_and_nothing_else_that_is_one_dimensional(head, learned, norm, gamma):
    classifier = swap_head("test_resnet", head, norm=norm, num_classes=10, project=12)
    classifier.backbone.conv1[0].weight.requires_grad_(False)
    decayed, rest = names(classifier, True), names(classifier, False)
    assert {n for n in decayed if not n.startswith("backbone.")} == learned | gamma | {"project.weight"}
    assert {n for n in decayed if n.startswith("backbone.")} == {
        n for n, p in classifier.named_parameters() if p.ndim == 4 and n != "backbone.conv1.0.weight"
    }
    assert decayed | rest == {n for n, p in classifier.named_parameters() if p.requires_grad}
    assert not decayed & rest


def test_beta_of_a_last_norm_does_not_decay():
    classifier = swap_head("test_resnet", norm=LastBatchNorm(96, bias=True, gamma="scalar"), num_classes=10)
    assert "norm.weight" in names(classifier, True) and "norm.bias" in names(classifier, False)


def test_wrapped_and_plain_models():
    classifier = swap_head("test_vit", num_classes=10)
    wrapped = nn.ModuleDict({"module": classifier})  # the names DistributedDataParallel gives
    assert names(wrapped, True) == {f"module.{name}" for name in names(classifier, True)}
    assert "backbone.pos_embed" in names(classifier, False)
    plain = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), LastBatchNorm(8), nn.Linear(8, 3))
    assert names(plain, True) == {"0.weight", "2.weight", "3.weight"}
    assert names(plain, False) == {"0.bias", "1.weight", "1.bias", "3.bias"}


def test_tied_weights_are_in_one_group():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert names(model, True) == {"0.weight"} and names(model, False) == {"0.bias", "1.bias"}


def test_coupled_decay_reaches_gamma_through_sgd_and_no_other_norm():
    classifier = swap_head("test_resnet", "etf", num_classes=10)
    optimizer = torch.optim.SGD(param_groups(classifier, 0.1), lr=1.0)
    for parameter in classifier.parameters():
        parameter.grad = torch.zeros_like(parameter)
    norm = classifier.backbone.layer1[0].bn1.weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(classifier.norm.weight, torch.full_like(classifier.norm.weight, 0.9))
    torch.testing.assert_close(classifier.backbone.layer1[0].bn1.weight.detach(), norm)


def test_layer_decay_is_a_geometric_series_up_to_the_head():
    classifier = swap_head("test_vit", "linear", num_classes=10)
    scale = {id(p): g["lr_scale"] for g in param_groups(classifier, 0.1, layer_decay=0.5) for p in g["params"]}
    blocks = [scale[id(block.attn.qkv.weight)] for block in classifier.backbone.blocks]
    assert all(above == 2 * below for below, above in zip(blocks[:-1], blocks[1:], strict=True))
    assert scale[id(classifier.head.weight)] == scale[id(classifier.norm.weight)] == 1 and blocks[-1] < 1
    assert sum(len(g["params"]) for g in param_groups(classifier, 0.1, layer_decay=1.0)) == len(scale)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("weight_decay", [-1e-4, float("nan"), float("inf")])
def test_decay_must_be_finite_and_not_negative(weight_decay):
    with pytest.raises(ValueError, match="weight_decay"):
        param_groups(nn.Linear(2, 2), weight_decay)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "layer_decay, message", [(0.0, "in \\(0, 1\\]"), (1.1, "in \\(0, 1\\]"), (0.5, "group_matcher")]
)
def test_layer_decay_needs_layers(layer_decay, message):
    with pytest.raises(ValueError, match=message):
        param_groups(nn.Linear(2, 2), 0.1, layer_decay=layer_decay)


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_model_and_no_number_is_named():
    with pytest.raises(TypeError, match="model must be an nn.Module, got list"):
        param_groups([1], 0.1)
    with pytest.raises(TypeError, match="weight_decay='0.1'"):
        param_groups(nn.Linear(2, 2), "0.1")


def test_the_threshold_of_a_filter_response_norm_does_not_decay():
    classifier = swap_head("test_resnet", norm="filter_response", num_classes=10)
    assert {n for n in names(classifier, True) if n.startswith("norm.")} == {"norm.weight"}


def test_a_compiled_model_has_the_groups_of_the_model_inside():
    classifier = swap_head("test_vit", num_classes=10)
    known = {parameter: name for name, parameter in classifier.named_parameters()}
    for model in (torch.compile(classifier), nn.ModuleDict({"module": torch.compile(classifier)})):
        decayed = {known[p] for group in param_groups(model, 5e-4) if group["weight_decay"] for p in group["params"]}
        assert decayed == names(classifier, True) and "backbone.pos_embed" not in decayed


def test_a_bias_of_two_dimensions_does_not_decay():
    module = nn.Linear(3, 2)
    module.bias = nn.Parameter(torch.zeros(2, 1))
    assert names(module, True) == {"weight"}
