"""Robustness curves, reports, and the checks that make a result suspect."""

import json

import numpy as np
import pytest
import torch
from adversarial_cases import EPS
from torch import nn

from ncreg.robustness import (
    binomial_interval,
    evaluate_adversarial,
    find_suspicions,
    logit_margin,
    pgd,
    predict,
    robustness_curve,
)


class TestCurve:
    def test_never_rises_and_starts_at_the_clean_accuracy(self, net, batch):
        curve = robustness_curve(net, *batch, [0, 0.02, 0.05, 0.1, 0.2], steps=5)
        assert curve.accuracy[0] == float((net(batch[0]).argmax(1) == batch[1]).double().mean())
        assert list(curve.accuracy) == sorted(curve.accuracy, reverse=True) and curve.accuracy[0] > curve.accuracy[-1]
        assert not (curve.robust[1:] & ~curve.robust[:-1]).any()
        for accuracy, (low, high) in zip(curve.accuracy, curve.intervals, strict=True):
            assert low <= accuracy <= high
        single = pgd(net, *batch, epsilon=0.1, steps=5)
        assert curve.accuracy[3] <= single.accuracy + 0.02

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize(
        ("epsilons", "message"), [([], "empty"), ([0.1, 0.1], "rise"), ([0.2, 0.1], "rise"), ([-0.1], "at least 0")]
    )
    def test_refuses(self, net, few, epsilons, message):
        with pytest.raises(ValueError, match=message):
            robustness_curve(net, *few, epsilons)
        with pytest.raises(TypeError, match="epsilons=0.1 must be a sequence of numbers, not float"):
            robustness_curve(net, *few, 0.1)


class TestSuspicion:
    @staticmethod
    def flags(*given, **more):
        return {finding.name for finding in find_suspicions(*given, **more) if finding.flagged}

    def test_an_honest_model_is_only_short_of_autoattack(self, net, few):
        assert self.flags(net, *few) == {"no_ensemble"}
        assert self.flags(net, *few, ensemble=torch.ones(60, dtype=torch.bool)) == set()

    def test_zero_gradient_share_and_scale(self, net, few):
        found = {f.name: f for f in find_suspicions(lambda x: 1e4 * net(x), *few)}
        x = few[0].clone().requires_grad_()
        loss = nn.functional.cross_entropy(1e4 * net(x), few[1], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)  # not backward: the net is shared with other tests
        assert found["zero_gradient"].value == float((gradient.flatten(1).abs().amax(1) == 0).double().mean()) > 0.5
        margins = logit_margin(1e4 * predict(net, few[0]), few[1]).abs()
        assert found["logit_scale"].value == pytest.approx(float(margins.median()))
        assert found["zero_gradient"].flagged and found["logit_scale"].flagged

    def test_gradients_that_are_not_finite_count_as_zero(self, few):
        def spoiled(x):
            total = x.flatten(1).sum(1)
            return torch.stack([(total - total.detach()).sqrt() + 3, torch.zeros_like(total)], 1)

        found = {f.name: f for f in find_suspicions(spoiled, few[0], few[1] % 2)}
        assert found["zero_gradient"].value == 1

    def test_randomness_and_batch_statistics(self, net, few):
        generator = torch.Generator().manual_seed(0)
        noisy = lambda x: net(x) + 0.05 * torch.randn(len(x), 10, generator=generator)  # noqa: E731
        assert {"random_model", "batch_dependence"} <= self.flags(noisy, *few)
        hidden = nn.Sequential(nn.BatchNorm2d(1), net)
        hidden[0].train()
        assert self.flags(lambda x: hidden(x), *few) == {"batch_dependence", "no_ensemble"}

    @pytest.mark.parametrize("mask", [-1e4, -1e9])
    def test_classes_ruled_out_hide_no_chance(self, net, few, mask):
        generator = torch.Generator().manual_seed(0)
        out = torch.tensor([False, True, True] + 7 * [False])
        noisy = lambda x: net(x) + 0.05 * torch.randn(len(x), 10, generator=generator)  # noqa: E731
        masked = lambda model: lambda x: model(x).masked_fill(out, mask)  # noqa: E731
        assert {"random_model", "batch_dependence"} <= self.flags(masked(noisy), *few)
        assert self.flags(masked(net), *few) == {"no_ensemble"}
        shaken = lambda x: masked(net)(x) + out * 64 * torch.randint(2, (1,), generator=generator)  # noqa: E731
        assert self.flags(shaken, *few) == {"no_ensemble"}  # rounding of 1e9

        def measured(model, target):
            generator.manual_seed(1)
            return {finding.name: finding.value for finding in find_suspicions(model, few[0], target)}

        alone = measured(lambda x: noisy(x)[:, ~out], few[1] % 8)
        assert measured(masked(noisy), few[1])["random_model"] == alone["random_model"] > 0

    def test_training_mode_is_found_and_statistics_are_not_moved(self, net, few):
        model = nn.Sequential(nn.BatchNorm2d(1), net).train()
        before = model[0].running_mean.clone()
        found = {f.name: f for f in find_suspicions(model, *few)}
        assert found["training_mode"].flagged and found["training_mode"].value == sum(
            m.training for m in model.modules()
        )
        assert torch.equal(model[0].running_mean, before) and model.training
        net.eval()

    def test_disagreements(self, net, few):
        def mask(count):
            return torch.arange(60) < count

        def flags(**more):
            masks = {"cross_entropy": mask(30), "margin": mask(30), "black_box": mask(40), "ensemble": mask(29)}
            return self.flags(net, *few, **(masks | more))

        assert flags() == set()
        assert flags(cross_entropy=mask(34)) == {"cross_entropy_gap"}
        assert flags(cross_entropy=mask(33)) == set()  # 5 points are allowed, not more
        assert flags(black_box=mask(29)) == {"black_box"}
        assert flags(ensemble=mask(25)) == {"margin_gap"}
        assert flags(ensemble=None) == {"no_ensemble"}


class TestReport:
    @pytest.mark.usefixtures("unchecked")
    def test_numbers_of_numpy_go_into_json(self, net, few):
        found = evaluate_adversarial(net, *few, epsilon=np.float32(EPS), seed=np.int64(3), autoattack=False)
        plain = evaluate_adversarial(net, *few, epsilon=float(np.float32(EPS)), seed=3, autoattack=False)
        assert json.dumps(found.as_dict()) == json.dumps(plain.as_dict())

    def test_headline_is_at_most_every_row_and_the_rule_of_two_losses_holds(self, report):
        names = [row.name for row in report.rows]
        assert names[0] == "clean" and names[-2:] == ["apgd-ce", "apgd-t"]
        assert any("cross_entropy" in name for name in names) and any("PGD-20 margin" in name for name in names)
        for row in report.rows:
            assert report.headline.accuracy <= row.accuracy and not (report.headline.robust & ~row.robust).any()
            assert (row.low, row.high) == binomial_interval(row.correct, 60) and row.correct == int(row.robust.sum())
        assert report.headline.name.startswith("AutoAttack") and not report.flagged
        assert (
            json.loads(json.dumps(report.as_dict(), allow_nan=False))["headline"]["correct"] == report.headline.correct
        )
        shown = str(report)
        assert all(finding.name in shown for finding in report.findings) and all(name in shown for name in names)

    def test_large_logits_flag_it(self, report, net, few):
        large = evaluate_adversarial(lambda x: 1e4 * net(x), *few, epsilon=EPS)
        flagged = {finding.name for finding in large.findings if finding.flagged}
        assert {"zero_gradient", "logit_scale", "cross_entropy_gap", "black_box"} <= flagged
        assert abs(large.headline.correct - report.headline.correct) <= 1
        assert "FLAGGED" in str(large)

    def test_without_autoattack_it_is_flagged(self, net, few):
        report = evaluate_adversarial(net, *few, epsilon=EPS, autoattack=False)
        assert report.flagged and [f.name for f in report.findings if f.flagged] == ["no_ensemble"]
        masks = torch.stack([row.robust for row in report.rows])
        assert torch.equal(report.headline.robust, masks.all(0))

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_logits_that_do_not_depend_on_the_images(self, norm):
        images, target = torch.rand(6, 1, 8, 8), torch.tensor([0, 0, 0, 0, 1, 2])
        constant = lambda x: torch.tensor([[2.0, 1.0, 0.0]]).repeat(len(x), 1)  # noqa: E731
        with pytest.warns(UserWarning, match="no gradient leads from the logits to the images"):
            report = evaluate_adversarial(constant, images, target, epsilon=EPS, norm=norm)
        assert report.headline.accuracy == pytest.approx(4 / 6)
        assert {f.name: f.value for f in report.findings}["zero_gradient"] == 1 and report.flagged

    def test_full_preset_runs_all_of_autoattack(self, net, batch):
        report = evaluate_adversarial(net, batch[0][:4], batch[1][:4], epsilon=0.4, preset="full")
        assert report.headline.correct == 0
        assert [row.name for row in report.rows][-4:] == ["apgd-ce", "apgd-t", "fab-t", "square"]
