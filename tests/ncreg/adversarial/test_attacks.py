"""Attacks against closed forms, against foolbox, and against models that fool attacks."""

import warnings

import numpy as np
import pytest
import torch
from adversarial_cases import ATTACKS, EPS, SCALES, affine
from torch import nn

from ncreg.robustness import (
    autoattack,
    fgsm,
    logit_margin,
    pgd,
    predict,
    random_search,
)
from ncreg.robustness.adversarial.objectives import loss_of


class TestClosedForms:
    @pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
    @pytest.mark.parametrize("loss", ["margin", "cross_entropy"])
    def test_two_affine_classes_lose_exactly_the_dual_norm(self, norm, dual, loss):
        weight, model, images, target = affine(classes=2)
        epsilon, clean = 0.03, logit_margin(model(images), target)
        result = pgd(model, images, target, epsilon=epsilon, norm=norm, loss=loss, steps=30, random=False)
        fall = clean - logit_margin(model(result.images), target)
        expected = epsilon * torch.linalg.vector_norm(weight[0] - weight[1], ord=dual)
        torch.testing.assert_close(fall, expected.expand(16), rtol=1e-6, atol=0)

    def test_fgsm_is_the_sign_of_the_softmax_gradient(self):
        weight, model, images, target = affine()
        share = torch.softmax(model(images), 1) - nn.functional.one_hot(target, 5)
        expected = images + 0.02 * (share @ weight).sign().view_as(images)
        torch.testing.assert_close(fgsm(model, images, target, epsilon=0.02).images, expected, rtol=0, atol=1e-15)

    def test_dlr_and_margin_against_sorted_logits(self):
        logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        target = torch.arange(50) % 6
        for row, label, dlr, margin in zip(
            logits.numpy(), target.tolist(), loss_of("dlr")(logits, target), logit_margin(logits, target), strict=True
        ):
            ordered, rival = np.sort(row)[::-1], np.delete(row, label).max()
            assert margin == pytest.approx(row[label] - rival)
            assert dlr == pytest.approx(-(row[label] - rival) / (ordered[0] - ordered[2]))

    def test_random_search_reaches_the_corner_that_an_affine_model_fears(self):
        weight, model, images, target = affine(classes=2, shape=(1, 3, 3))
        clean = logit_margin(model(images), target)
        largest = 0.03 * (weight[0] - weight[1]).abs().sum()
        robust = random_search(model, images, target, epsilon=0.03, queries=400).robust
        assert torch.equal(robust, clean > largest)


class TestScale:
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    @pytest.mark.parametrize("loss", ["margin", "dlr"])
    def test_margin_and_dlr_do_not_see_it(self, net, batch, loss, norm):
        epsilon = EPS if norm == "linf" else 0.5
        plain = pgd(net, *batch, epsilon=epsilon, norm=norm, loss=loss, steps=10)
        assert 0.1 < plain.accuracy < plain.clean_correct.double().mean() - 0.1
        for scale in SCALES:
            scaled = pgd(lambda x, k=scale: k * net(x), *batch, epsilon=epsilon, norm=norm, loss=loss, steps=10)
            assert torch.equal(scaled.robust, plain.robust)

    @pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e25])
    def test_nor_do_extreme_scales_matter(self, net, batch, scale):
        for norm, epsilon in (("linf", EPS), ("l2", 0.5)):
            plain = pgd(net, *batch, epsilon=epsilon, norm=norm, steps=5)
            assert torch.equal(
                pgd(lambda x: scale * net(x), *batch, epsilon=epsilon, norm=norm, steps=5).robust, plain.robust
            )

    def test_half_precision_gradients_do_not_underflow(self, net, batch):
        double = pgd(net, *batch, epsilon=EPS, steps=5)
        half = pgd(lambda x: 1e-3 * net(x).half().float(), *batch, epsilon=EPS, steps=5)
        assert abs(half.accuracy - double.accuracy) <= 0.01

    def test_cross_entropy_is_fooled(self, net, batch):
        fooled = [pgd(lambda x, k=k: k * net(x), *batch, epsilon=EPS, loss="cross_entropy") for k in (1.0, 1e3)]
        assert fooled[1].accuracy > fooled[0].accuracy + 0.2

    def test_apgd_t_is_not(self, net, few):
        plain = autoattack(net, *few, epsilon=EPS, version="apgd", steps=20)
        for scale in (1e-3, 1e3):
            scaled = autoattack(lambda x, k=scale: k * net(x), *few, epsilon=EPS, version="apgd", steps=20)
            assert abs(int(scaled.robust.sum()) - int(plain.robust.sum())) <= 1


class TestPGD:
    def test_wrong_images_come_back_unchanged_and_count_as_wrong(self, net, batch):
        images, target = batch
        wrong = net(images).argmax(1) != target
        assert wrong.any()
        for attack in ("fgsm", "pgd", "random_search", "autoattack"):
            result = ATTACKS[attack](net, images, target, epsilon=EPS)
            assert torch.equal(result.images[wrong], images[wrong])
            assert not result.robust[wrong].any() and torch.equal(result.clean_correct, ~wrong)

    def test_lowest_margin_of_all_iterates_is_kept(self, net, batch):
        images, target = batch
        seen = []

        def spy(x):
            logits = net(x)
            seen.append((x.detach().clone(), logits.detach()))
            return logits

        result = pgd(spy, images, target, epsilon=EPS, steps=6, batch_size=len(images))
        right = result.clean_correct
        lowest = logit_margin(net(result.images), target)[right]
        visited = torch.stack(
            [logit_margin(logits, target[right]) for x, logits in seen if len(x) == int(right.sum())][:7]
        )
        assert len(visited) == 7
        clean = logit_margin(net(images), target)[right]
        torch.testing.assert_close(lowest, torch.minimum(visited.amin(0), clean), rtol=1e-5, atol=1e-5)

    def test_restarts_only_ever_break_more(self, net, batch):
        once = pgd(net, *batch, epsilon=EPS, steps=4)
        thrice = pgd(net, *batch, epsilon=EPS, steps=4, restarts=3)
        assert not (thrice.robust & ~once.robust).any()
        margins = [logit_margin(net(result.images), batch[1]) for result in (thrice, once)]
        assert (margins[0] <= margins[1] + 1e-6).all() and (margins[0] < margins[1] - 1e-3).any()

    def test_radius_zero_is_the_clean_accuracy(self, net, batch):
        for attack in ("fgsm", "pgd", "random_search", "autoattack"):
            result = ATTACKS[attack](net, *batch, epsilon=0)
            assert torch.equal(result.robust, result.clean_correct) and torch.equal(result.images, batch[0])

    @pytest.mark.parametrize("attack", ["pgd", "random_search"])
    def test_seed_decides_and_batch_size_does_not(self, net, batch, attack):
        run = ATTACKS[attack]
        state = torch.random.get_rng_state()
        first = run(net, *batch, epsilon=EPS, seed=3)
        again = run(net, *batch, epsilon=EPS, seed=3, batch_size=37)
        torch.testing.assert_close(first.images, again.images, rtol=0, atol=1e-6)
        assert not torch.equal(first.images, run(net, *batch, epsilon=EPS, seed=4).images)
        assert torch.equal(state, torch.random.get_rng_state())

    @pytest.mark.parametrize("attack", ["fgsm", "pgd", "autoattack"])
    def test_parameters_are_left_as_they_were(self, net, few, attack):
        first = next(net.parameters())
        first.requires_grad_(False)
        closure_called_with = []
        try:
            ATTACKS[attack](net, *few, epsilon=EPS)
            ATTACKS[attack](lambda x: closure_called_with.append(0) or net(x), *few, epsilon=EPS)
            assert [p.requires_grad for p in net.parameters()] == [False, True, True, True, True, True]
            assert all(p.grad is None for p in net.parameters())
        finally:
            first.requires_grad_(True)

    def test_parameters_are_frozen_meanwhile_and_thawed_after_an_error(self, few):
        class Breaks(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear, self.asked = nn.Linear(64, 10), []

            def forward(self, x):
                if torch.is_grad_enabled():
                    self.asked.append(self.linear.weight.requires_grad)
                    raise RuntimeError("broken")
                return self.linear(x.flatten(1))

        model = Breaks().eval()
        target = predict(model, few[0]).argmax(1)
        for called in (model, model.forward):
            with pytest.raises(RuntimeError, match="broken"):
                pgd(called, few[0], target, epsilon=EPS)
        assert model.asked == [False, False]
        assert all(p.requires_grad for p in model.parameters())

    @pytest.mark.parametrize("attack", [fgsm, pgd])
    def test_a_model_that_autograd_cannot_follow_is_said(self, net, few, attack):
        for hides in (torch.no_grad()(net.__call__), lambda x: net(x).detach(), lambda x: net(x.detach())):
            with pytest.warns(UserWarning, match="no gradient leads from the logits to the images"):
                attack(hides, *few, epsilon=EPS)

    def test_under_no_grad_and_inference_mode(self, net, few):
        expected = pgd(net, *few, epsilon=EPS, steps=3).robust
        with torch.no_grad():
            assert torch.equal(pgd(net, *few, epsilon=EPS, steps=3).robust, expected)
        with torch.inference_mode():
            assert torch.equal(pgd(net, few[0].clone(), few[1], epsilon=EPS, steps=3).robust, expected)
            assert autoattack(net, few[0].clone(), few[1], epsilon=EPS, steps=3, queries=3).accuracy <= 1


class TestFoolbox:
    """The same attack by another hand; foolbox looks at the last iterate alone, hence one image of leeway."""

    @pytest.mark.parametrize(("norm", "epsilon"), [("linf", EPS), ("l2", 0.5)])
    def test_fgsm_and_pgd_agree(self, net, batch, norm, epsilon):
        foolbox = foolbox_or_skip()
        images, target = batch
        model = foolbox.PyTorchModel(net, bounds=(0, 1))
        theirs = {
            "linf": (foolbox.attacks.LinfFastGradientAttack, foolbox.attacks.LinfPGD),
            "l2": (foolbox.attacks.L2FastGradientAttack, foolbox.attacks.L2PGD),
        }[norm]
        _, moved, broken = theirs[0]()(model, images, target, epsilons=epsilon)
        mine = fgsm(net, images, target, epsilon=epsilon, norm=norm)
        assert abs(int(mine.robust.sum()) - int((~broken).sum())) <= 1
        if norm == "linf":
            still = mine.clean_correct & ~mine.robust
            torch.testing.assert_close(mine.images[still], moved[still], rtol=0, atol=1e-6)
        how = {"epsilon": epsilon, "norm": norm, "loss": "cross_entropy", "steps": 40}
        *_, broken = theirs[1](rel_stepsize=2.5 / 40, steps=40, random_start=False)(
            model, images, target, epsilons=epsilon
        )
        mine = pgd(net, images, target, random=False, **how)
        assert abs(int(mine.robust.sum()) - int((~broken).sum())) <= 1

    def test_pgd_from_random_starts_agrees_on_average(self, net, batch):
        """Single draws differ by up to 4 images in 200, on either side; the means over ten by less than one."""
        foolbox = foolbox_or_skip()
        model = foolbox.PyTorchModel(net, bounds=(0, 1))
        attack = foolbox.attacks.LinfPGD(rel_stepsize=2.5 / 40, steps=40, random_start=True)
        theirs, mine = [], []
        for seed in range(10):
            with torch.random.fork_rng():
                torch.manual_seed(seed)  # their start draws from the global generator
                *_, broken = attack(model, *batch, epsilons=EPS)
            theirs.append(int((~broken).sum()))
            mine.append(int(pgd(net, *batch, epsilon=EPS, loss="cross_entropy", steps=40, seed=seed).robust.sum()))
        assert abs(np.mean(theirs) - np.mean(mine)) <= 1


def foolbox_or_skip():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("foolbox")
