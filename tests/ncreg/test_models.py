import copy
import gc
from collections import Counter

import pytest
import timm
import torch
import torchvision
from timm.models import get_model_input_config, group_parameters, model_entrypoint
from torch import nn

from ncreg.models import Classifier, Normalize, fold, swap_head

TINY = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_nfnet", "test_byobnet", "test_mambaout"]
# a head of its own each: conv, MLP, two branches, parts with shares, distilled pairs with and without BatchNorm
ODD = ["dla46x_c", "efficientvit_b0", "mobilenetv3_small_050", "crossvit_tiny_240", "efficientvim_m1", "levit_128s"]
ODD += ["deit_tiny_distilled_patch16_224", "efficientformerv2_s0", "repvit_m1", "volo_d1_224"]


def images(model, n=2):
    channels, *size = get_model_input_config(model)["input_size"]
    return torch.rand(n, channels, *size, generator=torch.Generator().manual_seed(0))


def stir(classifier):
    """Running statistics and γ unlike their initial values, as after training."""
    generator = torch.Generator().manual_seed(1)
    for tensor in (*classifier.norm.parameters(), *classifier.norm.buffers()):
        if tensor.is_floating_point():
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return classifier


def check_swap_and_fold(model, classifier, x):
    """Features are the model's own; timm's two-step forward is the forward; fold gives the same logits back."""
    model.eval(), stir(classifier.eval())
    own = model.forward_head(model.forward_features(x), pre_logits=True)
    features = classifier.backbone(x)
    torch.testing.assert_close(features, own, rtol=1e-4, atol=1e-4 * float(own.abs().max()))
    logits = classifier(x)
    torch.testing.assert_close(classifier.forward_head(classifier.forward_features(x)), logits, rtol=1e-4, atol=1e-4)
    folded = fold(classifier)
    torch.testing.assert_close(folded(x), logits, rtol=0, atol=1e-5 * max(1.0, float(logits.abs().max())))
    model.load_state_dict(folded.state_dict())


@pytest.mark.parametrize("name", [*TINY, *ODD[:-1], pytest.param(ODD[-1], marks=pytest.mark.slow)])
@torch.no_grad()
def test_swap_keeps_the_features_and_folds_back(name):
    model = timm.create_model(name, num_classes=10)
    check_swap_and_fold(model, swap_head(model, "linear"), images(model))


@pytest.mark.parametrize("training", [True, False])
def test_the_given_model_is_never_changed(training):
    model = timm.create_model("test_resnet", num_classes=10).train(training)
    model.layer1.eval()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    classifier = swap_head(model, "etf", project=9)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    modes = [m.training for m in model.modules()]
    assert [m.training for m in classifier.backbone.modules()] == modes
    assert {m.training for part in (classifier.norm, classifier.head) for m in part.modules()} == {training}
    assert classifier.training == model.training == training
    shared = {id(p) for p in model.parameters()} & {id(p) for p in classifier.parameters()}
    own, kept = dict(model.named_buffers()), dict(classifier.backbone.named_buffers())
    assert not shared and all(torch.equal(own[name], kept[name]) for name in kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype):
    classifier = swap_head(timm.create_model("test_resnet", num_classes=4).to(dtype), project=8)
    floating = [t for t in (*classifier.parameters(), *classifier.buffers()) if t.is_floating_point()]
    assert {t.dtype for t in floating} == {dtype}
    logits, features = classifier.eval()(torch.rand(2, 3, 32, 32, dtype=dtype), with_features=True)
    assert logits.dtype == features.dtype == dtype


def off_the_simplex(classifier):
    """The largest distance of a product of two class vectors from that of a simplex."""
    rows, classes = classifier.head.weight.double(), classifier.num_classes
    simplex = (classes * torch.eye(classes, dtype=torch.float64) - 1) / (classes - 1)
    return (rows @ rows.T - simplex).abs().max()


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("head", ["etf", "nearest_etf", "tammes"])
def test_a_simplex_is_exact_in_the_dtype_of_the_model(head, reset):
    """It was drawn in torch's default dtype and cast: in float64 it was off by 1e-8, the last digits of float32."""
    classifier = swap_head(timm.create_model("test_resnet", num_classes=4).double(), head)
    if reset:
        classifier.reset_classifier(6)
    assert off_the_simplex(classifier) < 1e-14


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("head", ["etf", "nearest_etf", "tammes"])
def test_a_simplex_is_no_coarser_where_torch_default_is(head, reset):
    """As where a loader of large models has set bfloat16: a model in float32 got a simplex of three digits."""
    model = timm.create_model("test_resnet", num_classes=4)
    torch.set_default_dtype(torch.bfloat16)
    try:
        classifier = swap_head(model, head)
        if reset:
            classifier.reset_classifier(6)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert classifier.head.weight.dtype == torch.float32 and off_the_simplex(classifier) < 1e-6


def test_meta_device_is_kept():
    with torch.device("meta"):
        classifier = swap_head("test_vit", "etf", project=16, num_classes=10)
    assert {t.device.type for t in (*classifier.parameters(), *classifier.buffers())} == {"meta"}


def test_runs_that_differ_in_the_head_alone_stay_paired():
    drawn = []
    for head, norm in (("etf", "batch"), ("linear", "none"), ("cosine", "layer")):
        torch.manual_seed(7)
        classifier = swap_head("test_resnet", head, norm=norm, num_classes=5, project=16)
        shared = torch.cat([p.flatten() for p in (*classifier.backbone.parameters(), classifier.project.weight)])
        drawn.append(torch.cat([shared, torch.rand(3)]))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_features_are_what_enters_the_head():
    classifier = stir(swap_head("test_resnet", "etf", num_classes=10, project=9).eval())
    x = images(classifier.backbone)
    logits, features = classifier(x, with_features=True)
    raw = classifier.backbone(x) @ classifier.project.weight.T
    norm = classifier.norm
    expected = norm.weight * (raw - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(features, expected)
    cosines = nn.functional.cosine_similarity(features[:, None], classifier.head.weight[None], dim=2)
    torch.testing.assert_close(logits, classifier.head.scale * cosines)
    assert torch.equal(classifier(x), logits)


def test_another_head_on_a_projection_of_ones_own():
    """The new head stands on the backbone's own features, whose width such a projection need not say."""
    torch.manual_seed(0)
    backbone = timm.create_model("test_resnet", num_classes=0)
    project = nn.Sequential(nn.Linear(96, 12), nn.Linear(12, 8))
    own = Classifier(backbone, nn.Identity(), nn.Linear(8, 5), project=project).eval()
    images = torch.rand(2, 3, 32, 32)
    assert own.backbone_width == 96 and own.head_hidden_size == 8
    torch.testing.assert_close(fold(own)(images), own(images), rtol=1e-4, atol=1e-5)
    swapped = swap_head(own, "linear", norm="none")
    torch.testing.assert_close(swapped(images), backbone.eval()(images) @ swapped.head.weight.T + swapped.head.bias)


def test_one_forward_pass_gives_logits_and_features():
    classifier = swap_head("test_resnet", num_classes=10)
    calls = []
    classifier.backbone.register_forward_hook(lambda *_: calls.append(1))
    classifier(images(classifier.backbone), with_features=True)
    assert len(calls) == 1


def test_normalize_is_the_affine_map_per_channel():
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 1.0]
    x = torch.rand(2, 3, 4, 4)
    expected = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(Normalize(mean, std)(x), expected)


@pytest.mark.parametrize(
    "change", [lambda m: m.double(), lambda m: m.half().double(), lambda m: nn.Sequential(m).double()[0]]
)
def test_normalize_in_float64_takes_the_numbers_as_given(change):
    images = torch.rand(2, 1, 3, 3, dtype=torch.float64)
    assert torch.equal(change(Normalize([0.1], [0.3]))(images), (images - 0.1) / 0.3)


def test_numbers_loaded_into_normalize_stay():
    loaded = Normalize([0.0], [1.0])
    loaded.load_state_dict(Normalize([0.1], [0.3]).state_dict())
    assert loaded.double().mean.item() == torch.tensor(0.1).item() and loaded.std.item() == torch.tensor(0.3).item()


def test_channels_and_image_size_go_to_timm():
    args = {"in_chans": 1, "img_size": 64}
    classifier = swap_head("test_vit", num_classes=10, model_args=args).eval()
    x = torch.rand(2, 1, 64, 64)
    assert classifier(x).shape == (2, 10) and classifier.pretrained_cfg["input_size"] == (1, 64, 64)
    again = swap_head(classifier.backbone, num_classes=10).eval()
    torch.testing.assert_close(again(x), classifier(x))


@torch.no_grad()
def test_distilled_training_gives_one_head_on_the_averaged_tokens():
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=10)
    model.set_distilled_training(True)
    classifier = swap_head(model, "linear", norm="none")
    x = images(model)
    tokens = model.forward_features(x)[:, :2]
    torch.testing.assert_close(classifier(x, with_features=True).features, tokens.mean(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["linear", "etf", "nearest_etf"])
def test_a_new_head_has_the_dtype_of_the_one_before(head):
    """A head in float32 behind a frozen backbone in bfloat16, whose few bits would lose small steps."""
    classifier = swap_head("test_resnet", head, num_classes=5)
    classifier.backbone.bfloat16()
    classifier.reset_classifier(7)
    assert classifier.head.weight.dtype == torch.float32 and classifier.backbone.conv1[0].weight.dtype == torch.bfloat16
    classifier.double().reset_classifier(3)
    assert classifier.head.weight.dtype == torch.float64


def test_local_dir_brings_weights_and_classes(tmp_path):
    model = timm.create_model("test_resnet", num_classes=6)
    timm.models.save_for_hf(model, str(tmp_path))
    classifier = swap_head(f"local-dir:{tmp_path}", norm="none", model_args={"pretrained": True})
    assert classifier.num_classes == 6
    x = images(model)
    model.reset_classifier(0)
    torch.testing.assert_close(classifier.eval().backbone(x), model.eval()(x))


@torch.no_grad()
def check_torchvision(name, norm="batch"):
    """The identity in the classifier's place gives what the classifier saw: it reproduces the logits from there."""
    aux = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **aux).eval()
    classifier = stir(swap_head(model, "linear"))
    layer = model.get_submodule(classifier._removed.path)
    for parameter in layer.parameters():  # vit starts at zero
        nn.init.normal_(parameter)
    x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    seen = []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(x)
    pooled = seen[0].mean((2, 3)) if seen[0].ndim == 4 else seen[0]
    torch.testing.assert_close(classifier.backbone(x), pooled)
    if "squeezenet" in name:  # a ReLU stands behind its classifier
        for normalize in (None, "keep"):
            with pytest.raises(ValueError, match="stands behind"):
                fold(classifier, normalize=normalize)
    else:
        torch.testing.assert_close(fold(classifier)(x), classifier(x), rtol=1e-4, atol=1e-5)
    assert classifier.train()(x).shape == (2, 10)


@pytest.mark.filterwarnings("ignore:dropout of rate")
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "googlenet", "shufflenet_v2_x0_5"])
def test_torchvision(name):
    check_torchvision(name)


# --- the slow suite: every architecture ---------------------------------------------------------------------------


def census_of(name):
    """Shapes on the meta device: (outcome, number of parameters)."""
    try:
        with torch.device("meta"):
            classifier = swap_head(name, "etf", num_classes=10)
    except ValueError as error:
        if name.endswith("_enc") and "encoder" in str(error):
            return "refused: an encoder without classifier", 0
        raise
    backbone = classifier.backbone
    assert classifier.head.in_features == backbone.head_hidden_size == classifier.head_hidden_size
    if hasattr(backbone, "group_matcher"):
        layers = group_parameters(classifier, classifier.group_matcher(), reverse=True)
        own = group_parameters(backbone, backbone.group_matcher(), reverse=True)
        assert all(layers[f"backbone.{name}"] == layer for name, layer in own.items())
        assert layers["norm.weight"] == max(layers.values())
    return "passed", sum(p.numel() for p in backbone.parameters())


def report(capsys, title, outcomes):
    """Print the counts; return what is neither passed nor refused for a reason."""
    counts = Counter(outcomes.values())
    unexplained = {n: o for n, o in outcomes.items() if o != "passed" and not o.startswith("refused")}
    with capsys.disabled():
        print(f"\n{title}: {len(outcomes)}")
        for outcome, count in counts.most_common():
            print(f"  {count:5d} {outcome}")
        print(f"  {len(unexplained):5d} unexplained")
    return unexplained


def attempt(check, *args):
    try:
        return check(*args) or "passed"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        gc.collect()


@pytest.fixture(scope="module")
def census():
    """Name → outcome, and family → its smallest name, of all that timm lists."""
    outcomes, smallest = {}, {}
    for name in timm.list_models():
        result = attempt(census_of, name)
        outcomes[name], size = (result, 0) if isinstance(result, str) else result
        family = model_entrypoint(name).__module__.rpartition(".")[2]
        if outcomes[name] == "passed" and size < smallest.get(family, (size + 1,))[0]:
            smallest[family] = size, name
    return outcomes, {family: name for family, (_, name) in smallest.items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:dropout of rate")
def test_every_timm_architecture(census, capsys):
    assert not report(capsys, "timm architectures, shapes on the meta device", census[0])


@torch.no_grad()
def family_check(name):
    model = timm.create_model(name, num_classes=10)
    check_swap_and_fold(model, swap_head(model, "linear"), images(model, 1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:dropout of rate")
def test_the_smallest_of_every_timm_family(census, capsys):
    outcomes = {f"{family}: {name}": attempt(family_check, name) for family, name in census[1].items()}
    assert not report(capsys, "timm families, real forward, features and fold compared", outcomes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:dropout of rate")
def test_every_torchvision_family(capsys):
    names = ["alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet"]
    names += ["inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf"]
    names += ["regnet_y_400mf", "resnet18", "resnext50_32x4d", "wide_resnet50_2", "shufflenet_v2_x0_5", "squeezenet1_1"]
    names += ["swin_t", "swin_v2_t", "vgg11", "vgg11_bn", "vit_b_16"]
    outcomes = {name: attempt(check_torchvision, name) for name in names}
    assert not report(capsys, "torchvision families, real forward, features and fold compared", outcomes)
