"""TPTScheduler: accuracies off by rounding, chained schedules past their end, and what it refuses."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
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
    with pytest.raises(ValueError, match=f"metric={metric!r} is not a fraction"):
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


def test_a_plateau_schedule_stepped_by_updates_is_refused():
    own = optimizer()
    with pytest.raises(ValueError, match="interval='update' would never be stepped"):
        TPTScheduler(own, torch_schedules.ReduceLROnPlateau(own, mode="max"), max_epochs=9, interval="update")


@pytest.mark.parametrize(
    "make, interval",
    [
        (lambda own: torch_schedules.LinearLR(own, 0.1, 1.0, 4), "update"),
        (lambda own: CosineLRScheduler(own, t_initial=100, t_in_epochs=False), "epoch"),
    ],
)
def test_a_schedule_of_updates_that_is_told_of_none_is_warned_of_once(make, interval):
    own, other = optimizer(), optimizer()
    silent = TPTScheduler(own, make(own), max_epochs=9, interval=interval)
    own.step()
    with pytest.warns(UserWarning, match="counts updates, but epoch 1 ended without a step_update"):
        silent.step(1, 0.5)
    before = silent.get_last_lr()
    silent.step(2, 0.5)  # warnings are errors: said once
    assert silent.get_last_lr() == before
    told = TPTScheduler(other, make(other), max_epochs=9, interval=interval)
    other.step()
    told.step_update(1)
    told.step(1, 0.5)
    assert told.get_last_lr() != before
    at_once = TPTScheduler(last := optimizer(), make(last), max_epochs=9, interval=interval)
    last.step()
    with pytest.warns(UserWarning, match="counts updates, but epoch 1 ended"):
        at_once.step(1, 1.0)  # also where the onset comes with the first epoch


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
@pytest.mark.parametrize("name", ["metric", "watch"])
@pytest.mark.parametrize("wrong", ["0.9", [0.5], True, torch.ones(2), torch.ones((), device="meta")])
def test_what_is_no_number_is_no_metric(name, wrong):
    scheduler = TPTScheduler(optimizer(), max_epochs=9)
    with pytest.raises(TypeError, match=f"{name}=.* must be a number, not {type(wrong).__name__}"):
        scheduler.step(1, **({"metric": 0.5} | {name: wrong}))
    assert scheduler.epoch == 0


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [True, 1.0, "1", None])
def test_what_is_no_whole_number_is_no_epoch(wrong):
    with pytest.raises(TypeError, match=f"epoch={wrong!r} must be an integer"):
        TPTScheduler(optimizer(), max_epochs=9).step(wrong, 1.0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["threshold", "extend", "terminal_lr", "patience", "max_epochs"])
def test_true_is_no_number(name):
    with pytest.raises((TypeError, ValueError), match=f"{name}=True"):
        TPTScheduler(optimizer(), **{"max_epochs": 9, name: True})


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_other_libraries_are_taken_and_kept_as_pythons_own():
    scheduler = TPTScheduler(optimizer(), max_epochs=np.int64(5), threshold=np.float32(0.5), stop_patience=2)
    scheduler.step(np.int64(1), torch.tensor(0.75), np.float64(0.1))
    assert scheduler.onset_epoch == 1
    kinds = {type(value) for value in scheduler.state_dict().values()}
    assert kinds == {int, float, str, list, type(None)} and type(scheduler.epoch) is int


def cyclic():
    own = optimizer()
    schedule = torch_schedules.CyclicLR(own, 0.1, 0.4, step_size_up=3, cycle_momentum=False)
    return TPTScheduler(own, schedule, max_epochs=9)


def test_a_state_can_be_loaded_twice():
    first = cyclic()
    first.optimizer.step()
    for epoch in (1, 2):
        first.step(epoch, 0.5)
    state = first.state_dict()
    kept = copy.deepcopy(state)
    for scheduler in (cyclic(), cyclic()):
        scheduler.load_state_dict(state)
        assert scheduler.get_last_lr() == first.get_last_lr() != [0.1]
    assert state == kept


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "name, wrong, words",
    [
        ("terminal", "x", "terminal='x'"),
        ("max_epochs", "a", "max_epochs='a'"),
        ("threshold", 2.0, "threshold=2.0"),
        ("extend", [1], r"extend=\[1\]"),
        ("interval", "batch", "interval='batch'"),
        ("epoch", 1.5, "epoch=1.5"),
        ("_peaks", 5, "_peaks=5"),
        ("lr", ["a"], r"lr\[0\]='a'"),
    ],
)
def test_states_with_wrong_values_are_refused_by_name_and_change_nothing(name, wrong, words):
    scheduler = TPTScheduler(optimizer(), max_epochs=9)
    before = scheduler.state_dict()
    with pytest.raises((TypeError, ValueError), match=words):
        scheduler.load_state_dict(before | {"max_epochs": 7, name: wrong})
    assert scheduler.state_dict() == before


def test_the_interval_of_a_state_is_followed():
    def made(interval):
        own = optimizer()
        return TPTScheduler(own, torch_schedules.StepLR(own, 1, 0.5), max_epochs=9, interval=interval)

    scheduler = made("epoch")
    scheduler.load_state_dict(made("update").state_dict())
    scheduler.optimizer.step()
    scheduler.step_update(1)
    assert scheduler.get_last_lr() == [0.05]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong, words", [(5, "not int"), ({"kind": "StepLR"}, "lacks schedule: it is not")])
def test_states_of_the_inner_schedule_that_are_none(wrong, words):
    own = optimizer()
    scheduler = TPTScheduler(own, torch_schedules.StepLR(own, 1), max_epochs=9)
    with pytest.raises((TypeError, ValueError), match=words):
        scheduler.load_state_dict(scheduler.state_dict() | {"schedule": wrong})


def test_a_run_that_ends_without_a_metric_is_warned_once():
    scheduler = TPTScheduler(optimizer(), max_epochs=3)
    scheduler.step(1)
    scheduler.step(2)
    with pytest.warns(UserWarning, match="3 epochs without a metric: no terminal phase could begin"):
        scheduler.step(3)
    measured, plain = TPTScheduler(optimizer(), max_epochs=2), TPTScheduler(optimizer(), max_epochs=2, extend=None)
    for epoch in (1, 2):  # warnings are errors here
        measured.step(epoch, 0.5 if epoch == 1 else None)
        plain.step(epoch)
    assert measured.finished and plain.finished
