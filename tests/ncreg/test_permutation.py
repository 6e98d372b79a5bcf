"""The permutation of a fixed head in averages, states, functional calls, copies between processes and pickles."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from ncreg.heads import ETFHead

SEATS = [3, 1, 0, 2, 5, 4]
HEADS = {
    "dense": lambda seats=SEATS: ETFHead(12, 6, permutation=seats),
    "grouped": lambda seats=SEATS: ETFHead(13, 6, structure="grouped", permutation=seats),
    "householder": lambda seats=SEATS: ETFHead(5, 6, structure="householder", permutation=seats),
    "centre": lambda seats=SEATS: ETFHead(6, 6, structure="centre", permutation=seats),
}
permuted_heads = pytest.mark.parametrize("build", HEADS.values(), ids=HEADS)


def rows(head, count=3):
    return torch.randn(count, head.in_features, generator=torch.Generator().manual_seed(2))


def test_a_permutation_is_in_the_state_and_no_average_changes_it():
    head = ETFHead(40, 40, structure="grouped", permutation=list(range(39, -1, -1)))
    features = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    expected = head(features)
    averages = [
        torch.optim.swa_utils.AveragedModel(head, avg_fn=rule, use_buffers=True)
        for rule in (lambda old, new, n: 0.9 * old + 0.1 * new, lambda old, new, n: 0.9999 * old + 0.0001 * new)
    ]
    ema = ModelEmaV3(nn.Sequential(nn.Linear(1, 1), head), decay=0.9)
    for _ in range(200):
        for average in averages:
            average.update_parameters(head)
        ema.update(nn.Sequential(nn.Linear(1, 1), head))
    for average in (*(a.module for a in averages), ema.module[1]):
        assert torch.equal(average(features), expected)
        assert torch.equal(average.state_dict()["permutation"], torch.arange(39, -1, -1))
    other = ETFHead(40, 40, structure="grouped", permutation=list(range(40)))
    other.load_state_dict(averages[0].module.state_dict())
    assert torch.equal(other(features), expected)


@pytest.mark.usefixtures("unchecked")
def test_a_wrong_or_missing_permutation_in_a_state_is_named():
    head = ETFHead(12, 6, structure="grouped", permutation=SEATS)
    with pytest.raises(RuntimeError, match="Missing key.*permutation"):
        head.load_state_dict({})
    with pytest.raises(RuntimeError, match="permutation: permutation must hold each of 0 … 5 exactly once"):
        head.load_state_dict({"permutation": torch.tensor([0, 1, 2, 3, 4, 4])})
    assert head.permutation.tolist() == SEATS
    with pytest.raises(RuntimeError, match="Unexpected key.*permutation"):
        ETFHead(12, 6).load_state_dict(ETFHead(12, 6, permutation=SEATS).state_dict())


@permuted_heads
def test_states_and_buffers_go_into_functional_calls(build):
    head, other = build(), build([5, 4, 3, 2, 1, 0])
    features = rows(head)
    for tensors in (other.state_dict(), dict(other.named_buffers())):
        assert torch.equal(functional_call(head, tensors, (features,)), other(features))
    assert head.permutation.tolist() == SEATS


@permuted_heads
def test_an_ensemble_of_heads_has_each_its_own_permutation(build):
    heads = [build(), build([5, 4, 3, 2, 1, 0])]
    features = rows(heads[0])
    state = stack_module_state(heads)
    logits = vmap(lambda *state: functional_call(copy.deepcopy(heads[0]).to("meta"), state, (features,)))(*state)
    torch.testing.assert_close(logits, torch.stack([head(features) for head in heads]))


@permuted_heads
def test_buffers_of_the_first_process_are_honoured(build):
    """DistributedDataParallel writes them over those of the others, in place."""
    head, first = build(), build([5, 4, 3, 2, 1, 0])
    for mine, its in zip(head.buffers(), first.buffers(), strict=True):
        mine.copy_(its)
    assert torch.equal(head(rows(head)), first(rows(head)))
    assert head.permutation.tolist() == [5, 4, 3, 2, 1, 0]


@permuted_heads
def test_a_head_pickled_by_earlier_versions(build):
    """They kept the permutation in its buffer alone."""
    head, old = build(), build()
    del old.__dict__["_seats"], old.__dict__["_kept"]
    old = copy.deepcopy(old)  # by way of __setstate__, as pickle does
    assert torch.equal(old(rows(old)), head(rows(head)))
    average = torch.optim.swa_utils.AveragedModel(old, avg_fn=lambda a, b, n: 0.9999 * a + 0.0001 * b, use_buffers=True)
    for _ in range(100):
        average.update_parameters(old)
    assert average.module.permutation.tolist() == SEATS
    old.reset_parameters()
    assert torch.equal(old(rows(old)), head(rows(head)))


def test_the_average_of_the_buffer_itself_is_rounded():
    """What the second copy is for: without it classes would sit on other vertices."""
    head = HEADS["grouped"](list(range(5, -1, -1)))
    average = torch.optim.swa_utils.AveragedModel(head, avg_fn=lambda a, b, n: 0.9 * a + 0.1 * b, use_buffers=True)
    stored = dict(average.module.named_buffers())["permutation"]
    stored.sub_(torch.tensor([1, 0, 0, 1, 0, 0]))
    assert average.module.permutation.tolist() == [5, 4, 3, 2, 1, 0]
    assert torch.equal(average(rows(head)), head(rows(head)))
    assert average.module.state_dict()["permutation"].tolist() == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("seats", [[0, 1], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [0, 0, 1, 2, 3, 4]])
def test_a_state_that_is_refused_leaves_the_head_alone(seats):
    head = HEADS["grouped"]()
    with pytest.raises(RuntimeError, match="permutation"):
        head.load_state_dict({"permutation": torch.tensor(seats)})
    assert head.permutation.tolist() == SEATS and head.state_dict()["permutation"].tolist() == SEATS


def test_the_state_holds_the_buffer_itself_also_of_heads_built_in_inference_mode():
    head = HEADS["centre"]()
    head.state_dict()["permutation"].copy_(torch.arange(6))  # how many repositories load weights
    assert head.permutation.tolist() == list(range(6))
    with torch.inference_mode():
        head = HEADS["centre"]()
    assert head.state_dict()["permutation"].tolist() == SEATS
