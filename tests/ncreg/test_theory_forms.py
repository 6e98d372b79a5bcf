"""The closed forms against each other, fixtures, fifty digits, and what users get wrong; and the certificate."""

import math
import re
from decimal import Decimal, getcontext, localcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ncreg import theory
from ncreg.frames import simplex_etf

classes = st.integers(2, 100_000)


def close(value, expected, tolerance=1e-12):
    return value == pytest.approx(expected, rel=tolerance, abs=tolerance)


@given(classes, st.floats(1e-10, 1e10))
def test_spectral_decoupling_optimum_is_stationary(num_classes, coefficient):
    best = theory.spectral_decoupling_optimum(num_classes, coefficient)
    # the own logit's gradient −(1−p_y) + λz_y and every other's p_k + λz_k vanish
    wrong_mass = -math.expm1(-best.cross_entropy)
    assert close(coefficient * best.own_logit, wrong_mass, 1e-9)
    assert close(-coefficient * best.other_logit * (num_classes - 1), wrong_mass, 1e-9)
    penalty = 0.5 * coefficient * (best.own_logit**2 + (num_classes - 1) * best.other_logit**2)
    assert close(best.loss, best.cross_entropy + penalty)


@given(st.floats(1e-12, 1e12))
def test_binary_spectral_decoupling_solves_its_equation(coefficient):
    best = theory.binary_spectral_decoupling_optimum(coefficient)
    assert close(math.log(best.margin) + math.log1p(math.exp(best.margin)), -math.log(coefficient), 1e-9)
    assert best.own_logit == -best.other_logit == best.margin


# published and derived fixtures


@pytest.mark.parametrize(
    ("num_classes", "decay", "m_reg"), [(10, 5e-4, 0.01388), (100, 5e-4, 0.05396), (1000, 1e-4, 0.04316)]
)
def test_m_reg_fixtures(num_classes, decay, m_reg):
    best = theory.last_batch_norm_optimum(num_classes, decay, decay)
    assert best.loss == pytest.approx(m_reg, abs=5e-6)
    assert close(best.wrong_mass, decay * (num_classes - 1) / math.sqrt(num_classes))


def test_unit_logits_cannot_be_confident():
    assert theory.minimal_cross_entropy(1, 10) == pytest.approx(1.377, abs=5e-4)
    assert theory.minimal_cross_entropy(1, 100) == pytest.approx(3.61, abs=5e-3)
    assert theory.minimal_cross_entropy(0, 7) == math.log(7)


def test_deep_linear_fixture_of_the_two_layer_form():
    """Per singular value min_s (√n − s)²/(2N) + (3/2)λs^(2/3), on a grid."""
    num_classes, samples, decay = 4, 5, 1e-3
    grid = torch.linspace(0, 3, 3_000_001, dtype=torch.float64)
    value = (samples**0.5 - grid).square() / (2 * num_classes * samples) + 1.5 * decay * grid ** (2 / 3)
    closed = theory.deep_linear_optimum(num_classes, samples, [decay, decay], decay).loss
    assert close(closed, num_classes * float(value.min()), 1e-10)


@pytest.mark.parametrize("factors", [3, 4, 7])
def test_deep_linear_networks_give_up_at_a_jump(factors):
    jump = (factors - 2) / (factors - 1)
    kappa = (1 - jump) * jump ** (1 - 2 / factors)
    below, above = (
        theory.deep_linear_optimum(3, 1, [kappa / 3 * f] * (factors - 1), kappa / 3 * f) for f in (1 - 1e-9, 1 + 1e-9)
    )
    assert close(below.own_logit, jump, 1e-6) and not below.collapsed_to_zero
    assert above.own_logit == 0 and above.collapsed_to_zero and above.loss == 0.5
    assert close(below.loss, 0.5, 1e-6)


def test_dot_regression_without_decay_reaches_zero():
    best = theory.dot_regression_optimum(10, 3.0, 1.5, 0.0)
    assert (best.loss, best.own_logit, best.feature_norm) == (0.0, 3.0, 2.0)


# properties


@given(classes, st.floats(1e-12, 0.999))
def test_scale_and_smallest_loss_are_inverse(num_classes, share):
    loss = share * math.log(num_classes)
    scale = theory.scale_for_loss(num_classes, loss)
    assert scale > 0
    assert close(theory.minimal_cross_entropy(scale, num_classes) / loss, 1, 1e-11)


@given(classes, st.floats(0.01, 0.9))
def test_scale_falls_as_the_loss_rises(num_classes, share):
    chance = math.log(num_classes)
    assert theory.scale_for_loss(num_classes, share * chance) > theory.scale_for_loss(
        num_classes, 1.01 * share * chance
    )


@given(classes, st.floats(0, 1e4), st.floats(1e-6, 10))
def test_smallest_loss_falls_with_the_scale_and_stays_in_range(num_classes, scale, more):
    low, high = (theory.minimal_cross_entropy(value, num_classes) for value in (scale + more, scale))
    assert 0 <= low <= high <= math.log(num_classes) * (1 + 1e-15)


@given(classes, st.integers(1, 10_000), st.floats(1e-30, 1e-1), st.floats(1e-30, 1e-1))
def test_cross_entropy_optimum_is_consistent_at_any_size(num_classes, samples, weight_decay, feature_decay):
    best = theory.cross_entropy_optimum(num_classes, samples, weight_decay, feature_decay)
    assert close(best.weight_norm * best.feature_norm, best.own_logit, 1e-9)
    weight_term = 0.5 * weight_decay * num_classes * best.weight_norm**2
    feature_term = 0.5 * feature_decay * num_classes * samples * best.feature_norm**2
    assert close(weight_term, feature_term, 1e-9)
    assert best.loss == pytest.approx(best.cross_entropy + weight_term + feature_term, rel=1e-9)
    mass = (num_classes - 1) * math.sqrt(samples * weight_decay * feature_decay)
    assert best.collapsed_to_zero == (best.loss == pytest.approx(math.log(num_classes), rel=1e-15))
    if best.collapsed_to_zero:
        assert mass >= (num_classes - 1) / num_classes * (1 - 1e-12)
        assert best.own_logit == best.weight_norm == best.feature_norm == 0
    else:
        assert best.wrong_mass == pytest.approx(mass, rel=1e-9)


@given(classes, st.floats(1e-12, 1e-3), st.floats(1.001, 10))
def test_more_decay_costs_more_and_leaves_less_margin(num_classes, decay, factor):
    less, more = (theory.cross_entropy_optimum(num_classes, 5, value, decay) for value in (decay, decay * factor))
    assert less.loss < more.loss or more.collapsed_to_zero
    assert less.margin > more.margin or more.collapsed_to_zero


@given(st.integers(2, 10**6), st.floats(1e-15, 0.9999))
def test_cross_entropy_optimum_against_fifty_digits(num_classes, share):
    """q = share of its largest value (C−1)/C; loss and margin against decimal arithmetic."""
    getcontext().prec = 50
    root = share / num_classes
    best = theory.cross_entropy_optimum(num_classes, 1, root, root)
    count, r = Decimal(num_classes), Decimal(root)
    q = (count - 1) * r
    loss = -q * q.ln() - (1 - q) * (1 - q).ln() + q * (count - 1).ln()
    assert best.loss == pytest.approx(float(loss), rel=1e-13)
    assert best.margin == pytest.approx(float(((1 - q) / r).ln()), rel=1e-10)


def test_extremes_keep_their_digits():
    tiny = theory.cross_entropy_optimum(100_000, 1, 1e-300, 1e-20)
    assert tiny.loss == pytest.approx(tiny.wrong_mass * (1 + tiny.margin), rel=1e-6) and tiny.loss > 0
    assert theory.spectral_decoupling_optimum(100_000, 1e-300).margin == pytest.approx(
        math.log(1e300) + math.log(100_000) - math.log(696), rel=1e-3
    )
    assert theory.mse_optimum(10, 1, 1e-200, 1e-200).shrinkage == pytest.approx(1e-199, rel=1e-10)
    deep = theory.deep_linear_optimum(10, 1, [1e-40, 1e-40], 1e-40)
    assert deep.shrinkage == pytest.approx(1e-39, rel=1e-9) and deep.loss == pytest.approx(1.5e-39, rel=1e-9)


@given(classes, st.integers(2, 1000), st.floats(0.02, 10))
def test_contrastive_optima_have_their_floors(num_classes, samples, temperature):
    supcon = theory.supcon_optimum(num_classes, samples, temperature)
    ntce = theory.ntce_optimum(num_classes, samples, temperature)
    nonl = theory.nonl_optimum(num_classes, samples, temperature)
    chance = math.log(samples * num_classes)
    with localcontext(prec=60):
        gap = Decimal(num_classes) / (num_classes - 1) / Decimal(temperature)
        exact = (samples - 1 + samples * (num_classes - 1) * (-gap).exp()).ln()
    assert supcon == pytest.approx(float(exact), rel=1e-14)
    assert math.log(samples - 1) <= supcon <= chance and math.log(samples) <= ntce <= chance
    # the own class's n terms are what NTCE's denominator has and NONL's lacks
    assert math.exp(ntce) - samples == pytest.approx(math.exp(nonl), rel=1e-6, abs=1e-9 * samples)
    assert close(ntce - math.log(samples), theory.minimal_cross_entropy(1 / temperature, num_classes), 1e-9)


@given(st.integers(2, 1000), st.floats(0.01, 20), st.floats(0.01, 20))
def test_layer_peeled_is_the_floor_of_its_scale(num_classes, weight_energy, feature_energy):
    best = theory.layer_peeled_optimum(num_classes, weight_energy, feature_energy)
    scale = math.sqrt(weight_energy * feature_energy)
    assert close(best.loss, theory.minimal_cross_entropy(scale, num_classes))
    assert best.loss == best.cross_entropy and close(best.own_logit, scale)


@given(st.integers(2, 500), st.integers(1, 50), st.floats(1e-8, 1.0), st.floats(1e-8, 1.0))
def test_squared_error_forms_agree(num_classes, samples, weight_decay, feature_decay):
    arguments = num_classes, samples, weight_decay, feature_decay
    plain, biased = theory.mse_optimum(*arguments), theory.mse_optimum(*arguments, bias=True)
    c = min(1.0, num_classes * math.sqrt(samples * weight_decay * feature_decay))
    assert close(plain.loss, c * (1 - c / 2), 1e-9) and close(plain.own_logit, 1 - c, 1e-9)
    assert close(biased.loss, plain.loss * (num_classes - 1) / num_classes, 1e-9)
    assert close(biased.own_logit + (num_classes - 1) * biased.other_logit, 1)
    assert close(plain.margin, 1 - c, 1e-9) and close(biased.margin, 1 - c, 1e-9)
    assert plain.collapsed_to_zero == (plain.loss == 0.5)


# the certificate


@st.composite
def measured(draw):
    """Free features, head and bias of any quality, on balanced classes, with a cross-entropy below ln C."""
    num_classes, samples = draw(st.integers(2, 6)), draw(st.integers(1, 4))
    dim, seed = draw(st.integers(1, 7)), draw(st.integers(0, 10_000))
    quality, bias = draw(st.floats(0.2, 3)), draw(st.booleans())
    make = torch.Generator().manual_seed(seed)
    normal = {"generator": make, "dtype": torch.float64}
    weight = torch.randn(num_classes, dim, **normal) + torch.randn(dim, **normal)
    target = torch.arange(num_classes).repeat_interleave(samples)
    features = quality * (weight - weight.mean(0))[target] + torch.randn(len(target), dim, **normal)
    offset = torch.randn(num_classes, **normal) if bias else torch.zeros(num_classes, dtype=torch.float64)
    return weight, features, target, offset, samples


@settings(max_examples=300)
@given(measured())
def test_certificate_holds_in_every_random_case(case):
    weight, features, target, offset, samples = case
    loss = float(F.cross_entropy(features @ weight.T + offset, target))
    num_classes = len(weight)
    if not 0 < loss < math.log(num_classes):
        return
    means = torch.stack([features[target == k].mean(0) for k in range(num_classes)])
    between = float((means - means.mean(0)).square().sum(1).mean())
    within = float((features - means[target]).square().sum(1).mean())
    certificate = theory.collapse_certificate(loss, weight, between + within, [samples] * num_classes)
    assert certificate.between_variance <= between * (1 + 1e-9)
    assert within / (between + within) <= certificate.within_share + 1e-9
    logits = features @ weight.T + offset
    own = logits.gather(1, target[:, None])
    assert certificate.mean_margin <= float((own - logits).sum() / (len(target) * (num_classes - 1))) + 1e-9


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("dim", [3, 6])
def test_certificate_is_tight_at_the_optimum(dim, dtype, tolerance):
    best = theory.cross_entropy_optimum(4, 10, 1e-3, 1e-4)
    weight = (best.weight_norm * simplex_etf(4, dim, dtype=torch.float64) + 5.0).to(dtype).requires_grad_()
    variance = torch.tensor(best.feature_norm**2, dtype=dtype, requires_grad=True)
    certificate = theory.collapse_certificate(best.cross_entropy, weight, variance, torch.full((4,), 10))
    assert certificate.mean_margin == pytest.approx(best.margin)
    assert certificate.within_share == pytest.approx(0, abs=tolerance)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_counts": [5, 5, 4]}, "from 4 to 5.*balanced"),
        ({"class_counts": [0, 0, 0]}, "from 0 to 0"),
        ({"class_counts": [5.5, 5.5, 5.5]}, "whole numbers"),
        ({"class_counts": torch.tensor([5, 5, 6])}, "from 5 to 6"),
        ({"class_counts": [5, 5]}, "2 entries for a weight of 3 classes"),
        ({"loss": math.log(3)}, "loss=1.09"),
        ({"loss": 0.0}, "loss=0.0"),
        ({"loss": math.nan}, "loss=nan"),
        ({"loss": 1e-3}, "needs a between-class variance of .* one pass"),
        ({"weight": torch.ones(3, 2)}, "spread of 0.0"),
        ({"weight": torch.full((3, 2), torch.nan)}, "spread of nan"),
        ({"weight": torch.ones(3)}, "shape .3,."),
        ({"weight": torch.ones(1, 2), "class_counts": [5]}, "C ≥ 2"),
        ({"total_variance": 0.0}, "total_variance=0.0"),
        ({"total_variance": math.inf}, "total_variance=inf"),
    ],
)
def test_certificate_refuses_what_it_cannot_certify(changes, message):
    good = {"loss": 0.5, "weight": simplex_etf(3, 2), "total_variance": 4.0, "class_counts": [5, 5, 5]}
    theory.collapse_certificate(**good)
    with pytest.raises(ValueError, match=message):
        theory.collapse_certificate(**good | changes)


# what users get wrong


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.scale_for_loss(10, 0.0), r"loss=0.0.*ln 10 = 2.302"),
        (lambda: theory.scale_for_loss(10, math.log(10)), "strictly between"),
        (lambda: theory.scale_for_loss(10, math.nan), "loss=nan"),
        (lambda: theory.scale_for_loss(1, 0.1), "num_classes=1"),
        (lambda: theory.minimal_cross_entropy(-1.0, 10), "scale=-1.0"),
        (lambda: theory.minimal_cross_entropy(math.inf, 10), "scale=inf"),
        (lambda: theory.cross_entropy_optimum(10, 5, 0.0, 1e-3), "weight_decay=0.0"),
        (lambda: theory.cross_entropy_optimum(10, 0, 1e-3, 1e-3), "samples_per_class=0"),
        (lambda: theory.layer_peeled_optimum(10, 1.0, -1.0), "feature_energy=-1.0"),
        (lambda: theory.last_batch_norm_optimum(10, 1e-3, 1e-3, gamma="none"), "gamma='none'"),
        (lambda: theory.last_batch_norm_optimum(10, 1e-3, 1e-3, gamma="scalar"), "num_features"),
        (lambda: theory.deep_linear_optimum(10, 5, [], 1e-3), "empty"),
        (lambda: theory.mse_optimum(10, 5, 1e-3, math.nan), "decay=nan"),
        (lambda: theory.minority_collapse_threshold(0, 1e-3, 1e-3), "num_samples=0"),
        (lambda: theory.imbalanced_mse_logits([], 1e-3, 1e-3), "empty"),
        (lambda: theory.imbalanced_mse_logits([3, 0], 1e-3, 1e-3), r"class_counts\[1\]=0"),
        (lambda: theory.supcon_optimum(10, 1, 0.1), "samples_per_class=1"),
        (lambda: theory.nonl_optimum(10, 1, 0.0), "temperature=0.0"),
        (lambda: theory.spectral_decoupling_optimum(10, 0.0), "coefficient=0.0"),
        (lambda: theory.dot_regression_optimum(10, 1.0, 1.0, -1e-3), "feature_decay=-0.001"),
    ],
)
def test_bad_numbers_are_named(call, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        call()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [10.0, True, "10"])
def test_a_count_is_an_int(wrong):
    with pytest.raises(TypeError, match="num_classes=.* must be an integer"):
        theory.scale_for_loss(wrong, 0.1)
