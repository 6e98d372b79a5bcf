"""Frames against closed forms and published numbers, in float64."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ncreg.frames import (
    etf_distance,
    hypercube,
    max_cosine,
    nearest_simplex_etf,
    one_vs_rest_distance,
    orthoplex,
    simplex_etf,
    softmax_code,
    tammes,
)

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


@pytest.mark.parametrize("size", [1e-200, 1e-160, 1e160, 1e200])
def test_nearest_simplex_and_distance_know_no_scale(size):
    means = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grads = []
    for factor in (1.0, size):
        leaf = (means * factor).requires_grad_()
        (nearest_simplex_etf(leaf)[0, 0] + etf_distance(leaf)).backward()
        grads.append(leaf.grad * factor)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(etf_distance(means * size), etf_distance(means), rtol=1e-12, atol=0)


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


@pytest.mark.parametrize("frame", [orthoplex, hypercube])
@pytest.mark.parametrize("rotate", [True, False])
def test_closed_frames_are_unit_and_seeded(frame, rotate):
    weight = frame(7, 6, rotate=rotate, **F64)
    assert torch.allclose(weight.norm(dim=1), torch.ones(7, **F64), atol=1e-14)
    assert torch.equal(weight, frame(7, 6, rotate=rotate, **F64))
    assert frame(7, 6, rotate=False).count_nonzero(dim=0).gt(0).sum() == {orthoplex: 4, hypercube: 3}[frame]
    turned = frame(7, 6, generator=torch.Generator().manual_seed(9), **F64)
    flat = frame(7, 6, rotate=False, **F64)
    assert torch.allclose(turned @ turned.T, flat @ flat.T, atol=1e-14)
    assert frame(7, 6, dtype=torch.bfloat16).dtype == torch.bfloat16


@given(st.integers(3, 40), st.integers(0, 5))
def test_orthoplex_gram(num_classes, spare):
    """Every vector is orthogonal to all others but its antipode."""
    weight = orthoplex(num_classes, (num_classes + 1) // 2 + spare, **F64)
    half, expected = (num_classes + 1) // 2, torch.eye(num_classes, **F64)
    for c in range(num_classes - half):
        expected[c, c + half] = expected[c + half, c] = -1
    assert (weight @ weight.T - expected).abs().max() < 1e-13
    assert max_cosine(weight).abs() < 1e-13


@given(st.integers(2, 70), st.integers(0, 4))
def test_hypercube_cosines_count_equal_digits(num_classes, spare):
    bits = math.ceil(math.log2(num_classes))
    weight = hypercube(num_classes, bits + spare, **F64)
    digits = [format(c, f"0{bits}b") for c in range(num_classes)]
    equal = [[sum(a == b for a, b in zip(p, q, strict=True)) for q in digits] for p in digits]
    expected = 2 * torch.tensor(equal, **F64) / bits - 1
    assert (weight @ weight.T - expected).abs().max() < 1e-13


TAMMES = [
    (4, 3, -1 / 3),
    (6, 3, 0.0),
    (8, 4, 0.0),
    (12, 3, 5**-0.5),
    pytest.param(56, 7, 1 / 3, marks=pytest.mark.slow),
]
TAMMES += [(24, 4, 0.5), (27, 6, 0.25), (20, 3, math.cos(math.radians(47.4310362)))]  # 24-cell, Schläfli; Sloane


@pytest.mark.parametrize("num_classes, dim, best", TAMMES)
def test_tammes_reaches_the_known_packings(num_classes, dim, best):
    weight = tammes(num_classes, dim, **F64)
    assert max_cosine(weight).item() == pytest.approx(best, abs=1e-4)
    assert torch.allclose(weight.norm(dim=1), torch.ones(num_classes, **F64), atol=1e-14)


@pytest.mark.parametrize("num_classes, dim", [(2, 1), (4, 3), (5, 9), (6, 3), (7, 4), (8, 4), (6, 4)])
def test_softmax_code_is_the_simplex_then_the_orthoplex(num_classes, dim):
    distance = num_classes / (num_classes - 1) if num_classes <= dim + 1 else 1.0
    assert one_vs_rest_distance(softmax_code(num_classes, dim, **F64)).item() == pytest.approx(distance, abs=1e-9)


@pytest.mark.parametrize("num_classes, dim", [(3, 2), (4, 2), (5, 2), (17, 2)])
def test_codes_in_the_plane_are_polygons(num_classes, dim):
    angle = 2 * math.pi / num_classes
    assert max_cosine(tammes(num_classes, dim, **F64)).item() == pytest.approx(math.cos(angle), abs=1e-12)
    height = one_vs_rest_distance(softmax_code(num_classes, dim, **F64)).item()
    assert height == pytest.approx(1 - math.cos(angle), abs=1e-9)


@pytest.mark.parametrize("num_classes, dim", [(15, 4), pytest.param(30, 5, marks=pytest.mark.slow)])
def test_each_code_wins_by_its_own_measure(num_classes, dim):
    packing, code = tammes(num_classes, dim, **F64), softmax_code(num_classes, dim, **F64)
    assert max_cosine(packing) <= max_cosine(code) + 1e-4
    assert one_vs_rest_distance(code) >= one_vs_rest_distance(packing) - 1e-4
    random = torch.nn.functional.normalize(gaussian(num_classes, dim), dim=1)
    assert one_vs_rest_distance(code) > 2 * one_vs_rest_distance(random)


@pytest.mark.parametrize("frame", [tammes, softmax_code])
def test_codes_are_seeded_cached_and_silent(frame, capfd):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = frame(9, 3, seed=5)
    with torch.no_grad():
        second = frame(9, 3, seed=5, **F64)
    first_kept = first.clone()
    first.zero_()  # the caller's copy, not the cache
    assert torch.equal(frame(9, 3, seed=5), first_kept)
    assert torch.equal(second.float(), first_kept)
    assert not torch.allclose(frame(6, 3, seed=6), frame(6, 3, seed=5), atol=1e-3)
    assert torch.equal(before, torch.get_rng_state())
    assert capfd.readouterr() == ("", "")


def hull_oracle(weight, k):
    """Distance to the others' hull by a general solver."""
    others = np.delete(weight.numpy(), k, 0)
    fit = scipy.optimize.minimize(
        lambda a: ((weight[k].numpy() - a @ others) ** 2).sum(),
        np.full(len(others), 1 / len(others)),
        jac=lambda a: -2 * others @ (weight[k].numpy() - a @ others),
        bounds=[(0, 1)] * len(others),
        constraints={"type": "eq", "fun": lambda a: a.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    return math.sqrt(fit.fun)


@settings(deadline=None)
@given(st.integers(2, 12), st.integers(1, 8), st.integers(0, 99), st.sampled_from([1e-3, 1.0, 1e3]))
def test_one_vs_rest_distance_against_a_general_solver(num_classes, dim, seed, size):
    weight = gaussian(num_classes, dim, seed=seed)
    expected = min(hull_oracle(weight, k) for k in range(num_classes))
    assert one_vs_rest_distance(size * weight).item() / size == pytest.approx(expected, abs=2e-6)


def test_one_vs_rest_distance_where_gradients_crawl():
    """Clusters, copies, long thin hulls: cases that projected gradient alone does not finish."""
    turn = torch.linalg.qr(gaussian(10, 10)).Q
    thin = gaussian(15, 10) * torch.logspace(0, -4, 10, **F64) @ turn
    tight = 0.3 + 1e-3 * gaussian(20, 8, seed=2)
    twice = torch.cat([torch.eye(6, **F64), torch.eye(6, **F64)])
    for weight in thin, tight:
        expected = min(hull_oracle(weight, k) for k in range(len(weight)))
        assert one_vs_rest_distance(weight, tolerance=1e-11).item() == pytest.approx(expected, abs=1e-6)
    assert one_vs_rest_distance(twice).item() < 1e-9
    icosahedron = tammes(12, 3)  # in float32: five neighbours that just miss a common plane
    assert one_vs_rest_distance(icosahedron).item() == pytest.approx(1 - 5**-0.5, abs=1e-5)


def test_measures_have_gradients():
    weight = gaussian(6, 4).requires_grad_()
    assert torch.autograd.gradcheck(max_cosine, weight)
    assert torch.autograd.gradcheck(one_vs_rest_distance, gaussian(5, 6).requires_grad_(), atol=1e-4)


def test_max_cosine_in_blocks():
    weight = torch.nn.functional.normalize(gaussian(2100, 5), dim=1)
    cosines = weight @ weight.T - 2 * torch.eye(2100, **F64)
    assert torch.allclose(max_cosine(3 * weight), cosines.max(), atol=1e-14)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: orthoplex(9, 4), "dim=4.*needs dim >= 5"),
        (lambda: hypercube(9, 3), "dim=3.*needs dim >= 4"),
        (lambda: tammes(3, 1), "dim=1 has two directions"),
        (lambda: softmax_code(1, 3), "num_classes=1"),
        (lambda: max_cosine(torch.zeros(3, 4)), "length 0"),
        (lambda: max_cosine(torch.ones(4)), "floating-point"),
        (lambda: max_cosine(torch.full((3, 4), torch.inf)), "finite"),
        (lambda: one_vs_rest_distance(torch.ones(1, 4)), "floating-point"),
        (lambda: one_vs_rest_distance(torch.full((3, 4), torch.nan)), "finite"),
        (lambda: one_vs_rest_distance(torch.ones(3, 4), tolerance=0), "tolerance=0"),
        (lambda: etf_distance(torch.full((3, 4), torch.nan)), "means must be finite"),
        *(
            (lambda measure=measure, weight=weight: measure(weight), words)
            for measure in (max_cosine, one_vs_rest_distance)
            for weight, words in (
                (torch.ones(3, 0), r"weight is \(3, 0\)"),
                (torch.ones(3, 4, device="meta"), "weight has no values, being on device meta"),
            )
        ),
        (lambda: tammes(7, 3, seed=2**64), "seed=18446744073709551616 must have at most 64 bits"),
        (lambda: softmax_code(7, 3, seed=-(2**63) - 1), "seed=-9223372036854775809 must have at most 64 bits"),
    ],
)
def test_frames_refuse(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "call, words",
    [
        *(
            (lambda frame=frame: frame(4, 4, dtype=torch.int64), "dtype=torch.int64 must be a floating-point dtype")
            for frame in (simplex_etf, orthoplex, hypercube, tammes, softmax_code)
        ),
        (lambda: tammes(7, 3, dtype=torch.int64), "dtype=torch.int64"),
        (lambda: simplex_etf(3, 4, generator=3), "generator=3 must be a torch.Generator"),
        *(
            (lambda frame=frame: frame(3, 4, rotate="False"), "rotate='False' must be True or False")
            for frame in (simplex_etf, orthoplex, hypercube)
        ),
        (lambda: simplex_etf(3, 4, dtype="float32"), "dtype=float32 must be a floating-point dtype"),
        (lambda: simplex_etf(torch.tensor(2.5), 4), r"num_classes=tensor\(2.5000\) must be an integer"),
        (lambda: one_vs_rest_distance(torch.ones(3, 4), tolerance="0.1"), "tolerance='0.1' must be a number"),
        (lambda: max_cosine([[1.0]]), "weight must be a tensor .* not list"),
        (lambda: one_vs_rest_distance([[1.0]]), "weight must be a tensor .* not list"),
        (lambda: etf_distance([[1.0]]), "means must be a tensor .* not list"),
        (lambda: nearest_simplex_etf([[1.0]]), "means must be a tensor .* not list"),
    ],
)
def test_frames_refuse_wrong_types(call, words):
    with pytest.raises(TypeError, match=words):
        call()


@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1])
def test_every_seed_of_64_bits_is_one(seed):
    assert torch.isfinite(tammes(5, 2, seed=seed)).all()


@pytest.mark.parametrize("size", [1e-320, 1e-170, 1e160, 1e308])
def test_measures_at_extreme_sizes(size):
    """(1, 0), (0, 1), (−1, 0): the second is at distance 1 from the segment of the others, the first at √2."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(one_vs_rest_distance(weight * size) / size, torch.tensor(1.0, dtype=torch.float64))
    assert max_cosine(weight * size) == 0
