"""Collapse by depth: what the hooks collect is what the layers gave, and nothing stays behind."""

import copy
import functools

import numpy as np
import oracles
import pytest
import timm
import torch
import torchvision.models as tv
from timm.layers import LayerNorm2dFp32, RmsNorm2dFp32
from timm.models.metaformer import LayerNorm2dNoBias
from torch import nn
from torch.nn.functional import relu
from torch.utils.checkpoint import checkpoint
from torchvision.ops import Permute

from ncreg.metrics import LayerwiseCollapse


class Net(nn.Module):
    """A map, a sequence and a vector, in float64."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.tokens = nn.Linear(4, 5)
        self.last = nn.Linear(5, 6)

    def forward(self, images):
        maps = relu(self.conv(images))
        return self.last(self.tokens(maps.flatten(2).transpose(1, 2)).mean(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().double()


def batches(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(40, 1, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    return list(zip(images.split(16), (torch.arange(40) % 3).split(16), strict=True))


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_measures_of_pooled_activations(net):
    with torch.no_grad(), LayerwiseCollapse(net, layers=["conv", "tokens", "last"]) as depth:
        for images, target in batches():
            net(images)
            depth.update(target)
        found = depth.compute()
    images, target = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    with torch.no_grad():
        maps = net.conv(images)
        tokens = net.tokens(relu(maps).flatten(2).transpose(1, 2))
        layers = {"conv": maps.mean((2, 3)), "tokens": tokens.mean(1), "last": net.last(tokens.mean(1))}
    assert list(found) == list(layers)
    for name, features in layers.items():
        expected = oracles.neural_collapse(features.numpy(), target.numpy())
        for key in ("nc1", "nc1_rank", "stable_rank", "effective_rank", "within_stable_rank", "cdnv"):
            assert float(found[name][key]) == pytest.approx(float(expected[key]), rel=1e-9), (name, key)
    assert hooks(net) == 0


def test_an_exception_leaves_no_hooks(net):
    with pytest.raises(ZeroDivisionError), LayerwiseCollapse(net, layers=["conv"]):
        assert hooks(net) == 1
        raise ZeroDivisionError
    assert hooks(net) == 0


def test_bfloat16_under_autocast(net):
    net = net.float()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        with LayerwiseCollapse(net, layers=["conv", "last"]) as depth:
            for images, target in batches(torch.float32):
                out = net(images)
                depth.update(target)
            found = depth.compute()
    assert out.dtype == torch.bfloat16
    images, target = batches(torch.float32)[-1][0], torch.cat([labels for _, labels in batches()])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        features = torch.cat([net(images) for images, _ in batches(torch.float32)]).double()
    expected, _ = oracles.nc1(features.numpy(), target.numpy(), np.arange(3))
    assert float(found["last"]["nc1"]) == pytest.approx(expected, rel=1e-9)


def test_training_goes_on_inside(net):
    with LayerwiseCollapse(net, layers=["last"]) as depth:
        images, target = batches()[0]
        net(images).square().sum().backward()
        depth.update(target)
        assert depth.compute()["last"]["nc1"].requires_grad is False
    assert net.conv.weight.grad.abs().sum() > 0
    depth.reset()
    with pytest.raises(ValueError, match="no samples seen"):
        depth.compute()


@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("options", [{}, {"fullgraph": True}], ids=str)
def test_a_compiled_model_shows_what_it_computes(net, options, ran_before):
    """Code that was compiled before the hooks were set calls none of them."""
    in_place = copy.deepcopy(net)
    in_place.compile(backend="eager", **options)
    found = {}
    with torch.no_grad():
        for model in (net, torch.compile(net, backend="eager", **options), in_place):
            for images, _ in batches() if ran_before else ():
                model(images)
            for again in range(2):
                with LayerwiseCollapse(model, layers=["conv", "last"], num_classes=3) as depth:
                    for images, target in batches():
                        model(images)
                        depth.update(target)
                    found[model, again] = [float(values["nc1"]) for values in depth.compute().values()]
    assert len(found) == 6
    assert all(values == pytest.approx(found[net, 0], rel=1e-12) for values in found.values())
    compiled = []
    torch.compile(lambda x: x + 1, backend=lambda graph, inputs: compiled.append(graph) or graph.forward)(torch.ones(1))
    assert compiled  # outside of the block torch compiles again


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_shows_a_batch_once(net, use_reentrant):
    images, target = batches()[0]
    found = []
    for run in (net, functools.partial(checkpoint, net, use_reentrant=use_reentrant)):
        with LayerwiseCollapse(net, layers=["last"]) as depth:
            run(images.clone().requires_grad_()).square().sum().backward()  # runs the layers once more
            depth.update(target)
            found.append(depth.compute())
    assert found[0] == found[1]


@pytest.mark.parametrize(("name", "size", "count"), [("test_resnet", 32, 5), ("test_vit", 160, 6)])
def test_timm_models_name_their_own_stages(name, size, count):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    wrapped = nn.Sequential(model)
    with torch.no_grad(), LayerwiseCollapse(wrapped, num_classes=3) as depth:
        wrapped(torch.randn(9, 3, size, size))
        depth.update(torch.arange(9) % 3)
        found = depth.compute()
    assert len(found) == count
    assert all(values["nc1"] > 0 for values in found.values())


def test_channels_last_and_own_pooling(net):
    class Last(Net):
        output_fmt = "NHWC"

        def __init__(self):
            super().__init__()
            self.permute = nn.Identity()

        def forward(self, images):
            return self.permute(self.conv(images).permute(0, 2, 3, 1))

    model = Last().double()
    images, target = batches()[0]
    with torch.no_grad(), LayerwiseCollapse(model, layers=["permute"]) as depth:
        out = model(images)
        depth.update(target)
        found = depth.compute()["permute"]
    expected = oracles.neural_collapse(out.mean((1, 2)).numpy(), target.numpy())
    assert float(found["nc1"]) == pytest.approx(expected["nc1"], rel=1e-9)
    with torch.no_grad(), LayerwiseCollapse(model, layers=["permute"], pool=lambda maps: maps[:, 0, 0]) as depth:
        model(images)
        depth.update(target)
        found = depth.compute()["permute"]
    expected = oracles.neural_collapse(out[:, 0, 0].numpy(), target.numpy())
    assert float(found["nc1"]) == pytest.approx(expected["nc1"], rel=1e-9)


def swin(size):
    return timm.models.SwinTransformer(
        img_size=size, patch_size=4, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2), num_classes=4
    )


def torchvision_swin():
    return tv.swin_transformer.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=4)


def torchvision_convnext():
    return tv.convnext.ConvNeXt([tv.convnext.CNBlockConfig(16, None, 2)], num_classes=4)


class Gated(nn.Module):
    """Squeeze and excitation by linear layers, beside a convolution: 64/16 = 4 channels inside, and 4 columns."""

    def __init__(self):
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(3, 64, 3, 8, 1), nn.Linear(64, 4), nn.Linear(4, 64)

    def forward(self, x):
        x = self.conv(x)
        return x * self.up(self.down(x.mean((2, 3)))).sigmoid()[:, :, None, None]


class Outlook(nn.Module):
    """Attention of VOLO: of linear layers on maps (B, H, W, C), with a pooling that has channels first within."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool, self.proj, self.drop = nn.Conv2d(3, 6, 1), nn.AvgPool2d(2), nn.Linear(6, 6), nn.Dropout()

    def forward(self, x):
        return self.drop(self.proj(self.pool(self.conv(x)).permute(0, 2, 3, 1)))


def volo_step():
    """One convolution between two permutations; the permutation before it has channels last."""
    return nn.Sequential(Permute([0, 2, 3, 1]), timm.models.volo.Downsample(3, 6), nn.ReLU())


# model, size of its images, and by layer the axis of the channels
MAPS = [
    (lambda: timm.create_model("test_resnet"), 32, {"conv1.0": 1, "layer1.0.conv1": 1, "layer2": 1}),
    (
        lambda: timm.create_model("test_resnet"),
        128,
        {"conv1": 1, "layer1": 1, "act1": 1},
    ),  # (B, 32, 64, 64), (B, 32, 32, 32)
    (lambda: timm.create_model("test_convnext"), 64, {"stem": 1, "stages.0.blocks.0.norm": 3, "stages.0": 1}),
    (
        lambda: timm.create_model("test_convnext"),
        96,
        {"stem": 1, "stages.0.blocks.0.norm": 3, "stages.0": 1},
    ),  # 24 × 24
    (
        lambda: swin(32),
        32,
        {"patch_embed.proj": 1, "patch_embed": 3, "layers.0": 3, "layers.1.downsample": 3, "norm": 3},
    ),
    (lambda: swin(64), 64, {"patch_embed.proj": 1, "patch_embed": 3, "layers.0": 3}),  # 16 channels, 16 × 16
    (torchvision_swin, 32, {"features.0.0": 1, "features.0.1": 3, "features.1": 3, "features": 3, "permute": 1}),
    (torchvision_swin, 64, {"features.0.0": 1, "features.0": 3, "features.1.0.mlp": 3, "features.1": 3}),
    (torchvision_convnext, 64, {"features.0": 1, "features.1.0.block.5": 3, "features.1.0": 1, "features": 1}),
    (
        lambda: tv.densenet.DenseNet(8, (2, 2), 16),
        64,
        {"features.denseblock1": 1, "features.denseblock1.denselayer1": 1},
    ),
    (lambda: nn.Sequential(Outlook()), 32, {"0.pool": 1, "0.proj": 3, "0.drop": 3}),
    (volo_step, 32, {"1": 3, "1.proj": 1, "2": 3}),
    (lambda: nn.Sequential(Gated(), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 4)), 32, {"0": 1, "1": 1}),
]


@pytest.mark.parametrize(("build", "size", "axes"), MAPS)
def test_channels_are_found_layer_by_layer(build, size, axes):
    """The mean over all other axes, by numpy, of a copy of what the layer gave."""
    torch.manual_seed(0)
    model, seen = build().eval(), {}
    for name in axes:
        keep = lambda m, i, o, name=name: seen.__setitem__(name, o.detach().numpy().copy())  # noqa: E731
        model.get_submodule(name).register_forward_hook(keep)
    with torch.no_grad(), LayerwiseCollapse(model, list(axes), num_classes=4) as depth:
        model(torch.randn(2, 3, size, size))
        found = depth.activations()
    for name, axis in axes.items():
        expected = seen[name].mean(tuple({1, 2, 3} - {axis}))
        assert seen[name].ndim == 4 and found[name].shape == expected.shape, name
        np.testing.assert_allclose(found[name], expected, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("norm", [LayerNorm2dFp32, RmsNorm2dFp32, LayerNorm2dNoBias])
def test_norms_of_maps_have_channels_first_also_where_the_columns_are_as_many(norm):
    """timm has such norms with a word behind the 2d of their names."""
    torch.manual_seed(0)
    layer, maps = norm(8), torch.randn(2, 8, 6, 8)
    with torch.no_grad(), LayerwiseCollapse(nn.Sequential(layer), ["0"], num_classes=4) as depth:
        depth.modules["0"](maps)
        found = depth.activations()["0"]
        expected = layer(maps).numpy().mean((2, 3))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_one_layer_with_channels_last_changes_no_other():
    """A convolution in a model of maps (B, H, W, C): collapse by columns is not collapse by channels."""
    torch.manual_seed(0)
    model, target, seen = swin(32).eval(), torch.arange(80) % 4, []
    images = torch.randn(80, 3, 32, 32) + target[:, None, None, None] * torch.tensor([1.0, 0, -1])[:, None, None]
    model.patch_embed.proj.register_forward_hook(lambda m, i, o: seen.append(o))
    with torch.no_grad(), LayerwiseCollapse(model, layers=["patch_embed.proj"]) as depth:
        model(images)
        depth.update(target)
        found = depth.compute()["patch_embed.proj"]
    expected = oracles.neural_collapse(seen[0].double().numpy().mean((2, 3)), target.numpy())
    assert float(found["nc1"]) == pytest.approx(expected["nc1"], rel=1e-4)


class Both(nn.Module):
    """A convolution and a layer norm; nothing but its code says that its maps have channels last."""

    num_classes = 4

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 8, 1), nn.LayerNorm(8), nn.ReLU()

    def forward(self, x):
        return self.act(self.norm(self.conv(x).permute(0, 2, 3, 1)))


@pytest.mark.parametrize("layer", ["0", "0.act"])
def test_a_map_whose_channels_may_be_either_axis_is_refused_with_a_way_out(layer):
    torch.manual_seed(0)
    whole = nn.Sequential(Both())
    with torch.no_grad():
        with LayerwiseCollapse(whole, [layer], num_classes=4) as depth:
            out = whole(torch.randn(2, 3, 5, 5))  # 5 columns: the 8 channels are told
            torch.testing.assert_close(depth.activations()[layer], out.mean((1, 2)))
            with pytest.raises(ValueError, match=rf"layer '{layer}' gives \(2, 8, 8, 8\).*axis 1 or 3: give pool="):
                whole(torch.randn(2, 3, 8, 8))
        with LayerwiseCollapse(whole, [layer], num_classes=4, pool=lambda maps: maps.mean((1, 2))) as depth:
            out = whole(torch.randn(2, 3, 8, 8))
            torch.testing.assert_close(depth.activations()[layer], out.mean((1, 2)))


@pytest.mark.usefixtures("unchecked")
def test_misuse(net):
    with pytest.raises(ValueError, match="layer 'layer9' is none of 'conv', 'tokens', 'last'"):
        LayerwiseCollapse(net, layers=["layer9"])
    with pytest.raises(ValueError, match="layers names no submodule"):
        LayerwiseCollapse(net)
    with pytest.raises(TypeError, match=r"layers=\['conv'\]"):
        LayerwiseCollapse(net, layers="conv")
    with pytest.raises(ValueError, match="fits 2 submodules: '0.conv', '1.conv'"):
        LayerwiseCollapse(nn.Sequential(Net(), Net()), layers=["conv"], num_classes=3)
    with pytest.raises(ValueError, match="give num_classes="):
        LayerwiseCollapse(nn.Sequential(net), layers=["conv"])
    depth = LayerwiseCollapse(net, layers=["conv"])
    images, target = batches()[0]
    with pytest.raises(RuntimeError, match="inside `with"):
        depth.update(target)
    with depth:
        with pytest.raises(ValueError, match="has not run since the last update"):
            depth.update(target)
        net(images)
        net(images)
        with pytest.raises(ValueError, match="gave 32 samples since .* has 16: .* no layer that runs several times"):
            depth.update(target)
        net(images)
        depth.update(target)
        with pytest.raises(RuntimeError, match="already active"), depth:
            pass
    with LayerwiseCollapse(net, layers=["conv"], pool=lambda out: (out,)), pytest.raises(ValueError, match="pool="):
        net(images)
