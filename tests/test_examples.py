"""Every example runs in seconds, prints numbers, leaves a figure, and shows what it says it shows."""

import importlib.util
import math
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", [path.stem for path in EXAMPLES])
def test_example_runs_prints_numbers_and_saves_a_figure(name, tmp_path, capsys):
    load(name).main(["--out", str(tmp_path), "--quick"])
    printed = capsys.readouterr().out
    assert re.search(r"\d\.\d", printed) and not re.search(r"\b(nan|inf)\b", printed)
    figures = list(tmp_path.glob("*.png"))
    assert figures, f"{name} left no figure"
    for figure in figures:
        pixels = plt.imread(figure)[..., :3]
        assert pixels.shape[1] >= 1000 and pixels.std() > 0.05, f"{figure.name} is small or empty"


@pytest.mark.parametrize("name", [path.stem for path in EXAMPLES])
def test_example_says_how_to_run_it(name, capsys):
    module = load(name)
    assert f"python examples/{name}.py" in module.__doc__
    with pytest.raises(SystemExit) as stop:
        module.main(["--quik"])
    assert stop.value.code == 2 and "--quick" in capsys.readouterr().err


def test_minority_classes_merge_at_the_predicted_ratio_under_a_learned_head_alone():
    example = load("minority_collapse")
    ratio, decay = example.predicted_ratio(0.1), 0.1
    for factor, merged in ((0.85, False), (1.15, True)):
        count = round(example.SIZE / (ratio * factor))
        learned = example.LinearHead(example.DIM, example.CLASSES, bias=False, **example.DOUBLE)
        fixed = example.ETFHead(example.DIM, example.CLASSES, normalize=False, scale=2.0, **example.DOUBLE)
        found = example.optimum(learned, count, decay)
        assert (found.distance < 1e-3) == (found.margin < 1e-3) == merged
        assert example.optimum(fixed, count, decay).margin > 1


@pytest.mark.parametrize("name", ["NONL", "SupCon", "CE + decay", "CE + decay, BatchNorm", "squared error + decay"])
def test_free_features_come_down_to_the_closed_form(name):
    example = load("unconstrained_features")
    history = example.descend(example.cases()[name], 300)
    assert -1e-12 < history["gap"][-1] < 2e-2 * history["gap"][0]
    assert history["etf_distance"][-1] < 0.3 * history["etf_distance"][0]


def test_the_pull_of_a_large_scale_is_gone_before_collapse():
    example = load("scale_landscape")
    cosines = example.torch.tensor([0.0, 0.9], dtype=example.torch.float64)
    losses, small = example.pull(3.0, cosines)
    _, large = example.pull(64.0, cosines)
    assert large[0] > small[0] and large[1] < 1e-12 < small[1]
    # at cosine c to its class vector a feature is c/(C−1) on the far side of every other
    expected = [float(example.torch.tensor(1 + 9 * 2.718281828459045 ** (-3 * c * 10 / 9)).log()) for c in (0, 0.9)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)


def test_wide_networks_collapse_on_a_mixture_whose_test_points_they_get_wrong():
    example = load("gaussian_mixture")
    narrow, wide = (example.trained(width, 500) for width in (4, 128))
    best = example.best_error()
    low, high = 0, -1  # signals
    assert wide.nc1[low] < 0.15 and wide.nc1[high] < 0.15 and wide.nc1[low] < 0.3 * narrow.nc1[low]
    assert wide.train_error[low] == wide.train_error[high] == 0
    assert wide.test_error[low] > 0.55 > 0.05 > wide.test_error[high]
    for signal, error in zip(example.SIGNALS, best, strict=True):
        confused = 0.5 * math.erfc(signal / 2 / 2**0.5)  # with one of the two others; the union bound is twice that
        assert 0.95 * confused - 2e-3 <= error <= 2 * 1.05 * confused + 2e-3
    assert all(error >= least - 0.01 for error, least in zip(wide.test_error, best, strict=True))
