import pytest
import torch
from torch import nn

from ncreg.models import swap_head
from ncreg.optim import param_groups


def names(model, groups, decayed):
    known = {parameter: name for name, parameter in model.named_parameters()}
    return {known[p] for g in groups if (g["weight_decay"] > 0) == decayed for p in g["params"]}


def test_gamma_and_learned_head_decay_and_nothing_else_that_is_one_dimensional():
    classifier = swap_head("test_resnet", "linear", num_classes=10)
    classifier.backbone.conv1[0].weight.requires_grad_(False)
    groups = param_groups(classifier, 5e-4)
    decayed, rest = names(classifier, groups, True), names(classifier, groups, False)
    assert {"norm.weight", "head.weight"} <= decayed and "head.bias" in rest
    assert not decayed & rest
    trainable = {name for name, p in classifier.named_parameters() if p.requires_grad}
    assert decayed | rest == trainable and "backbone.conv1.0.weight" not in trainable
    one_dimensional = {name for name, p in classifier.named_parameters() if p.ndim == 1}
    assert rest & trainable == (one_dimensional - {"norm.weight"}) & trainable


def test_decay_reaches_gamma_through_sgd():
    classifier = swap_head("test_resnet", "etf", num_classes=10)
    optimizer = torch.optim.SGD(param_groups(classifier, 0.1), lr=1.0)
    for parameter in classifier.parameters():
        parameter.grad = torch.zeros_like(parameter)
    norm = classifier.backbone.layer1[0].bn1.weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(classifier.norm.weight, torch.full_like(classifier.norm.weight, 0.9))
    torch.testing.assert_close(classifier.backbone.layer1[0].bn1.weight.detach(), norm)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("weight_decay", [-1e-4, float("nan"), float("inf")])
def test_decay_must_be_finite_and_not_negative(weight_decay):
    with pytest.raises(ValueError, match="weight_decay"):
        param_groups(nn.Linear(2, 2), weight_decay)
