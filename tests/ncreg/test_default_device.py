"""Evaluations under another default device (`meta` plays it) or dtype, and on a device without float64."""

import pytest
import torch
from torch import nn

from ncreg import metrics, robustness
from ncreg.robustness import corruptions


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.flat = nn.Linear(3 * 16 * 16, 4)

    def forward(self, images):
        return self.flat(images.flatten(1))


@pytest.fixture(scope="module")
def given():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    images = torch.rand(8, 3, 16, 16, generator=generator)
    return Small().eval(), images, torch.arange(8) % 4, torch.randn(8, 5, generator=generator)


EVALUATIONS = {
    "pgd": lambda m, x, y, h: robustness.pgd(m, x, y, epsilon=0.1, steps=2).robust,
    "pgd l2": lambda m, x, y, h: robustness.pgd(m, x, y, epsilon=0.5, norm="l2", steps=2).robust,
    "random search": lambda m, x, y, h: robustness.random_search(m, x, y, epsilon=0.1, queries=3).robust,
    "minimum norm": lambda m, x, y, h: robustness.minimum_norm(m, x, y).distance,
    "deepfool": lambda m, x, y, h: robustness.deepfool(m, x).rho,
    "noise": lambda m, x, y, h: [robustness.noise_images(x, kind) for kind in ("uniform", "gaussian", "shuffle")],
    "calibration": lambda m, x, y, h: robustness.evaluate_calibration(m(x), y, m(x), y),
    "curvature": lambda m, x, y, h: metrics.hessian_norms(m, x, y, steps=2),  # not yet independent of its start
    "risk": lambda m, x, y, h: robustness.risk_coverage(m(x).softmax(1), y),
    "few shot": lambda m, x, y, h: robustness.few_shot(h, y, h, y, shots=1, draws=2),
    "corruptions": lambda m, x, y, h: [corruptions.corrupt(x, name, 3) for name in corruptions.CORRUPTIONS],
}


def parts(found):
    """Every tensor of a result, and the words for the rest of it."""
    if isinstance(found, list | tuple):
        return [part for item in found for part in parts(item)]
    return [found if isinstance(found, torch.Tensor) else repr(found)]


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_gives_the_same_under_another_default_device(given, name):
    expected = parts(EVALUATIONS[name](*given))
    with torch.device("meta"):
        found = parts(EVALUATIONS[name](*given))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) if isinstance(other, torch.Tensor) else one == other


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_gives_the_same_under_another_default_dtype(given, name):
    """Draws included: of one seed float64 draws other numbers than float32, and rounds otherwise."""
    expected = parts(EVALUATIONS[name](*given))
    torch.set_default_dtype(torch.float64)
    try:
        found = EVALUATIONS[name](*given)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(parts(found), expected, strict=True):
        assert torch.equal(one, other) if isinstance(other, torch.Tensor) else one == other


ATTACKS = {
    "fgsm": lambda m, x, y: robustness.fgsm(m, x, y, epsilon=0.1),
    "pgd": lambda m, x, y: robustness.pgd(m, x, y, epsilon=0.1, steps=2),
    "random search": lambda m, x, y: robustness.random_search(m, x, y, epsilon=0.1, queries=3),
    "autoattack": lambda m, x, y: robustness.autoattack(m, x, y, epsilon=0.1),
    "minimum norm": lambda m, x, y: robustness.minimum_norm(m, x, y),
    "deepfool": lambda m, x, y: robustness.deepfool(m, x),
    "curve": lambda m, x, y: robustness.robustness_curve(m, x, y, [0.1]),
    "report": lambda m, x, y: robustness.evaluate_adversarial(m, x, y, epsilon=0.1),
    "suspicions": lambda m, x, y: robustness.find_suspicions(m, x, y),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_say_which_device_they_cannot_run_on(given, name, monkeypatch):
    """Here the CPU plays a device without float64, such as Apple's MPS."""
    monkeypatch.setattr("ncreg.robustness._inputs.float64_device", lambda device: torch.device("meta"))
    model, images, target, _ = given
    with pytest.raises(TypeError, match=r"images are on cpu, which has no float64.*to\(\"cpu\"\)"):
        ATTACKS[name](model, images, target)
