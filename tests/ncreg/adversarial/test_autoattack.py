"""AutoAttack against the package it runs on."""

import contextlib
import sys

import pytest
import torch
from adversarial_cases import EPS

from ncreg.robustness import (
    autoattack,
    pgd,
)


class TestAutoAttack:
    def test_equals_pyautoattacks_own_loop(self, net, few):
        module = pytest.importorskip("pyautoattack.autoattack")
        images, target = few
        theirs = module.AutoAttack(net, norm="Linf", eps=EPS, seed=0, version="custom", attacks=["apgd-ce", "apgd-t"])
        base = sys.modules["pyautoattack.autopgd_base"]
        common = {"eps": EPS, "n_iter": 20, "device": "cpu", "logger": theirs.logger}
        theirs.apgd, theirs.apgd_targeted = base.APGDAttack(net, **common), base.APGDAttack_targeted(net, **common)
        with torch.random.fork_rng(), without_trace():
            _, given_class = theirs.run_standard_evaluation(images, target, batch_size=256)
        mine = autoattack(net, images, target, epsilon=EPS, version="apgd", steps=20)
        assert torch.equal(mine.robust, given_class == target)
        assert 0 < mine.accuracy < 1 and mine.note == "" and mine.target_classes == 9

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_is_at_most_every_attack_of_it_and_at_most_pgd(self, net, few, norm):
        epsilon = EPS if norm == "linf" else 0.5
        result = autoattack(net, *few, epsilon=epsilon, norm=norm, steps=30, queries=50)
        assert list(result.after) == ["apgd-ce", "apgd-t", "fab-t", "square"]
        masks = [result.clean_correct, *result.after.values()]
        for before, after in zip(masks, masks[1:], strict=False):
            assert not (after & ~before).any()
        assert torch.equal(result.robust, masks[-1])
        for loss in ("margin", "cross_entropy", "dlr"):
            assert result.accuracy <= pgd(net, *few, epsilon=epsilon, norm=norm, loss=loss).accuracy
        right = net(result.images).argmax(1) == few[1]
        assert torch.equal(result.robust, result.clean_correct & right)

    @pytest.mark.parametrize("classes", [2, 3, 4])
    def test_few_classes(self, net, batch, classes):
        target = batch[1] % classes
        images, target = batch[0][target == batch[1]][:40], batch[1][target == batch[1]][:40]
        result = autoattack(lambda x: net(x)[:, :classes], images, target, epsilon=EPS, steps=20, queries=50)
        assert result.target_classes == classes - 1
        assert ("needs 4 classes" in result.note) == (classes < 4)
        plain = pgd(lambda x: net(x)[:, :classes], images, target, epsilon=EPS)
        assert 0 < result.accuracy <= plain.accuracy
        scaled = autoattack(lambda x: 1e3 * net(x)[:, :classes], images, target, epsilon=EPS, steps=20, version="apgd")
        assert abs(scaled.accuracy - result.accuracy) <= 0.05

    def test_survivors_alone_are_attacked(self, net, few):
        survivors = torch.zeros(60, dtype=torch.bool)
        survivors[:20] = True
        result = autoattack(net, *few, epsilon=EPS, version="apgd", steps=5, survivors=survivors)
        assert not result.robust[20:].any() and torch.equal(result.images[20:], few[0][20:])
        whole = autoattack(net, few[0][:20], few[1][:20], epsilon=EPS, version="apgd", steps=5)
        assert torch.equal(result.robust[:20], whole.robust)

    def test_silent_seeded_and_the_global_generator_untouched(self, net, few, capfd):
        state = torch.random.get_rng_state()
        first, again, other = (autoattack(net, *few, epsilon=EPS, steps=3, queries=5, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(state, torch.random.get_rng_state())
        assert torch.equal(first.images, again.images) and not torch.equal(first.images, other.images)
        assert capfd.readouterr() == ("", "")

    def test_models_that_return_views_hide_gradients_or_speak_double(self):
        images = torch.rand(10, 1, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        target, before = images.flatten(1).argmax(1), images.clone()
        for norm in ("linf", "l2"):
            view = autoattack(lambda x: x.flatten(1), images, target, epsilon=0.05, norm=norm, steps=5, queries=20)
            hidden = autoattack(
                torch.no_grad()(lambda x: x.flatten(1)), images, target, epsilon=0.05, norm=norm, steps=5, queries=200
            )
            assert torch.equal(images, before)
            assert ("Square left out" in view.note) == (norm == "l2") == ("square" not in view.after)
            assert hidden.after["apgd-ce"].sum() >= view.after["apgd-ce"].sum()
        gap = images.flatten(1).topk(2).values
        expected = gap[:, 0] - gap[:, 1] > 0.1
        exact = autoattack(lambda x: x.flatten(1), images, target, epsilon=0.05, steps=20, queries=20)
        assert torch.equal(exact.robust, expected)

    def test_channels_last_images(self, net, few):
        images = few[0].expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        for norm in ("linf", "l2"):
            result = autoattack(lambda x: net(x[:, :1]), images, few[1], epsilon=EPS, norm=norm, steps=3, queries=3)
            assert 0 < result.accuracy <= 1

    def test_missing_package_is_named(self, net, few, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyautoattack", None)
        monkeypatch.setitem(sys.modules, "pyautoattack.autopgd_base", None)
        with pytest.raises(ImportError, match=r"ncreg\[robust\]"):
            autoattack(net, *few, epsilon=EPS)


@contextlib.contextmanager
def without_trace():
    """pyautoattack switches tracing off for good; coverage and debuggers want it back."""
    trace = sys.gettrace()
    try:
        yield
    finally:
        sys.settrace(trace)
