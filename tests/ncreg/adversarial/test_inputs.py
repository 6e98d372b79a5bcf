"""Batch sizes, seeds and gradients that must not matter, and inputs that are refused."""

import numpy as np
import pytest
import torch
from adversarial_cases import ATTACKS, EPS
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import nn

from ncreg.robustness import (
    autoattack,
    binomial_interval,
    deepfool,
    evaluate_adversarial,
    fgsm,
    find_suspicions,
    minimum_norm,
    pgd,
    predict,
    random_search,
    robustness_curve,
)
from ncreg.robustness._inputs import check_images, check_logits, check_target, in_eval_mode


class TestBatches:
    @pytest.mark.parametrize("epsilon", [0.1, 1.0])
    @pytest.mark.parametrize("wrong", [0, 1])
    def test_models_are_never_asked_about_no_image(self, few, epsilon, wrong):
        """`view(len(x), -1)` takes no empty batch: neither where all is wrong at first nor once all is broken."""

        def model(x):
            return 3 * x.view(len(x), -1)[:, 20:24]

        images, target = few[0][:8], (model(few[0][:8]).argmax(1) + wrong) % 4
        for attack in (
            pgd,
            fgsm,
            random_search,
            lambda *given, **more: autoattack(*given, steps=5, queries=20, **more),
        ):
            found = attack(model, images, target, epsilon=epsilon)
            if wrong or epsilon == 1:
                assert found.accuracy == 0

    def test_images_that_ask_for_gradients_leave_none_behind(self, net, few):
        images = few[0][:5].clone().requires_grad_()
        for attack in (pgd, fgsm, random_search, lambda *given, **more: autoattack(*given, steps=2, queries=2, **more)):
            found = attack(net, images, few[1][:5], epsilon=EPS)
            plain = attack(net, images.detach(), few[1][:5], epsilon=EPS)
            assert not found.images.requires_grad and torch.equal(found.images, plain.images)
        assert images.grad is None

    def test_a_model_that_changes_its_input_in_place_changes_no_image(self, net, few):
        def normalising(x):
            return net(x.sub_(0.5).mul_(2).div_(2).add_(0.5))

        def apart(x):
            return net(x.sub(0.5).mul(2).div(2).add(0.5))

        images, target = few[0][:8].clone(), few[1][:8]
        calls = (
            lambda model: predict(model, images),
            lambda model: pgd(model, images, target, epsilon=EPS, steps=3).images,
            lambda model: random_search(model, images, target, epsilon=EPS, queries=9).images,
            lambda model: deepfool(model, images, max_steps=3).distance,
            lambda model: minimum_norm(model, images, target, rounds=2, steps=2).images,
            lambda model: robustness_curve(model, images, target, [0.0, EPS], steps=2).robust,
            lambda model: autoattack(model, images, target, epsilon=EPS, steps=3, queries=9).images,
            lambda model: [finding.value for finding in find_suspicions(model, images, target)],
        )
        for call in calls:
            torch.testing.assert_close(call(normalising), call(apart), rtol=0, atol=0)
            assert torch.equal(images, few[0][:8])


@pytest.mark.usefixtures("unchecked")
class TestBadInput:
    @pytest.mark.parametrize("attack", list(ATTACKS))
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"images": lambda x: x * 2 - 1}, ValueError, "normalise inside the model"),
            ({"images": lambda x: x * 255}, ValueError, r"in \[0, 1\]"),
            ({"images": lambda x: (x * 255).byte()}, TypeError, "float"),
            ({"images": lambda x: torch.where(x > 0.5, torch.nan, x)}, ValueError, "finite"),
            ({"images": lambda x: x[:0]}, ValueError, "empty"),
            ({"images": lambda x: x[:, 0]}, ValueError, "batch, channels"),
            ({"images": lambda x: x.numpy()}, TypeError, "tensor"),
            ({"target": lambda y: y.float()}, TypeError, "integer"),
            ({"target": lambda y: y + 5}, ValueError, r"\[0, 10\)"),
            ({"target": lambda y: y - 1}, ValueError, r"\[0, 10\)"),
            ({"target": lambda y: y[:5]}, ValueError, "shape"),
            ({"target": lambda y: nn.functional.one_hot(y)}, ValueError, "shape"),
            ({"epsilon": -0.1}, ValueError, "at least 0"),
            ({"epsilon": float("nan")}, ValueError, "finite"),
            ({"epsilon": 8}, ValueError, "/255"),
            ({"epsilon": "0.1"}, TypeError, "number"),
            ({"norm": "l1"}, ValueError, "norm=.* must be one of"),
            ({"batch_size": 0}, ValueError, "batch_size"),
            ({"model": lambda net: lambda x: net(x).softmax(1)}, ValueError, "probabilities"),
            ({"model": lambda net: lambda x: net(x) * torch.nan}, ValueError, "not finite"),
            ({"model": lambda net: lambda x: net(x)[:, :1]}, ValueError, "2 classes"),
            ({"model": lambda net: lambda x: net(x).argmax(1)}, TypeError, "logits"),
            ({"model": lambda net: lambda x: (net(x),)}, TypeError, "tuple"),
            ({"model": lambda net: lambda x: net(x)[:1]}, ValueError, "shape"),
            ({"model": lambda net: nn.Sequential(nn.Dropout(), net)}, ValueError, r"model\.eval"),
            ({"model": lambda net: nn.Sequential(nn.Dropout(), net).forward}, ValueError, r"model\.eval"),
            ({"model": lambda net: "net"}, TypeError, "callable"),
        ],
    )
    def test_is_refused(self, net, few, attack, change, error, message):
        given = {"model": net, "images": few[0], "target": few[1], "epsilon": EPS, "norm": "linf", "batch_size": 32}
        for key, value in change.items():
            given[key] = value(given[key]) if callable(value) else value
        positional = [given.pop(key) for key in ("model", "images", "target")]
        try:
            with pytest.raises(error, match=message):
                ATTACKS[attack](*positional, **given)
        finally:
            net.eval()

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"loss": "hinge"}, ValueError, "loss='hinge' must be one of"),
            ({"steps": 0}, ValueError, "steps"),
            ({"steps": 2.5}, TypeError, "steps"),
            ({"restarts": 0}, ValueError, "restarts"),
            ({"restarts": 2, "random": False}, ValueError, "random"),
            ({"step_size": 0.0}, ValueError, "step_size"),
            ({"step_size": float("nan")}, ValueError, "step_size"),
            ({"step_size": "0.1"}, TypeError, "step_size=.* must be a number"),
            ({"seed": None}, TypeError, "seed=None must be an integer"),
            ({"seed": 0.5}, TypeError, "seed=.* must be an integer"),
            ({"seed": 2**64}, ValueError, "at most 64 bits"),
        ],
    )
    def test_pgd_arguments(self, net, few, arguments, error, message):
        with pytest.raises(error, match=message):
            pgd(net, *few, epsilon=EPS, **arguments)

    def test_dlr_needs_three_classes(self, net, few):
        with pytest.raises(ValueError, match="at least 3 classes, got 2"):
            pgd(lambda x: net(x)[:, :2], few[0], few[1] % 2, epsilon=EPS, loss="dlr")

    def test_logits_that_break_down_under_attack(self, few):
        def fragile(x):
            logits = x.flatten(1)[:, :2] * 10
            return torch.where(
                (x - few[0][: len(x)]).abs().amax((1, 2, 3), keepdim=True)[:, 0, 0] > 0, torch.nan, logits
            )

        with pytest.raises(ValueError, match="not finite"):
            pgd(fragile, few[0], torch.zeros(60, dtype=torch.long), epsilon=EPS)

    @pytest.mark.parametrize(
        ("arguments", "message"), [({"version": "plus"}, "version"), ({"survivors": torch.ones(60)}, "survivors")]
    )
    def test_autoattack_arguments(self, net, few, arguments, message):
        with pytest.raises(ValueError, match=message):
            autoattack(net, *few, epsilon=EPS, **arguments)

    @pytest.mark.parametrize("mask", [[True] * 60, np.ones(60, dtype=bool)])
    def test_masks_that_are_no_tensors(self, net, few, mask):
        with pytest.raises(TypeError, match=f"survivors must be a tensor of bool, got {type(mask).__name__}"):
            autoattack(net, *few, epsilon=EPS, survivors=mask)
        with pytest.raises(TypeError, match=f"margin must be a tensor of bool, got {type(mask).__name__}"):
            find_suspicions(net, *few, margin=mask)

    def test_suspicions_refuse_what_is_no_tensor_or_no_batch(self, net, few):
        with pytest.raises(TypeError, match="got tuple: wrap it"):
            find_suspicions(lambda x: (net(x),), *few)
        with pytest.raises(ValueError, match="batch_size=0"):
            find_suspicions(net, *few, batch_size=0)

    def test_seeds_of_numpy_are_welcome(self, net, few):
        for attack in (pgd, random_search, lambda *given, **more: autoattack(*given, version="apgd", steps=2, **more)):
            mine, same = (attack(net, *few, epsilon=EPS, seed=seed).images for seed in (np.int64(3), 3))
            assert torch.equal(mine, same)

    def test_unknown_preset(self, net, few):
        with pytest.raises(ValueError, match="preset"):
            evaluate_adversarial(net, *few, epsilon=EPS, preset="slow")

    def test_probabilities_are_told_from_logits_that_lie_in_the_unit_interval(self):
        rows = torch.tensor([[0.2, 0.8], [0.5, 0.5]])
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            with pytest.raises(ValueError, match="probabilities"):
                check_logits(rows.to(dtype))
        assert check_logits(rows + torch.tensor([[0.0, 0.0], [0.0, 0.1]])) is not None
        assert check_logits(rows.log()) is not None

    def test_checks_return_what_they_were_given(self):
        images, target = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 2], dtype=torch.uint8)
        assert check_images(images) is images
        checked = check_target(target, images, 3)
        assert checked.dtype == torch.int64 and checked.tolist() == [0, 1, 2]
        with pytest.raises(TypeError, match="bool"):
            check_target(target.bool(), images, 3)
        model = nn.Linear(2, 2).eval()
        assert in_eval_mode(model) is model and in_eval_mode(len) is len


class TestShared:
    @settings(max_examples=50, deadline=None)
    @given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
    def test_interval_is_wilsons(self, counts):
        expected = binomtest(*counts).proportion_ci(method="wilson")
        assert binomial_interval(*counts) == pytest.approx((expected.low, expected.high), abs=1e-12)

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize(("correct", "n", "error"), [(3, 2, ValueError), (-1, 2, ValueError), (0, 0, ValueError)])
    def test_interval_refuses(self, correct, n, error):
        with pytest.raises(error):
            binomial_interval(correct, n)

    def test_predict_gives_the_models_logits_in_order(self, net, batch):
        whole = predict(net, batch[0], batch_size=64)
        torch.testing.assert_close(whole, net(batch[0]).detach(), rtol=1e-5, atol=1e-5)
        assert not whole.requires_grad
        assert predict(lambda x: net(x).bfloat16(), batch[0][:3]).dtype == torch.float32
