"""Losses, heads, norms, measures and evaluations on a device that is not the CPU: equal numbers, no devices mixed."""

import copy
from dataclasses import fields, is_dataclass
from functools import partial

import pytest
import timm
import torch
from torch import nn

from ncreg import functional as nf
from ncreg import losses, metrics, robustness, transferability
from ncreg.averaging import update_bn
from ncreg.frames import etf_distance, max_cosine, nearest_simplex_etf, orthoplex, similar_permutation, simplex_etf
from ncreg.heads import HEADS, CosineHead, ETFHead, FixedHead, NearestETFHead
from ncreg.models import Normalize, fold, swap_head
from ncreg.norms import NORMS, last_norm
from ncreg.numerics import float64_device
from ncreg.quantization import round_frame, round_weights
from ncreg.theory import collapse_certificate
from tests import other_device
from tests.ncreg.test_default_device import ATTACKS, EVALUATIONS, Small
from tests.ncreg.test_losses import MODULES
from tests.other_device import DEVICE, Elsewhere, OtherDevice

CLASSES, DIM = 4, 6


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


LABEL = torch.arange(24) % CLASSES


def trained(module, *inputs):
    """What a step of training sees: the output, the gradients of inputs and parameters, buffers after it."""
    inputs = [item.clone().requires_grad_() if item.is_floating_point() else item for item in inputs]
    out = module(*inputs)
    out.square().mean().backward()
    seen = [out, *(item.grad for item in inputs if item.requires_grad)]
    if isinstance(module, nn.Module):
        seen += [item.grad for item in module.parameters() if item.requires_grad] + list(module.buffers())
    return seen


def of_loss(name, to):
    module = to(MODULES[name]().double())
    at_hand = {"features": drawn(24, DIM), "logits": drawn(24, CLASSES, seed=1), "weight": drawn(CLASSES, DIM, seed=2)}
    at_hand["target"] = LABEL
    return trained(module, *(to(at_hand[key]) for key in module.consumes))


def of_head_loss(make, to):
    torch.manual_seed(0)
    head = to(CosineHead(DIM, CLASSES).double())
    features = to(drawn(24, DIM)).requires_grad_()
    loss = to(make())(features, head, to(LABEL))
    loss.backward()
    return [loss, features.grad, *(item.grad for item in head.parameters())]


def of_head(make, to):
    return trained(to(make().double()), to(drawn(24, DIM)))


def of_norm(make, to):
    norm = to(make().double())
    return [*trained(norm, to(drawn(24, DIM))), norm.eval()(to(drawn(5, DIM, seed=3)))]


def of_nearest(to):
    head = to(NearestETFHead(DIM, CLASSES).double())
    head.update(to(drawn(24, DIM)), to(LABEL))
    return list(head.buffers())


def of_collapse(to):
    head = to(nn.Linear(DIM, CLASSES).double())
    with torch.no_grad():
        head.weight.copy_(to(drawn(CLASSES, DIM, seed=4)))
        head.bias.copy_(to(drawn(CLASSES, seed=5)))
    metric = to(metrics.NeuralCollapse(CLASSES, DIM, classifier=head))
    metric.update(to(drawn(20, DIM)), to(LABEL[:20]))
    metric.update(to(drawn(4, DIM, seed=1)), to(LABEL[:4]))
    found = metric.compute()
    centers = to(metrics.NearestClassCenter(metric.class_means(), head))
    centers.update(to(drawn(24, DIM)), to(LABEL))
    return [found, centers.compute()]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Linear(8, 4)
        draw = torch.Generator().manual_seed(0)
        for item in self.parameters():
            item.data = torch.randn(item.shape, generator=draw)

    def forward(self, x):
        return self.last(self.act(self.norm(self.conv(x))).mean((2, 3)))


IMAGES = torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(6))


def of_layers(to):
    net = to(Net().eval())
    with metrics.LayerwiseCollapse(net, ["conv", "act"], num_classes=CLASSES) as layers, torch.no_grad():
        net(to(IMAGES))
        layers.update(to(LABEL))
    return layers.compute()


def of_classifier(to):
    torch.manual_seed(0)
    model = to(swap_head(timm.create_model("test_resnet", num_classes=7), "etf", num_classes=CLASSES).double())
    logits, features = model(to(IMAGES.double()), with_features=True)
    logits.square().mean().backward()
    model.eval()
    plain = fold(model)
    return [logits, features, [item.grad for item in model.parameters()], plain(to(IMAGES.double()))]


def of_bn(to):
    torch.manual_seed(0)
    model = to(nn.Sequential(nn.Flatten(), nn.Linear(768, 5), nn.BatchNorm1d(5)))
    update_bn([(to(IMAGES[:16]), 0), (to(IMAGES[16:]), 0)], model)
    return list(model.buffers())


def of_ood(to):
    weight, bias, shift = to(drawn(CLASSES, DIM, seed=4)), to(drawn(CLASSES, seed=5)), to(3 * drawn(CLASSES, DIM))
    train, near, far = to(drawn(240, DIM)), to(drawn(60, DIM, seed=8)), to(drawn(60, DIM, seed=9) * 3)
    label = to(LABEL.repeat(10))
    train, near = train + shift[label], near + shift[label[:60]]
    logits = [features @ weight.T + bias for features in (train, near, far)]
    known = {"train_logits": logits[0], "weight": weight, "bias": bias}
    return robustness.evaluate_ood(train, label, near, logits[1], {"far": (far, logits[2])}, **known)


CASES = {f"loss: {name}": partial(of_loss, name) for name in MODULES}
CASES |= {
    "loss: chunked": partial(of_head_loss, losses.ChunkedCrossEntropyLoss),
    "loss: sampled": partial(of_head_loss, lambda: losses.SampledCrossEntropyLoss(num_sampled=4)),
    "loss: sampled by chances": partial(
        of_head_loss, lambda: losses.SampledCrossEntropyLoss(4, probabilities=torch.arange(1.0, 1 + CLASSES))
    ),
    "loss: sharded": partial(of_head_loss, losses.ShardedCrossEntropyLoss),
}
CASES |= {f"head: {name}": partial(of_head, partial(build, DIM, CLASSES)) for name, build in HEADS.items()}
CASES |= {
    "head: grouped": partial(of_head, lambda: ETFHead(DIM, CLASSES, structure="grouped", permutation=[2, 0, 3, 1])),
    "head: householder": partial(of_head, lambda: ETFHead(DIM, DIM + 1, structure="householder")),
    "head: centre": partial(of_head, lambda: ETFHead(DIM, DIM, structure="centre")),
    "head: fixed": partial(of_head, lambda: FixedHead(drawn(CLASSES, DIM), scale=3.0)),
    "head: nearest, re-aimed": of_nearest,
}
CASES |= {f"norm: {name}": partial(of_norm, partial(last_norm, name, DIM)) for name in NORMS}
CASES |= {
    "collapse": of_collapse,
    "layers": of_layers,
    "classifier": of_classifier,
    "update_bn": of_bn,
    "ood": of_ood,
    "normalize": lambda to: to(Normalize([0.5] * 3, [0.2] * 3))(to(IMAGES)),
    "frames": lambda to: [
        nearest_simplex_etf(to(drawn(CLASSES, DIM))),
        etf_distance(to(drawn(CLASSES, DIM))),
        max_cosine(to(drawn(CLASSES, DIM))),
    ],
    "class sums": lambda to: [
        nf.intra_class_cosine(to(drawn(24, DIM)), to(LABEL), CLASSES),
        nf.inter_class_cosine(to(drawn(24, DIM)), to(LABEL), CLASSES),
        nf.smooth_labels(to(LABEL), CLASSES, 0.1),
    ],
    "minority": lambda to: [
        metrics.minority_angles(to(drawn(CLASSES, DIM)), {"few": (0, 1), "many": (2, 3)}, centre=True),
        metrics.minority_collapse(to(torch.tensor([9, 5, 2, 1])), weight_decay=1e-3, feature_decay=1e-3),
    ],
    "seli": lambda to: metrics.seli_distance(to(drawn(CLASSES, DIM)), [9, 5, 2, 1], "means"),
    "transferability": lambda to: [
        transferability.logme(to(drawn(24, DIM) + 3 * drawn(CLASSES, DIM)[LABEL]), to(LABEL)),
        transferability.ncti({"a": to(drawn(24, DIM)), "b": to(drawn(24, DIM, seed=1))}, to(LABEL)),
        transferability.leave_one_out_accuracy(to(drawn(24, DIM)), to(LABEL)),
        transferability.naswot(to(Net().eval()), to(IMAGES)),
    ],
    "condensation": lambda to: metrics.batch_norm_condensation(to(Net().eval()), to(IMAGES)),
    "curvature": lambda to: metrics.hessian_norms(to(Net().eval()), to(IMAGES), to(LABEL)),
    "quantization": lambda to: list(round_weights(to(Net().eval()), bits=4).parameters()),
    "calibration": lambda to: robustness.evaluate_calibration(
        to(drawn(24, 4)), to(LABEL), to(drawn(24, 4, seed=1)), to(LABEL)
    ),
    "probes": lambda to: [
        robustness.linear_probe(
            to(drawn(24, DIM)), to(LABEL), to(drawn(24, DIM, seed=1)), to(LABEL), l2_grid=(0.1, 1.0)
        ),
        robustness.few_shot(to(drawn(24, DIM)), to(LABEL), to(drawn(24, DIM)), to(LABEL), shots=2, draws=2, l2=0.1),
        robustness.knn_probe(to(drawn(24, DIM)), to(LABEL), to(drawn(24, DIM, seed=1)), to(LABEL)),
    ],
    "long tail": lambda to: robustness.long_tail_accuracy(to(LABEL.flip(0)), to(LABEL), [900, 50, 20, 1]),
    "memorization": lambda to: robustness.memorization(to(drawn(24, 4).argmax(1)), to(LABEL), to(LABEL.flip(0))),
}


def of_evaluation(check, to):
    torch.manual_seed(0)
    return check(to(Small().eval()), to(IMAGES[:8]), to(LABEL[:8]), to(drawn(8, 5)))


def of_attack(check, to):
    torch.manual_seed(0)
    return check(to(Small().eval()), to(IMAGES[:8]), to(LABEL[:8]))


QUICKER = {
    "minimum norm": lambda m, x, y: robustness.minimum_norm(m, x, y, rounds=3, steps=3),
    "suspicions": lambda m, x, y: robustness.find_suspicions(m, x[:4], y[:4]),
}
CHECKED = {name: check for name, check in EVALUATIONS.items() if name not in ("few shot", *ATTACKS)}
CASES |= {f"evaluation: {name}": partial(of_evaluation, check) for name, check in CHECKED.items()}
CASES |= {f"attack: {name}": partial(of_attack, check) for name, check in (ATTACKS | QUICKER).items()}


def leaves(found):
    """Every tensor and number of a result, at whatever depth."""
    if is_dataclass(found):
        found = [getattr(found, field.name) for field in fields(found)]
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list | tuple):
        return [leaf for item in found for leaf in leaves(item)]
    return [found]


def elsewhere(item):
    return copy.deepcopy(item).to(DEVICE) if isinstance(item, nn.Module) else item.to(DEVICE)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:features are normalised before the head")
def test_on_another_device_the_numbers_are_those_of_the_cpu(name):
    expected = leaves(CASES[name](lambda item: item))
    with OtherDevice():
        found = leaves(CASES[name](elsewhere))
        found = [item.detach().cpu() if isinstance(item, torch.Tensor) else item for item in found]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, torch.Tensor | float):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, equal_nan=True)
        else:
            assert one == other


def loaded(to):
    """Other class vectors: they are compared with those of before, whose default scale they do not keep."""
    head = to(FixedHead(simplex_etf(CLASSES, DIM)))
    head.load_state_dict({"weight": orthoplex(CLASSES, DIM)})
    return [head.weight, head.scale]


def norm_and_layer(to):
    """A head of its own that is affine and no single layer, as LeViT's."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 5), nn.ReLU(), nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4)))
    return swap_head(to(net.eval()), "keep", classifier="3", input_size=(3, 16, 16)).head.weight


def detected(to):
    found = robustness.evaluate_detection(to(drawn(40) + 1), to(drawn(30, seed=1)))
    risk = robustness.risk_coverage(to(drawn(24, 4).softmax(1)), to(LABEL), confidence=to(drawn(24, seed=2)))
    return [found, risk]


IN_FLOAT32 = CASES | {
    "loaded": loaded,
    "norm and layer": norm_and_layer,
    "detected": detected,
    "similar": lambda to: similar_permutation(to(orthoplex(4, 2)), to(drawn(4, 4))),
    "certificate": lambda to: collapse_certificate(0.05, to(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])), 2.5, [50, 50]),
    "printed": lambda to: str(round_frame(to(simplex_etf(CLASSES, DIM)), 4)),
}
ATTACKING = ("evaluation: ", "attack: ")  # attacks say that they need float64


def in_float32(item):
    return item.float() if isinstance(item, nn.Module) or item.is_floating_point() else item


@pytest.fixture
def without_float64(monkeypatch):
    """No tensor on DEVICE is of float64, as on Apple's GPUs, and none becomes one on its way to the CPU.

    There torch 2.14 gives zeros without a word, versions before and after it an error (pytorch issue 197715).
    """
    run = other_device._run

    def refusing(func, args, kwargs):
        found = run(func, args, kwargs)
        wide = [item for item in other_device._tensors(found) if item.dtype == torch.float64]
        moved = func in other_device.BETWEEN_DEVICES and any(isinstance(item, Elsewhere) for item in args)
        if wide and (moved or any(isinstance(item, Elsewhere) for item in wide)):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return found

    monkeypatch.setattr(other_device, "_run", refusing)
    for module in ("heads._fixed", "losses.imbalance", "losses.sampled", "losses.spread"):
        monkeypatch.setattr(f"ncreg.{module}.widest", lambda device: torch.float32)
    float64_device.cache_clear()
    yield
    float64_device.cache_clear()


@pytest.mark.usefixtures("without_float64")
@pytest.mark.filterwarnings("ignore:features are normalised before the head")
@pytest.mark.parametrize("name", [name for name in IN_FLOAT32 if not name.startswith(ATTACKING)])
def test_a_device_without_float64_gives_the_numbers_of_the_cpu(name):
    expected = leaves(IN_FLOAT32[name](in_float32))
    with OtherDevice():
        found = leaves(IN_FLOAT32[name](lambda item: elsewhere(in_float32(item))))
        found = [item.detach().cpu() if isinstance(item, torch.Tensor) else item for item in found]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, torch.Tensor | float):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)
        else:
            assert one == other


READ = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}
STEPS = [
    name for name in CASES if name.startswith(("loss: ", "head: ", "norm: ")) and name != "head: nearest, re-aimed"
]


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.filterwarnings("ignore:features are normalised before the head")
def test_a_training_step_reads_nothing_from_the_device(name, monkeypatch):
    """Each value read makes the host wait for all work before it; NONL looks whether a batch has two classes."""
    reads, run = [], other_device._run

    def counting(func, args, kwargs):
        if func in READ and isinstance(args[0], Elsewhere):
            reads.append(func)
        return run(func, args, kwargs)

    monkeypatch.setattr(other_device, "_run", counting)
    with OtherDevice():
        CASES[name](elsewhere)
        assert len(reads) == (name == "loss: nonl")
        torch.ones(1, device=DEVICE).item()
        assert len(reads) == 1 + (name == "loss: nonl")  # a read would have been seen


def test_the_device_refuses_what_a_gpu_refuses():
    with OtherDevice():
        there = torch.ones(3, 2, device=DEVICE)
        assert isinstance(there, Elsewhere) and (there + 1).device == DEVICE
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3, 2)
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(2, device=DEVICE, generator=torch.Generator())
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        there.cpu().zero_()
        assert there.sum().item() == 6
