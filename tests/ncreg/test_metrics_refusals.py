"""What the metrics refuse, and settings and scales at which they once gave plausible nonsense."""

import math

import pytest
import torch
from torch import nn
from torchmetrics.wrappers import Running

from ncreg.frames import simplex_etf
from ncreg.metrics import LayerwiseCollapse, NearestClassCenter, NeuralCollapse

TARGET = torch.arange(60) % 4


def sample(scale=1.0):
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    return scale * (means[TARGET] + 0.1 * torch.randn(60, 6, generator=generator, dtype=torch.float64)), means


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("cache", [True, False])
def test_a_diverged_classifier_is_refused(part, value, cache):
    features, means = sample()
    head = nn.Linear(6, 4, dtype=torch.float64)
    metric, nearest = NeuralCollapse(4, 6, head, cache=cache), NearestClassCenter(means, head)
    metric.update(features, TARGET)
    with torch.no_grad():
        getattr(head, part)[1] = value
    with pytest.raises(ValueError, match=rf"classifier\.{part} holds NaN"):
        metric.compute()
    with pytest.raises(ValueError, match=rf"classifier\.{part} holds NaN"):
        nearest.update(features, TARGET)


@pytest.mark.parametrize("kind", ["cached", "streamed", "nearest"])
def test_a_batch_that_forward_refuses_costs_no_other_batch(kind):
    features, means = sample()

    def metric():  # as on several ranks, so that a compute() afterwards must still sum over them
        settings = {"dist_sync_fn": lambda tensor, group: [tensor, tensor], "distributed_available_fn": lambda: True}
        if kind == "nearest":
            return NearestClassCenter(means, **settings)
        return NeuralCollapse(4, 6, cache=kind == "cached", **settings)

    failed, plain = metric(), metric()
    for rows, target in ((features[:30], TARGET[:30]), (features[30:], TARGET[30:])):
        for each in (failed, plain):
            each(rows, target)
        with pytest.raises(ValueError, match="NaN"):
            failed(rows * math.nan, target)
        with pytest.raises(ValueError, match="no samples seen"):
            failed(rows[:0], target[:0])
    assert failed.update_count == plain.update_count == 2
    wanted = plain.compute()
    assert failed.compute() == wanted and len(wanted) > 0


@pytest.mark.parametrize("cache", [True, False])
def test_a_compute_that_fails_over_ranks_leaves_the_ranks_own_samples(cache):
    features, _ = sample()
    head = nn.Linear(6, 4, dtype=torch.float64)
    settings = {"dist_sync_fn": lambda tensor, group: [tensor, tensor], "distributed_available_fn": lambda: True}
    metric = NeuralCollapse(4, 6, head, cache=cache, **settings)
    metric.update(features[:30], TARGET[:30])
    right = head.bias.detach().clone()
    torch.nn.init.constant_(head.bias, math.nan)
    with pytest.raises(ValueError, match="bias holds NaN"):
        metric.compute()
    head.bias.data.copy_(right)
    metric.update(features[30:], TARGET[30:])
    again = NeuralCollapse(4, 6, head, cache=cache)
    again.update(features.repeat(2, 1), TARGET.repeat(2))  # both ranks' samples
    wanted = again.compute()
    for name, value in metric.compute().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-9, equal_nan=True, msg=name)


@pytest.mark.parametrize("cache", [True, False])
def test_torchmetrics_running_window_holds_its_batches(cache):
    features, _ = sample()
    running = Running(NeuralCollapse(4, 6, cache=cache), window=2)
    for rows, target in zip(features.split(20), TARGET.split(20), strict=True):
        running(rows, target)
    last = NeuralCollapse(4, 6, cache=cache)
    last.update(features[20:], TARGET[20:])
    wanted = last.compute()
    for name, value in running.compute().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-9, equal_nan=True, msg=name)


def test_set_dtype_leaves_cached_labels_and_counts_integers():
    features, means = sample()
    metric, nearest = NeuralCollapse(4, 6), NearestClassCenter(means)
    for each in (metric, nearest):
        each.update(features, TARGET)
    before = metric.compute(), nearest.compute()
    for each in (metric, nearest):
        each.set_dtype(torch.float32)
    assert (metric.target[0].dtype, nearest.counts.dtype) == (torch.int64, torch.int64)
    assert (metric.compute(), nearest.compute()) == before


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "sizes, name", [((4.5, 6), "num_classes=4.5"), ((3.0, 5), "num_classes=3.0"), ((4, 5.5), "num_features=5.5")]
)
def test_sizes_are_integers(sizes, name):
    with pytest.raises(TypeError, match=name):
        NeuralCollapse(*sizes)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["cache", "scatter"])
def test_switches_are_booleans(name):
    with pytest.raises(TypeError, match=f"{name}='no'"):
        NeuralCollapse(4, 6, **{name: "no"})


@pytest.mark.parametrize(
    "name, other",
    [("num_classes", 5), ("num_features", 7), ("cache", False), ("scatter", False), ("center", "features")],
)
def test_metrics_of_other_settings_do_not_merge(name, other):
    settings = {"num_classes": 4, "num_features": 6}
    with pytest.raises(ValueError, match=f"cannot merge: {name} "):
        NeuralCollapse(**settings).merge_state(NeuralCollapse(**settings | {name: other}))


def test_states_of_other_settings_do_not_merge():
    with pytest.raises(ValueError, match="cache"):
        NeuralCollapse(4, 6).merge_state(NeuralCollapse(4, 6, cache=False).metric_state)
    with pytest.raises(ValueError, match="scatter differ"):
        NeuralCollapse(4, 6, cache=False).merge_state(NeuralCollapse(4, 6, cache=False, scatter=False).metric_state)


@pytest.mark.parametrize("as_state", [True, False])
def test_nearest_centres_of_other_means_do_not_merge(as_state):
    features, means = sample()
    metric, same = NearestClassCenter(means), NearestClassCenter(means)
    for each in (metric, same):
        each.update(features, TARGET)
    metric.merge_state(same.metric_state if as_state else same)
    assert metric.counts[:, 0].tolist() == [30] * 4
    for others in (means + 1, means[:3]):
        other = NearestClassCenter(others)
        other.update(features[TARGET < 3], TARGET[TARGET < 3])
        with pytest.raises(ValueError, match="cannot merge: means"):
            metric.merge_state(other.metric_state if as_state else other)


@pytest.mark.parametrize("classes, dim", [(10, 9), (10, 16), (3, 2), (2, 5)])
def test_distance_to_the_simplex_is_never_negative(classes, dim):
    metric = NeuralCollapse(classes, dim)
    for seed in range(5):
        metric.reset()
        turn = torch.linalg.qr(
            torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        )[0]
        metric.update(simplex_etf(classes, dim, dtype=torch.float64) @ turn, torch.arange(classes))
        assert 0 <= metric.compute()["etf_distance"] < 1e-28


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_lengths_whose_squares_leave_float64_are_refused(scale, cache):
    features, means = sample(scale)
    metric = NeuralCollapse(4, 6, cache=cache)
    with pytest.raises(ValueError, match="features .*rescale"):
        for _ in metric.passes():
            metric.update(features, TARGET)
        metric.compute()
    with pytest.raises(ValueError, match="features .*rescale"):
        NearestClassCenter(means * scale).update(features, TARGET)


@pytest.mark.parametrize("scale", [1e60, 1e-60])
def test_measures_do_not_depend_on_the_unit_of_length(scale):
    values = []
    for factor in (1.0, scale):
        metric = NeuralCollapse(4, 6)
        metric.update(sample(factor)[0], TARGET)
        values.append(metric.compute())
    for name, value in values[0].items():
        torch.testing.assert_close(values[1][name], value, rtol=1e-8, atol=1e-12, msg=name)


@pytest.mark.usefixtures("unchecked")
def test_lists_are_refused_by_name():
    with pytest.raises(TypeError, match="means must be a torch.Tensor"):
        NearestClassCenter([[1.0], [2.0]])
    with pytest.raises(TypeError, match="model must be"):
        LayerwiseCollapse([nn.Linear(2, 2)], ["0"], num_classes=2)
    model = nn.Sequential(nn.Linear(3, 2))
    with LayerwiseCollapse(model, ["0"], num_classes=2) as depth:
        model(torch.randn(2, 3))
        with pytest.raises(TypeError, match="target must be a torch.Tensor"):
            depth.update([0, 1])


class Head:
    """A classifier of no library."""

    def __init__(self, weight, bias):
        self.weight, self.bias = weight, bias


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("bias", [0.5, True, [0.0] * 4])
def test_a_bias_that_is_no_tensor_is_refused(bias):
    features, means = sample()
    for make in (lambda head: NeuralCollapse(4, 6, head), lambda head: NearestClassCenter(means, head)):
        with pytest.raises(TypeError, match=f"classifier.bias must be a torch.Tensor, got {type(bias).__name__}"):
            make(Head(means, bias))
        metric = make(Head(means, None))
        metric.update(features, TARGET)
        assert metric.compute()["classifier_accuracy"] > 0.5


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: NeuralCollapse(4, 6).update(torch.ones(60, 6, device="meta"), TARGET), "features"),
        (lambda: NeuralCollapse(4, 6, cache=False).update(torch.ones(60, 6), TARGET.to("meta")), "target"),
        (lambda: NeuralCollapse(4, 6, nn.Linear(6, 4, device="meta")), "classifier.weight"),
        (lambda: NearestClassCenter(torch.ones(4, 6, device="meta")), "means"),
    ],
)
def test_tensors_without_values_are_refused_by_name(call, name):
    with pytest.raises(ValueError, match=f"{name} has no values, being on device meta"):
        call()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "settings, words",
    [
        ({"num_classes": "4"}, "num_classes='4' must be an integer"),
        ({"num_classes": True}, "num_classes=True must be an integer"),
        ({"layers": 5}, "layers=5 must be a sequence of names"),
        ({"layers": [5]}, r"layers=\[5\] must be a sequence of names"),
        ({"pool": "avg"}, "pool='avg' must be a function"),
    ],
)
def test_layerwise_settings_are_refused_by_name(settings, words):
    with pytest.raises(TypeError, match=words):
        LayerwiseCollapse(nn.Sequential(nn.Linear(3, 2)), **({"layers": ["0"], "num_classes": 2} | settings))


@pytest.mark.usefixtures("unchecked")
def test_per_class_is_a_boolean_and_center_a_word():
    with pytest.raises(TypeError, match="per_class='False' must be True or False"):
        NearestClassCenter(sample()[1], per_class="False")
    with pytest.raises(ValueError, match=r"center=\['features'\] must be one of"):
        NeuralCollapse(4, 6, center=["features"])


def fed(classes, dim, **settings):
    metric = NeuralCollapse(classes, dim, **settings)
    metric.update(torch.randn(60, dim, generator=torch.Generator().manual_seed(1)), torch.arange(60) % classes)
    metric.persistent(True)
    return metric


@pytest.mark.parametrize("doing", ["merge", "load"])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("classes, dim, name", [(4, 5, "num_features"), (5, 6, "num_classes")])
def test_states_of_other_sizes_are_refused_at_the_door(doing, cache, classes, dim, name):
    here, there = fed(4, 6, cache=cache), fed(classes, dim, cache=cache)
    before = here.compute()
    with pytest.raises(ValueError, match=f"cannot {doing}: .*{name}"):
        here.merge_state(there.metric_state) if doing == "merge" else here.load_state_dict(there.state_dict())
    assert here.compute() == before


def test_a_state_of_another_pass_does_not_merge():
    first, second = fed(4, 6, cache=False), NeuralCollapse(4, 6, cache=False)
    for _ in second.passes():
        second.update(sample()[0].float(), TARGET)
    with pytest.raises(ValueError, match="cannot merge: both metrics must be in the first pass"):
        first.merge_state(second.metric_state)


def test_what_is_loaded_between_the_passes_is_what_is_measured():
    """Also by a metric that stood in a second pass of its own, around other means."""
    features = sample()[0]
    one, other = NeuralCollapse(4, 6, cache=False), NeuralCollapse(4, 6, cache=False)
    for metric, rows in ((one, features), (other, features + 3 * TARGET[:, None])):
        passes = metric.passes()
        for _ in range(2):
            next(passes)
            metric.update(rows[:30], TARGET[:30])
            if not metric.reference:
                metric.update(rows[30:], TARGET[30:])
        metric.persistent(True)
    other.load_state_dict(one.state_dict())
    for metric in (one, other):
        metric.update(features[30:], TARGET[30:])
    assert other.compute() == one.compute()


def test_nearest_centres_of_other_sizes_do_not_load():
    features, means = sample()
    metric, same, other = NearestClassCenter(means), NearestClassCenter(means + 1), NearestClassCenter(means[:3])
    for each in (metric, same, other):
        each.persistent(True)
    same.update(features, TARGET)
    metric.update(features, TARGET)
    with pytest.raises(ValueError, match=r"cannot load: num_classes or num_features .*means is \(3, 6\) here"):
        other.load_state_dict(metric.state_dict())
    same.load_state_dict(metric.state_dict())
    for each in (metric, same):
        each.update(features + 0.5, TARGET)
    assert same.compute() == metric.compute()


def test_cosines_within_classes_as_the_documentation_puts_them():
    """Opposite directions of two samples cancel out; a class of one sample has 1, or 0 where it is the centre."""
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    metric = NeuralCollapse(3, 2)
    metric.update(features, torch.tensor([0, 0, 1, 1, 2]))
    assert metric.compute()["intra_cosine_max"] == 0
    metric = NeuralCollapse(3, 2)
    metric.update(torch.eye(3, 2, dtype=torch.float64), torch.arange(3))
    assert metric.compute()["intra_cosine_min"] == pytest.approx(1, abs=1e-15)


def test_cdnv_of_means_that_coincide():
    features = torch.tensor([[1.0], [-1.0], [2.0], [-2.0]])
    target = torch.tensor([0, 0, 1, 1])
    for scale, expected in ((1.0, math.inf), (0.0, math.nan)):
        metric = NeuralCollapse(2, 1)
        metric.update(scale * features, target)
        torch.testing.assert_close(
            metric.compute()["cdnv"], torch.tensor(expected, dtype=torch.float64), equal_nan=True
        )
