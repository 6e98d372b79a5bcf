"""TPTScheduler: accuracies off by rounding, chained schedules past their end, and what it refuses."""

import math
import warnings

import pytest
import torch
from timm.scheduler.plateau_lr import PlateauLRScheduler
from torch.optim import SGD
from torch.optim import lr_scheduler as torch_schedules

from ncreg.tpt import TPTScheduler


def optimizer(rate=0.1):
    return SGD([torch.zeros(1, requires_grad=True)], lr=rate)


def rates(make, epochs):
    """Rates after each epoch of a run that never reaches zero error."""
    own = optimizer()
    scheduler = TPTScheduler(own, make(own), max_epochs=epochs + 1)
    found = []
    for epoch in range(1, epochs + 1):
        own.step()
        scheduler.step(epoch, 0.0)
        found.append(own.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize(
    "metric, reached", [(float(torch.tensor(1.0).nextafter(torch.tensor(2.0))), True), (-1e-7, False)]
)
def test_a_share_off_by_the_rounding_of_float32_is_taken(metric, reached):
    scheduler = TPTScheduler(optimizer(), max_epochs=9, threshold=1.0)
    scheduler.step(1, metric)
    assert scheduler.onset_epoch == (1 if reached else None)


@pytest.mark.parametrize("metric", [1.00001, -1.1e-6, 97.3])
def test_other_metrics_are_refused_with_all_digits(metric):
    with pytest.raises(ValueError, match=f"metric={metric!r} is not a share"):
        TPTScheduler(optimizer(), max_epochs=9).step(1, metric)


def test_a_chained_cosine_does_not_climb_again():
    alone = rates(lambda o: torch_schedules.CosineAnnealingLR(o, 12, 1e-3), 30)
    chained = rates(lambda o: torch_schedules.ChainedScheduler([torch_schedules.CosineAnnealingLR(o, 12, 1e-3)]), 30)
    assert chained == alone and chained[11:] == [chained[11]] * 19


def test_members_of_a_chain_end_each_at_its_own_time():
    def make(own):
        return torch_schedules.ChainedScheduler(
            [torch_schedules.CosineAnnealingLR(own, 6, 0.05), torch_schedules.ExponentialLR(own, 0.9)]
        )

    found = rates(make, 20)
    for before, after in zip(found[6:], found[7:], strict=False):  # the cosine has ended, the decay goes on
        assert after == pytest.approx(0.9 * before, rel=1e-12)

    def warm(own):
        return torch_schedules.ChainedScheduler(
            [torch_schedules.LinearLR(own, 0.1, 1.0, 4), torch_schedules.CosineAnnealingLR(own, 10)]
        )

    found = rates(warm, 25)
    assert found[9:] == [found[9]] * 16 and found[9] == pytest.approx(0, abs=1e-12)
    expected = [0.1 * min(1, 0.1 + 0.9 * t / 4) * (1 + math.cos(math.pi * t / 10)) / 2 for t in range(1, 11)]
    assert found[:10] == pytest.approx(expected, abs=1e-12)


def test_plateau_schedules_that_wait_for_a_fall_are_refused():
    own = optimizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        schedules = PlateauLRScheduler(own, mode="min"), torch_schedules.ReduceLROnPlateau(own, mode="min")
    for schedule in schedules:
        with pytest.raises(ValueError, match=rf"{type(schedule).__name__}\(mode='min'\)"):
            TPTScheduler(own, schedule, max_epochs=9)


def test_the_state_of_another_kind_of_schedule_is_refused():
    one, two = optimizer(), optimizer()
    cosine = TPTScheduler(one, torch_schedules.CosineAnnealingLR(one, 5), max_epochs=9)
    step = TPTScheduler(two, torch_schedules.StepLR(two, 5), max_epochs=9)
    with pytest.raises(ValueError, match="CosineAnnealingLR, this scheduler has StepLR"):
        step.load_state_dict(cosine.state_dict())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [None, torch.nn.Linear(2, 2)])
def test_no_optimizer(wrong):
    with pytest.raises(TypeError, match="optimizer must be"):
        TPTScheduler(wrong, max_epochs=9)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["threshold", "extend", "terminal_lr", "patience", "max_epochs", "ramp_epochs"])
def test_a_string_is_no_number(name):
    with pytest.raises((TypeError, ValueError), match=f"{name}='0.9'"):
        TPTScheduler(optimizer(), **{"max_epochs": 9, name: "0.9"})


@pytest.mark.usefixtures("unchecked")
def test_a_string_is_no_metric():
    with pytest.raises(TypeError, match="metric='0.9'"):
        TPTScheduler(optimizer(), max_epochs=9).step(1, "0.9")
