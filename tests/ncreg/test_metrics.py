"""NeuralCollapse and NearestClassCenter against the definitions, near collapse, off balance, in any split."""

import copy
import pickle
import warnings

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import MetricCollection

from ncreg.frames import etf_distance, simplex_etf
from ncreg.metrics import NearestClassCenter, NeuralCollapse
from ncreg.metrics import _base as base

MODES = {
    "cached": {},
    "cached, no scatter": {"scatter": False},
    "streamed": {"cache": False},
    "streamed, no scatter": {"cache": False, "scatter": False},
}


def make(classes, dim, samples, *, spread=1.0, offset=0.0, balanced=True, seed=0, dtype=torch.float64):
    """Features around random class means of unit-variance entries, and a random classifier."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(samples) % classes
    if not balanced:
        target = (classes * torch.rand(samples, generator=generator) ** 3).long()
        target[:classes] = torch.arange(classes)
    target = target[torch.randperm(samples, generator=generator)]
    means = torch.randn(classes, dim, generator=generator, dtype=torch.float64) + offset
    noise = torch.randn(samples, dim, generator=generator, dtype=torch.float64)
    head = nn.Linear(dim, classes, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(means - offset + torch.randn(classes, dim, generator=generator, dtype=torch.float64))
        head.bias.copy_(torch.randn(classes, generator=generator, dtype=torch.float64))
    return (means[target] + spread * noise).to(dtype), target, head


def measure(features, target, head, *, batch=37, **options):
    metric = NeuralCollapse(head.out_features, head.in_features, head, **options)
    for _ in metric.passes():
        for rows, labels in zip(features.split(batch), target.split(batch), strict=True):
            metric.update(rows, labels)
    return metric.compute()


def expect(features, target, head, **options):
    weight, bias = head.weight.detach().double().numpy(), head.bias.detach().double().numpy()
    return oracles.neural_collapse(features.double().numpy(), target.numpy(), weight, bias, **options)


def assert_agrees(found, expected, tolerance=1e-9):
    for name, value in expected.items():
        if name in found:
            assert found[name].shape == ()
            assert float(found[name]) == pytest.approx(float(value), rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-5])
@pytest.mark.parametrize(("classes", "dim"), [(5, 8), (12, 4), (2, 6), (4, 1), (2, 1)])
def test_every_measure_agrees_with_its_definition(classes, dim, spread, balanced):
    features, target, head = make(classes, dim, 48, spread=spread, balanced=balanced)
    expected = expect(features, target, head)
    for options in MODES.values():
        found = measure(features, target, head, **options)
        missing = set() if options.get("scatter", True) else {"within_stable_rank", "within_effective_rank"}
        assert set(found) == set(expected) - missing
        assert_agrees(found, expected)
        for name in ("nc1", "trace_ratio", "cdnv"):  # tiny values must be right in their own scale
            assert float(found[name]) == pytest.approx(expected[name], rel=1e-9), name


@pytest.mark.parametrize(
    ("dtype", "spread", "offset"),
    [
        *[(torch.float64, 1e-5, offset) for offset in (0, 80, 1000)],
        *[(torch.float32, spread, offset) for spread in (1e-2, 1e-4) for offset in (0, 80, 1000)],
        *[(torch.bfloat16, 0.3, offset) for offset in (0, 10)],
        (torch.float16, 0.1, 30),
    ],
)
def test_offset_and_rounding_cost_no_digits(dtype, spread, offset):
    features, target, head = make(6, 16, 60, spread=spread, offset=offset, dtype=dtype, balanced=False)
    expected = expect(features, target, head)
    exact = dtype == torch.float64
    for options in MODES.values():
        found = measure(features, target, head, **options)
        for name in ("nc1", "trace_ratio", "cdnv"):
            assert float(found[name]) == pytest.approx(expected[name], rel=1e-8 if exact else 1e-6), name
        assert_agrees(found, expected, 1e-8 if exact else 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_feature_of_length_0_has_no_direction(mode, dtype):
    """Behind a ReLU that is dead to an image; its margin over its length was rounding over 0, an infinite mean."""
    features, target, head = make(3, 4, 60, dtype=dtype)
    with torch.no_grad():
        head.bias.zero_()
    features[[0, 7, 20]] = 0
    found = measure(features, target, head, **mode)
    logits = features.double() @ head.weight.detach().T
    own = logits.gather(1, target[:, None])[:, 0]
    margin = own - logits.scatter(1, target[:, None], -torch.inf).amax(1)
    length = features.double().norm(dim=1) * head.weight.detach().square().sum(1).mean().sqrt()
    scaled = torch.where(length == 0, 0, margin / length)
    for name, value in (("mean", scaled.mean()), ("min", scaled.min()), ("q10", scaled.quantile(0.1))):
        torch.testing.assert_close(found[f"normalized_margin_{name}"], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e15])
def test_the_scale_of_the_features_does_not_matter(scale):
    features, target, head = make(4, 6, 48, dtype=torch.float32)
    head.bias.data.zero_()
    expected = measure(features, target, head)
    for options in MODES.values():
        found = measure(scale * features, target, head, **options)
        for name in set(found) - {name for name in found if name.startswith("margin")} - {"nc3_bias"}:
            assert float(found[name]) == pytest.approx(float(expected[name]), rel=3e-6, abs=3e-7), name


@pytest.mark.parametrize("relative", [1e-3, 1e-6, 1e-10])
def test_nc1_of_a_constructed_collapse(relative):
    """Closed form: an exact simplex and exactly white noise make NC1 = spread²·d'/... in one line of algebra."""
    classes, dim, pairs = 10, 16, 16
    means = simplex_etf(classes, dim, dtype=torch.float64) * 3 + 50
    # ± each unit direction: Σ_W = (2/(2·dim))·s²·I exactly, Σ_B = (9/(C−1)) on the span of the means
    directions = torch.cat([torch.eye(dim, dtype=torch.float64), -torch.eye(dim, dtype=torch.float64)])
    size = (relative * dim * 9) ** 0.5
    features = (means[:, None] + size * directions).flatten(0, 1)
    target = torch.arange(classes).repeat_interleave(2 * pairs)
    metric = NeuralCollapse(classes, dim, center="features")
    metric.update(features, target)
    values = metric.compute()
    # tr(Σ_W Σ_B⁺)/C = (C−1)·(s²/dim)/(9/(C−1))/C
    assert float(values["nc1"]) == pytest.approx(relative * (classes - 1) ** 2 / classes, rel=1e-7)
    assert float(values["nc1_rank"]) == classes - 1
    assert float(values["etf_distance"]) == pytest.approx(0, abs=1e-9)
    assert float(values["nc2_equinorm"]) == pytest.approx(0, abs=1e-9)
    assert float(values["nc2_equiangularity"]) == pytest.approx(0, abs=1e-9)


def test_rank_deficient_means_are_measured_in_their_own_span():
    """Ten classes whose means span four directions: a cut at C − 1 would divide by rounding errors."""
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(10, 4, generator=generator, dtype=torch.float64) @ torch.randn(
        4, 20, generator=generator, dtype=torch.float64
    )
    target = torch.arange(500) % 10
    features = means[target] + 1e-3 * torch.randn(500, 20, generator=generator, dtype=torch.float64)
    # equal noise in every class: the empirical means keep their rank
    features = means[target] + (features - means[target])[torch.arange(500) // 10 * 10]
    for options in MODES.values():
        found = measure(features, target, nn.Linear(20, 10).double(), **options)
        expected, rank = oracles.nc1(features.numpy(), target.numpy(), np.arange(10))
        assert rank == 4 == int(found["nc1_rank"])
        assert float(found["nc1"]) == pytest.approx(expected, rel=1e-9)
        assert found["nc1"] < 1e-3


def test_the_gram_matrix_of_more_classes_than_a_tile_and_than_features():
    head = nn.Linear(6, 530, bias=False).double()
    metric = NeuralCollapse(530, 6, head)
    metric.update(torch.randn(530, 6, generator=torch.Generator().manual_seed(0)), torch.arange(530))
    gram = head.weight.detach() @ head.weight.detach().T
    simplex = (torch.eye(530, dtype=torch.float64) - 1 / 530) / 529**0.5
    wanted = float((gram / gram.norm() - simplex).norm())
    assert float(metric.compute()["nc2_weight_gram"]) == pytest.approx(wanted, rel=1e-12)


def test_many_classes_take_the_gram_route():
    """Beyond 256 classes and features the span comes from an eigendecomposition, or a fallback if ill-conditioned."""
    generator = torch.Generator().manual_seed(2)
    for first in (1.0, 1000.0):
        means = torch.randn(300, 310, generator=generator, dtype=torch.float64)
        means[:, 0] *= first
        target = torch.arange(900) % 300
        features = means[target] + 1e-6 * torch.randn(900, 310, generator=generator, dtype=torch.float64)
        metric = NeuralCollapse(300, 310)
        metric.update(features, target)
        found = metric.compute()
        empirical = torch.stack([features[target == c].mean(0) for c in range(300)])
        centred = empirical - empirical.mean(0)
        inside = (features - empirical[target]) @ torch.linalg.pinv(centred)
        assert float(found["nc1"]) == pytest.approx(float(inside.square().sum() / 900), rel=1e-8)
        assert int(found["nc1_rank"]) == 299


def test_published_normalisations():
    features, target, head = make(5, 8, 60)
    ours, theirs = measure(features, target, head), measure(features, target, head, convention="papyan")
    means = torch.stack([features[target == c].mean(0) for c in range(5)])
    norms = (means - means.mean(0)).norm(dim=1)
    assert float(theirs["nc1"]) == pytest.approx(5 * float(ours["nc1"]), rel=1e-12)
    assert float(theirs["nc3"]) == pytest.approx(float(ours["nc3"]) ** 2, rel=1e-12)
    assert float(theirs["nc2_equinorm"]) == pytest.approx(float(norms.std() / norms.mean()), rel=1e-12)
    assert float(theirs["cdnv"]) == float(ours["cdnv"])


def test_centre_of_all_features_misleads_off_balance():
    """At exact collapse with imbalance the mean inter-class cosine leaves −1/(C−1) unless μ_G is the centre."""
    means = simplex_etf(10, 12, dtype=torch.float64)
    target = torch.arange(10).repeat_interleave(torch.logspace(2, 0, 10).long())
    head = nn.Linear(12, 10).double()
    ours = measure(means[target], target, head)
    paper = measure(means[target], target, head, center="features")
    assert float(ours["inter_cosine"]) == pytest.approx(-1 / 9, abs=1e-12)
    assert float(ours["inter_cosine_max"]) == pytest.approx(-1 / 9, abs=1e-12)
    assert paper["inter_cosine"] > -0.05
    features = means[target].numpy()
    expected = oracles.cosines_by_pairs(features, target.numpy(), range(10), features.mean(0))
    assert_agrees(paper, expected)


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 80), max_size=6),
    seed=st.integers(0, 3),
    mode=st.sampled_from(sorted(MODES)),
    backwards=st.booleans(),
)
def test_any_split_and_order_gives_the_same(cuts, seed, mode, backwards):
    features, target, head = make(4, 6, 80, spread=1e-3, offset=30.0, balanced=False, seed=seed)
    whole = measure(features, target, head, batch=80)
    edges = sorted({0, 80, *cuts})
    shards = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)] + [slice(0, 0)]
    shards = shards[::-1] if backwards else shards
    metric = NeuralCollapse(4, 6, head, **MODES[mode])
    for _ in metric.passes():
        for shard in shards:
            metric.update(features[shard], target[shard])
    found = metric.compute()
    for name in found:
        assert float(found[name]) == pytest.approx(float(whole[name]), rel=1e-8, abs=1e-9), name


@pytest.mark.parametrize("mode", MODES)
def test_merging_shards_equals_concatenating_them(mode):
    features, target, head = make(4, 6, 90, spread=1e-3, offset=100.0, balanced=False)
    parts = [NeuralCollapse(4, 6, head, **MODES[mode]) for _ in range(4)]  # the last one stays empty
    for part, rows, labels in zip(parts, features.split(30), target.split(30), strict=False):
        part.update(rows, labels)
    merged = NeuralCollapse(4, 6, head, **MODES[mode])
    for part in (parts[3], parts[2], parts[0], parts[1]):
        merged.merge_state(part)
    whole = NeuralCollapse(4, 6, head, **MODES[mode])
    whole.update(features, target)
    found, expected = merged.compute(), whole.compute()
    assert set(found) == set(expected)
    for name in expected:
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-9, abs=1e-10), name
    # and after a compute(), a merge counts: nothing stale comes back
    merged.merge_state(whole)
    assert float(merged.compute()["cdnv"]) == pytest.approx(float(expected["cdnv"]), rel=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_forward_measures_the_batch_and_accumulates(mode):
    features, target, head = make(3, 5, 60)
    metric = NeuralCollapse(3, 5, head, **MODES[mode])
    for rows, labels in zip(features.split(20), target.split(20), strict=True):
        batch = metric(rows, labels)
        alone = NeuralCollapse(3, 5, head, **MODES[mode])
        alone.update(rows, labels)
        assert_agrees(batch, alone.compute())
    whole = NeuralCollapse(3, 5, head, **MODES[mode])
    whole.update(features, target)
    assert_agrees(metric.compute(), whole.compute())


@pytest.mark.parametrize("mode", MODES)
def test_reset_pickle_clone_and_state_dict(mode):
    features, target, head = make(3, 5, 60)
    metric = NeuralCollapse(3, 5, head, **MODES[mode])
    metric.update(features[:20] + 5, target[:20])
    metric.reset()
    metric.update(features, target)
    expected = metric.compute()
    fresh = NeuralCollapse(3, 5, head, **MODES[mode])
    fresh.update(features, target)
    assert_agrees(fresh.compute(), expected, 1e-15)
    for copied in (pickle.loads(pickle.dumps(metric)), metric.clone(), copy.deepcopy(metric)):
        assert_agrees(copied.compute(), expected, 1e-15)
    assert not metric.state_dict() and not list(metric.parameters()) and not list(metric.modules())[1:]
    metric.persistent(True)
    loaded = NeuralCollapse(3, 5, head, **MODES[mode])
    loaded.persistent(True)
    loaded.load_state_dict(metric.state_dict())
    assert_agrees(loaded.compute(), expected, 1e-15)


def test_between_the_passes_a_copy_carries_on():
    features, target, head = make(3, 5, 60)
    expected = measure(features, target, head, cache=False)
    metric = NeuralCollapse(3, 5, head, cache=False)
    passes = metric.passes()
    next(passes)
    metric.update(features, target)
    next(passes)
    metric.update(features[:30], target[:30])
    other = pickle.loads(pickle.dumps(metric))
    metric.persistent(True)
    third = NeuralCollapse(3, 5, head, cache=False)
    third.load_state_dict(metric.state_dict())
    for copied in (metric, other, third):
        copied.update(features[30:], target[30:])
        assert_agrees(copied.compute(), expected, 1e-12)
    with pytest.raises(RuntimeError, match=r"use update\(\) in the second pass"):
        metric(features, target)


def test_the_classifier_is_read_when_the_measures_are_computed():
    features, target, head = make(3, 5, 60)
    metric = NeuralCollapse(3, 5, head)
    copied = metric.clone()
    for one in (metric, copied):
        one.update(features, target)
        one.compute()
    with torch.no_grad():
        head.weight.mul_(-1)
        head.weight[0] += 3
    for one in (metric, copied):
        with pytest.warns(UserWarning, match="classifier has changed since compute"):
            found = one.compute()
        assert_agrees(found, expect(features, target, head))


def test_class_vectors_decide_where_a_head_has_them():
    """A head that normalises its weight's rows in its forward pass is measured by the rows it uses."""

    class UnitHead(nn.Linear):
        @property
        def class_vectors(self):
            return nn.functional.normalize(self.weight, dim=1)

    features, target, head = make(3, 5, 60)
    unit = UnitHead(5, 3, dtype=torch.float64)
    with torch.no_grad():
        unit.weight.copy_(head.weight * torch.tensor([[1.0], [9.0], [0.1]]))
        unit.bias.zero_()
        head.weight.copy_(unit.class_vectors)
        head.bias.zero_()
    metric = NeuralCollapse(3, 5, unit)
    metric.update(features, target)
    assert_agrees(metric.compute(), expect(features, target, head))


def test_a_copied_model_with_its_metric_inside_measures_the_copy():
    features, target, head = make(3, 5, 60)
    model = nn.ModuleDict({"head": head, "measure": NeuralCollapse(3, 5, head)})
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied["head"].weight.neg_()[0] += 3
    copied["measure"].update(features, target)
    assert_agrees(copied["measure"].compute(), expect(features, target, copied["head"]))
    assert set(model.state_dict()) == {"head.weight", "head.bias"}


def test_what_the_caller_does_to_its_tensors_later_does_not_reach_the_cache():
    features, target, head = make(3, 5, 60)
    expected = expect(features, target, head)
    metric = NeuralCollapse(3, 5, head)
    rows, labels = features.clone(), target.clone()
    metric.update(rows, labels)
    rows.zero_()
    labels.zero_()
    assert_agrees(metric.compute(), expected)


@pytest.mark.parametrize("mode", MODES)
def test_inference_mode_can_be_entered_and_left(mode):
    features, target, head = make(3, 5, 60)
    metric = NeuralCollapse(3, 5, head, **MODES[mode])
    with torch.inference_mode():
        metric.reset()
        metric.update(features[:30], target[:30])
    metric.update(features[30:], target[30:])
    assert_agrees(metric.compute(), expect(features, target, head))


def test_metrics_share_a_collection():
    features, target, head = make(3, 5, 60)
    found = MetricCollection(
        {
            "ours": NeuralCollapse(3, 5, head),
            "paper": NeuralCollapse(3, 5, head, center="features"),
            "streamed": NeuralCollapse(3, 5, head, cache=False),
            "near": NearestClassCenter(torch.randn(3, 5), head),
            "far": NearestClassCenter(torch.randn(3, 5) + 9, head),
        }
    )
    for rows, labels in zip(features.split(20), target.split(20), strict=True):
        found.update(rows, labels)
    values = found.compute()
    ours = expect(features, target, head)
    assert float(values["ours_nc1"]) == pytest.approx(ours["nc1"], rel=1e-9)
    for name, options in (("ours", {}), ("paper", {"center": "features"})):
        assert_agrees(
            {k[len(name) + 1 :]: v for k, v in values.items() if k.startswith(name)},
            expect(features, target, head, **options),
        )


def test_classifiers_that_agree_on_the_first_batch_keep_their_own_counts():
    """torchmetrics takes metrics of one collection whose states are equal after the first batch for one."""
    features, target, head = make(3, 5, 60)
    averaged, means = copy.deepcopy(head), torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    found = MetricCollection({"raw": NearestClassCenter(means, head), "averaged": NearestClassCenter(means, averaged)})
    found.update(features, target)
    same = found.compute()
    assert same["raw_nc4"] == same["averaged_nc4"]
    found.reset()
    with torch.no_grad():
        averaged.weight.neg_()
    found.update(features, target)
    values = found.compute()
    for name, layer in (("raw", head), ("averaged", averaged)):
        right = (layer(features).argmax(1) == target).double().mean()
        assert float(values[f"{name}_classifier_accuracy"]) == pytest.approx(float(right), abs=1e-12)
    assert values["raw_classifier_accuracy"] != values["averaged_classifier_accuracy"]


@pytest.mark.parametrize("mode", MODES)
def test_autocast_around_the_loop_rounds_nothing(mode):
    features, target, head = make(4, 6, 90, dtype=torch.float32)
    centres = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))

    def everything():
        nearest = NearestClassCenter(centres, head)
        nearest.update(features, target)
        return measure(features, target, head, **MODES[mode]) | nearest.compute()

    outside = everything()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(everything(), outside, rtol=0, atol=0)


class TensorCores(TorchDispatchMode):
    """A device that keeps 10 bits of the factors of a float32 product, as GPUs do where TF32 is allowed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            *added, left, right = args
            args = (*added, to_ten_bits(left), to_ten_bits(right))
        return func(*args, **(kwargs or {}))


def to_ten_bits(factor):
    if factor.dtype != torch.float32:
        return factor
    mantissa, exponent = torch.frexp(factor)
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


@pytest.fixture(params=["set_float32_matmul_precision", "allow_tf32", "fp32_precision"])
def tf32(request):
    """TF32 is allowed, by each switch that torch has."""
    matmul = torch.backends.cuda.matmul
    before = getattr(matmul, "fp32_precision", None)
    if request.param == "set_float32_matmul_precision":
        torch.set_float32_matmul_precision("high")
    elif request.param == "allow_tf32" or before is not None:
        setattr(matmul, request.param, True if request.param == "allow_tf32" else "tf32")
    else:
        pytest.skip("torch 2.8 has no such switch")
    yield
    if request.param == "fp32_precision":
        matmul.fp32_precision = before
    else:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("mode", MODES)
def test_tf32_rounds_nothing(mode, tf32):
    features, target, head = make(4, 6, 90, dtype=torch.float32)
    centres = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))

    def everything(dtype):
        nearest = NearestClassCenter(centres, head)
        nearest.update(features.to(dtype), target)
        return measure(features.to(dtype), target, head, **MODES[mode]) | nearest.compute()

    exact = everything(torch.float64)
    with TensorCores():
        assert not torch.equal(features @ features.T, (features.double() @ features.double().T).float())
        torch.testing.assert_close(everything(torch.float32), exact, rtol=1e-6, atol=1e-6)


def test_absent_classes_are_left_out_and_named_once():
    features, target, head = make(6, 8, 80)
    keep = (target != 2) & (target != 5)
    for options in MODES.values():
        metric = NeuralCollapse(6, 8, head, **options)
        for _ in metric.passes():
            metric.update(features[keep], target[keep])
        with pytest.warns(UserWarning, match=r"2 of 6 classes have no samples \(2, 5\)"):
            found = metric.compute()
        assert_agrees(found, expect(features[keep], target[keep], head))
        metric.compute()  # warnings are errors: a second one would fail here
        assert metric.class_means().isnan().any(1).tolist() == [False, False, True, False, False, True]


def test_one_class_alone_is_undefined_but_not_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = NeuralCollapse(3, 4, nn.Linear(4, 3))
        metric.update(torch.randn(5, 4), torch.ones(5, dtype=torch.long))
        values = metric.compute()
    assert all(values[name].isnan() for name in ("nc1", "cdnv", "nc2_equinorm", "inter_cosine", "etf_distance"))
    assert values["ncc_accuracy"] == 1 and values["trace_ratio"] == torch.inf


def test_etf_distance_is_the_frames_module_s():
    features, target, head = make(5, 8, 60)
    metric = NeuralCollapse(5, 8, head)
    metric.update(features, target)
    assert float(metric.compute()["etf_distance"]) == pytest.approx(
        float(etf_distance(metric.class_means())), abs=1e-12
    )


def test_large_tables_are_tiled(monkeypatch):
    features, target, head = make(12, 6, 90)
    expected = measure(features, target, head)
    monkeypatch.setattr("ncreg.metrics._geometry._EDGE", 5)
    monkeypatch.setattr("ncreg.metrics._second_pass._LARGEST_TABLE", 10)
    assert_agrees(measure(features, target, head), expected, 1e-13)


def test_a_device_without_float64_keeps_its_sums_on_the_cpu(monkeypatch):
    """A stand-in: `meta` plays the device, which holds no data and so must never be computed on."""
    cpu = torch.device("cpu")
    monkeypatch.setattr("ncreg.metrics._base.float64_device", lambda device: cpu if device.type == "meta" else device)
    features, target, head = make(3, 5, 60, dtype=torch.float32)
    for options in MODES.values():
        metric = NeuralCollapse(3, 5, head, **options).to("meta")
        assert metric.device.type == "meta"
        assert metric.home == cpu
        for _ in metric.passes():
            metric.update(features, target)
        assert_agrees(metric.compute(), expect(features, target, head), 1e-5)
    assert base.Float64Metric.is_differentiable is False


@pytest.mark.parametrize("mode", MODES)
def test_compute_on_cpu_keeps_everything_there(mode):
    """Device meta stands for the accelerator to which a Lightning module, say, takes its metrics: it has no values."""
    features, target, head = make(3, 5, 60)
    metric = NeuralCollapse(3, 5, head, compute_on_cpu=True, **MODES[mode]).to("meta")
    assert metric.device.type == "meta"
    for _ in metric.passes():
        for rows, labels in zip(features.split(20), target.split(20), strict=True):
            metric.update(rows, labels)
    assert_agrees(metric.compute(), expect(features, target, head))
    metric.to("meta")
    assert_agrees(metric.compute(), expect(features, target, head))
    metric.reset()
    metric(features, target)
    assert_agrees({"nc2_equinorm": metric.compute()["nc2_equinorm"]}, expect(features, target, head))


def test_dtype_casts_do_not_touch_the_sums():
    features, target, head = make(3, 5, 60)
    metric = NeuralCollapse(3, 5, head, cache=False).half().set_dtype(torch.float16)
    metric.update(features, target)
    metric = metric.float().set_dtype(torch.float32)
    assert_agrees(metric.compute(), {k: v for k, v in expect(features, target, head).items()})


@pytest.mark.parametrize("mode", ["streamed", "streamed, no scatter"])
def test_the_second_pass_must_see_the_samples_of_the_first(mode):
    features, target, head = make(3, 5, 60)

    def run(second, labels):
        metric = NeuralCollapse(3, 5, head, **MODES[mode])
        for number in metric.passes():
            metric.update(features if number == 1 else second, target if number == 1 else labels)
        return metric.compute()

    run(features.flip(0), target.flip(0))
    with pytest.raises(ValueError, match="saw 59 samples and the first 60"):
        run(features[1:], target[1:])
    with pytest.raises(ValueError, match="in eval mode"):
        run(features + 0.1 * torch.randn_like(features), target)


# NearestClassCenter


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_nearest_class_centre_on_other_features(spread, dtype):
    features, target, head = make(5, 8, 120, spread=spread, offset=10.0, balanced=False, dtype=dtype)
    train = NeuralCollapse(5, 8, head)
    train.update(features[:60], target[:60])
    means = train.class_means()
    metric = NearestClassCenter(means, head, per_class=True)
    for rows, labels in zip(features[60:].split(7), target[60:].split(7), strict=True):
        metric.update(rows, labels)
    found = metric.compute()
    test, labels = features[60:].double().numpy(), target[60:].numpy()
    nearest = np.linalg.norm(test[:, None] - means.numpy(), axis=2).argmin(1)
    chosen = (test @ head.weight.detach().numpy().T + head.bias.detach().numpy()).argmax(1)
    assert float(found["nc4"]) == pytest.approx(np.mean(nearest != chosen), abs=1e-12)
    assert float(found["ncc_accuracy"]) == pytest.approx(np.mean(nearest == labels), abs=1e-12)
    assert float(found["classifier_accuracy"]) == pytest.approx(np.mean(chosen == labels), abs=1e-12)
    for c in range(5):
        mine = labels == c
        for name, hit in (
            ("nc4", nearest != chosen),
            ("ncc_accuracy", nearest == labels),
            ("classifier_accuracy", chosen == labels),
        ):
            value = float(found[f"{name}_per_class"][c])
            assert np.isnan(value) if not mine.any() else value == pytest.approx(hit[mine].mean(), abs=1e-12)


def test_nc4_counts_the_bias():
    """Without the bias both rules agree; a bias of one class moves every decision of the classifier."""
    means = torch.eye(3, dtype=torch.float64)
    head = nn.Linear(3, 3).double()
    with torch.no_grad():
        head.weight.copy_(means)
        head.bias.zero_()
    metric = NearestClassCenter(means, head)
    metric.update(means, torch.arange(3))
    assert metric.compute()["nc4"] == 0
    with torch.no_grad():
        head.bias[1] = 2
    metric.reset()
    metric.update(means, torch.arange(3))
    values = metric.compute()
    assert float(values["nc4"]) == pytest.approx(2 / 3)
    assert values["ncc_accuracy"] == 1


def test_a_class_without_centre_is_never_the_nearest():
    means = torch.tensor([[1.0, 0.0], [torch.nan, torch.nan], [-1.0, 0.0]])
    metric = NearestClassCenter(means)
    metric.update(torch.tensor([[0.9, 0.1], [-0.1, 0.0], [-3.0, 0.0]]), torch.tensor([0, 1, 2]))
    assert set(metric.compute()) == {"ncc_accuracy"}
    assert float(metric.compute()["ncc_accuracy"]) == pytest.approx(2 / 3)


def test_nearest_class_centre_keeps_the_laws():
    features, target, head = make(4, 6, 60)
    means = NeuralCollapse(4, 6)
    means.update(features, target)
    metric = NearestClassCenter(means.class_means(), head)
    first = NearestClassCenter(means.class_means(), head)
    metric(features[:20], target[:20])
    first.update(features[20:], target[20:])
    metric.merge_state(first)
    whole = measure(features, target, head)
    for one in (metric, metric.clone(), pickle.loads(pickle.dumps(metric))):
        assert_agrees(one.compute(), {key: whole[key] for key in ("nc4", "ncc_accuracy", "classifier_accuracy")}, 1e-14)
    metric.reset()
    with pytest.raises(ValueError, match="no samples seen"):
        metric.compute()


# labels of narrow integers


@pytest.mark.parametrize(("dtype", "classes"), [(torch.uint8, 256), (torch.uint8, 300), (torch.int8, 200)])
def test_labels_of_narrow_integers_go_with_more_classes_than_they_hold(dtype, classes):
    """256 is 0 in uint8, 300 is 44, and 200 is −56 in int8."""
    generator = torch.Generator().manual_seed(0)
    features, target = torch.randn(150, 4, generator=generator), torch.randint(0, 120, (150,), generator=generator)
    found, centres = [], torch.randn(classes, 4, generator=generator)
    for labels in (target, target.to(dtype)):
        metric, nearest = NeuralCollapse(classes, 4), NearestClassCenter(centres)
        metric.update(features, labels)
        nearest.update(features, labels)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*classes have no samples")
            found.append({**metric.compute(), "nearest": nearest.compute()})
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=0, atol=0, equal_nan=True)


# bad input


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("cls", ["collapse", "collapse streamed", "centre"])
@pytest.mark.parametrize(
    ("features", "target", "error", "message"),
    [
        (torch.full((4, 3), torch.nan), torch.zeros(4).long(), ValueError, "NaN or infinite values in 4 of 4 rows"),
        (torch.tensor([[1.0, torch.inf, 0]]), torch.zeros(1).long(), ValueError, "the first is row 0"),
        (torch.randn(4, 3), torch.full((4,), 2), ValueError, r"target must lie in 0\.\.1 .* from 2 to 2"),
        (torch.randn(4, 3), torch.full((4,), -1), ValueError, "from -1 to -1"),
        (torch.randn(4, 3), torch.zeros(4), TypeError, "integer class labels, got torch.float32"),
        (torch.randn(4, 3), torch.zeros(4, dtype=torch.bool), TypeError, "integer class labels, got torch.bool"),
        (torch.randn(4, 3), torch.zeros(4, 1).long(), ValueError, r"target must have shape \(4,\)"),
        (torch.randn(4, 3), torch.zeros(5).long(), ValueError, r"target must have shape \(4,\)"),
        (torch.randn(4, 5), torch.zeros(4).long(), ValueError, "num_features=3"),
        (torch.randn(4, 3, 2, 2), torch.zeros(4).long(), ValueError, "pool them first"),
        (torch.randn(3), torch.zeros(3).long(), ValueError, r"shape \(batch, 3\)"),
        (torch.ones(4, 3).long(), torch.zeros(4).long(), TypeError, "features must be floating point"),
        ([[1.0, 2, 3]], torch.zeros(1).long(), TypeError, "features must be a torch.Tensor, got list"),
        (torch.randn(1, 3), [0], TypeError, "target must be a torch.Tensor, got list"),
    ],
)
def test_bad_batches(cls, features, target, error, message):
    metric = {
        "collapse": lambda: NeuralCollapse(2, 3),
        "collapse streamed": lambda: NeuralCollapse(2, 3, cache=False),
        "centre": lambda: NearestClassCenter(torch.eye(2, 3)),
    }[cls]()
    good = torch.tensor([[1.0, 0, 0], [0, 1, 0.1], [1, 0.1, 0], [0, 0.9, 0]]), torch.tensor([0, 1, 0, 1])
    metric.update(*good)
    expected = metric.compute()
    with pytest.raises(error, match=message):
        metric.update(features, target)
    assert_agrees(metric.compute(), expected, 1e-15)  # a refused batch leaves no trace


@pytest.mark.usefixtures("unchecked")
def test_bad_settings():
    with pytest.raises(ValueError, match="num_classes=1 must be at least 2"):
        NeuralCollapse(1, 3)
    with pytest.raises(ValueError, match="num_features=0"):
        NeuralCollapse(2, 0)
    with pytest.raises(ValueError, match="center='mean' must be"):
        NeuralCollapse(2, 3, center="mean")
    with pytest.raises(ValueError, match="convention='ours' must be"):
        NeuralCollapse(2, 3, convention="ours")
    with pytest.raises(TypeError, match="classifier must have a tensor .weight"):
        NeuralCollapse(2, 3, nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(ValueError, match=r"classifier.weight must have shape \(2, 3\), got \(3, 2\)"):
        NeuralCollapse(2, 3, nn.Linear(2, 3))
    with pytest.raises(ValueError, match="means must be floating point"):
        NearestClassCenter(torch.zeros(3))
    with pytest.raises(ValueError, match="means hold NaN"):
        NearestClassCenter(torch.tensor([[torch.nan, 0.0], [1.0, 1.0]]))
    with pytest.raises(ValueError, match="Unexpected keyword"):
        NeuralCollapse(2, 3, chace=True)


@pytest.mark.parametrize("options", MODES.values())
def test_compute_before_update(options):
    with pytest.raises(ValueError, match=r"no samples seen: call update\(features, target\)"):
        NeuralCollapse(2, 3, **options).compute()


def test_mismatched_merges():
    with pytest.raises(ValueError, match="num_features is 3 here and 4 there"):
        NeuralCollapse(2, 3).merge_state(NeuralCollapse(2, 4))
    with pytest.raises(ValueError, match="cache is True here and False there"):
        NeuralCollapse(2, 3).merge_state(NeuralCollapse(2, 3, cache=False))
    features, target, _ = make(2, 3, 20)
    first = NeuralCollapse(2, 3, cache=False)
    passes = first.passes()
    next(passes)
    first.update(features, target)
    next(passes)
    with pytest.raises(ValueError, match="both metrics must be in the first pass"):
        first.merge_state(NeuralCollapse(2, 3, cache=False))


def test_class_means_that_nearly_coincide_keep_the_digits_of_their_distance():
    generator = torch.Generator().manual_seed(3)
    target = torch.arange(40) % 4
    means = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    means[1] = means[0] + 1e-7 * means[1]
    features = means[target] + 1e-6 * torch.randn(40, 6, generator=generator, dtype=torch.float64)
    head = nn.Linear(6, 4, dtype=torch.float64)
    found, expected = measure(features, target, head), expect(features, target, head)
    assert float(found["cdnv"]) == pytest.approx(float(expected["cdnv"]), rel=1e-6) and expected["cdnv"] > 0.1


def test_means_of_many_classes_that_barely_fill_a_direction_are_decomposed_as_those_of_few(monkeypatch):
    features, target, head = make(12, 16, 120, spread=1e-3)
    squeezed = torch.linspace(0, -7, 16, dtype=torch.float64)
    features = features @ torch.diag(10**squeezed)
    expected = measure(features, target, head)
    monkeypatch.setattr("ncreg.metrics._geometry._SMALL", 4)
    assert_agrees(measure(features, target, head), expected, 1e-7)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1e6, 1e8, 1e10])
def test_nc1_far_from_zero_is_that_of_the_same_features_at_zero(offset, cache):
    """Means have P − 1 directions at most; what float64 cannot tell from rounding at this distance is none of them."""
    draw = torch.Generator().manual_seed(3)
    labels = torch.arange(1000) % 5
    spread = torch.randn(5, 8, generator=draw, dtype=torch.float64)[labels]
    far = offset + 1e-2 * (spread + torch.randn(1000, 8, generator=draw, dtype=torch.float64))
    near = far.numpy().astype("longdouble") - offset  # exact
    means = np.stack([near[labels == k].mean(0) for k in range(5)])
    within = sum((near[labels == k] - means[k]).T @ (near[labels == k] - means[k]) for k in range(5)) / 1000
    centred = means - means.mean(0)
    values, vectors = np.linalg.eigh((centred.T @ centred / 5).astype("float64"))
    top = vectors[:, -4:]
    exact = float(np.trace(top.T @ within.astype("float64") @ top / values[-4:])) / 5
    metric = NeuralCollapse(5, 8, cache=cache)
    for _ in metric.passes():
        for rows in torch.arange(1000).split(100):
            metric.update(far[rows], labels[rows])
    found = metric.compute()
    assert found["nc1_rank"] == 4
    assert float(found["nc1"]) == pytest.approx(exact, rel=max(1e-9, 1e-14 * offset / 1e-2))


def test_a_coordinate_that_is_large_and_constant_hides_no_other():
    draw = torch.Generator().manual_seed(5)
    labels = torch.arange(600) % 4
    rows = torch.randn(4, 6, generator=draw, dtype=torch.float64)[labels]
    rows = rows + torch.randn(600, 6, generator=draw, dtype=torch.float64)
    found = []
    for constant in (0.0, 0.1 * 2**60):
        metric = NeuralCollapse(4, 7)
        metric.update(torch.cat([rows, torch.full((600, 1), constant, dtype=torch.float64)], 1), labels)
        found.append(metric.compute())
    assert found[1]["nc1_rank"] == 3
    for name in ("nc1", "nc2_equinorm", "nc2_equiangularity"):  # variance within classes has that coordinate's rounding
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-9, atol=0)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("classes", [7, 300])
def test_features_that_are_all_alike_have_no_between_class_direction(classes, cache):
    """A dead network: the means differ by rounding alone, and NC1 is neither 0 nor a large number but NaN."""
    row = torch.rand(320, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(1003) % classes
    metric = NeuralCollapse(classes, 320, cache=cache)
    for _ in metric.passes():
        for rows in torch.arange(1003).split(100):
            metric.update(row.expand(len(rows), 320), labels[rows])
    found = metric.compute()
    assert found["nc1_rank"] == 0 and found["nc1"].isnan() and found["nc2_equinorm"].isnan()
