"""Figures of the metrics, the direction of each measure, and torchmetrics' tracker on one of them."""

import pytest
import timm
import torch
from torch import nn
from torchmetrics import MetricTracker

from ncreg.frames import simplex_etf
from ncreg.metrics import HIGHER_IS_BETTER, LayerwiseCollapse, NearestClassCenter, NeuralCollapse

CLASSES, DIM = 4, 6
TARGET = torch.arange(80) % CLASSES
VERTICES = simplex_etf(CLASSES, DIM)


def collapsing(noise):
    return 3 * VERTICES[TARGET] + noise * torch.randn(80, DIM, generator=torch.Generator().manual_seed(0))


def metric_of(noise):
    """A metric that has seen features and a head which collapse as the noise goes."""
    head = nn.Linear(DIM, CLASSES)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        head.weight.copy_(3 * VERTICES + noise * torch.randn(CLASSES, DIM, generator=generator))
        head.bias.fill_(noise)
    metric = NeuralCollapse(CLASSES, DIM, head)
    metric.update(collapsing(noise), TARGET)
    return metric


def test_collapse_moves_every_measure_as_its_direction_says():
    far, near = metric_of(2.0).compute(), metric_of(0.01).compute()
    assert far.keys() == HIGHER_IS_BETTER.keys()
    with pytest.raises(TypeError):
        HIGHER_IS_BETTER["nc1"] = True  # one table for every user
    for name, higher in HIGHER_IS_BETTER.items():
        if higher is not None:
            assert near[name] >= far[name] if higher else near[name] <= far[name], name
            assert near[name] != far[name] or name == "nc1_rank", name


def test_what_only_the_length_of_the_features_moves_has_no_direction():
    metric, longer = metric_of(1.0), NeuralCollapse(CLASSES, DIM, metric_of(1.0)._classifier.module)
    longer.update(7 * collapsing(1.0), TARGET)
    with torch.no_grad():
        metric._classifier.module.bias.zero_()
        longer._classifier.module.bias.zero_()
    before, after = metric.compute(), longer.compute()
    moved = {name for name in HIGHER_IS_BETTER if not torch.isclose(before[name], after[name])}
    moved.remove("nc3_bias")  # the bias that the features' offset asks for grows with it
    assert moved == {"margin_mean", "margin_min", "margin_q01", "margin_q10", "margin_q50"}
    assert {HIGHER_IS_BETTER[name] for name in moved} == {None}


def test_a_tracker_follows_one_measure():
    for key, best in {"nc1": 2, "intra_cosine": 2, "ncc_accuracy": 2}.items():
        tracker = MetricTracker(NeuralCollapse(CLASSES, DIM)[key], maximize=HIGHER_IS_BETTER[key])
        wanted = []
        for noise in (4.0, 2.0, 0.5, 3.0):
            tracker.increment()
            tracker.update(collapsing(noise), TARGET)
            alone = NeuralCollapse(CLASSES, DIM)
            alone.update(collapsing(noise), TARGET)
            wanted.append(alone.compute()[key])
        assert torch.equal(tracker.compute_all(), torch.stack(wanted))
        value, step = tracker.best_metric(return_step=True)
        assert (value, step) == (wanted[best].item(), best)


@pytest.fixture
def plt():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


def test_a_result_and_a_list_of_results_are_drawn(plt):
    metrics = [metric_of(noise) for noise in (2.0, 1.0, 0.1)]
    results = [metric.compute() for metric in metrics]
    figure, axis = metrics[0].plot()
    drawn = {line.get_label(): line.get_ydata() for line in axis.get_lines()}
    assert {name: float(y[0]) for name, y in drawn.items()} == pytest.approx(
        {name: float(value) for name, value in results[0].items()}
    )
    figure, axis = plt.subplots()
    some = [{name: result[name] for name in ("nc1", "nc3")} for result in results]
    assert metrics[0].plot(some, axis) == (None, axis)
    drawn = {line.get_label(): list(line.get_ydata()) for line in axis.get_lines()}
    assert drawn == {name: [float(result[name]) for result in results] for name in ("nc1", "nc3")}
    with pytest.raises(ValueError, match=r"val\[1\] and val\[0\] differ in \['nc3'\]"):
        metrics[0].plot([some[0], {"nc1": some[1]["nc1"]}])


def looks(lines):
    """What of each line is left in a print without colours."""
    return [(line.get_marker(), line.get_linestyle(), str(line._dash_pattern)) for line in lines]


def test_curves_differ_without_colour_and_the_legend_shows_it(plt):
    """Every measure at once; a line that the axis held before stays as it was, also in the legend."""
    metric = metric_of(1.0)
    result = metric.compute()
    figure, axis = plt.subplots()
    (own,) = axis.plot([0, 1], [0, 1], "r--", label="own")
    axis.fill_between([0, 1], 0, 1, label="area")
    before = looks([own])
    metric.plot([result, result, result], axis)
    drawn = axis.get_lines()
    assert looks(drawn[:1]) == before and len(drawn) == len(result) + 1 and len(set(looks(drawn))) == len(drawn)
    legend = axis.get_legend()
    names = [text.get_text() for text in legend.get_texts()]
    assert [name for name in names if name != "area"] == [line.get_label() for line in drawn]
    # a legend's dashes are scaled by its own line width, so the pattern is compared by name
    assert [look[:2] for look in looks(legend.get_lines())] == [look[:2] for look in looks(drawn)]
    alone = metric.plot({name: result[name] for name in ("nc1", "nc3", "nc4")})[1]
    assert len({look[0] for look in looks(alone.get_lines())}) == 3


def test_what_no_axis_can_show_is_said(plt):
    metric, nan = metric_of(1.0), torch.tensor(torch.nan)
    axis = metric.plot({"nc1": nan, "cdnv": torch.tensor(torch.inf), "nc0": 0.5})[1]
    assert [line.get_label() for line in axis.get_lines()] == ["nc1 (nan)", "cdnv (inf)", "nc0"]
    axis = metric.plot([{"nc1": nan}, {"nc1": torch.ones(())}, {"nc1": torch.ones(())}])[1]
    assert [line.get_label() for line in axis.get_lines()] == ["nc1 (1 of 3 not finite)"]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("val", "error", "message"),
    [
        ([{"nc1": 1.0}, {"nc1": 1.0, "nc4": 0.0}], ValueError, r"differ in \['nc4'\]"),
        ({}, ValueError, "no measure that is one number"),
        ([], ValueError, "no measure that is one number"),
        ({"nc1": torch.ones(2)}, ValueError, "a list of results, one a step"),
        ({"nc1": "low"}, ValueError, r"val\['nc1'\]='low' must be a number"),
        (torch.ones(2), TypeError, "val must be a dict of measures"),
        ([torch.ones(2)], TypeError, "val must be a dict of measures"),
    ],
)
def test_what_cannot_be_drawn_is_refused(plt, val, error, message):
    with pytest.raises(error, match=message):
        metric_of(1.0).plot(val)
    assert not plt.get_fignums()


def test_values_of_classes_are_left_out_of_a_figure(plt):
    metric = NearestClassCenter(VERTICES, per_class=True)
    metric.update(collapsing(0.1), TARGET)
    axis = metric.plot()[1]
    assert [line.get_label() for line in axis.get_lines()] == ["ncc_accuracy"]


def test_a_measure_over_the_layers_is_drawn(plt):
    model = timm.create_model("test_resnet", num_classes=CLASSES).eval()
    with torch.no_grad(), LayerwiseCollapse(model, layers=["layer1", "layer4"]) as depth:
        model(torch.randn(12, 3, 32, 32))
        depth.update(TARGET[:12])
        values = depth.compute()
        axis = depth.plot()[1]
        several = depth.plot([values, values], measure="cdnv")[1]
        with pytest.raises(ValueError, match="measure='nc7' must be one of 'cdnv'"):
            depth.plot(measure="nc7")
    (line,) = axis.get_lines()
    assert list(line.get_xdata()) == ["layer1", "layer4"] and axis.get_ylabel() == "nc1"
    assert list(line.get_ydata()) == [values[layer]["nc1"].item() for layer in values]
    assert len(several.get_lines()) == 2 and several.get_ylabel() == "cdnv"


def test_without_matplotlib_torchmetrics_says_so(monkeypatch):
    monkeypatch.setattr("torchmetrics.utilities.plot._MATPLOTLIB_AVAILABLE", False)
    depth = LayerwiseCollapse(nn.Sequential(nn.Linear(2, 2)), ["0"], num_classes=2)
    for plot, result in ((metric_of(1.0).plot, {"nc1": torch.ones(())}), (depth.plot, {"0": {"nc1": torch.ones(())}})):
        with pytest.raises(ModuleNotFoundError, match="matplotlib"):
            plot(result)
