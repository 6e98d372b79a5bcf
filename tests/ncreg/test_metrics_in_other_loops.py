"""Metrics in loops of others: loaded twice, merged, tracked, copied with their model, in a collection of two passes."""

import copy
import pickle

import pytest
import torch
from test_metrics import MODES, assert_agrees, expect, make, measure
from torch import nn
from torch.nn.utils import prune
from torchmetrics import MetricCollection, MetricTracker

from ncreg.losses import ChunkedCrossEntropyLoss
from ncreg.metrics import NearestClassCenter, NeuralCollapse
from tests.stand_ins import Adapted, quantize


def states(metric):
    metric.persistent(True)
    return metric.state_dict()


@pytest.mark.parametrize("mode", MODES)
def test_two_metrics_that_load_one_state_go_on_apart(mode):
    """Streamed sums grow in place: the second metric, and the state itself, would have grown with the first."""
    features, target, head = make(3, 5, 90)
    first = NeuralCollapse(3, 5, head, **MODES[mode])
    first.update(features[:30], target[:30])
    state = states(first)
    loaded = [NeuralCollapse(3, 5, head, **MODES[mode]) for _ in range(3)]
    for metric in loaded:
        metric.persistent(True)
        metric.load_state_dict(state)
    for metric, end in zip(loaded[:2], (60, 90), strict=True):
        metric.update(features[30:end], target[30:end])
    for metric, end in zip(loaded, (60, 90, 30), strict=True):
        assert_agrees(metric.compute(), expect(features[:end], target[:end], head))


def test_a_state_that_was_cast_on_its_way_grows_in_float64_again():
    """In float32 sums would be off by 1e-7 and more."""
    features, target, head = make(3, 5, 300, spread=1e-3)
    metric = NeuralCollapse(3, 5, head, cache=False)
    metric.persistent(True)
    cast = {name: value.float() for name, value in metric.state_dict().items() if torch.is_tensor(value)}
    metric.load_state_dict(cast)
    for rows, labels in zip(features.split(6), target.split(6), strict=True):
        metric.update(rows, labels)
    assert_agrees(metric.compute(), expect(features, target, head))


def test_states_of_earlier_versions_load_and_others_are_named():
    features, target, head = make(3, 5, 60)
    metric = NeuralCollapse(3, 5, head, cache=False)
    metric.update(features, target)
    state = states(metric)
    state.pop("mark", None)
    loaded = NeuralCollapse(3, 5, head, cache=False)
    loaded.persistent(True)
    loaded.load_state_dict(state)
    assert_agrees(loaded.compute(), expect(features, target, head))
    earlier = {name: value for name, value in metric.metric_state.items() if name != "mark"}
    loaded.merge_state(earlier)
    twice = expect(torch.cat([features, features]), torch.cat([target, target]), head)
    assert_agrees(loaded.compute(), twice)
    with pytest.raises(ValueError, match="cannot load: margins must hold tensors"):
        loaded.load_state_dict(state | {"margins": [3]})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("as_dict", [True, False])
def test_a_kept_result_does_not_outlive_a_merge(mode, as_dict):
    features, target, head = make(3, 5, 90)
    shards = [NeuralCollapse(3, 5, head, compute_with_cache=True, **MODES[mode]) for _ in range(2)]
    for metric, part in zip(shards, (slice(40), slice(40, None)), strict=True):
        metric.update(features[part], target[part])
        assert_agrees(metric.compute(), expect(features[part], target[part], head))
    shards[0].merge_state(shards[1].metric_state if as_dict else shards[1])
    assert_agrees(shards[0].compute(), expect(features, target, head))


@pytest.mark.parametrize("first", ["measure", "head"])
def test_a_copied_model_measures_its_own_classifier_wherever_the_metric_stands_in_it(first):
    """A metric before the head was copied before it, and went on to read the original's weights."""
    features, target, head = make(3, 5, 60)
    parts = {"head": head, "measure": NeuralCollapse(3, 5, head)}
    model = nn.ModuleDict({first: parts.pop(first), **parts})
    copies = [copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model))]
    with torch.no_grad():
        head.weight.neg_()[0] += 3
    for copied in copies:
        copied["measure"].update(features, target)
        assert_agrees(copied["measure"].compute(), expect(features, target, copied["head"]))
        assert not torch.equal(copied["head"].weight, head.weight)
    apart = model["measure"].clone()  # by itself it keeps to the classifier that it was made with
    apart.update(features, target)
    assert_agrees(apart.compute(), expect(features, target, head))


def test_metrics_of_a_collection_keep_their_own_second_pass():
    """Their first passes agree: torchmetrics would take them for one, with the first one's margins for all."""
    features, target, head = make(3, 5, 90)
    _, _, other = make(3, 5, 90, seed=1)
    settings = {"raw": (head, {}), "averaged": (other, {}), "paper": (head, {"center": "features"}), "same": (head, {})}
    found = MetricCollection(
        {name: NeuralCollapse(3, 5, layer, cache=False, **more) for name, (layer, more) in settings.items()}
    )
    for _ in zip(*(metric.passes() for metric in found.values(copy_state=False)), strict=True):
        for rows, labels in zip(features.split(20), target.split(20), strict=True):
            found.update(rows, labels)
    values = found.compute()
    for name, (layer, more) in settings.items():
        own = {key.removeprefix(f"{name}_"): value for key, value in values.items() if key.startswith(f"{name}_")}
        alone = measure(features, target, layer, cache=False, **more)
        assert own.keys() == alone.keys()
        assert_agrees(own, alone, 1e-12)
    assert ["raw", "same"] in [sorted(group) for group in found.compute_groups.values()]


def test_a_tracker_is_told_that_its_earlier_steps_meet_the_weights_of_now():
    features, target, head = make(3, 5, 60)
    for kept in (False, True):
        tracker = MetricTracker(NeuralCollapse(3, 5, head, compute_with_cache=kept), maximize=False)
        seen = []
        for _ in range(3):
            tracker.increment()
            tracker.update(features, target)
            seen.append(float(tracker.compute()["nc3"]))
            with torch.no_grad():
                head.weight.neg_()[0] += 1
        if kept:
            assert tracker.compute_all()["nc3"].tolist() == seen
        else:
            with pytest.warns(UserWarning, match="compute_with_cache=True"):
                tracker.compute_all()


def test_nothing_is_told_where_new_samples_came_or_the_classifier_stayed():
    features, target, head = make(3, 5, 60)
    metric = NeuralCollapse(3, 5, head)
    for step in range(3):
        if step == 2:
            metric.reset()
        metric.update(features, target)
        for _ in range(2):
            metric.compute()  # warnings are errors
        metric(features, target)
        with torch.no_grad():
            head.weight.mul_(2)


def test_merged_decisions_are_of_one_classifier():
    features, target, head = make(3, 5, 60)
    _, _, other = make(3, 5, 60, seed=1)
    means = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def shard(layer, part):
        metric = NearestClassCenter(means, layer)
        metric.update(features[part], target[part])
        return metric

    whole = shard(head, slice(None)).compute()
    for mate in (head, copy.deepcopy(head)):  # each process of several has a copy of its own
        merged, second = shard(head, slice(20)), shard(mate, slice(20, None))
        merged.merge_state(second)
        assert merged.compute() == whole
        merged = shard(head, slice(20))
        merged.merge_state({name: second.metric_state[name] for name in ("means", "counts")})  # as earlier versions had
        assert merged.compute() == whole
    with pytest.raises(ValueError, match="different classifiers"):
        shard(head, slice(20)).merge_state(shard(other, slice(20, None)))
    without = shard(None, slice(20, None))
    for incoming in (without, without.metric_state):
        with pytest.raises(ValueError, match="without a classifier|has no classifier"):
            shard(head, slice(20)).merge_state(incoming)
    merged = shard(None, slice(20))
    merged.merge_state(shard(head, slice(20, None)))
    assert merged.compute() == {"ncc_accuracy": whole["ncc_accuracy"]}


def prune_some(layer):
    prune.l1_unstructured(layer, "weight", amount=0.3)


@pytest.mark.parametrize("bind", [prune_some, nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_measuring_leaves_a_computed_weight_as_it_is(bind):
    """The model can be copied after a validation pass, and a loss that reads the weight keeps its gradient."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).double()
    bind(net[1])
    inputs, target = torch.randn(40, 8, dtype=torch.float64), torch.arange(40) % 4
    metric = NeuralCollapse(4, 8, net[1])
    net.eval()
    with torch.no_grad():
        net(inputs)
        metric.update(net[0](inputs), target)
        metric.compute()
        ChunkedCrossEntropyLoss()(net[0](inputs), net[1], target)
    copied = copy.deepcopy(net)
    assert torch.equal(copied(inputs), net(inputs))
    net(inputs)
    held = net[1].weight
    metric.reset()
    metric.update(net[0](inputs).detach(), target)
    metric.compute()
    assert net[1].weight is held and held.requires_grad
    loss = ChunkedCrossEntropyLoss()(net[0](inputs), net[1], target)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(net(inputs), target))


@pytest.mark.parametrize("kind", ["adapted", "quantized"])
def test_a_layer_that_is_more_than_its_weight_is_measured_by_what_it_does(kind):
    """LoRA's `weight` is that without the adapters, and a quantized one cannot be read."""
    features, target, plain = make(3, 5, 90)
    layer = nn.Linear(5, 3).double()
    layer.load_state_dict(plain.state_dict())
    acting = Adapted(layer) if kind == "adapted" else layer
    with torch.no_grad():
        plain.weight.copy_(acting.merged() if kind == "adapted" else quantize(layer))
    metric = NeuralCollapse(3, 5, acting)
    metric.update(features, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert_agrees(metric.compute(), expect(features, target, plain), 1e-9)
    assert all(part.training for part in acting.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda view: pickle.loads(pickle.dumps(view))])
def test_a_view_of_one_measure_is_copied_with_its_samples(copied):
    features, target, head = make(3, 5, 90)
    metric = NeuralCollapse(3, 5)
    view = metric["nc1"]
    view.update(features[:60], target[:60])
    second = copied(view)
    assert "nc1" in repr(second) and second.compute() == metric.compute()["nc1"]
    second.update(features[60:], target[60:])
    assert float(second.compute()) == pytest.approx(float(expect(features, target, head)["nc1"]), rel=1e-9)
    assert float(view.compute()) == pytest.approx(float(expect(features[:60], target[:60], head)["nc1"]), rel=1e-9)
