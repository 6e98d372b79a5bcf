"""Curvature by layer against closed forms and full Hessians; condensation against all pairs."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn

from ncreg.metrics import batch_norm_condensation, hessian_norms
from ncreg.models import swap_head
from ncreg.norms import LastBatchNorm
from ncreg.transferability import naswot


def gaussian(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("classes", [2, 5])
def test_softmax_regression_at_zero(classes):
    rows, target = gaussian(40, 7), torch.arange(40) % classes
    layer = nn.Linear(7, classes).double()
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    wanted = np.linalg.eigvalsh((rows.T @ rows / 40).numpy())[-1] / classes
    found = hessian_norms(layer, rows, target, steps=2000, tolerance=1e-10)
    assert found == {"weight": pytest.approx(wanted, rel=1e-6)}


def test_a_step_beyond_two_over_the_norm_diverges_on_the_quadratic():
    rows, wanted = gaussian(30, 5), gaussian(30, 2, seed=1)
    layer = nn.Linear(5, 2, bias=False).double()
    norm = hessian_norms(layer, rows, wanted, loss=F.mse_loss, steps=5000, tolerance=1e-12)["weight"]
    sizes = {}
    for factor in (1.9, 2.1):
        weight = torch.zeros_like(layer.weight, requires_grad=True)
        for _ in range(400):
            (slope,) = torch.autograd.grad(F.mse_loss(rows @ weight.T, wanted), weight)
            weight = (weight - factor / norm * slope).detach().requires_grad_()
        sizes[factor] = float(weight.detach().norm())
    assert sizes[1.9] < 10 and sizes[2.1] > 1e6


def test_blocks_of_a_network_are_those_of_its_full_hessian():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    rows, target = gaussian(20, 4), torch.arange(20) % 3
    found = hessian_norms(net, rows, target, steps=5000, tolerance=1e-11)
    for name in ("0.weight", "2.weight"):
        start = net.get_parameter(name).detach()

        def of_weight(w, name=name):
            return F.cross_entropy(torch.func.functional_call(net, {name: w}, (rows,)), target)

        block = torch.autograd.functional.hessian(of_weight, start).reshape(start.numel(), start.numel())
        assert found[name] == pytest.approx(float(torch.linalg.eigvalsh(block).abs().max()), rel=1e-4)
    one = hessian_norms(net, rows, target, layers=["2.weight"], steps=5000, tolerance=1e-11)
    assert one == {"2.weight": pytest.approx(found["2.weight"], rel=1e-4)}


def test_attention_has_a_second_derivative_too():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 1, 4, dropout=0.0, batch_first=True).double()
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 3).double())
    rows, target = gaussian(6, 3, 4), torch.arange(6) % 3
    name = "0.self_attn.in_proj_weight"
    found = hessian_norms(net, rows, target, layers=[name], steps=5000, tolerance=1e-11)[name]
    weight, step = net.get_parameter(name), 1e-5

    def slope(change):
        with torch.no_grad():
            weight.add_(change)
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(rows), target), weight)
        with torch.no_grad():
            weight.sub_(change)
        return gradient

    units = torch.eye(weight.numel(), dtype=torch.float64).view(-1, *weight.shape) * step
    block = torch.stack([(slope(unit) - slope(-unit)).flatten() / (2 * step) for unit in units])
    assert found == pytest.approx(float(torch.linalg.eigvalsh(block).abs().max()), rel=1e-4)


def test_every_trained_weight_of_a_classifier_and_no_gradient_left():
    torch.manual_seed(0)
    model = swap_head("test_resnet", "etf", num_classes=4).eval()
    found = hessian_norms(model, torch.rand(4, 3, 32, 32), torch.arange(4), steps=2)
    assert set(found) == {n for n, p in model.named_parameters() if p.ndim >= 2}
    assert all(np.isfinite(value) and value >= 0 for value in found.values()) and max(found.values()) > 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_has_the_curvature_of_the_model(backend):
    """Code that torch.compile makes by AOTAutograd, as its default backend's, has no second derivative."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    rows, target = gaussian(12, 3), torch.arange(12) % 2
    compiled = torch.compile(net, backend=backend)
    compiled(rows)
    found = {f"_orig_mod.{name}": value for name, value in hessian_norms(net, rows, target).items()}
    assert hessian_norms(compiled, rows, target) == pytest.approx(found, rel=1e-12)


def test_a_batch_of_inference_mode_has_the_curvature_of_any_other():
    """Lightning's and others' validation loops read their batches there."""
    net, rows, target = nn.Linear(3, 2).double(), gaussian(12, 3), torch.arange(12) % 2
    with torch.inference_mode():
        found = hessian_norms(net, rows.clone(), target.clone())
    assert found == hessian_norms(net, rows, target)


class Centred(nn.Module):
    """What changes its input in place, as scripts with `images.sub_(mean)` do."""

    def forward(self, rows):
        return rows.sub_(0.5)


@pytest.mark.parametrize(
    "measure",
    [
        lambda net, rows: hessian_norms(net, rows, torch.arange(6) % 3, steps=3),
        batch_norm_condensation,
        naswot,
    ],
)
def test_a_model_that_changes_its_input_in_place_changes_no_image(measure):
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3)).double().eval()
    rows = gaussian(6, 4)
    before, wanted = rows.clone(), measure(net, rows - 0.5)
    found = measure(nn.Sequential(Centred(), *net).eval(), rows)
    assert torch.equal(rows, before)
    found, wanted = (list(f.values()) if isinstance(f, dict) else f for f in (found, wanted))
    assert found == pytest.approx(wanted, rel=1e-12)


def test_running_statistics_are_kept_in_training_mode():
    """The Hessian is that of the batch's own statistics; the running ones do not count the batch."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), LastBatchNorm(4), nn.Linear(4, 2)).double()
    rows, target = gaussian(12, 3).double(), torch.arange(12) % 2
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = hessian_norms(net, rows, target, steps=3)
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)
    net(rows)  # moves them
    assert not torch.equal(net[1].running_mean, before["1.running_mean"])
    assert hessian_norms(net, rows, target, steps=3) == pytest.approx(found, rel=1e-12)


def test_what_a_model_draws_is_one_draw_from_the_seed_and_no_global_one():
    """Against the whole Hessian with the masks that the seed gives: every product has seen the same function."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), DropPath(0.3), nn.Linear(8, 3)).double()
    rows, target = gaussian(20, 6), torch.arange(20) % 3
    before = torch.random.get_rng_state()
    found = [hessian_norms(net, rows, target, steps=5000, tolerance=1e-11, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert found[0] == found[1] and abs(found[0]["4.weight"] / found[2]["4.weight"] - 1) > 1e-3
    for name in ("0.weight", "4.weight"):
        start = net.get_parameter(name).detach()

        def of_weight(w, name=name):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                return F.cross_entropy(torch.func.functional_call(net, {name: w}, (rows,)), target)

        block = torch.autograd.functional.hessian(of_weight, start).reshape(start.numel(), start.numel())
        assert found[0][name] == pytest.approx(float(torch.linalg.eigvalsh(block).abs().max()), rel=1e-4)


def test_condensation_is_the_mean_over_pairs():
    torch.manual_seed(0)
    net = (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), LastBatchNorm(48)).double().eval()
    )
    images = gaussian(5, 2, 6, 6)
    found = batch_norm_condensation(net, images)
    compiled = torch.compile(net[:3].eval(), backend="eager")
    with torch.no_grad():
        compiled(images)  # its code is made before any hook is set
        assert batch_norm_condensation(compiled, images) == {"_orig_mod.1": found["1"]}
        inputs = {"1": net[0](images), "4": net[:4](images)}
    for name, rows in inputs.items():
        pairs = itertools.combinations(rows.flatten(1).numpy(), 2)
        cosines = [a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in pairs]
        assert found[name] == pytest.approx(np.mean(cosines), abs=1e-12)


def test_the_same_image_everywhere_is_fully_condensed_and_zeros_count_as_nothing():
    net = nn.Sequential(nn.BatchNorm1d(3)).eval()
    same = torch.tensor([[1.0, 2.0, 3.0]]).repeat(4, 1) * torch.arange(1, 5)[:, None]
    assert batch_norm_condensation(net, same) == {"0": pytest.approx(1)}
    same[0] = 0  # three of six pairs are left
    assert batch_norm_condensation(net, same) == {"0": pytest.approx(0.5)}


X, Y = torch.rand(4, 3), torch.tensor([0, 1, 0, 1])
PARTLY_TRAINING = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()).eval()
PARTLY_TRAINING[0].train()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: hessian_norms(lambda x: x, X, Y), TypeError, "model must be a module"),
        (lambda: hessian_norms(nn.ReLU(), X, Y), ValueError, "no trained weight of two or more axes"),
        (lambda: hessian_norms(nn.Linear(3, 2), X, Y, layers=["w"]), ValueError, "layers names 'w'.*there are weight"),
        (lambda: hessian_norms(nn.Linear(3, 2), X / 0, Y), ValueError, "one finite number"),
        (lambda: hessian_norms(nn.Linear(3, 2), X, Y, steps=0), ValueError, "steps=0"),
        (lambda: batch_norm_condensation(nn.Sequential(nn.ReLU()).eval(), X), ValueError, "no BatchNorm runs"),
        (lambda: batch_norm_condensation(nn.BatchNorm1d(3), X), ValueError, "training mode"),
        (lambda: batch_norm_condensation(PARTLY_TRAINING, X), ValueError, r"training mode \(0\): call model.eval"),
        (lambda: batch_norm_condensation(nn.BatchNorm1d(3).eval(), X[:1]), ValueError, "images holds 1"),
    ],
)
def test_what_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
    assert PARTLY_TRAINING[0].num_batches_tracked == 0 and PARTLY_TRAINING[0].running_mean.eq(0).all()
