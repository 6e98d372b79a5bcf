"""Collapse by depth: what the hooks collect is what the layers gave, and nothing stays behind."""

import functools

import numpy as np
import oracles
import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import relu
from torch.utils.checkpoint import checkpoint

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
        with pytest.raises(ValueError, match="gave 32 samples since the last update, but target has 16"):
            depth.update(target)
        net(images)
        depth.update(target)
        with pytest.raises(RuntimeError, match="already active"), depth:
            pass
    with LayerwiseCollapse(net, layers=["conv"], pool=lambda out: (out,)), pytest.raises(ValueError, match="pool="):
        net(images)
