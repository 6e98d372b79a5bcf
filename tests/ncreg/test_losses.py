"""The modules, and what is thrown at them: half precision, zeros, tiny batches, absent classes, wrong input."""

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ncreg import functional as nf
from ncreg import losses

CLASSES, DIM = 4, 6

COSTS = [[0, 1, 2, 3], [5, 0, 1, 1], [1, 1, 0, 1], [2, 0, 9, 0]]
MODULES = {
    "intra": lambda: losses.IntraClassCosineLoss(),
    "inter": lambda: losses.InterClassCosineLoss(CLASSES),
    "intra, memory": lambda: losses.IntraClassCosineLoss(memory=losses.ClassMeanMemory(CLASSES, DIM)),
    "inter, memory": lambda: losses.InterClassCosineLoss(CLASSES, memory=losses.ClassMeanMemory(CLASSES, DIM)),
    "dot regression": lambda: losses.DotRegressionLoss(),
    "centre": lambda: losses.CenterLoss(CLASSES, DIM),
    "ntce": lambda: losses.NTCELoss(temperature=1 / 64),
    "nonl": lambda: losses.NONLLoss(temperature=1 / 64),
    "supcon": lambda: losses.SupConLoss(temperature=1 / 64),
    "koleo": lambda: losses.KoLeoLoss(),
    "mse": lambda: losses.OneHotMSELoss(),
    "expected cost": lambda: losses.ExpectedCostLoss(COSTS),
    "spectral decoupling": lambda: losses.SpectralDecouplingLoss(),
    "logit adjusted": lambda: losses.LogitAdjustedLoss([9, 5, 2, 1]),
}


def test_the_table_has_every_loss():
    every = {getattr(losses, name) for name in losses.__all__} - {losses.ClassMeanMemory}
    assert {type(make()) for make in MODULES.values()} == {loss for loss in every if "head" not in loss.consumes}


def batch(samples=12, classes=CLASSES, dim=DIM, dtype=torch.float32, seed=0):
    """All that a training loop has at hand."""
    g = torch.Generator().manual_seed(seed)
    return {
        "features": torch.randn(samples, dim, generator=g).to(dtype),
        "logits": (64 * torch.rand(samples, classes, generator=g) - 32).to(dtype),
        "target": torch.arange(samples) % classes,
        "weight": torch.randn(classes, dim, generator=g),
    }


def value_and_grads(module, available):
    """The loss, and its gradients in whatever of the batch it consumes and is not a label."""
    leaves = {k: v.detach().clone().requires_grad_(v.is_floating_point()) for k, v in available.items()}
    loss = module(*(leaves[name] for name in module.consumes))
    loss.sum().backward()
    return loss.detach(), [leaf.grad for leaf in leaves.values() if leaf.grad is not None]


def test_a_module_passes_its_hyperparameters_on():
    at_hand = batch()
    h, y, w, z = (at_hand[name] for name in ("features", "target", "weight", "logits"))
    share, center = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.linspace(0, 1, DIM)
    centers = losses.CenterLoss(CLASSES, DIM, reduction="sum")
    pairs = [
        (losses.IntraClassCosineLoss(center=center), nf.intra_class_cosine_loss(h, y, center=center)),
        (losses.InterClassCosineLoss(CLASSES, center="batch"), nf.inter_class_cosine_loss(h, y, 4, center="batch")),
        (
            losses.DotRegressionLoss(normalize=False, length=3.0, class_weight=share, reduction="none"),
            nf.dot_regression_loss(h, y, w, normalize=False, length=3.0, class_weight=share, reduction="none"),
        ),
        (centers, h.square().sum() / 2),
        (losses.NTCELoss(temperature=0.7), nf.ntce_loss(h, y, w, temperature=0.7)),
        (losses.NONLLoss(class_weight=share), nf.nonl_loss(h, y, w, temperature=0.1, class_weight=share)),
        (losses.SupConLoss(temperature=0.3, reduction="sum"), 12 * nf.supcon_loss(h, y, temperature=0.3)),
        (
            losses.ExpectedCostLoss(COSTS, reduction="sum"),
            12 * nf.expected_cost_loss(z, y, torch.tensor(COSTS).float()),
        ),
        (losses.KoLeoLoss(reduction="sum"), 12 * nf.koleo_loss(h)),
        (losses.OneHotMSELoss(class_weight=share), nf.mse_one_hot_loss(z, y, class_weight=share)),
        (losses.SpectralDecouplingLoss(coefficient=0.4), nf.spectral_decoupling_loss(z, y, coefficient=0.4)),
    ]
    for module, wanted in pairs:
        got = module(*(at_hand[name] for name in module.consumes))
        torch.testing.assert_close(got, wanted, msg=type(module).__name__)
        again = pickle.loads(pickle.dumps(copy.deepcopy(module)))
        if module is not centers:
            torch.testing.assert_close(again(*(at_hand[name] for name in again.consumes)), wanted)


SOFT = ["dot regression", "ntce", "mse", "expected cost", "spectral decoupling", "logit adjusted"]


@pytest.mark.parametrize("name", SOFT)
def test_modules_take_the_soft_labels_of_their_function(name):
    """One-hot rows as soft labels are the labels themselves; a smoothed row is not."""
    module, at_hand = MODULES[name](), batch()
    hard = module(*(at_hand[key] for key in module.consumes))
    at_hand["target"] = F.one_hot(at_hand["target"]).float()
    torch.testing.assert_close(module(*(at_hand[key] for key in module.consumes)), hard)
    at_hand["target"] = 0.9 * at_hand["target"] + 0.1 / CLASSES
    assert (module(*(at_hand[key] for key in module.consumes)) - hard).abs() > 1e-3


@pytest.mark.parametrize("name", MODULES)
def test_labels_on_another_device_are_refused_by_name(name):
    """Device meta stands for it: index_select of a table by labels there gave memory that nobody had written."""
    module, at_hand = MODULES[name](), batch()
    if "target" in module.consumes:
        at_hand["target"] = at_hand["target"].to("meta")
        with pytest.raises(ValueError, match=r"target is on meta, the batch on cpu: move it, target.to\('cpu'\)"):
            module(*(at_hand[key] for key in module.consumes))


@pytest.mark.parametrize("name", SOFT)
def test_soft_labels_and_weights_on_another_device_are_refused_by_name(name):
    module, at_hand = MODULES[name](), batch()
    if hasattr(module, "class_weight"):
        module.class_weight = torch.ones(CLASSES, device="meta")
        with pytest.raises(ValueError, match="class_weight is on meta, the batch on cpu"):
            module(*(at_hand[key] for key in module.consumes))
        module.class_weight = None
    at_hand["target"] = F.one_hot(at_hand["target"], CLASSES).float().to("meta")
    with pytest.raises(ValueError, match="target is on meta, the batch on cpu"):
        module(*(at_hand[key] for key in module.consumes))


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_numpy_are_numbers():
    at_hand = batch()
    h, y = at_hand["features"], at_hand["target"]
    ours, theirs = losses.InterClassCosineLoss(4), losses.InterClassCosineLoss(np.int64(4))
    assert ours(h, y) == theirs(h, y)
    assert nf.supcon_loss(h, y, temperature=np.float32(0.5)) == nf.supcon_loss(h, y, temperature=0.5)


LEARNABLE = {
    "ntce": (losses.NTCELoss, "temperature"),
    "nonl": (losses.NONLLoss, "temperature"),
    "supcon": (losses.SupConLoss, "temperature"),
    "dot regression": (losses.DotRegressionLoss, "length"),
    "spectral decoupling": (losses.SpectralDecouplingLoss, "coefficient"),
    "logit adjusted": (partial(losses.LogitAdjustedLoss, [9, 5, 2, 1]), "tau"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", LEARNABLE)
def test_a_number_that_could_not_be_learned_is_refused_and_is_learned_where_the_error_says(name):
    make, number = LEARNABLE[name]
    learned = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    with pytest.raises(TypeError, match=rf"{number} requires a gradient.*loss\.{number} = torch\.nn\.Parameter"):
        make(**{number: learned})
    at_hand = {key: value.double() if value.is_floating_point() else value for key, value in batch().items()}

    def value(loss):
        return loss(*(at_hand[key] for key in loss.consumes))

    loss = make()
    setattr(loss, number, learned)
    assert dict(loss.named_parameters()) == {number: learned}
    value(loss).backward()
    after, before = (value(make(**{number: 0.3 + step})) for step in (1e-5, -1e-5))
    assert learned.grad is not None
    assert float(learned.grad) == pytest.approx(float(after - before) / 2e-5, rel=1e-6)


def test_modules_name_their_hyperparameters_and_move_their_buffers():
    loss = losses.NTCELoss(temperature=0.2, class_weight=torch.ones(CLASSES))
    assert repr(loss) == "NTCELoss(temperature=0.2, reduction='mean', gather=True)"
    assert "momentum=0.9" in repr(losses.IntraClassCosineLoss(memory=losses.ClassMeanMemory(3, 2)))
    assert loss.double().class_weight.dtype == torch.float64
    centred = losses.InterClassCosineLoss(CLASSES, center=torch.ones(DIM))
    assert centred.double().center.dtype == torch.float64


@pytest.mark.parametrize("name", MODULES)
def test_training_steps_bring_the_loss_down(name):
    module, at_hand = MODULES[name](), batch()
    logits, features = at_hand["logits"] / 10, at_hand["features"]
    leaves = {**at_hand, "features": features.requires_grad_(), "logits": logits.requires_grad_()}
    optimizer = torch.optim.SGD([features, logits], lr=0.01)
    seen = []
    for _ in range(30):
        loss = module(*(leaves[key] for key in module.consumes))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    start = 1 if "memory" in name else 0  # the first batch only fills the memory
    assert seen[-1] < seen[start]


# ---- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MODULES)
def test_under_autocast_the_loss_is_that_of_the_rounded_inputs(name, dtype):
    """At scale 64 (temperature 1/64) half-precision products would be off in the first digit."""
    rounded = batch(dtype=dtype)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in rounded.items()}
    with torch.autocast("cpu", dtype=dtype):
        loss, grads = value_and_grads(MODULES[name]().eval(), rounded)
    wanted, wanted_grads = value_and_grads(MODULES[name]().double().eval(), exact)
    torch.testing.assert_close(loss.double(), wanted, rtol=2e-5, atol=1e-6)
    for got, want in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0.02, atol=1e-2 * float(want.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SOFT)
def test_soft_labels_under_autocast(name, dtype):
    at_hand = batch()
    at_hand["target"] = 0.9 * F.one_hot(at_hand["target"], CLASSES).float() + 0.1 / CLASSES
    wanted, wanted_grads = value_and_grads(MODULES[name]().eval(), at_hand)
    module = MODULES[name]().eval()
    leaves = {k: v.clone().requires_grad_() if k in ("features", "logits") else v for k, v in at_hand.items()}
    with torch.autocast("cpu", dtype=dtype):
        loss = module(*(leaves[key] for key in module.consumes))
    loss.backward()
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-6, atol=1e-7)
    got = [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
    torch.testing.assert_close(got[0], wanted_grads[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [[3], list(range(12))], ids=["one zero row", "all rows zero"])
@pytest.mark.parametrize("name", MODULES)
def test_zero_rows_give_finite_values_and_gradients(name, rows, dtype):
    at_hand = batch(dtype=dtype)
    at_hand["features"][rows] = 0
    at_hand["logits"][rows] = 0
    module = MODULES[name]()
    for _ in range(2):  # the second time memories and centres are filled
        loss, grads = value_and_grads(module, at_hand)
        assert loss.isfinite()
        assert grads and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("case", ["one sample", "two classes on a line", "absent classes", "int32 labels"])
def test_small_cases_stay_finite(name, case):
    if case == "two classes on a line":
        at_hand = batch(classes=CLASSES, dim=DIM)
        at_hand["features"] = at_hand["features"][:, :1].repeat(1, DIM)
        at_hand["target"] %= 2
    else:
        at_hand = batch(samples=1 if case == "one sample" else 12)
    if case == "absent classes":
        at_hand["target"] = at_hand["target"] % 2 * 3
    if case == "int32 labels":
        at_hand["target"] = at_hand["target"].int()
    if name in ("nonl", "koleo") and case == "one sample":
        return  # refused, or warned of: see below
    module = MODULES[name]()
    for _ in range(2):
        loss, grads = value_and_grads(module, at_hand)
        assert loss.isfinite() and all(grad.isfinite().all() for grad in grads)
    if case == "one sample" and name in ("intra", "inter", "ntce", "supcon"):  # nothing to compare with
        assert loss.abs() < 1e-5 and all(grad.abs().max() < 1e-4 for grad in grads)


# ---- cost


class LargestTensor(TorchDispatchMode):
    """The most elements any operation has returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(made, torch.Tensor):
                self.numel = max(self.numel, made.numel())
        return result


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("supcon", "koleo")])
def test_nothing_grows_with_the_square_of_the_batch(name):
    samples = 256
    with LargestTensor() as largest:
        value_and_grads(MODULES[name](), batch(samples=samples))
    assert largest.numel <= samples * max(DIM, CLASSES)


def test_the_cosine_losses_hold_no_table_of_all_classes():
    """With 5000 classes and 8 samples the tables are 8 × 8."""
    features, target = torch.randn(8, 3), torch.arange(8) * 600
    with LargestTensor() as largest:
        nf.inter_class_cosine_loss(features, target, 5000) + nf.intra_class_cosine_loss(features, target)
    assert largest.numel <= 64


# ---- memory of class means


def test_the_memory_is_an_exponential_average_of_unit_class_means():
    memory = losses.ClassMeanMemory(3, 2, momentum=0.75)
    first = torch.tensor([[2.0, 0.0], [0.0, 5.0], [0.0, 1.0]])
    memory.update(first, torch.tensor([0, 0, 2]))
    torch.testing.assert_close(memory.means, torch.tensor([[0.5, 0.5], [0.0, 0.0], [0.0, 1.0]]))
    memory.update(torch.tensor([[-3.0, 0.0]]), torch.tensor([0]))
    torch.testing.assert_close(memory.means, torch.tensor([[0.125, 0.375], [0.0, 0.0], [0.0, 1.0]]))


@pytest.mark.parametrize("center", [None, "batch"])
def test_memory_losses_equal_their_sums(center):
    g = torch.Generator().manual_seed(0)
    classes = 9
    past = torch.randn(classes, DIM, generator=g, dtype=torch.float64) / 5
    past[[2, 5]] = 0  # not met so far
    features = torch.randn(6, DIM, generator=g, dtype=torch.float64)
    target = torch.tensor([0, 0, 2, 3, 3, 8])
    shifted = features - features.mean(0) if center else features
    u = F.normalize(shifted).numpy()
    means = {c: u[target == c].mean(0) for c in (0, 2, 3, 8)}
    m = past.numpy()
    intra = [1 - means[c] @ m[c] for c in (0, 3, 8)]
    met = [c for c in range(classes) if c not in (2, 5)]
    inter = [(means[c] @ m[k] + 1 / (classes - 1)) ** 2 for c in means for k in met if k != c]
    got = nf.intra_class_cosine_loss(features, target, center=center, memory=past)
    np.testing.assert_allclose(got, np.mean(intra))
    got = nf.inter_class_cosine_loss(features, target, classes, center=center, memory=past)
    np.testing.assert_allclose(got, np.mean(inter))
    features.requires_grad_()
    assert gradcheck(lambda h: nf.intra_class_cosine_loss(h, target, center=center, memory=past), features)
    assert gradcheck(lambda h: nf.inter_class_cosine_loss(h, target, classes, center=center, memory=past), features)


def test_memory_sees_what_a_batch_of_singletons_cannot():
    features, target = torch.randn(8, DIM, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    plain = losses.IntraClassCosineLoss()
    remembering = losses.IntraClassCosineLoss(memory=losses.ClassMeanMemory(100, DIM))
    assert plain(features, target).abs() < 1e-6
    assert remembering(features, target) == 0  # no class met before
    assert abs(remembering(-features, target) - 2) < 1e-6  # each sample opposite to its class's past


def test_memory_and_centres_rest_in_eval_mode_and_travel_in_the_state():
    for make in (MODULES["inter, memory"], MODULES["centre"]):
        module, at_hand = make(), batch()
        module(at_hand["features"], at_hand["target"])
        held = copy.deepcopy(module.state_dict())
        assert all(tensor.abs().sum() > 0 for tensor in held.values())
        module.eval()
        module(-at_hand["features"], at_hand["target"])
        torch.testing.assert_close(module.state_dict(), held, rtol=0, atol=0)
        fresh = make()
        fresh.load_state_dict(held)
        here = {**at_hand, "features": at_hand["features"] + 1}
        torch.testing.assert_close(value_and_grads(fresh.eval(), here), value_and_grads(module, here))


def test_centres_follow_wens_rule():
    loss = losses.CenterLoss(2, 2, rate=0.5)
    h, y = torch.tensor([[4.0, 0.0], [2.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 0, 1])
    assert loss(h, y) == (16 + 4 + 9) / 2 / 3
    torch.testing.assert_close(loss.centers, torch.tensor([[0.5 * 6 / 3, 0.0], [0.0, 0.5 * 3 / 2]]))
    torch.testing.assert_close(loss(h, y), torch.tensor((9 + 1 + 2.25**2) / 6))


RUNNING = [
    lambda: losses.CenterLoss(2, 2, rate=0.5),
    lambda: losses.IntraClassCosineLoss(memory=losses.ClassMeanMemory(2, 2)),
    lambda: losses.InterClassCosineLoss(2, memory=losses.ClassMeanMemory(2, 2)),
]


@pytest.mark.parametrize("gradients_off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("make", RUNNING)
def test_validation_without_eval_leaves_what_a_loss_keeps_as_training_made_it(make, gradients_off):
    """Loops call eval() on the model, seldom on the loss."""
    training, y = torch.tensor([[4.0, 0.0], [2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0, 1])
    loss, alone = make(), make()
    for _ in range(2):
        loss(training, y), alone(training, y)
        expected = copy.deepcopy(alone).eval()(-training, y)
        with gradients_off():
            assert loss(-training, y) == expected
    torch.testing.assert_close(loss.state_dict(), alone.state_dict(), rtol=0, atol=0)
    loss(training.requires_grad_(), y).backward()


@pytest.mark.parametrize("make", RUNNING)
def test_a_state_that_moves_is_never_met_in_another_place_by_activation_checkpointing(make):
    """Computed again in backward it would be a loss of other centres: refused. Reentrant, it moves once, and there."""
    plain, reentrant, refused = make(), make(), make()
    y = torch.tensor([0, 0, 1])
    for seed in range(3):
        rows = torch.randn(3, 2, generator=torch.Generator().manual_seed(seed))
        one, other = rows.clone().requires_grad_(), rows.clone().requires_grad_()
        plain(one, y).backward()
        checkpoint(reentrant, other, y, use_reentrant=True).backward()
        torch.testing.assert_close(other.grad, one.grad, rtol=0, atol=0)
    torch.testing.assert_close(reentrant.state_dict(), plain.state_dict(), rtol=0, atol=0)
    loss = checkpoint(refused, other, y, use_reentrant=False)
    with pytest.raises(RuntimeError, match="is inside torch.utils.checkpoint.*use_reentrant=True"):
        loss.backward()
    resting = plain.eval()  # where nothing moves, nothing is refused
    found, expected = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    checkpoint(resting, found, y, use_reentrant=False).backward()
    resting(expected, y).backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=0)


def test_koleo_of_one_sample_is_zero_and_says_so():
    rows = batch(samples=1)["features"].requires_grad_()
    for reduction, shape in (("mean", ()), ("none", (1,))):
        with pytest.warns(UserWarning, match="koleo_loss of a single sample is 0"):
            loss = losses.KoLeoLoss(reduction=reduction)(rows)
        loss.sum().backward()
        assert loss.shape == shape and not loss.any() and not rows.grad.any()


def test_nonl_skips_a_batch_of_one_class_where_told_to():
    available = batch(classes=CLASSES)
    loss = losses.NONLLoss(one_class="skip")
    for reduction in ("mean", "sum", "none"):
        h, w = (available[name].detach().clone().requires_grad_() for name in ("features", "weight"))
        with pytest.warns(UserWarning, match="skips batches of a single class"):
            zero = losses.NONLLoss(one_class="skip", reduction=reduction)(h, available["target"] * 0, w)
        zero.sum().backward()
        assert not zero.any() and not h.grad.any() and not w.grad.any()
    args = [available[name] for name in loss.consumes]
    assert torch.equal(loss(*args), losses.NONLLoss()(*args))


def test_running_means_and_centres_keep_their_dtype_and_its_precision():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(6, 3, dtype=torch.float64, generator=generator)
    y, old = torch.arange(6) % 2, torch.full((2, 3), 0.5, dtype=torch.float64)
    unit = h / h.norm(dim=1, keepdim=True)
    wanted = torch.stack([0.9 * old[c] + 0.1 * unit[y == c].mean(0) for c in range(2)])
    torch.testing.assert_close(nf.update_class_means(old, h, y), wanted, rtol=0, atol=1e-15)
    memory = losses.ClassMeanMemory(4, 6).bfloat16()
    rows, labels = torch.ones(600, 6), torch.zeros(600, dtype=torch.long)
    memory.update(rows, labels)
    assert memory.means.dtype == torch.bfloat16
    torch.testing.assert_close(memory.means[0].float(), torch.full((6,), 6**-0.5), rtol=0.01, atol=0)
    centers = nf.update_centers(torch.zeros(1, 6).bfloat16(), rows, labels, rate=1.0)
    assert centers.dtype == torch.bfloat16
    torch.testing.assert_close(centers.float(), torch.full((1, 6), 600 / 601), rtol=0.01, atol=0)


def test_of_many_classes_those_of_the_batch_alone_move():
    """Running means and centres by their definition, class by class; the others keep every bit."""
    generator = torch.Generator().manual_seed(0)
    h, old = (torch.randn(rows, 4, dtype=torch.float64, generator=generator) for rows in (6, 40))
    old[7] = 0  # not met so far
    y = torch.tensor([31, 7, 31, 2, 7, 31])
    unit = h / h.norm(dim=1, keepdim=True)
    means, centers = old.clone(), old.clone()
    for c in (2, 7, 31):
        mean = unit[y == c].mean(0)
        means[c] = mean if c == 7 else 0.8 * old[c] + 0.2 * mean
        centers[c] = old[c] + 0.3 * (h[y == c] - old[c]).sum(0) / (1 + int((y == c).sum()))
    absent = torch.ones(40, dtype=torch.bool).index_fill(0, y, False)
    for found, wanted in (
        (nf.update_class_means(old, h, y, momentum=0.8), means),
        (nf.update_centers(old, h, y, rate=0.3), centers),
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)
        assert torch.equal(found[absent], old[absent])


def test_dot_regression_of_many_classes_is_that_of_their_own_vectors():
    generator = torch.Generator().manual_seed(0)
    w, y = torch.randn(50, 6, dtype=torch.float64, generator=generator), torch.tensor([41, 3, 41, 0])
    h = torch.randn(4, 6, dtype=torch.float64, generator=generator).requires_grad_()
    loss = nf.dot_regression_loss(h, y, w)
    wanted = (F.cosine_similarity(h, w[y]) - 1).square().mean() / 2
    slope, wanted_slope = (torch.autograd.grad(value, h)[0] for value in (loss, wanted))
    torch.testing.assert_close(loss, wanted, rtol=1e-14, atol=0)
    torch.testing.assert_close(slope, wanted_slope, rtol=0, atol=1e-15)


def test_a_batch_that_overflowed_leaves_no_trace_in_centres_and_memory():
    """A gradient scaler skips its step; what is kept beside the weights must skip it as well."""
    at_hand = batch()
    h, y = at_hand["features"], at_hand["target"]
    centers = losses.CenterLoss(CLASSES, DIM)
    memory = losses.ClassMeanMemory(CLASSES, DIM)
    for module in (centers, losses.IntraClassCosineLoss(memory=memory)):
        module(h, y)
        before = copy.deepcopy(module.state_dict())
        for bad in (torch.inf, torch.nan):
            spoilt = h.clone()
            spoilt[y == 1] = bad
            module(spoilt[y == 1], y[y == 1])
            assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        module(spoilt + 1, y)  # the other classes are taken in
        (name,) = before
        moved = module.state_dict()[name]
        assert moved.isfinite().all() and torch.equal(moved[1], before[name][1])
        assert not torch.equal(moved[0], before[name][0])


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e19), (torch.bfloat16, 1e19), (torch.float64, 1e155)])
def test_features_whose_length_overflows_give_nan_and_never_a_number(dtype, size):
    at_hand = batch(dtype=dtype)
    long = at_hand["features"].detach() * size
    assert long.isfinite().all()
    y, w = at_hand["target"], at_hand["weight"].to(dtype)
    for loss in (
        nf.dot_regression_loss(long, y, w),
        nf.ntce_loss(long, y, w),
        nf.nonl_loss(long, y, w),
        nf.supcon_loss(long, y),
        nf.koleo_loss(long),
        nf.intra_class_cosine_loss(long, y),
        nf.inter_class_cosine_loss(long, y, CLASSES),
    ):
        assert loss.isnan()


def test_a_batch_without_weight_has_loss_and_gradient_zero():
    weight, frame = torch.tensor([0.0, 1.0, 1.0, 1.0]), batch()["weight"]
    for call in (
        lambda z, y: nf.mse_one_hot_loss(z, y, class_weight=weight),
        lambda z, y: nf.spectral_decoupling_loss(z, y, class_weight=weight),
        lambda z, y: nf.logit_adjusted_cross_entropy(z, y, [4, 3, 2, 1], class_weight=weight),
        lambda z, y: nf.ntce_loss(z, y, frame[:, :4], class_weight=weight),
        lambda z, y: nf.dot_regression_loss(z, y, frame[:, :4], class_weight=weight),
    ):
        z = batch()["logits"][:3].requires_grad_()
        loss = call(z, torch.zeros(3, dtype=torch.int64))
        loss.backward()
        assert loss == 0 and not z.grad.any()
    with pytest.warns(UserWarning, match="single class"):
        assert nf.nonl_loss(H, Y * 0, W, one_class="skip", class_weight=torch.tensor([0.0, 1.0])) == 0


# ---- what is refused, and in which words

H, Y, W = torch.ones(3, 2), torch.tensor([0, 1, 1]), torch.eye(2)
SOFT = torch.full((3, 2), 0.5)
REFUSED = [
    (lambda: nf.intra_class_cosine_loss(H[0], Y), ValueError, "features must be a matrix, got shape .2,."),
    (lambda: nf.intra_class_cosine_loss(H[:0], Y[:0]), ValueError, "features is empty"),
    (lambda: nf.intra_class_cosine_loss(H.long(), Y), TypeError, "features must hold floating-point numbers"),
    (lambda: nf.intra_class_cosine_loss([[1.0]], Y), TypeError, "features must be a tensor, got list"),
    (lambda: nf.intra_class_cosine_loss(H, Y[:2]), ValueError, r"target must have shape \(3,\)"),
    (lambda: nf.intra_class_cosine_loss(H, [0, 1, 1]), TypeError, "target must be a tensor, got list"),
    (lambda: nf.intra_class_cosine_loss(H, Y.float()), TypeError, r"integer class indices.*target.long\(\)"),
    (lambda: nf.intra_class_cosine_loss(H, Y == 1), TypeError, "integer class indices, got torch.bool"),
    (lambda: nf.intra_class_cosine_loss(H, Y - 100), ValueError, "not negative, got indices from -100 to -99"),
    (lambda: nf.intra_class_cosine_loss(H, Y, center="mean"), ValueError, "center must be None, 'batch'.*'mean'"),
    (lambda: nf.intra_class_cosine_loss(H, Y, center=H), ValueError, r"center must have shape \(2,\)"),
    (lambda: nf.intra_class_cosine_loss(H, Y, memory=H.T), ValueError, "memory has 3 columns"),
    (lambda: nf.intra_class_cosine_loss(H, Y, memory=W[:1]), ValueError, r"in \[0, 1\), got indices from 0 to 1"),
    (lambda: nf.inter_class_cosine_loss(H, Y, 1), ValueError, "num_classes=1 must be at least 2"),
    (lambda: nf.inter_class_cosine_loss(H, Y, 2.0), TypeError, "num_classes=2.0 must be an integer"),
    (lambda: nf.inter_class_cosine_loss(H, Y + 1, 2), ValueError, r"in \[0, 2\), got indices from 1 to 2"),
    (lambda: nf.inter_class_cosine_loss(H, Y, 3, memory=W), ValueError, "memory holds 2 classes, num_classes is 3"),
    (lambda: nf.inter_class_cosine(H, Y + 1, 2), ValueError, r"in \[0, 2\)"),
    (lambda: nf.dot_regression_loss(H, Y, W[:, :1]), ValueError, "weight has 1 columns where the features have 2"),
    (lambda: nf.dot_regression_loss(H, Y, W, length=0.0), ValueError, "length=0.0 must be finite and above 0"),
    (
        lambda: nf.dot_regression_loss(H, Y, W, reduction="avg"),
        ValueError,
        "reduction='avg' must be one of 'mean', 'sum', 'none'",
    ),
    (
        lambda: nf.dot_regression_loss(H, Y, W, class_weight=H),
        ValueError,
        r"class_weight .* got \(3, 2\)",
    ),
    (lambda: nf.dot_regression_loss(H, Y, W, class_weight=[1, 2]), ValueError, r"class_weight .* got \[1, 2\]"),
    (lambda: nf.dot_regression_loss(H, SOFT * 3, W), ValueError, "distributions.*sums from 3 to 3"),
    (lambda: nf.dot_regression_loss(H, SOFT - 1, W), ValueError, "distributions.*values from -0.5"),
    (lambda: nf.mse_one_hot_loss(H, SOFT[:2]), ValueError, r"soft target must have shape \(3, 2\)"),
    (lambda: nf.mse_one_hot_loss(H, Y + 1), ValueError, r"in \[0, 2\)"),
    (lambda: nf.ntce_loss(H, Y, W, temperature=-1.0), ValueError, "temperature=-1.0 must be finite and above 0"),
    (lambda: nf.ntce_loss(H, Y, W, temperature="hot"), TypeError, "temperature='hot' must be a number"),
    (lambda: nf.nonl_loss(H, Y * 0, W), ValueError, "nonl_loss needs samples of two classes, all 3 .* of class 0"),
    (lambda: nf.center_loss(H, Y + 1, W), ValueError, r"in \[0, 2\)"),
    (lambda: nf.smooth_labels(Y, 2, 1.5), ValueError, r"smoothing=1.5 must be in \[0, 1\]"),
    (lambda: losses.ClassMeanMemory(2, 2, momentum=2), ValueError, r"momentum=2 must be in \[0, 1\]"),
    (lambda: losses.CenterLoss(2, 2, rate=-1.0), ValueError, r"rate=-1.0 must be in \[0, 1\]"),
    (lambda: losses.NTCELoss(temperature=float("nan")), ValueError, "temperature=nan must be finite"),
    (lambda: losses.InterClassCosineLoss(0), ValueError, "num_classes=0"),
    (lambda: losses.IntraClassCosineLoss(center="origin"), ValueError, "center must be None"),
    (lambda: nf.koleo_loss(H[0]), ValueError, "features must be a matrix, got shape .2,."),
    (lambda: nf.koleo_loss(H.long()), TypeError, "features must hold floating-point numbers"),
    (lambda: nf.koleo_loss(H, reduction="avg"), ValueError, "reduction='avg' must be one of"),
    (
        lambda: losses.ExpectedCostLoss([[0.0, 1.0]]),
        ValueError,
        r"square matrix with a row a class, got shape \(1, 2\)",
    ),
    (lambda: losses.ExpectedCostLoss([[1.0, 1.0], [1.0, 0.0]]), ValueError, "cost of the right class must be 0"),
    (lambda: losses.ExpectedCostLoss([[0.0, -1.0], [1.0, 0.0]]), ValueError, "finite and not negative"),
    (lambda: nf.expected_cost_loss(H, Y, torch.zeros(3, 3)), ValueError, "cost is for 3 classes where there are 2"),
    (lambda: nf.expected_cost_loss(H, Y, [[0.0, 1.0]]), TypeError, "cost must be a tensor of numbers, got list"),
    (lambda: losses.ExpectedCostLoss(torch.zeros(3, 3))(H, Y), ValueError, "logits has 2 columns"),
    (lambda: losses.SupConLoss(reduction="median"), ValueError, "reduction=.* must be one of"),
    (lambda: losses.ClassMeanMemory(5, 0), ValueError, "num_features=0 must be at least 1"),
    (lambda: losses.CenterLoss(5, 0), ValueError, "num_features=0 must be at least 1"),
    (lambda: losses.IntraClassCosineLoss(memory=W), TypeError, "memory must be a ClassMeanMemory or None, got Tensor"),
    (lambda: losses.InterClassCosineLoss(2, memory=W), TypeError, "memory must be a ClassMeanMemory"),
    (lambda: losses.IntraClassCosineLoss(center=np.zeros(3)), TypeError, "center must be None.* got ndarray"),
    (lambda: nf.intra_class_cosine(H, Y, 2, center=np.zeros(2)), TypeError, "center must be None.* got ndarray"),
    (lambda: losses.DotRegressionLoss(normalize="no"), TypeError, "normalize='no' must be True or False"),
    (lambda: nf.dot_regression_loss(H, Y, W, normalize="no"), TypeError, "normalize='no' must be True or False"),
    (lambda: nf.ntce_loss(H, Y, W, class_weight=torch.tensor([1.0, -1.0])), ValueError, "class_weight.*not negative"),
    (lambda: nf.ntce_loss(H, Y, W, class_weight=torch.tensor([1.0, torch.nan])), ValueError, "class_weight.*finite"),
    *(
        (lambda loss=loss: loss(gather="False"), TypeError, "gather='False' must be True or False")
        for loss in (
            losses.NTCELoss,
            losses.SupConLoss,
            losses.KoLeoLoss,
            losses.DotRegressionLoss,
            losses.OneHotMSELoss,
            losses.SpectralDecouplingLoss,
            losses.IntraClassCosineLoss,
            lambda gather: losses.InterClassCosineLoss(4, gather=gather),
            lambda gather: losses.CenterLoss(4, 2, gather=gather),
            lambda gather: losses.LogitAdjustedLoss([1, 2], gather=gather),
        )
    ),
    (lambda: losses.CenterLoss(2, 2, rate="fast"), TypeError, "rate='fast' must be a number"),
    (lambda: losses.ClassMeanMemory(2, 2, momentum=True), TypeError, "momentum=True must be a number"),
    (lambda: nf.smooth_labels(Y, 2, "0.1"), TypeError, "smoothing='0.1' must be a number"),
    (lambda: nf.mse_one_hot_loss(H, SOFT * 1.001), ValueError, "distributions.*sums from 1.001"),
    (lambda: losses.NONLLoss(one_class="drop"), ValueError, "one_class='drop' must be one of 'raise', 'skip'"),
]
COMPARE_MEMBERS = [
    lambda: nf.intra_class_cosine_loss(H, SOFT),
    lambda: nf.inter_class_cosine_loss(H, SOFT, 2),
    lambda: nf.nonl_loss(H, SOFT, W),
    lambda: nf.supcon_loss(H, SOFT),
    lambda: nf.center_loss(H, SOFT, W),
    lambda: losses.NONLLoss()(H, SOFT, W),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("call", "error", "words"), REFUSED)
def test_wrong_input_is_refused_in_words(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.usefixtures("unchecked")
def test_where_reading_a_value_would_wait_for_the_device_the_range_is_asserted(monkeypatch):
    features, target = torch.randn(6, 2), torch.tensor([3, 7, 3, 0, 7, 7])
    calls = [
        lambda: nf.intra_class_cosine_loss(features, target),
        lambda: nf.inter_class_cosine_loss(features, target, 9),
        lambda: nf.ntce_loss(features, target, torch.ones(9, 2)),
        lambda: nf.nonl_loss(features, target, torch.ones(9, 2)),
        lambda: nf.supcon_loss(features, target),
        lambda: nf.mse_one_hot_loss(H, SOFT),
    ]
    here = [call() for call in calls]
    monkeypatch.setattr("ncreg.losses._targets.reads_are_free", lambda tensor: False)
    torch.testing.assert_close([call() for call in calls], here)
    for wrong in (lambda: nf.intra_class_cosine_loss(H, Y - 1), lambda: nf.inter_class_cosine_loss(H, Y + 1, 2)):
        with pytest.raises(RuntimeError, match="class index out of range"):
            wrong()
    with pytest.raises(RuntimeError, match="must be distributions"):
        nf.mse_one_hot_loss(H, SOFT * 2)


def test_weights_keep_the_precision_of_the_loss_and_no_labels_smooth_to_none():
    at_hand = batch()
    weighted = losses.OneHotMSELoss(class_weight=torch.ones(CLASSES).double())
    assert weighted(at_hand["logits"], at_hand["target"]).dtype == torch.float32
    assert nf.smooth_labels(torch.empty(0, dtype=torch.int64), 3).shape == (0, 3)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("call", COMPARE_MEMBERS)
def test_losses_that_compare_members_refuse_soft_labels(call):
    with pytest.raises(ValueError, match="soft labels.*switch mixup and label smoothing off"):
        call()
