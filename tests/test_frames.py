"""Frames against closed forms and published numbers, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ncreg.frames import simplex_etf

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
