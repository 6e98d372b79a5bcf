"""TPTScheduler against a plain restatement of its rules, with every kind of inner schedule, and across a resume."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.scheduler import create_scheduler_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.plateau_lr import PlateauLRScheduler
from torch.optim import SGD
from torch.optim import lr_scheduler as torch_schedules

from ncreg.tpt import FLOOR, TPTScheduler


def optimizer(*rates):
    return SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates or (0.1,)], lr=1.0)


def run(scheduler, metrics, *, updates=0):
    """Rates in force during each epoch, phases and ramps after it; stops when the scheduler says so."""
    rates, phases, ramps = [], [], []
    for epoch, metric in enumerate(metrics, 1):
        rates.append(scheduler.get_last_lr()[0])
        for update in range(updates):
            scheduler.optimizer.step()
            scheduler.step_update((epoch - 1) * updates + update + 1)
        scheduler.optimizer.step()
        scheduler.step(epoch, metric)
        phases.append(scheduler.phase)
        ramps.append(scheduler.ramp)
        if scheduler.finished:
            break
    return rates, phases, ramps


def expected_end(metrics, *, threshold, patience, extend, min_terminal, max_terminal, max_epochs):
    """(onset, end) by scanning the list: the rule as a sentence would state it."""
    for epoch in range(patience, max_epochs + 1):
        if all(metric >= threshold for metric in metrics[epoch - patience : epoch]):
            length = min(max(round(extend * epoch), min_terminal), math.inf if max_terminal is None else max_terminal)
            return epoch, min(epoch + length, max_epochs)
    return None, max_epochs


@given(
    metrics=st.lists(st.sampled_from([0.5, 0.9, 0.999, 1.0]), min_size=60, max_size=60),
    patience=st.integers(1, 4),
    extend=st.sampled_from([0.0, 0.5, 1.0, 2.5]),
    min_terminal=st.integers(0, 6),
    more=st.none() | st.integers(0, 20),
    max_epochs=st.integers(1, 60),
)
@settings(max_examples=200, deadline=None)
@pytest.mark.filterwarnings("ignore:min_terminal")
def test_onset_and_end_follow_the_rule(metrics, patience, extend, min_terminal, more, max_epochs):
    rule = {"patience": patience, "extend": extend, "min_terminal": min_terminal, "max_epochs": max_epochs}
    rule |= {"max_terminal": None if more is None else min_terminal + more, "threshold": 0.999}
    scheduler = TPTScheduler(optimizer(), **rule)
    onset, end = expected_end(metrics, **rule)
    _, phases, _ = run(scheduler, metrics)
    assert (scheduler.onset_epoch, len(phases)) == (onset, end)
    assert phases == [
        "finished" if epoch == end else "terminal" if onset and epoch >= onset else "fitting"
        for epoch in range(1, end + 1)
    ]
    fallen = [epoch for epoch in range((onset or end) + 1, end + 1) if metrics[epoch - 1] < 0.999]
    assert scheduler.regressions == (fallen if onset else [])


def test_terminal_curves_match_their_closed_forms():
    for terminal, curve in {
        "cosine": lambda t: (1 + math.cos(math.pi * t / 9)) / 2,
        "constant": lambda t: 1.0,
        "step": lambda t: 1.0 if t < 3 else 0.1 if t < 6 else 0.01,
    }.items():
        scheduler = TPTScheduler(optimizer(0.4), max_epochs=50, extend=3.0, min_terminal=0, terminal=terminal)
        rates, _, _ = run(scheduler, [0.1, 0.2, 1.0] + [1.0] * 20)
        assert len(rates) == 12 and scheduler.last_epoch == 12
        torch.testing.assert_close(rates, [0.4] * 3 + [0.4 * curve(t) for t in range(9)], rtol=1e-12, atol=0)


def test_ramp_is_linear_from_the_onset():
    scheduler = TPTScheduler(optimizer(), max_epochs=20, min_terminal=10, ramp_epochs=4)
    _, _, ramps = run(scheduler, [0.0, 1.0] + [1.0] * 20)
    assert ramps == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]
    assert run(TPTScheduler(optimizer(), max_epochs=9, ramp_epochs=0), [0.0] + [1.0] * 8)[2] == [0] + [1] * 8


def test_the_start_is_the_rate_at_the_onset_but_not_below_the_floor():
    high = optimizer(1.0, 0.1)
    scheduler = TPTScheduler(high, CosineLRScheduler(high, t_initial=10), max_epochs=100, terminal="constant")
    run(scheduler, [0.0] * 4 + [1.0])
    rate = (1 + math.cos(math.pi * 4 / 10)) / 2  # epoch 5 runs at t = 4
    torch.testing.assert_close(scheduler.get_last_lr(), [rate, 0.1 * rate], rtol=1e-12, atol=0)

    late = optimizer(1.0, 0.1)
    scheduler = TPTScheduler(late, CosineLRScheduler(late, t_initial=10), max_epochs=100, terminal="constant")
    run(scheduler, [0.0] * 30 + [1.0])  # annealed to nothing long ago
    torch.testing.assert_close(scheduler.get_last_lr(), [FLOOR, 0.1 * FLOOR], rtol=1e-12, atol=0)


def test_terminal_lr_keeps_the_ratio_of_the_groups():
    both = optimizer(0.02, 0.2)
    scheduler = TPTScheduler(both, max_epochs=30, terminal="constant", terminal_lr=0.05)
    run(scheduler, [1.0])
    torch.testing.assert_close(scheduler.get_last_lr(), [0.005, 0.05], rtol=1e-12, atol=0)


def test_extend_none_only_records_and_the_inner_schedule_goes_on():
    alone, watched = optimizer(), optimizer()
    schedule = CosineLRScheduler(alone, t_initial=12)
    reference = []
    for epoch in range(1, 13):
        reference.append(alone.param_groups[0]["lr"])
        schedule.step(epoch)
    scheduler = TPTScheduler(watched, CosineLRScheduler(watched, t_initial=12), max_epochs=12, extend=None)
    rates, phases, _ = run(scheduler, [0.5, 1.0] + [1.0] * 20)
    assert rates == reference and scheduler.onset_epoch == 2 and scheduler.last_epoch == 12
    assert phases == ["fitting"] + ["terminal"] * 10 + ["finished"]


def test_extend_none_knows_no_standstill():
    scheduler = TPTScheduler(optimizer(), max_epochs=9, extend=None, stop_patience=1, min_terminal=0)
    for epoch in range(1, 10):
        assert not scheduler.finished
        scheduler.step(epoch, 1.0, watch=1.0)
    assert scheduler.finished and scheduler.onset_epoch == 1


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("right", "of", "threshold"), [(997, 1000, 0.997), (9, 10, 0.9), (999, 1000, 0.999), (1, 1, 1.0)]
)
def test_an_accuracy_in_float32_reaches_the_threshold_that_it_equals(right, of, threshold):
    single = (torch.arange(of) < right).float().mean()
    for accuracy in (right / of, single, single.item(), single.numpy()):
        scheduler = TPTScheduler(optimizer(), max_epochs=5, threshold=threshold)
        scheduler.step(1, accuracy)
        assert scheduler.onset_epoch == 1
    scheduler = TPTScheduler(optimizer(), max_epochs=5, threshold=threshold)
    scheduler.step(1, threshold - 1e-6)
    assert scheduler.onset_epoch is None


@pytest.mark.parametrize("kind", ["cosine", "one cycle", "chained", "sequential"])
def test_a_torch_schedule_that_began_at_another_step_ends_where_it_says(kind):
    """With last_epoch=9 eleven of twenty steps are left; after them the last rate stays."""

    def build(given):
        for group in given.param_groups:
            group |= {"initial_lr": 0.1, "max_lr": 0.1, "min_lr": 1e-4, "max_momentum": 0.95, "base_momentum": 0.85}
        if kind == "one cycle":
            return torch_schedules.OneCycleLR(given, 0.1, total_steps=21, last_epoch=9)
        cosine = torch_schedules.CosineAnnealingLR(given, 20, eta_min=0.01, last_epoch=9)
        if kind == "chained":
            return torch_schedules.ChainedScheduler(
                [cosine, torch_schedules.LinearLR(given, 1.0, 1.0, 20, last_epoch=9)], optimizer=given
            )
        return cosine

    if kind == "sequential":  # it has been stepped by hand before it was handed in

        def build(given):
            parts = [torch_schedules.LinearLR(given, 0.1, 1.0, 4), torch_schedules.CosineAnnealingLR(given, 16)]
            schedule = torch_schedules.SequentialLR(given, parts, [4])
            for _ in range(10):
                given.step()
                schedule.step()
            return schedule

    alone, given = optimizer(), optimizer()
    reference = build(alone)
    expected = [alone.param_groups[0]["lr"]]
    for _ in range(10):
        alone.step()
        reference.step()
        expected.append(alone.param_groups[0]["lr"])
    rates, _, _ = run(TPTScheduler(given, build(given), max_epochs=30), [0.0] * 30)
    assert rates == expected + expected[-1:] * 19


@pytest.mark.parametrize(
    ("build", "end"),
    [
        (lambda o: torch_schedules.CosineAnnealingLR(o, T_max=6), 6),
        (
            lambda o: torch_schedules.SequentialLR(
                o,
                [torch_schedules.LinearLR(o, total_iters=2), torch_schedules.CosineAnnealingLR(o, T_max=4)],
                milestones=[2],
            ),
            6,
        ),
    ],
)
def test_a_torch_schedule_that_ends_keeps_its_last_rate(build, end):
    given = optimizer()
    rates, _, _ = run(TPTScheduler(given, build(given), max_epochs=20), [0.0] * 20)
    assert len(rates) == 20 and rates[end:] == [rates[end]] * (20 - end)
    assert rates[end] == pytest.approx(0, abs=1e-12) and rates[end - 1] > 1e-4


def test_one_cycle_is_stepped_by_updates_and_does_not_raise_past_its_end():
    given, alone = optimizer(), optimizer()
    inner = torch_schedules.OneCycleLR(given, max_lr=1.0, total_steps=12)
    reference = torch_schedules.OneCycleLR(alone, max_lr=1.0, total_steps=12)
    expected = [alone.param_groups[0]["lr"]]
    for _ in range(11):
        alone.step()
        reference.step()
        expected.append(alone.param_groups[0]["lr"])
    scheduler = TPTScheduler(given, inner, max_epochs=6, interval="update")
    rates, _, _ = run(scheduler, [0.0] * 6, updates=3)
    assert rates == [expected[min(3 * epoch, 11)] for epoch in range(6)]


def test_timms_schedules_on_updates_are_followed():
    given = optimizer()
    inner, _ = create_scheduler_v2(
        given, sched="cosine", num_epochs=10, step_on_epochs=False, updates_per_epoch=4, warmup_epochs=0
    )
    rates, _, _ = run(TPTScheduler(given, inner, max_epochs=10), [0.0] * 10, updates=4)
    expected = [0.1 * (1 + math.cos(math.pi * 4 * epoch / 40)) / 2 for epoch in range(10)]
    torch.testing.assert_close(rates, expected, rtol=1e-9, atol=1e-12)


def plateau(given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return PlateauLRScheduler(given, patience_t=2)


SCHEDULES = {
    "none": lambda o: None,
    "timm cosine": lambda o: CosineLRScheduler(o, t_initial=15, warmup_t=2, warmup_lr_init=0.01),
    "timm plateau": plateau,
    "torch cosine": lambda o: torch_schedules.CosineAnnealingLR(o, T_max=5),
    "torch plateau": lambda o: torch_schedules.ReduceLROnPlateau(o, mode="max", patience=1),
    "torch exponential": lambda o: torch_schedules.ExponentialLR(o, 0.8),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("stop", [1, 4, 8, 9, 13])
def test_a_resumed_scheduler_continues_exactly(kind, stop):
    metrics = [0.1, 0.2, 0.2, 0.2, 0.2, 0.3, 0.999, 0.999, 1.0, 0.4] + [1.0] * 10

    def build():
        given = optimizer(0.1, 0.5)
        return TPTScheduler(
            given, SCHEDULES[kind](given), max_epochs=18, patience=2, min_terminal=8, extend=0.5, ramp_epochs=3
        )

    def trace(scheduler, metrics, first):
        seen = []
        for epoch, metric in enumerate(metrics, first):
            scheduler.optimizer.step()
            scheduler.step(epoch, metric)
            seen.append((epoch, scheduler.get_last_lr(), scheduler.phase, scheduler.ramp, list(scheduler.regressions)))
        return seen

    whole, first, second = build(), build(), build()
    reference = trace(whole, metrics[:16], 1)
    trace(first, metrics[:stop], 1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert trace(second, metrics[stop:16], stop + 1) == reference[stop:]
    assert second.state_dict() == whole.state_dict()


def test_the_state_survives_a_safe_checkpoint(tmp_path):
    given = optimizer()
    scheduler = TPTScheduler(given, CosineLRScheduler(given, t_initial=9), max_epochs=9)
    run(scheduler, [0.1, 1.0, 0.9])
    torch.save(scheduler.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == scheduler.state_dict()


def test_an_unmeasured_epoch_neither_counts_nor_breaks():
    scheduler = TPTScheduler(optimizer(), max_epochs=30, patience=2)
    run(scheduler, [1.0, None, 1.0])
    assert scheduler.onset_epoch == 3


def test_the_same_epoch_without_a_metric_only_sets_the_rates_again():
    given = optimizer()
    scheduler = TPTScheduler(given, max_epochs=30)
    run(scheduler, [0.0, 1.0, 1.0])
    before, rate = scheduler.state_dict(), scheduler.get_last_lr()
    given.param_groups[0]["lr"] = 7.0
    scheduler.step(3)
    assert scheduler.get_last_lr() == rate and scheduler.state_dict() == before


@pytest.mark.parametrize(("more", "end", "rate"), [({"min_terminal": 2}, 3, 0.0), ({"extend": None}, 4, 0.1)])
def test_past_the_end_the_rate_stays_and_a_warning_says_so_once(more, end, rate):
    scheduler = TPTScheduler(optimizer(), max_epochs=4, **more)
    for epoch in range(1, end + 1):
        scheduler.step(epoch, 1.0)
    scheduler.step(end)  # the same epoch again is none too many
    with pytest.warns(
        UserWarning, match=rf"epoch {end + 1} comes after the end of the run, epoch {end} of at most 4.*"
    ) as said:
        scheduler.step(end + 1, 1.0)
    scheduler.step(end + 2, 1.0)  # any warning is an error here
    assert scheduler.finished and scheduler.last_epoch == end and scheduler.get_last_lr() == [pytest.approx(rate)]
    assert f"rates stay at {rate:.4g}" in str(said[0].message)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"max_epochs": 0}, "max_epochs=0"),
        ({"threshold": 99.9}, r"threshold=99.9.*\(0, 1\]"),
        ({"threshold": 0.0}, "threshold=0"),
        ({"patience": 0}, "patience=0"),
        ({"extend": -1.0}, "extend=-1"),
        ({"extend": math.nan}, "extend=nan"),
        ({"min_terminal": 5, "max_terminal": 3}, "max_terminal=3 is below min_terminal=5"),
        ({"terminal": "linear"}, "terminal='linear'.*cosine"),
        ({"terminal_lr": 0.0}, "terminal_lr=0"),
        ({"ramp_epochs": -1}, "ramp_epochs=-1"),
        ({"interval": "batch"}, "interval='batch'"),
    ],
)
def test_wrong_hyperparameters_are_refused_by_name(wrong, words):
    with pytest.raises(ValueError, match=words):
        TPTScheduler(optimizer(), **({"max_epochs": 10} | wrong))


@pytest.mark.usefixtures("unchecked")
def test_wrong_calls_are_refused():
    with pytest.raises(TypeError, match="max_epochs=2.5 must be an integer"):
        TPTScheduler(optimizer(), max_epochs=2.5)
    scheduler = TPTScheduler(optimizer(), max_epochs=10)
    for metric in (1.5, 98.2, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"metric=.*\[0, 1\].*per cent"):
            scheduler.step(1, metric)
    assert scheduler.epoch == 0
    with pytest.raises(ValueError, match="epoch=3 after epoch 0"):
        scheduler.step(3, 0.5)
    scheduler.step(1, 0.5)
    with pytest.raises(ValueError, match="epoch=1 after epoch 1"):
        scheduler.step(1, 0.5)
    with pytest.raises(ValueError, match="lacks max_epochs"):
        scheduler.load_state_dict({})
    with pytest.raises(ValueError, match="2 parameter groups, the optimizer has 1"):
        scheduler.load_state_dict(TPTScheduler(optimizer(0.1, 0.2), max_epochs=3).state_dict())
    given = optimizer()
    with pytest.raises(ValueError, match="no inner schedule"):
        TPTScheduler(given, CosineLRScheduler(given, t_initial=3), max_epochs=3).load_state_dict(scheduler.state_dict())


@pytest.mark.usefixtures("unchecked")
def test_wrong_schedules_are_refused():
    given = optimizer()
    for wrong, words in ((0.1, "float 0.1"), ("cosine", "str 'cosine'"), (SGD, "type")):
        with pytest.raises(TypeError, match=f"schedule must be a .*, or None, got {words}"):
            TPTScheduler(given, wrong, max_epochs=10)
    with pytest.raises(ValueError, match="another optimizer"):
        TPTScheduler(given, CosineLRScheduler(optimizer(), t_initial=3), max_epochs=10)
    with pytest.raises(ValueError, match="mode='max'"):
        TPTScheduler(given, torch_schedules.ReduceLROnPlateau(given), max_epochs=10)


def stopped_at(watched, *, patience, min_terminal=0, onset=1):
    """The epoch after which a run of constant rate ends; `watched` begins at the onset."""
    scheduler = TPTScheduler(
        optimizer(),
        max_epochs=100,
        extend=50.0,
        min_terminal=min_terminal,
        stop_patience=patience,
        terminal="constant",
    )
    for epoch in range(1, 101):
        value = watched[epoch - onset] if onset <= epoch < onset + len(watched) else None
        scheduler.step(epoch, 1.0 if epoch >= onset else 0.0, value)
        if scheduler.finished:
            return epoch
    return None


@pytest.mark.parametrize(
    ("watched", "options", "end"),
    [
        ([1.0] * 20, {"patience": 3}, 4),
        ([1.0, 0.9, 0.8, 0.7, 0.695, 0.694, 0.693], {"patience": 3}, 7),  # falls by less than 1 % are none
        ([1.0, 1.1, 1.1, 0.98, 1.0, 1.0, 1.0], {"patience": 3}, 7),  # a new least value begins the count again
        ([1.0] * 20, {"patience": 3, "min_terminal": 8}, 9),
        ([1.0, math.nan, math.nan], {"patience": 2}, 3),
        ([-1.0, -1.2, -1.205, -1.206], {"patience": 2}, 4),  # for what rises, pass its negative
        ([1.0, None, None, 1.0, 1.0], {"patience": 2}, 5),  # not measured is no epoch
        ([1.0] * 20, {"patience": 3, "onset": 5}, 8),
    ],
)
def test_a_standstill_of_the_watched_measure_ends_the_terminal_phase(watched, options, end):
    assert stopped_at(watched, **options) == end


def test_a_standstill_is_counted_across_a_resume():
    def made():
        return TPTScheduler(optimizer(), max_epochs=50, extend=40.0, stop_patience=3)

    first = made()
    for epoch in (1, 2, 3):
        first.step(epoch, 1.0, 1.0)
    second = made()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for scheduler in (first, second):
        scheduler.step(4, 1.0, 1.0)
        for epoch in range(5, 12):
            if not scheduler.finished:
                scheduler.step(epoch, 1.0, 1.0)
    assert first.state_dict() == second.state_dict() and first.last_epoch == 11  # min_terminal is 10
    with pytest.raises(ValueError, match="stop_patience=0"):
        TPTScheduler(optimizer(), max_epochs=5, stop_patience=0)


def test_a_peak_between_two_epochs_counts_for_the_first_terminal_rate():
    given = optimizer()
    inner = torch_schedules.OneCycleLR(given, max_lr=1.0, total_steps=20, pct_start=0.2, final_div_factor=1e9)
    scheduler = TPTScheduler(given, inner, max_epochs=8, interval="update", terminal="constant")
    run(scheduler, [0.0, 1.0, 1.0, 1.0], updates=10)  # the peak is at update 4 of the first epoch
    assert scheduler.get_last_lr() == [pytest.approx(FLOOR * 1.0, rel=1e-6)]


def test_a_least_length_that_no_run_can_have_is_warned_of():
    with pytest.warns(UserWarning, match="min_terminal=20 is above max_epochs=8, the end of the run"):
        scheduler = TPTScheduler(optimizer(), max_epochs=8, min_terminal=20)
    short = TPTScheduler(optimizer(), max_epochs=8)  # the default is no wish
    for each in (scheduler, short):
        each.step(1, 1.0)
    assert (scheduler.last_epoch, short.last_epoch, short.min_terminal) == (8, 8, 10)
    again = TPTScheduler(optimizer(), max_epochs=30)
    again.load_state_dict(scheduler.state_dict())  # a run that goes on is not warned again
    assert again.min_terminal == 20


@pytest.mark.parametrize("kind", ["torch", "timm"])
def test_rate_0_before_the_onset_is_warned_of_once(kind):
    own = optimizer()
    inner = torch_schedules.CosineAnnealingLR(own, 3) if kind == "torch" else CosineLRScheduler(own, t_initial=3)
    scheduler = TPTScheduler(own, inner, max_epochs=9)
    for epoch in (1, 2):
        own.step()
        scheduler.step(epoch, 0.5)
    with pytest.warns(UserWarning, match="rate 0 after epoch 3 of at most 9, before accuracy 0.999.*eta_min, lr_min"):
        scheduler.step(3, 0.5)
    scheduler.step(4, 0.5)
    scheduler.step(5, 1.0)  # the terminal phase has a rate of its own
    assert own.param_groups[0]["lr"] > 0


def test_a_warm_up_from_0_and_a_run_that_ends_at_0_are_not_warned_of():
    own = optimizer()
    scheduler = TPTScheduler(own, torch_schedules.LambdaLR(own, lambda epoch: max(0, epoch - 2)), max_epochs=6)
    for epoch in range(1, 5):
        own.step()
        scheduler.step(epoch, 0.5)
    own = optimizer()
    scheduler = TPTScheduler(own, CosineLRScheduler(own, t_initial=4), max_epochs=4)
    for epoch in range(1, 5):
        scheduler.step(epoch, 0.5)
    assert scheduler.finished and own.param_groups[0]["lr"] == 0
