"""What the metrics refuse, and settings and scales at which they once gave plausible nonsense."""

import math

import pytest
import torch
from torch import nn

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
