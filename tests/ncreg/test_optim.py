import copy
import warnings

import numpy as np
import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.lr_scheduler import CosineAnnealingLR

from ncreg.models import swap_head
from ncreg.norms import LastBatchNorm
from ncreg.optim import param_groups
from ncreg.tpt import TPTScheduler


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


def older_weight_norm(module, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module, name)


MADE = {
    "parametrized": lambda module, name: parametrize.register_parametrization(module, name, nn.Identity()),
    "weight norm": parametrizations.weight_norm,
    "older weight norm": older_weight_norm,
    "pruned": lambda module, name: prune.identity(module, name),
}


def decay_of_what_makes(make, model, path):
    """λ of each parameter of which a weight is made; the weight is told by the gradients that it has."""
    owner, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    make(owner, name)
    for hook in owner._forward_pre_hooks.values():
        hook(owner, None)
    parts = torch.autograd.grad(getattr(owner, name).sum(), list(model.parameters()), allow_unused=True)
    decay = {id(p): group["weight_decay"] for group in param_groups(model, 0.1) for p in group["params"]}
    return {decay[id(p)] for p, made in zip(model.parameters(), parts, strict=True) if made is not None}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_what_makes_a_weight_decays_as_the_weight_does(make):
    def model():
        norm = LastBatchNorm(8, bias=True)
        return nn.ModuleDict({"layer": nn.Linear(4, 8), "inner": nn.BatchNorm1d(8), "norm": norm})

    decays = {"layer.weight": {0.1}, "layer.bias": {0}, "inner.weight": {0}, "inner.bias": {0}, "norm.weight": {0.1}}
    for path, expected in (decays | {"norm.bias": {0}}).items():
        assert decay_of_what_makes(make, model(), path) == expected, path
    column = model()
    column["layer"].bias = nn.Parameter(torch.ones(8, 1))
    assert decay_of_what_makes(make, column, "layer.bias") == {0}
    filtered = nn.ModuleDict({"classifier": swap_head("test_resnet", norm="filter_response", num_classes=10)})
    assert decay_of_what_makes(make, filtered, "classifier.norm.eps") == {0}


def test_an_exempted_name_and_its_layer_are_known_when_it_is_parametrized():
    plain, made = vit(), vit()
    MADE["parametrized"](made.backbone, "cls_token")
    MADE["parametrized"](made.backbone, "pos_embed")

    def rules(model):
        groups = param_groups(model, 0.1, layer_decay=0.5)
        return sorted((g["weight_decay"], g["lr_scale"], p.numel()) for g in groups for p in g["params"])

    assert rules(made) == rules(plain)


class Holder(nn.Module):
    """A wrapper that keeps the module inside under a name of its own and hands nothing on, as DDP does."""

    def __init__(self, name, inner):
        super().__init__()
        self.add_module(name, inner)


def peft(inner):
    return Holder("base_model", Holder("model", inner))


WRAPPED = {
    "DDP": lambda m: Holder("module", m),
    "FSDP": lambda m: Holder("_fsdp_wrapped_module", m),
    "PEFT": peft,
    "compiled": torch.compile,
    "checkpointed": checkpoint_wrapper,
    "several": lambda m: Holder("module", torch.compile(checkpoint_wrapper(m))),
}


def wrapped_backbone(wrap):
    classifier = swap_head("test_vit", "linear", num_classes=10)
    classifier.backbone = wrap(classifier.backbone)
    return classifier


def wrapped_block(wrap):
    classifier = swap_head("test_vit", "linear", num_classes=10)
    for place, block in enumerate(classifier.backbone.blocks):
        classifier.backbone.blocks[place] = wrap(block)
    return classifier


@pytest.mark.parametrize("where", ["backbone", "block", "whole", "within another module"])
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_rules_by_name_see_through_wrappers_anywhere(wrap, where):
    """The same decay and the same layer for every parameter as without wrappers."""

    def rules(model):
        groups = param_groups(model, 5e-4, layer_decay=0.5)
        return {id(p): (group["weight_decay"], group["lr_scale"]) for group in groups for p in group["params"]}

    plain = swap_head("test_vit", "linear", num_classes=10)
    expected = [rules(plain)[id(p)] for p in plain.parameters()]
    model = {
        "backbone": wrapped_backbone,
        "block": wrapped_block,
        "whole": lambda wrap: wrap(swap_head("test_vit", "linear", num_classes=10)),
        "within another module": lambda wrap: Holder("model", wrapped_backbone(wrap)),
    }[where](wrap)
    found = rules(model)
    assert [found[id(p)] for p in model.parameters()] == expected
    assert len({scale for _, scale in expected}) > 4


def test_position_embeddings_of_every_model_inside_are_exempt():
    two = nn.ModuleList([vit(), checkpoint_wrapper(vit())])
    embeddings = {name for name, _ in two.named_parameters() if name.endswith("pos_embed")}
    assert len(embeddings) == 2 and embeddings <= names(two, False)


@pytest.mark.usefixtures("unchecked")
def test_a_grouping_that_puts_all_in_one_layer_is_refused():
    classifier = swap_head("test_vit", num_classes=10)
    classifier.backbone = Holder("student", classifier.backbone)
    classifier.backbone.group_matcher = lambda coarse: classifier.backbone.student.group_matcher(coarse)
    with pytest.raises(ValueError, match=r"puts all \d+ parameters in one layer, such as 'backbone.student"):
        param_groups(classifier, 0.1, layer_decay=0.5)


@pytest.mark.usefixtures("unchecked")
def test_what_has_no_layers_or_several_models_with_layers_is_refused():
    resnets = nn.ModuleList([vit(), vit()])
    with pytest.raises(ValueError, match="one model with timm's group_matcher, this one holds 2"):
        param_groups(resnets, 0.1, layer_decay=0.5)
    classifier = vit()
    classifier.backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 96))
    with pytest.raises(ValueError, match="group_matcher, which Classifier does not have"):
        param_groups(classifier, 0.1, layer_decay=0.5)


@pytest.mark.usefixtures("unchecked")
def test_parameters_that_were_flattened_are_refused():
    model = Holder("_fsdp_wrapped_module", vit())
    model.sharding_strategy = torch.distributed.fsdp.ShardingStrategy.FULL_SHARD
    with pytest.raises(ValueError, match=r"FullyShardedDataParallel \(FULL_SHARD\).*fully_shard"):
        param_groups(model, 0.1)


def vit():
    return swap_head("test_vit", "linear", num_classes=10)


def rates(optimizer, model):
    """The rate of each parameter over that of the head."""
    rate = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    return [rate[id(p)] / rate[id(model.head.weight)] for p in model.parameters()]


def scheduler(kind, optimizer):
    """Something with a step(epoch) that drives the optimizer."""
    if kind == "torch":
        inner = CosineAnnealingLR(optimizer, 10)
        return lambda epoch: inner.step()
    if kind == "timm":
        return CosineLRScheduler(optimizer, t_initial=10).step
    inner = {
        "TPT": lambda _: None,
        "TPT over torch": lambda o: CosineAnnealingLR(o, 10),
        "TPT over timm": lambda o: CosineLRScheduler(o, t_initial=10),
    }[kind](optimizer)
    tpt = TPTScheduler(optimizer, inner, max_epochs=10, min_terminal=4)
    return lambda epoch: tpt.step(epoch, 1.0 if epoch > 3 else 0.5)


@pytest.mark.parametrize("kind", ["none", "torch", "timm", "TPT", "TPT over torch", "TPT over timm"])
@pytest.mark.parametrize("factory", ["torch", "timm"])
@pytest.mark.parametrize("told", ["lr", "lr_scale"])
def test_layer_decay_acts_under_every_schedule(kind, factory, told):
    """With lr everywhere; lr_scale under timm's schedules and TPTScheduler, and once, never twice."""
    model = vit()
    groups = param_groups(model, 0.05, layer_decay=0.5, **({"lr": 0.1} if told == "lr" else {}))
    expected = {id(p): g["lr_scale"] for g in param_groups(model, 0.05, layer_decay=0.5) for p in g["params"]}
    expected = [expected[id(p)] for p in model.parameters()]
    make = {"torch": torch.optim.SGD, "timm": lambda g, lr: create_optimizer_v2(g, "sgd", lr=lr)}[factory]
    optimizer = make(groups, lr=0.1)
    step = scheduler(kind, optimizer) if kind != "none" else lambda epoch: None
    if told == "lr_scale" and kind in ("none", "torch"):
        expected = [1.0] * len(expected)  # documented: nothing there reads it
    for epoch in range(1, 7):
        assert rates(optimizer, model) == pytest.approx(expected, rel=1e-9), epoch
        optimizer.step()
        step(epoch)
    assert rates(optimizer, model) == pytest.approx(expected, rel=1e-9)


def test_a_scaled_run_resumes_exactly():
    def build():
        model = vit()
        optimizer = torch.optim.SGD(param_groups(model, 0.05, layer_decay=0.5), lr=0.1)
        return TPTScheduler(optimizer, CosineAnnealingLR(optimizer, 10), max_epochs=12, min_terminal=4)

    whole, first, second = build(), build(), build()
    for epoch in range(1, 4):
        whole.optimizer.step(), first.optimizer.step()
        whole.step(epoch, 0.5), first.step(epoch, 0.5)
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for epoch in range(4, 10):
        whole.optimizer.step(), second.optimizer.step()
        whole.step(epoch, float(epoch > 5)), second.step(epoch, float(epoch > 5))
        assert whole.get_last_lr() == second.get_last_lr()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("lr, error", [(-0.1, ValueError), (float("nan"), ValueError), ("0.1", TypeError)])
def test_a_rate_must_be_a_number_not_below_zero(lr, error):
    with pytest.raises(error, match="lr="):
        param_groups(nn.Linear(2, 2), 0.1, lr=lr)


def test_numbers_of_numpy_come_back_from_a_checkpoint(tmp_path):
    """As a sweep over np.logspace gives them: torch.load takes no scalars of numpy unless told to."""
    decay, lr = np.logspace(-4, -1, 2)
    plain = param_groups(vit(), 1e-4, layer_decay=0.5, lr=0.1)
    groups = param_groups(vit(), decay, layer_decay=np.float64(0.5), lr=lr)
    optimizer = torch.optim.SGD(groups, lr=0.1)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    saved = torch.load(tmp_path / "optimizer.pt")["param_groups"]
    assert [(g["lr"], g["weight_decay"]) for g in saved] == [(g["lr"], g["weight_decay"]) for g in plain]
