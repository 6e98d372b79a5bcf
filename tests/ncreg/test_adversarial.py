"""Attacks against closed forms, against foolbox and pyautoattack, and against models that fool attacks."""

import contextlib
import json
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.datasets import load_digits
from torch import nn

from ncreg.robustness import (
    autoattack,
    binomial_interval,
    evaluate_adversarial,
    fgsm,
    find_suspicions,
    logit_margin,
    pgd,
    predict,
    random_search,
    robustness_curve,
)
from ncreg.robustness._inputs import check_images, check_logits, check_target, in_eval_mode
from ncreg.robustness.adversarial.objectives import loss_of
from ncreg.robustness.adversarial.steps import (
    ascent_direction,
    clip_change,
    default_step_size,
    per_image,
    perturb,
    project,
    random_start,
)

EPS = 0.1
SCALES = (1e-3, 1e-2, 10.0, 1e3)


def digits():
    data = load_digits()
    return torch.tensor(data.images / 16, dtype=torch.float32)[:, None], torch.tensor(data.target)


@pytest.fixture(scope="module")
def net():
    """A small convolutional net on digits, trained on noisy images so that attacks neither fail nor win outright."""
    images, target = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
        made = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))
        optimizer = torch.optim.Adam(made.parameters(), 3e-3)
        for _ in range(250):
            chosen = torch.randint(0, 1500, (128,))
            noisy = (images[chosen] + 0.1 * torch.randn(128, 1, 8, 8).sign()).clamp(0, 1)
            optimizer.zero_grad()
            nn.functional.cross_entropy(made(noisy), target[chosen]).backward()
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return made.eval()


@pytest.fixture(scope="module")
def batch():
    images, target = digits()
    return images[1500:1700], target[1500:1700]


@pytest.fixture(scope="module")
def few(batch):
    return batch[0][:60], batch[1][:60]


@pytest.fixture(scope="module")
def report(net, few):
    return evaluate_adversarial(net, *few, epsilon=EPS)


def affine(seed=0, classes=5, shape=(2, 3, 4), dtype=torch.float64):
    """Weights, a model over images in the middle of [0, 1], and a batch with its own predictions as target."""
    generator = torch.Generator().manual_seed(seed)
    features = int(np.prod(shape))
    weight = torch.randn(classes, features, generator=generator, dtype=dtype)
    images = 0.4 + 0.2 * torch.rand(16, *shape, generator=generator, dtype=dtype)

    def model(x):
        return (x - 0.5).flatten(1) @ weight.T

    return weight, model, images, model(images).argmax(1)


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


class TestBall:
    @settings(max_examples=60, deadline=None)
    @given(
        st.integers(0, 10_000),
        st.sampled_from(["linf", "l2"]),
        st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
        st.floats(1e-6, 1.0),
    )
    def test_projection_holds_exactly(self, seed, norm, dtype, epsilon):
        generator = torch.Generator().manual_seed(seed)
        centre = torch.rand(4, 2, 5, 5, generator=generator, dtype=torch.float64).to(dtype)
        centre[0], centre[1] = centre[0].round(), 0
        radius = torch.full((4,), epsilon, dtype=torch.float64)
        wild = (centre.double() + torch.randn(4, 2, 5, 5, generator=generator, dtype=torch.float64)).to(dtype)
        for point in (wild, random_start(centre, radius, norm, generator)):
            near = project(point, centre, radius, norm)
            assert near.dtype == dtype and near.min() >= 0 and near.max() <= 1
            order = 2 if norm == "l2" else torch.inf
            for precision in (dtype, torch.float64):
                moved = (near.to(precision) - centre.to(precision)).flatten(1)
                # bfloat16 itself sums a length to three digits; float32 looks at what it holds
                moved = moved.double() if dtype in (torch.bfloat16, torch.float16) else moved
                assert float(torch.linalg.vector_norm(moved, ord=order, dim=1).max()) <= epsilon

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_projection_is_the_nearest_point(self, norm):
        generator = torch.Generator().manual_seed(0)
        centre = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
        point = centre + torch.randn(1, 1, 2, 2, generator=generator, dtype=torch.float64)
        near = project(point, centre, torch.tensor([0.2], dtype=torch.float64), norm)
        draws = random_start(
            centre.expand(4000, 1, 2, 2), torch.full((4000,), 0.2, dtype=torch.float64), norm, generator
        )
        assert float((draws - point).square().sum((1, 2, 3)).min()) >= float((near - point).square().sum())
        inside = centre + 0.01
        assert torch.equal(project(inside, centre, torch.tensor([0.2], dtype=torch.float64), norm), inside)

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_starts_fill_the_ball_evenly(self, norm):
        centre = torch.full((20_000, 1, 1, 3), 0.5, dtype=torch.float64)
        radius = torch.full((20_000,), 0.1, dtype=torch.float64)
        moved = (random_start(centre, radius, norm, torch.Generator().manual_seed(0)) - centre).flatten(1)
        size = torch.linalg.vector_norm(moved, ord=2 if norm == "l2" else torch.inf, dim=1) / 0.1
        assert float((size < 0.5).double().mean()) == pytest.approx(1 / 8, abs=0.01)
        assert moved.mean(0).abs().max() < 0.002

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("attack", ["pgd", "fgsm", "random_search", "autoattack"])
    def test_results_stay_inside(self, attack, dtype, norm):
        _, model, images, target = affine(dtype=dtype, shape=(1, 6, 6))
        images = (images - 0.4) * 5  # out to the edges of [0, 1]
        target = model(images).argmax(1)
        radius = 0.0123 if norm == "linf" else 0.0777
        result = ATTACKS[attack](model, images, target, epsilon=radius, norm=norm)
        moved = (result.images - images).flatten(1)
        assert result.images.dtype == dtype and result.images.min() >= 0 and result.images.max() <= 1
        assert float(torch.linalg.vector_norm(moved, ord=2 if norm == "l2" else torch.inf, dim=1).max()) <= radius
        assert not torch.equal(result.images, images)


ATTACKS = {
    "fgsm": fgsm,
    "pgd": lambda *given, **more: pgd(*given, **{"steps": 5, **more}),
    "random_search": lambda *given, **more: random_search(*given, **{"queries": 20, **more}),
    "autoattack": lambda *given, **more: autoattack(*given, **{"steps": 5, "queries": 20, **more}),
    "curve": lambda *given, epsilon, **more: robustness_curve(*given, [epsilon], **{"steps": 3, **more}),
    "evaluate": lambda *given, **more: evaluate_adversarial(*given, **{"autoattack": False, **more}),
}


class TestTrainingStep:
    """`perturb` is the same ascent as the attacks', without their float64 and their look at the margin."""

    @pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.1), ("l2", 0.8)])
    def test_it_is_projected_ascent_with_the_exact_step(self, norm, epsilon):
        _, model, images, target = affine()
        generator = torch.Generator().manual_seed(3)
        start = (torch.rand(images.shape, generator=generator, dtype=torch.float64) * 2 - 1) * epsilon

        def loss(x):
            return nn.functional.cross_entropy(model(x), target, reduction="sum")

        radius = torch.full((16,), epsilon, dtype=torch.float64)
        x, size = project(images + start, images, radius, norm), default_step_size(epsilon, 5)
        for _ in range(5):
            (grad,) = torch.autograd.grad(loss(x.requires_grad_()), x)
            x = project(x.detach() + size * ascent_direction(grad, norm), images, radius, norm)
        found = perturb(loss, images, start, epsilon=epsilon, norm=norm, steps=5)
        torch.testing.assert_close(found, x, rtol=0, atol=1e-12)
        assert loss(found) > loss(images)

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_clipping_is_the_projection_up_to_rounding(self, norm):
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(32, 2, 5, 5, generator=generator)
        change = torch.randn(images.shape, generator=generator) * per_image(torch.logspace(-3, 1, 32))
        exact = project(images + change, images, torch.full((32,), 0.3, dtype=torch.float64), norm)
        clipped = images + clip_change(change, images, 0.3, norm)
        torch.testing.assert_close(clipped, exact, rtol=0, atol=1e-5)


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
        nn.functional.cross_entropy(1e4 * net(x), few[1], reduction="sum").backward()
        assert found["zero_gradient"].value == float((x.grad.flatten(1).abs().amax(1) == 0).double().mean()) > 0.5
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
        report = evaluate_adversarial(constant, images, target, epsilon=EPS, norm=norm)
        assert report.headline.accuracy == pytest.approx(4 / 6)
        assert {f.name: f.value for f in report.findings}["zero_gradient"] == 1 and report.flagged

    def test_full_preset_runs_all_of_autoattack(self, net, batch):
        report = evaluate_adversarial(net, batch[0][:4], batch[1][:4], epsilon=0.4, preset="full")
        assert report.headline.correct == 0
        assert [row.name for row in report.rows][-4:] == ["apgd-ce", "apgd-t", "fab-t", "square"]


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
