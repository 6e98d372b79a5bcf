"""Frames against closed forms and published numbers, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ncreg.frames import etf_distance, nearest_simplex_etf, simplex_etf

F64 = {"dtype": torch.float64}


def simplex_gram(num_classes):
    eye = torch.eye(num_classes, **F64)
    return (eye - 1 / num_classes) * num_classes / (num_classes - 1)


@given(st.integers(2, 60), st.integers(0, 40), st.booleans(), st.integers(0, 9))
def test_simplex_gram_is_exact_for_every_dim(num_classes, spare, rotate, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = simplex_etf(num_classes, num_classes - 1 + spare, rotate=rotate, generator=generator, **F64)
    assert (weight @ weight.T - simplex_gram(num_classes)).abs().max() <= 1e-12
    assert weight.sum(0).abs().max() <= 1e-12


@pytest.mark.parametrize("num_classes, dim", [(2, 1), (257, 256), (1000, 999), (1000, 1200)])
def test_simplex_gram_at_full_size(num_classes, dim):
    weight = simplex_etf(num_classes, dim, **F64)
    assert (weight @ weight.T - simplex_gram(num_classes)).abs().max() <= 1e-12
    rounded = simplex_etf(num_classes, dim, dtype=torch.float32)
    assert torch.equal(rounded, weight.float())
    assert (rounded @ rounded.T - simplex_gram(num_classes)).abs().max() <= 1e-6


def test_simplex_is_seeded_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = simplex_etf(5, 9)
    assert torch.equal(first, simplex_etf(5, 9))
    assert torch.equal(before, torch.get_rng_state())
    other = simplex_etf(5, 9, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(first, other, atol=1e-2)


def test_rotation_is_uniform():
    """The mean of a row over many rotations is 0 and its covariance is I/d: no sign bias from QR."""
    rows = [simplex_etf(2, 3, generator=torch.Generator().manual_seed(seed), **F64)[0] for seed in range(4000)]
    rows = torch.stack(rows)
    assert rows.mean(0).abs().max() < 0.03
    assert (rows.T @ rows / len(rows) - torch.eye(3, **F64) / 3).abs().max() < 0.03


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "sizes, error, words",
    [
        ((100, 64), ValueError, "dim=64 cannot hold a 100-class.*project=99.*softmax_code"),
        ((1, 4), ValueError, "num_classes=1"),
        ((4.0, 4), TypeError, "num_classes=4.0 must be an integer"),
        ((4, True), TypeError, "dim=True"),
        ((2, 0), ValueError, "dim=0"),
    ],
)
def test_simplex_refuses(sizes, error, words):
    with pytest.raises(error, match=words):
        simplex_etf(*sizes)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, **F64, generator=torch.Generator().manual_seed(seed))


def centred(means):
    return means - means.mean(0)


@pytest.mark.parametrize("num_classes, dim", [(2, 1), (2, 6), (4, 3), (5, 9), (30, 40)])
def test_nearest_simplex_is_an_exact_simplex_and_the_nearest(num_classes, dim):
    means = gaussian(num_classes, dim) + 5
    nearest = nearest_simplex_etf(means)
    assert (nearest @ nearest.T - simplex_gram(num_classes)).abs().max() < 1e-12
    best = (nearest * centred(means)).sum()
    for seed in range(50):  # near it and far from it, no simplex fits better
        skew = gaussian(dim, dim, seed=seed) * 10.0 ** -(seed % 4)
        turn = torch.linalg.matrix_exp(skew - skew.T)
        assert (nearest @ turn * centred(means)).sum() <= best + 1e-9
    assert torch.allclose(nearest_simplex_etf(3 * means - 2), nearest, atol=1e-10)


def test_nearest_simplex_of_a_perturbed_simplex_finds_its_rotation():
    weight = simplex_etf(6, 5, generator=torch.Generator().manual_seed(4), **F64)
    assert torch.allclose(nearest_simplex_etf(7 * weight + 3), weight, atol=1e-12)
    assert (nearest_simplex_etf(weight + 1e-3 * gaussian(6, 5)) - weight).abs().max() < 1e-2


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, {}), (torch.float32, {"eps": 1e-2, "atol": 2e-2})])
@pytest.mark.parametrize("num_classes, dim", [(2, 1), (2, 4), (4, 3), (4, 7)])
@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
def test_nearest_simplex_gradcheck(dtype, tolerance, num_classes, dim, repeated):
    means = 2 * simplex_etf(num_classes, dim, **F64) if repeated else gaussian(num_classes, dim, seed=1)
    means = means.to(dtype).requires_grad_()
    assert torch.autograd.gradcheck(nearest_simplex_etf, means, **tolerance)


def test_polar_gradient_equals_that_of_the_singular_vectors():
    """Oracle written differently: autograd through eigenvectors of AᵀA, defined at distinct singular values."""
    means, upstream = gaussian(5, 7).requires_grad_(), gaussian(5, 7, seed=1)
    (nearest_simplex_etf(means) * upstream).sum().backward()
    other = means.detach().clone().requires_grad_()
    basis = torch.linalg.svd(torch.eye(5, **F64) - 0.2).U[:, :4]
    matrix = other.T @ basis
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    axes = matrix @ vectors @ torch.diag(values.rsqrt()) @ vectors.T
    (1.25**0.5 * (basis @ axes.T) * upstream).sum().backward()
    assert torch.allclose(means.grad, other.grad, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_nearest_simplex_of_means_short_of_rank(dtype, rank):
    means = (gaussian(5, rank) @ gaussian(rank, 7, seed=1) + 1).to(dtype).requires_grad_()
    nearest = nearest_simplex_etf(means)
    assert (nearest.double() @ nearest.double().T - simplex_gram(5)).abs().max() < 1e-6
    nuclear = torch.linalg.matrix_norm(centred(means.detach().double()), "nuc")
    fit = (nearest.double() * centred(means.detach().double())).sum()
    assert fit.item() == pytest.approx(1.25**0.5 * nuclear.item(), abs=1e-5)
    (nearest * gaussian(5, 7, seed=2).to(dtype)).sum().backward()
    assert means.grad.isfinite().all() and means.grad.abs().max() < 1e3


@given(st.integers(2, 12), st.integers(1, 14), st.integers(0, 99))
def test_etf_distance_against_a_search_and_its_invariances(num_classes, dim, seed):
    means = gaussian(num_classes, dim, seed=seed)
    distance = etf_distance(means)
    assert -1e-12 <= distance <= 1 - 1 / (num_classes - 1) + 1e-12
    turn = torch.linalg.qr(gaussian(dim, dim, seed=seed + 1)).Q
    assert torch.allclose(etf_distance(3 * means @ turn + 2), distance, atol=1e-12)
    if dim >= num_classes - 1:
        nearest = nearest_simplex_etf(means)
        scale = (nearest * centred(means)).sum() / nearest.square().sum()
        residual = (centred(means) - scale * nearest).square().sum() / centred(means).square().sum()
        assert distance.item() == pytest.approx(residual.item(), abs=1e-12)
    else:
        assert distance >= 1 - dim / (num_classes - 1) - 1e-12


def test_etf_distance_closed_forms():
    assert etf_distance(simplex_etf(10, 12, **F64) * 5 + 2) < 1e-28
    two_points = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 4, **F64)  # rank one: the farthest there is
    assert etf_distance(two_points).item() == pytest.approx(1 - 1 / 6, abs=1e-12)
    assert etf_distance(torch.ones(3, 4)).isnan()
    means = gaussian(4, 6).requires_grad_()
    assert torch.autograd.gradcheck(etf_distance, means)


@pytest.mark.usefixtures("unchecked")
def test_nearest_simplex_refuses():
    with pytest.raises(ValueError, match="dim=2.*needs dim >= 3"):
        nearest_simplex_etf(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="must be finite"):
        nearest_simplex_etf(torch.full((3, 4), torch.nan))
    for wrong in torch.zeros(3), torch.zeros(1, 3), torch.zeros(3, 3, dtype=torch.long):
        with pytest.raises(ValueError, match="means are"):
            nearest_simplex_etf(wrong)
        with pytest.raises(ValueError, match="means are"):
            etf_distance(wrong)
