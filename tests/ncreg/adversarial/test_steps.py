"""The step of projected gradient ascent: the ball, the random start, and the version for training."""

import pytest
import torch
from adversarial_cases import ATTACKS, affine
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ncreg.robustness.adversarial.steps import (
    ascent_direction,
    clip_change,
    default_step_size,
    per_image,
    perturb,
    project,
    random_start,
)


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
