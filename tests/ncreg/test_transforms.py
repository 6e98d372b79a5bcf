"""Every head, norm, loss and the Classifier under torch.fx, torch.func, forward mode, traces, ONNX, export and compile.

What a transform gives is compared with plain eager results: loops for vmap, reverse mode and finite differences for
forward mode, double backward for Hessians.
"""

import copy
import io
import pickle
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck
from torch.autograd.functional import hessian, jacobian
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from ncreg import losses
from ncreg.frames import etf_distance, nearest_simplex_etf, simplex_etf
from ncreg.heads import HEADS, CosineHead, ETFHead, FixedHead, LinearHead, NearestETFHead
from ncreg.models import swap_head
from ncreg.norms import NORMS, LastBatchNorm, last_norm

pytestmark = [
    pytest.mark.usefixtures("unchecked"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated"),
]
CLASSES, DIM = 4, 6
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


HEAD_CASES = {name: partial(build, DIM, CLASSES) for name, build in HEADS.items()}
HEAD_CASES |= {
    "grouped": lambda: ETFHead(DIM, CLASSES, structure="grouped"),
    "grouped, permuted": lambda: ETFHead(DIM, CLASSES, structure="grouped", permutation=[2, 0, 3, 1]),
    "householder": lambda: ETFHead(DIM, DIM + 1, structure="householder"),
    "centre": lambda: ETFHead(DIM, DIM, structure="centre"),
    "not normalised": lambda: ETFHead(DIM, CLASSES, normalize=False, scale=2.0),
    "fixed": lambda: FixedHead(gaussian(CLASSES, DIM), scale=3.0),
}


# ---- one function a transform: what it gives for module(features), and what plain eager mode gives


def by_fx(module, features):
    traced = torch.fx.symbolic_trace(nn.Sequential(module))
    return pickle.loads(pickle.dumps(traced))(features), module(features)


def by_vmap(module, features):
    several = torch.stack([features, 2 * features + 1, features.flip(0)])
    return torch.func.vmap(module)(several), torch.stack([module(one) for one in several])


def by_jvp(module, features):
    tangent = gaussian(*features.shape, seed=1)
    wanted = torch.einsum("bcij,ij->bc", jacobian(module, features), tangent)
    return torch.func.jvp(module, (features,), (tangent,))[1], wanted


def by_forward_ad(module, features):
    tangent = gaussian(*features.shape, seed=1)
    wanted = torch.einsum("bcij,ij->bc", jacobian(module, features), tangent)
    with forward_ad.dual_level():
        out = module(forward_ad.make_dual(features.clone().requires_grad_(), tangent))
        return forward_ad.unpack_dual(out).tangent, wanted


def by_hessian(module, features):
    def scalar(rows):
        return module(rows).sin().sum()

    return torch.func.hessian(scalar)(features[:3]), hessian(scalar, features[:3])


def by_jit_trace(module, features):
    traced, more = torch.jit.trace(module, features.clone().requires_grad_()), torch.cat([features, features + 1])
    return traced(more), module(more)


def by_onnx(module, features):
    """Warnings there are about the exporter itself; those of the trace inside it are errors in `by_jit_trace`."""
    onnxruntime = pytest.importorskip("onnxruntime")
    file, axes = io.BytesIO(), {"features": {0: "batch"}}
    names = {"input_names": ["features"], "output_names": ["logits"], "dynamic_axes": axes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (features,), file, dynamo=False, **names)
    more = torch.cat([features, features + 1])
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"features": more.numpy()})[0]), module(more)


def by_export(module, features):
    exported = torch.export.export(module, (features,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    more = torch.cat([features, features + 1])
    return exported.module()(more), module(more)


def by_compile(module, features):
    torch.compiler.reset()
    compiled, found = torch.compile(module, fullgraph=True, backend="aot_eager"), []
    for function in (compiled, module):
        rows = features.clone().requires_grad_()
        out = function(rows)
        found.append((out, torch.autograd.grad(out.sin().sum(), rows)[0]))
    return found


TRANSFORMS = {
    "fx": by_fx,
    "vmap": by_vmap,
    "jvp": by_jvp,
    "forward AD": by_forward_ad,
    "hessian": by_hessian,
    "jit.trace": by_jit_trace,
    "onnx": by_onnx,
    "export": by_export,
    "compile": by_compile,
}


SLOW = ("onnx", "export", "compile")  # each head once, and each norm once


def combinations():
    for head in HEAD_CASES:
        for norm in NORMS:
            for transform in TRANSFORMS:
                taken = transform not in SLOW or norm == "none" or head == "etf"
                if taken and (norm, transform) != ("rms", "onnx"):  # torch has no ONNX form of its own RMSNorm there
                    yield pytest.param(head, norm, transform, id=f"{head}, {norm}, {transform}")


@pytest.mark.parametrize(("head", "norm", "transform"), list(combinations()))
def test_every_head_behind_every_norm_is_itself_under_every_transform(head, norm, transform):
    module = nn.Sequential(last_norm(norm, DIM), HEAD_CASES[head]()).double().eval().requires_grad_(False)
    torch.testing.assert_close(*TRANSFORMS[transform](module, gaussian(5, DIM)), **CLOSE)


# ---- what a head or norm refuses, and how it keeps its state


def test_a_head_or_norm_alone_is_no_torch_fx_graph():
    with pytest.raises(TypeError, match=r"ETFHead is one node .* nn.Sequential\(module\)"):
        torch.fx.symbolic_trace(ETFHead(DIM, CLASSES))


def test_a_graph_follows_train_and_eval_mode_and_writes_the_running_statistics():
    module = nn.Sequential(LastBatchNorm(DIM)).double()
    traced, plain, features = torch.fx.symbolic_trace(copy.deepcopy(module)), module, gaussian(5, DIM)
    for train in (True, False):
        torch.testing.assert_close(traced.train(train)(features), plain.train(train)(features), **CLOSE)
    torch.testing.assert_close(dict(traced.named_buffers()), dict(plain.named_buffers()))
    with pytest.raises(ValueError, match="batch of 1 sample"):
        traced.train()(features[:1])


def test_last_batch_norm_in_training_refuses_transforms_that_its_statistics_do_not_survive():
    norm, features = LastBatchNorm(DIM).double(), gaussian(3, 5, DIM)
    before = copy.deepcopy(norm.state_dict())
    for transform in (torch.func.vmap(norm), torch.func.grad(lambda x: norm(x[0]).sum())):
        with pytest.raises(RuntimeError, match=r"running statistics in training.*call .eval\(\)"):
            transform(features)
    torch.testing.assert_close(norm.state_dict(), before)


def test_an_ensemble_of_last_batch_norms_trains_under_vmap_with_stacked_buffers():
    norms, features = [LastBatchNorm(DIM).double() for _ in range(3)], gaussian(3, 5, DIM)
    params, buffers = torch.func.stack_module_state(norms)
    apply = partial(torch.func.functional_call, norms[0])
    out = torch.func.vmap(lambda p, b, x: apply((p, b), (x,)))(params, buffers, features)
    torch.testing.assert_close(out, torch.stack([n(x) for n, x in zip(norms, features, strict=True)]), **CLOSE)
    torch.testing.assert_close(buffers["running_var"], torch.stack([n.running_var for n in norms]), **CLOSE)


# ---- losses


class Labelled(nn.Module):
    """A loss that takes no labels, beside labels that it does not need."""

    consumes = ("features", "target")

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, features, target):
        return self.loss(features)


WEIGHTS = torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)
LOSS_CASES = {
    "intra": lambda: losses.IntraClassCosineLoss(),
    "intra, batch centre": lambda: losses.IntraClassCosineLoss(center="batch"),
    "intra, memory": lambda: losses.IntraClassCosineLoss(memory=losses.ClassMeanMemory(CLASSES, DIM)),
    "inter": lambda: losses.InterClassCosineLoss(CLASSES),
    "inter, memory": lambda: losses.InterClassCosineLoss(CLASSES, memory=losses.ClassMeanMemory(CLASSES, DIM)),
    "dot regression": lambda: losses.DotRegressionLoss(class_weight=WEIGHTS),
    "centre": lambda: losses.CenterLoss(CLASSES, DIM),
    "ntce": lambda: losses.NTCELoss(class_weight=WEIGHTS),
    "ntce, soft": lambda: losses.NTCELoss(),
    "nonl": lambda: losses.NONLLoss(),
    "supcon": lambda: losses.SupConLoss(),
    "koleo": lambda: Labelled(losses.KoLeoLoss()),
    "expected cost": lambda: losses.ExpectedCostLoss(1 - torch.eye(CLASSES)),
    "mse": lambda: losses.OneHotMSELoss(class_weight=WEIGHTS),
    "mse, soft": lambda: losses.OneHotMSELoss(),
    "spectral decoupling": lambda: losses.SpectralDecouplingLoss(),
    "logit adjusted": lambda: losses.LogitAdjustedLoss([9, 5, 2, 1], label_smoothing=0.1),
}
STATEFUL = ["intra, memory", "inter, memory", "centre"]


def test_the_table_has_every_loss():
    every = {getattr(losses, name) for name in losses.__all__} - {losses.ClassMeanMemory}
    tried = {type(getattr(loss, "loss", loss)) for loss in (make() for make in LOSS_CASES.values())}
    assert tried == {loss for loss in every if "head" not in loss.consumes}


def loss_and_batch(name, samples=12):
    """A loss whose memory or centres have met a batch, now in eval mode, and what it consumes."""
    target = torch.arange(samples) % CLASSES
    if "soft" in name:
        target = 0.9 * nn.functional.one_hot(target, CLASSES).double() + 0.1 / CLASSES
    available = {"features": gaussian(samples, DIM), "logits": gaussian(samples, CLASSES, seed=1)}
    available |= {"target": target, "weight": gaussian(CLASSES, DIM, seed=2)}
    loss = LOSS_CASES[name]().double()
    batch = tuple(available[key] for key in loss.consumes)
    loss(*batch)
    return loss.eval(), batch


def shifted(batch):
    """A second member of an ensemble: other features, other labels."""
    rows, target, *weight = batch
    return (2 * rows + 1, target.flip(0), *(2 * w - 1 for w in weight))


@pytest.mark.parametrize("name", LOSS_CASES)
def test_every_loss_over_an_ensemble(name):
    """vmap over features alone, and over features, labels and class vectors; gradients too."""
    loss, batch = loss_and_batch(name)
    rows, rest = torch.stack([batch[0], 2 * batch[0] + 1]), batch[1:]
    torch.testing.assert_close(
        torch.func.vmap(lambda x: loss(x, *rest))(rows), torch.stack([loss(x, *rest) for x in rows]), **CLOSE
    )
    members = [batch, shifted(batch)]
    stacked = [torch.stack(parts) for parts in zip(*members, strict=True)]
    torch.testing.assert_close(torch.func.vmap(loss)(*stacked), torch.stack([loss(*one) for one in members]), **CLOSE)
    leaves = [one[0].clone().requires_grad_() for one in members]
    wanted = [torch.autograd.grad(loss(x, *one[1:]), x)[0] for x, one in zip(leaves, members, strict=True)]
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(*stacked), torch.stack(wanted), **CLOSE)


@pytest.mark.parametrize("name", LOSS_CASES)
def test_derivatives_of_every_loss(name):
    """Forward mode against finite differences and against reverse mode; Hessians against double backward."""
    loss, (rows, *rest) = loss_and_batch(name)
    tangent = gaussian(*rows.shape, seed=3)

    def of_rows(x):
        return loss(x, *rest)

    value, slope = torch.func.jvp(of_rows, (rows,), (tangent,))
    torch.testing.assert_close(value, of_rows(rows), **CLOSE)
    torch.testing.assert_close(slope, (jacobian(of_rows, rows) * tangent).sum(), **CLOSE)
    step = 1e-6
    difference = (of_rows(rows + step * tangent) - of_rows(rows - step * tangent)) / (2 * step)
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-8)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(rows.clone().requires_grad_(), tangent)
        torch.testing.assert_close(forward_ad.unpack_dual(of_rows(dual)).tangent, slope, **CLOSE)
    torch.testing.assert_close(torch.func.hessian(of_rows)(rows), hessian(of_rows, rows), **CLOSE)
    assert gradcheck(of_rows, rows.clone().requires_grad_(), check_forward_ad=True, check_batched_grad=True)


@pytest.mark.parametrize("name", LOSS_CASES)
def test_every_loss_in_a_graph(name):
    """One node of a torch.fx graph; a jit trace that serves other batches; export; compile."""
    loss, batch = loss_and_batch(name)
    other = (*(torch.cat([mine, its]) for mine, its in zip(batch[:2], shifted(batch)[:2], strict=True)), *batch[2:])

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = loss

        def forward(self, rows, target):
            return self.loss(rows, target, *batch[2:])

    torch.testing.assert_close(torch.fx.symbolic_trace(Step())(*other[:2]), loss(*other), **CLOSE)
    torch.testing.assert_close(torch.jit.trace(loss, batch)(*other), loss(*other), **CLOSE)
    torch.testing.assert_close(
        torch.export.export(loss, batch).module()(*shifted(batch)), loss(*shifted(batch)), **CLOSE
    )
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = [batch[0].clone().requires_grad_() for _ in range(2)]
    grads = [torch.autograd.grad(f(x, *batch[1:]), x)[0] for f, x in zip((compiled, loss), leaves, strict=True)]
    torch.testing.assert_close(*grads, **CLOSE)


def test_labels_are_checked_under_vmap_as_well():
    rows, target = gaussian(2, 6, DIM), torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 2, 4, 0, 1]])
    with pytest.raises(ValueError, match=r"in \[0, 4\), got indices from 0 to 4"):
        torch.func.vmap(losses.InterClassCosineLoss(CLASSES))(rows, target)
    soft = torch.full((6, CLASSES, 2), 0.3, dtype=torch.float64)  # the batched axis last
    with pytest.raises(ValueError, match="sums from 1.2 to 1.2"):
        torch.func.vmap(losses.OneHotMSELoss(), in_dims=(0, 2))(gaussian(2, 6, CLASSES), soft)
    with pytest.raises(ValueError, match="nonl_loss needs samples of two classes"):
        torch.func.vmap(losses.NONLLoss(), in_dims=(0, 0, None))(rows, target * 0, gaussian(CLASSES, DIM))


@pytest.mark.parametrize("name", STATEFUL)
def test_a_running_state_is_updated_through_a_derivative_and_refused_under_vmap(name):
    loss, (rows, *rest) = loss_and_batch(name)
    loss.train()
    plain = copy.deepcopy(loss)
    plain(rows, *rest)
    tangent = gaussian(*rows.shape)
    torch.func.grad(loss)(rows, *rest)
    torch.testing.assert_close(loss.state_dict(), plain.state_dict(), **CLOSE)
    plain(rows, *rest)
    torch.func.jvp(lambda x: loss(x, *rest), (rows,), (tangent,))
    plain(rows, *rest)
    with forward_ad.dual_level():
        loss(forward_ad.make_dual(rows, tangent), *rest)
        assert all(forward_ad.unpack_dual(state).tangent is None for state in loss.state_dict().values())
    torch.testing.assert_close(loss.state_dict(), plain.state_dict(), **CLOSE)
    with pytest.raises(RuntimeError, match=r"one running state in training.*call .eval\(\)"):
        torch.func.vmap(lambda x: loss(x, *rest))(rows[None])
    torch.testing.assert_close(loss.state_dict(), plain.state_dict(), **CLOSE)


# ---- frames


@pytest.mark.parametrize("function", [nearest_simplex_etf, etf_distance])
@pytest.mark.parametrize("means", [gaussian(4, 6), simplex_etf(4, 6, dtype=torch.float64)], ids=["any", "simplex"])
def test_the_nearest_simplex_under_transforms(function, means):
    tangent = gaussian(4, 6, seed=1)
    wanted = torch.tensordot(jacobian(function, means), tangent, 2)
    torch.testing.assert_close(torch.func.jvp(function, (means,), (tangent,))[1], wanted, **CLOSE)
    several = torch.stack([means, tangent])
    torch.testing.assert_close(torch.func.vmap(function)(several), torch.stack(list(map(function, several))), **CLOSE)
    for by in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(by(function)(means), jacobian(function, means), **CLOSE)


def test_the_nearest_simplex_refuses_a_second_derivative_instead_of_a_wrong_one():
    def scalar(means):
        return nearest_simplex_etf(means).sin().sum()

    means = gaussian(4, 6)
    for second in (torch.func.hessian(scalar), torch.func.jacrev(torch.func.grad(scalar)), partial(hessian, scalar)):
        with pytest.raises(RuntimeError, match="differentiable once"):
            second(means)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="differentiable once"):
        dual = forward_ad.make_dual(means.clone().requires_grad_(), means)
        torch.autograd.grad(scalar(dual), dual)


# ---- the Classifier


@pytest.fixture(scope="module")
def classifier():
    return swap_head("test_resnet", "etf", num_classes=10, project=12).double().eval()


IMAGES = gaussian(2, 3, 32, 32)


def test_a_classifier_traced_by_torch_fx_keeps_its_flag(classifier):
    traced = pickle.loads(pickle.dumps(torch.fx.symbolic_trace(classifier)))
    torch.testing.assert_close(traced(IMAGES), classifier(IMAGES), **CLOSE)
    found = traced(IMAGES, with_features=True)
    torch.testing.assert_close(tuple(found), tuple(classifier(IMAGES, with_features=True)), **CLOSE)
    with pytest.raises(TypeError, match="with_features=1 must be True or False"):
        traced(IMAGES, with_features=1)


def test_feature_extractors_name_norm_and_head(classifier):
    assert {"project", "norm", "head"} < set(get_graph_node_names(classifier)[1])
    found = create_feature_extractor(classifier, ["backbone.layer4", "norm", "head"]).eval()(IMAGES)
    logits, features = classifier(IMAGES, with_features=True)
    torch.testing.assert_close((found["head"], found["norm"]), (logits, features), **CLOSE)
    extract = pytest.importorskip("timm.models._features_fx").GraphExtractNet(classifier, {"norm": "h", "head": "z"})
    for got, wanted in zip(extract(IMAGES), (features, logits), strict=True):
        torch.testing.assert_close(got, wanted, **CLOSE)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_classifier_is_prepared_for_quantization(classifier):
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    mapping = torch.ao.quantization.get_default_qconfig_mapping("x86")
    plain = copy.deepcopy(classifier).float()
    prepared = quantize_fx.prepare_fx(copy.deepcopy(plain), mapping, (IMAGES.float(),))
    torch.testing.assert_close(prepared(IMAGES.float()), plain(IMAGES.float()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transform", ["vmap", "jvp", "forward AD", "jit.trace", "onnx", "export", "compile"])
def test_a_classifier_under_every_transform(classifier, transform):
    module = copy.deepcopy(classifier)
    if transform in ("jvp", "forward AD"):  # the Jacobian of whole images would be large
        tail = nn.Sequential(module.project, module.norm, module.head)
        torch.testing.assert_close(*TRANSFORMS[transform](tail, gaussian(3, 96)), **CLOSE)
    elif transform == "onnx":  # onnxruntime has no convolution in float64
        torch.testing.assert_close(*by_onnx(module.float(), IMAGES.float()), rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(*TRANSFORMS[transform](module, IMAGES), rtol=1e-9, atol=1e-9)


def test_modules_share_no_code_object():
    """torch.compile keeps eight versions of one, then it refuses fullgraph=True."""
    forwards = [cls.forward for cls in (LinearHead, CosineHead, ETFHead, FixedHead, NearestETFHead, LastBatchNorm)]
    assert len({id(forward.__code__) for forward in forwards}) == len(forwards)


@pytest.mark.parametrize(
    "name", [name if name in ("linear", "etf") else pytest.param(name, marks=pytest.mark.slow) for name in HEADS]
)
def test_every_head_has_an_onnx_form_by_dynamo(name):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, features = nn.Sequential(HEADS[name](DIM, num_classes=CLASSES)).eval(), gaussian(5, DIM).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module, (features,), dynamo=True, verbose=False)
        file = io.BytesIO()
        program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: features.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), module(features), rtol=1e-4, atol=1e-4)
