"""What timm's own tools expect of a model, a Classifier gives."""

import math

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3

from ncreg.models import Normalize, swap_head
from ncreg.optim import param_groups

X = torch.rand(4, 3, 160, 160, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return swap_head("test_vit", "linear", num_classes=10)


def test_sizes_and_parts(classifier):
    assert (classifier.num_classes, classifier.num_features, classifier.head_hidden_size) == (10, 64, 64)
    assert classifier.get_classifier() is classifier.head
    projected = swap_head("mobilenetv3_small_050", num_classes=10, project=9)
    assert (projected.num_features, projected.head_hidden_size) == (288, 9)


def test_two_step_forward(classifier):
    classifier.eval().preprocess = Normalize([0.5], [0.25])
    maps = classifier.forward_features(X)
    torch.testing.assert_close(maps, classifier.backbone.forward_features((X - 0.5) / 0.25))
    logits, features = classifier(X, with_features=True)
    torch.testing.assert_close(classifier.forward_head(maps), logits)
    torch.testing.assert_close(classifier.forward_head(maps, pre_logits=True), features)
    final, intermediates = classifier.forward_intermediates(X, indices=[0, 1])
    torch.testing.assert_close(final, maps)
    assert len(intermediates) == 2


@pytest.mark.parametrize("head", ["linear", "etf"])
def test_reset_classifier_makes_a_head_of_the_same_kind(head):
    classifier = swap_head("test_resnet", head, num_classes=10).to(torch.float64)
    x = X[:, :, :32, :32].double()
    classifier.reset_classifier(0)
    logits, features = classifier.eval()(x, with_features=True)
    assert torch.equal(logits, features) and classifier.num_classes == 0
    classifier.reset_classifier(7)
    fresh = swap_head("test_resnet", head, num_classes=7).head.double()
    torch.testing.assert_close(classifier.head.weight, fresh.weight)
    assert classifier(x).shape == (4, 7) and classifier.num_classes == 7 and not classifier.head.training


def test_a_pool_that_does_not_fit_is_refused_and_changes_nothing():
    classifier = swap_head("test_resnet", "etf", num_classes=10).eval()
    before = classifier(X)
    for pool, words in (("catavgmax", "of width 192"), ("", "pooled ones"), ("nonsense", "nonsense")):
        with pytest.raises(ValueError, match=f"global_pool='{pool}'.*{words}"):
            classifier.reset_classifier(5, pool)
        assert classifier.num_classes == 10 and torch.equal(classifier(X), before)
    with pytest.raises(ValueError, match="3000-class simplex"):
        classifier.reset_classifier(3000, "max")
    assert torch.equal(classifier(X), before)
    classifier.reset_classifier(5, "max")
    largest = classifier.backbone.forward_features(X).amax((2, 3))
    torch.testing.assert_close(classifier.backbone(X), largest)


def test_the_backbones_own_exemptions_under_the_right_names(classifier):
    assert {"backbone.pos_embed", "backbone.cls_token"} <= classifier.no_weight_decay()
    decayed = {id(p) for g in param_groups(classifier, 0.1) if g["weight_decay"] for p in g["params"]}
    assert classifier.backbone.pos_embed.ndim > 1 and id(classifier.backbone.pos_embed) not in decayed


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "cait_xxs24_224", "test_efficientnet"])
@pytest.mark.parametrize("coarse", [False, True])
def test_layers_are_the_backbones(name, coarse):
    with torch.device("meta"):
        classifier = swap_head(name, "linear", num_classes=10, project=16)
    layers = group_parameters(classifier, classifier.group_matcher(coarse=coarse), reverse=True)
    own = group_parameters(classifier.backbone, classifier.backbone.group_matcher(coarse=coarse), reverse=True)
    assert {f"backbone.{n}": layer for n, layer in own.items()}.items() <= layers.items()
    last = max(layers.values())
    assert {layers[n] for n in ("project.weight", "norm.weight", "head.weight", "head.bias")} == {last}


def test_layer_decay_of_timm_and_of_param_groups_agree_but_for_gamma(classifier):
    names = {id(p): name for name, p in classifier.named_parameters()}

    def table(optimizer):
        return {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}

    timms = table(create_optimizer_v2(classifier, "sgd", lr=0.1, weight_decay=0.05, layer_decay=0.5))
    groups = param_groups(classifier, 0.05, layer_decay=0.5)
    ours = table(create_optimizer_v2(groups, "sgd", lr=0.1, weight_decay=0.05))
    assert timms.pop("norm.weight") == (1.0, 0.0) and ours.pop("norm.weight") == (1.0, 0.05)
    assert ours == timms
    assert ours["head.weight"][0] == 1 and ours["backbone.patch_embed.proj.weight"][0] < 0.5


def test_gamma_decays_in_timms_optimizer_only_through_param_groups(classifier):
    def decay_of_gamma(optimizer):
        return {g["weight_decay"] for g in optimizer.param_groups for p in g["params"] if p is classifier.norm.weight}

    assert decay_of_gamma(create_optimizer_v2(classifier, "sgd", lr=0.1, weight_decay=0.05)) == {0.0}
    groups = param_groups(classifier, 0.05)
    assert decay_of_gamma(create_optimizer_v2(groups, "sgd", lr=0.1, weight_decay=0.05)) == {0.05}


def test_grad_checkpointing_reaches_the_backbone(classifier):
    classifier.set_grad_checkpointing()
    assert classifier.backbone.grad_checkpointing
    classifier(X).sum().backward()
    assert classifier.backbone.patch_embed.proj.weight.grad.abs().max() > 0


def test_the_data_configuration_normalises_once(classifier):
    own = timm.data.resolve_model_data_config(classifier.backbone)
    assert timm.data.resolve_model_data_config(classifier) == own
    classifier.preprocess = Normalize(own["mean"], own["std"])
    told = timm.data.resolve_model_data_config(classifier)
    assert told["mean"] == (0, 0, 0) and told["std"] == (1, 1, 1) and told["input_size"] == own["input_size"]
    cfg = classifier.pretrained_cfg
    assert (cfg["num_classes"], cfg["classifier"], cfg["first_conv"]) == (10, "head", "backbone.patch_embed.proj")
    assert cfg["classifier"] + ".weight" in classifier.state_dict()


def test_a_step_of_timms_training_pieces(classifier, tmp_path):
    optimizer = create_optimizer_v2(param_groups(classifier, 5e-4), "sgd", lr=0.1)
    scheduler, epochs = create_scheduler_v2(optimizer, "cosine", num_epochs=4)
    ema = ModelEmaV3(classifier, decay=0.5)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    saver = CheckpointSaver(classifier, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path))
    for epoch in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(classifier(X), torch.arange(4)).backward()
        optimizer.step()
        ema.update(classifier)
        scheduler.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=float(epoch))
    rates = [group["lr"] for group in optimizer.param_groups]
    assert epochs == 4 and rates == pytest.approx([0.05 * (1 + math.cos(math.pi * 2 / 4))] * 2)
    saved = torch.load(tmp_path / "model_best.pth.tar", weights_only=True)
    fresh = swap_head("test_vit", "linear", num_classes=10)
    fresh.load_state_dict(saved["state_dict"])
    torch.testing.assert_close(fresh.eval()(X), classifier.eval()(X))
    assert not torch.equal(saved["state_dict"]["head.weight"], before["head.weight"])
    moved = saved["state_dict_ema"]["norm.running_mean"]
    assert not torch.equal(moved, before["norm.running_mean"]) and not torch.equal(moved, classifier.norm.running_mean)


@pytest.mark.usefixtures("unchecked")
def test_what_a_backbone_of_no_timm_lacks_is_named():
    classifier = swap_head(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 3)), "linear", classifier="1")
    assert classifier.num_features == 8 and classifier.no_weight_decay() == set()
    with pytest.raises(AttributeError, match="forward_features is timm's: the backbone Sequential has none"):
        classifier.forward_features(X)
    assert not hasattr(classifier, "pretrained_cfg")
    own = swap_head("test_resnet", torch.nn.Linear(96, 10))
    with pytest.raises(ValueError, match="given as a module"):
        own.reset_classifier(5)
