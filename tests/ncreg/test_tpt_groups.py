"""Parameter groups that come late, scales of groups, and cycled momentum under TPTScheduler."""

import copy

import pytest
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, CyclicLR, ExponentialLR, LambdaLR, OneCycleLR

from ncreg.tpt import TPTScheduler


def parameter():
    return torch.zeros(1, requires_grad=True)


def optimizer(*rates, **args):
    return torch.optim.SGD([{"params": parameter(), "lr": rate} for rate in rates], lr=0.1, **args)


def train(scheduler, epochs, metric=1.0):
    """Epochs one after the other; the rates after each."""
    seen = []
    for _ in range(epochs):
        scheduler.optimizer.step()
        scheduler.step(scheduler.epoch + 1, metric)
        seen.append(scheduler.get_last_lr())
    return seen


def unfreeze(scheduler, rate):
    scheduler.optimizer.add_param_group({"params": parameter(), "lr": rate})


@pytest.mark.parametrize("terminal", ["cosine", "constant", "step"])
def test_a_group_added_after_the_onset_keeps_its_ratio(terminal):
    scheduler = TPTScheduler(optimizer(0.1, 0.05), max_epochs=40, min_terminal=12, terminal=terminal)
    train(scheduler, 5)
    leading = scheduler.get_last_lr()[0]
    unfreeze(scheduler, leading / 10)
    assert scheduler.get_last_lr()[-1] == leading / 10
    for first, second, late in train(scheduler, 6):
        assert (second, late) == (pytest.approx(first / 2), pytest.approx(first / 10))


@pytest.mark.parametrize("epochs", [0, 2])
def test_a_group_that_was_taken_away_is_said(epochs):
    scheduler = TPTScheduler(optimizer(0.1, 0.05), max_epochs=40)
    train(scheduler, epochs)
    del scheduler.optimizer.param_groups[0]
    with pytest.raises(ValueError, match="has 1 parameter groups, the TPTScheduler knows 2.*requires_grad_"):
        scheduler.step(epochs + 1, 1.0)
    assert scheduler.epoch == epochs


def test_a_late_group_is_in_the_state_and_resumes():
    def build():
        given = optimizer(0.1)
        return TPTScheduler(given, CosineLRScheduler(given, t_initial=20), max_epochs=40, min_terminal=12)

    whole = build()
    train(whole, 3)
    unfreeze(whole, 0.02)
    state = copy.deepcopy(whole.state_dict())  # before the first step with it
    assert len(state["_starts"]) == len(state["_peaks"]) == len(state["lr"]) == 2 and state["driven"] == 1
    second = build()
    with pytest.raises(ValueError, match="state has 2 parameter groups, the optimizer has 1.*add_param_group"):
        second.load_state_dict(state)
    unfreeze(second, 0.5)
    second.load_state_dict(state)
    assert train(second, 8) == train(whole, 8)
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    "build",
    [lambda o: CosineAnnealingLR(o, 20), lambda o: ExponentialLR(o, 0.9), lambda o: CosineLRScheduler(o, t_initial=20)],
    ids=["closed", "recursive", "timm"],
)
def test_a_group_added_while_fitting_keeps_its_rate_and_that_is_said(build):
    alone, given = optimizer(0.1), optimizer(0.1)
    reference = TPTScheduler(alone, build(alone), max_epochs=40, min_terminal=8)
    scheduler = TPTScheduler(given, build(given), max_epochs=40, min_terminal=8)
    train(reference, 2, 0.5), train(scheduler, 2, 0.5)
    unfreeze(scheduler, 0.03)
    with pytest.warns(UserWarning, match="parameter group 1 was added after the inner schedule was built.*0.03"):
        scheduler.optimizer.step()
        scheduler.step(3, 0.5)
    train(reference, 1, 0.5)
    assert scheduler.get_last_lr() == [*reference.get_last_lr(), 0.03]
    resumed_with = optimizer(0.1)
    resumed = TPTScheduler(resumed_with, build(resumed_with), max_epochs=40, min_terminal=8)
    unfreeze(resumed, 0.7)
    resumed.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    after = train(scheduler, 9)
    assert [rates[:1] for rates in after] == train(reference, 9)
    assert train(resumed, 9) == after
    ratios = [late / first for first, late in after[:-1] if first]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))


def test_a_state_without_the_newer_key_loads():
    first, second = (TPTScheduler(optimizer(0.1), max_epochs=40) for _ in range(2))
    train(first, 4)
    state = first.state_dict()
    del state["driven"]
    second.load_state_dict(state)
    assert train(second, 5) == train(first, 5)


def test_a_late_group_has_its_scale():
    scheduler = TPTScheduler(optimizer(0.1), max_epochs=40, min_terminal=12, terminal="constant")
    train(scheduler, 3)
    scheduler.optimizer.add_param_group({"params": parameter(), "lr": 0.1, "lr_scale": 0.25})
    assert train(scheduler, 2) == [pytest.approx([0.1, 0.025])] * 2


@pytest.mark.parametrize("inner", [None, CosineAnnealingLR, LambdaLR], ids=["none", "cosine", "lambda"])
@pytest.mark.parametrize("phase", ["built", "fitting", "terminal"])
def test_a_second_scheduler_does_not_scale_again(inner, phase):
    """One optimizer of two groups keeps the ratio of their scales, whatever was stepped before and is after."""
    given = torch.optim.SGD([{"params": parameter(), "lr_scale": scale} for scale in (0.25, 1.0)], lr=0.1)

    def build(schedule):
        argument = {CosineAnnealingLR: 40, LambdaLR: lambda epoch: 1 / (2 + epoch)}.get(schedule)
        return TPTScheduler(given, schedule and schedule(given, argument), max_epochs=40, min_terminal=12)

    first = build(inner)
    train(first, {"built": 0, "fitting": 3, "terminal": 3}[phase], 0.5)
    train(first, 3 if phase == "terminal" else 0)
    left = first.get_last_lr()
    assert left[0] == pytest.approx(left[1] / 4)
    if inner is not LambdaLR:  # which begins anew at its own start
        assert build(None).get_last_lr() == left
    for again in (None, inner):
        rates = train(build(again), 2, 0.5) + train(build(again), 2)
        assert all(row[0] == pytest.approx(row[1] / 4) and row[1] > 0.01 for row in rates)
    for group in given.param_groups:
        group["lr"] = 0.3  # rates of the caller's own have no scale yet
    assert build(None).get_last_lr() == pytest.approx([0.075, 0.3])


SCHEDULES = {
    "none": lambda given: None,
    "cosine": lambda given: CosineAnnealingLR(given, 40),
    "lambda": lambda given: LambdaLR(given, lambda epoch: 1 / (3 + epoch)),
    "timm": lambda given: CosineLRScheduler(given, 40, warmup_t=2, warmup_lr_init=0.01),
}


@pytest.mark.parametrize("scales", [(0.25, 1.0), (0.5, 0.25)])
@pytest.mark.parametrize("process", ["same", "new"])
@pytest.mark.parametrize("before", [*SCHEDULES, "timm alone"])
def test_rates_that_a_schedule_left_have_their_scale_also_in_another_process(before, process, scales):
    """With the optimizer's state alone, as a user of timm loads it: every schedule goes on with the scales, once."""

    def make():
        return torch.optim.SGD([{"params": parameter(), "lr_scale": scale} for scale in scales], lr=0.1)

    for after, build in SCHEDULES.items():
        given = make()
        if before == "timm alone":
            SCHEDULES["timm"](given).step(5)
        else:
            train(TPTScheduler(given, SCHEDULES[before](given), max_epochs=40, min_terminal=12), 5, 0.5)
        left = [group["lr"] for group in given.param_groups]
        if process == "new":
            state = copy.deepcopy(given.state_dict())
            given = make()
            given.load_state_dict(state)
        scheduler = TPTScheduler(given, build(given), max_epochs=40, min_terminal=12)
        if after == "none":
            assert scheduler.get_last_lr() == left
        if after == "timm":  # begins anew: its warmup is a rate of its own, not a share of what was left
            assert scheduler.get_last_lr() == pytest.approx([0.01 * scale for scale in scales])
        rates = [scheduler.get_last_lr(), *train(scheduler, 3, 0.5), *train(scheduler, 3)]
        assert all(row[0] / row[1] == pytest.approx(scales[0] / scales[1]) for row in rates)


def one_cycle(given):
    return OneCycleLR(given, 0.1, total_steps=20)


def cyclic(given):
    return CyclicLR(given, 0.01, 0.1, step_size_up=4)


def chained(given):
    return ChainedScheduler([cyclic(given), ExponentialLR(given, 0.9)])


@pytest.mark.parametrize("build", [one_cycle, cyclic, chained])
@pytest.mark.parametrize("kind", ["momentum", "betas"])
def test_cycled_momentum_is_set_back_at_the_onset(build, kind):
    def make():
        sgd = kind == "momentum"
        given = (
            torch.optim.SGD([parameter()], lr=0.1, momentum=0.91)
            if sgd
            else torch.optim.Adam([parameter()], betas=(0.91, 0.99))
        )
        return TPTScheduler(given, build(given), max_epochs=20, min_terminal=6)

    def momentum(scheduler):
        group = scheduler.optimizer.param_groups[0]
        return group["momentum"] if kind == "momentum" else group["betas"][0]

    scheduler = make()
    train(scheduler, 4, 0.5)
    assert momentum(scheduler) != 0.91
    train(scheduler, 2)
    assert momentum(scheduler) == 0.91
    if kind == "betas":
        assert scheduler.optimizer.param_groups[0]["betas"][1] == 0.99
    resumed = make()  # building the inner schedule cycles the momentum again
    resumed.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    assert momentum(resumed) == 0.91
    fitting = make()
    train(fitting, 3, 0.5)
    state = copy.deepcopy(fitting.state_dict())
    for _ in range(4):
        resumed = make()
        resumed.load_state_dict(state)
        assert momentum(resumed) == momentum(fitting) not in (0.91, momentum(make()))
        train(resumed, 1, 0.5), train(fitting, 1, 0.5)
        assert momentum(resumed) == momentum(fitting)
        state = copy.deepcopy(fitting.state_dict())
    resumed = make()
    del state["schedule"]["momentum"]  # as earlier versions wrote it
    resumed.load_state_dict(state)
    assert momentum(resumed) == momentum(make())


def test_without_a_terminal_phase_the_momentum_goes_on_cycling():
    given = torch.optim.SGD([parameter()], lr=0.1, momentum=0.9)
    scheduler = TPTScheduler(given, one_cycle(given), max_epochs=20, extend=None)
    train(scheduler, 3)
    assert given.param_groups[0]["momentum"] != 0.9


@pytest.mark.parametrize("inner", [None, CosineAnnealingLR], ids=["none", "cosine"])
def test_a_tensor_rate_that_all_groups_share_is_one_rate_a_group(inner):
    """torch gives every group the tensor that is handed in as lr=, and schedules write into it."""

    def rates(rate):
        groups = [{"params": parameter(), "lr_scale": scale} for scale in (0.5, 1.0)]
        given = torch.optim.Adam(groups, lr=rate)
        scheduler = TPTScheduler(given, inner and inner(given, 6), max_epochs=20, min_terminal=8)
        seen = train(scheduler, 2, 0.5) + train(scheduler, 3)
        given.add_param_group({"params": parameter()})
        seen += train(scheduler, 2)
        again = TPTScheduler(given, inner and inner(given, 6), max_epochs=20, min_terminal=8)
        again.load_state_dict(copy.deepcopy(scheduler.state_dict()))
        return seen + train(again, 2), given

    found, given = rates(torch.tensor(0.1, dtype=torch.float64))
    wanted, _ = rates(0.1)
    assert [row[:2] for row in found] == [pytest.approx(row[:2], abs=1e-12) for row in wanted]
    assert all(row[0] == pytest.approx(row[1] / 2) for row in found)
    assert all(isinstance(group["lr"], torch.Tensor) for group in given.param_groups)
