"""Scores for choosing a backbone against scikit-learn, brute force and numpy."""

import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import BayesianRidge
from torch import nn

from ncreg.transferability import leave_one_out_accuracy, logme, naswot, ncti


def clusters(samples=60, dim=5, classes=3, distance=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(samples) % classes
    centres = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    return torch.randn(samples, dim, generator=generator, dtype=torch.float64) + distance * centres[target], target


# ---- LogME


def evidence_by_sklearn(features, target):
    found = []
    for c in np.unique(target):
        model = BayesianRidge(
            fit_intercept=False,
            alpha_1=0,
            alpha_2=0,
            lambda_1=0,
            lambda_2=0,
            tol=1e-13,
            max_iter=20000,
            compute_score=True,
        )
        found.append(model.fit(features, (target == c).astype(float)).scores_[-1] / len(features))
    return np.mean(found)


@pytest.mark.parametrize(("samples", "dim"), [(60, 5), (90, 40), (30, 50)], ids=["tall", "wide", "fewer samples"])
def test_logme_is_sklearns_evidence(samples, dim):
    features, target = clusters(samples, dim)
    features = features + 0.5
    assert logme(features, target) == pytest.approx(evidence_by_sklearn(features.numpy(), target.numpy()), abs=1e-8)


def test_logme_with_repeated_columns_and_any_scale():
    """The rank is below the width; the scale does not matter."""
    features, target = clusters()
    wide = torch.cat([features, features], 1)
    wanted = evidence_by_sklearn(wide.numpy(), target.numpy())
    for scale in (1e-150, 1.0, 1e150):
        assert logme(scale * wide, target) == pytest.approx(wanted, abs=1e-8)


@pytest.mark.parametrize("offset", [30, 1e3, 1e5, 1e8])
def test_logme_is_the_largest_evidence_where_there_are_several_maxima(offset):
    """Far from zero one more direction of the weights is nearly free: a maximum with it alone, and one with all."""
    features, target = clusters(distance=2.0)
    features[:, 0] += offset
    samples = len(target)
    left, singular, _ = np.linalg.svd(features.numpy())
    sigma = np.zeros(samples)
    sigma[: len(singular)] = singular**2
    t = np.exp(np.linspace(-25, 60, 8001))[:, None]
    best = []
    for indicator in np.eye(3)[target.numpy()].T:
        exponent = ((left.T @ indicator) ** 2 * t / (t + sigma)).sum(1)
        evidence = (
            -samples * np.log(exponent / samples) - np.log1p(sigma / t).sum(1) - samples * (1 + np.log(2 * np.pi))
        )
        best.append(evidence.max() / 2 / samples)
    assert logme(features, target) == pytest.approx(np.mean(best), abs=1e-5)


def test_logme_without_signal_is_that_of_noise_alone_and_with_an_exact_fit_infinite():
    target = torch.arange(40) % 2
    features = (
        torch.stack([torch.ones(40), -torch.ones(40)])[torch.arange(40) // 2 % 2].T.reshape(-1)[:40, None].double()
    )
    features[::2] = features[1::2]  # the same in both classes, mean 0
    features -= features.mean()
    assert abs(float(features[target == 0].sum())) < 1e-12
    assert logme(features, target) == pytest.approx(0.5 * (math.log(2) - 1 - math.log(2 * math.pi)), abs=1e-6)
    assert logme(F.one_hot(target).double(), target) == math.inf


def test_logme_prefers_digits_seen_well():
    x, y = load_digits(return_X_y=True)
    x, y = torch.from_numpy(x[:400]), torch.from_numpy(y[:400])
    blurred = F.avg_pool2d(x.reshape(-1, 1, 8, 8), 4).flatten(1)
    assert (
        logme(x, y) > logme(blurred, y) > logme(x[torch.randperm(400, generator=torch.Generator().manual_seed(0))], y)
    )


# ---- nearest centre


@pytest.mark.parametrize("classes", [2, 4, 30])
def test_leaving_one_out_is_leaving_one_out(classes):
    """With 30 classes and 59 samples one class has a single sample."""
    features, target = clusters(59, 4, classes)
    features += 1e3
    correct = 0
    for i in range(59):
        rest = torch.arange(59) != i
        kept = [c for c in range(classes) if (target[rest] == c).any()]
        centres = np.stack([features[rest][target[rest] == c].numpy().mean(0) for c in kept])
        correct += kept[int(np.argmin(np.linalg.norm(centres - features[i].numpy(), axis=1)))] == int(target[i])
    assert leave_one_out_accuracy(features, target) == pytest.approx(correct / 59, abs=1e-12)


# ---- NCTI


def terms_by_sklearn(features, target):
    """As the authors' code has them: PCA, shrinkage by its variances, discriminant analysis."""
    pca = PCA(min(64, *features.shape))
    x = pca.fit_transform(features)
    shrinkage = max(np.exp(-pca.explained_variance_[:32].sum()), 1e-10)
    # theirs is "svd" without shrinkage: the same up to the divisor of the covariance, which older versions had as N − C
    rule = LinearDiscriminantAnalysis(solver="eigen", shrinkage=None if shrinkage == 1e-10 else float(shrinkage))
    low = rule.fit_transform(x, target)
    chances = rule.predict_proba(x)
    within = sum(np.linalg.norm(chances[target == c], "nuc") for c in np.unique(target))
    spread = np.linalg.norm(low - low.mean(0), "nuc")
    return -np.log(within), spread, chances[np.arange(len(x)), target].mean()


@pytest.mark.parametrize(("samples", "classes"), [(60, 3), (90, 7)])
def test_ncti_is_the_authors_by_sklearn(samples, classes):
    """Small, unit and large features: shrinkage from nearly 1 to none."""
    target = torch.arange(samples) % classes
    candidates = {
        f"{scale} {distance}": scale * clusters(samples, 4 + int(2 * distance), classes, distance)[0]
        for scale in (0.1, 1.0, 10.0)
        for distance in (0.2, 1.0, 3.0)
    }
    found = ncti(candidates, target)
    wanted = np.array([terms_by_sklearn(features.numpy(), target.numpy()) for features in candidates.values()])
    got = np.array([(one.within, one.spread, one.posterior) for one in found.values()])
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    ranks = sum(rankdata(column) for column in got.T)
    np.testing.assert_allclose([one.score for one in found.values()], ranks)


def test_ncti_of_ties_and_of_collapsed_features():
    features, target = clusters()
    collapsed = 10 * F.one_hot(target, 70).double()
    found = ncti({"one": features, "collapsed": collapsed}, target)
    assert found["collapsed"].posterior == pytest.approx(1) and found["collapsed"].within > found["one"].within
    twins = ncti({"one": features, "twin": features.clone()}, target)
    assert twins["one"].score == twins["twin"].score == 4.5


# ---- NASWOT


def small_network(functional=False):
    torch.manual_seed(0)

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.out = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 36, 7)

        def forward(self, x):
            x = F.relu(self.norm(self.conv(x)), inplace=functional)
            return torch.relu(self.out(x.flatten(1))) if functional else self.out(x.flatten(1)).clamp_min(0)

    return Functional().eval()


@pytest.mark.parametrize("functional", [True, False])
def test_naswot_counts_bits(functional):
    net, images = small_network(functional), torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = net.norm(net.conv(images)).clamp(min=0)
        codes = torch.cat([hidden.flatten(1) > 0, net.out(hidden.flatten(1)) > 0], 1).numpy()
    alike = [[sum(a == b for a, b in zip(one, other, strict=True)) for other in codes] for one in codes]
    assert naswot(net, images) == pytest.approx(np.linalg.slogdet(np.array(alike, float))[1], rel=1e-12)
    assert naswot(net, images[[0, 1, 1]]) == -math.inf
    assert naswot(nn.Sequential(net).eval(), images) == naswot(net, images)


@pytest.mark.parametrize("part", ["norm", "conv"])
def test_naswot_refuses_a_model_of_which_one_part_is_in_training_mode(part):
    """A BatchNorm there would take in the images, a dropout would draw: neither the model nor the score may change."""
    net, images = small_network(False), torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    net.get_submodule(part).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for model in (net, net.forward):
        with pytest.raises(ValueError, match=rf"training mode \({part}\): call model.eval\(\)"):
            naswot(model, images)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert naswot(net.eval(), images) == naswot(net.forward, images)


@pytest.mark.parametrize(
    "relu",
    [
        lambda x: x.clamp(min=0),
        lambda x: x.clone().clamp_(0),
        lambda x: x.clip(0),
        lambda x: x.clamp(min=torch.zeros(())),
        lambda x: torch.clamp_min(x, torch.zeros(x.shape[1])),
        lambda x: torch.maximum(x, torch.zeros(())),
        lambda x: torch.max(torch.zeros_like(x), x),
        lambda x: F.threshold(x, 0, 0),
    ],
)
def test_naswot_knows_a_relu_in_every_form(relu):
    """Each bit counts twice beside a relu() of the same input, so every entry of K doubles."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.form = nn.Linear(3, 20), relu

        def forward(self, x):
            h = self.hidden(x)
            return torch.cat([h.relu(), self.form(h)], 1)

    torch.manual_seed(0)
    net, images = Twice().eval(), torch.randn(4, 3)
    alone = naswot(nn.Sequential(net.hidden, nn.ReLU()).eval(), images)
    assert math.isfinite(alone)
    assert naswot(net, images) == pytest.approx(alone + 4 * math.log(2), rel=1e-12)
    net.form = lambda x: x.clamp(0, 6)
    with pytest.raises(ValueError, match="from 0 to a largest value"):
        naswot(net, images)
    net.form = lambda x: F.threshold(x, 0.1, 0)
    with pytest.raises(ValueError, match="threshold other than 0"):
        naswot(net, images)
    net.form = lambda x: x.clamp(min=-1) + torch.maximum(x, torch.ones(()))  # no ReLU
    assert naswot(net, images) == pytest.approx(alone, rel=1e-12)


def test_naswot_of_a_residual_network():
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    assert math.isfinite(naswot(timm.create_model("test_resnet").eval(), images))


@pytest.mark.parametrize("layer", [nn.GELU(), nn.SiLU(), nn.LeakyReLU(), nn.Sigmoid(), nn.ReLU6(), nn.Softmax(1)])
def test_naswot_refuses_other_activations(layer):
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), layer).eval()
    with pytest.raises(ValueError, match="NASWOT is for networks with ReLU alone"):
        naswot(net, torch.randn(4, 3))


class Attending(nn.Module):
    """ReLU units, then attention in the form of a kernel of torch's that has its softmax inside."""

    def __init__(self, form):
        super().__init__()
        self.embed, self.form = nn.Linear(3, 8), form
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="relu")

    def forward(self, x):
        tokens = self.embed(x).relu()
        if self.form == "function":
            return F.scaled_dot_product_attention(tokens, tokens, tokens)
        if self.form == "masked function":
            mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
            return F.scaled_dot_product_attention(tokens[..., :1], tokens[..., :1], tokens, attn_mask=mask)
        if self.form == "attention":
            return self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.layer(tokens) if self.form == "layer" else F.glu(tokens)


@pytest.mark.parametrize("form", ["function", "masked function", "attention", "layer", "gate"])
def test_naswot_refuses_what_one_kernel_hides(form):
    with pytest.raises(ValueError, match="NASWOT is for networks with ReLU alone"):
        naswot(Attending(form).eval(), torch.randn(4, 5, 3))


# ---- refusals

X, Y = torch.arange(8.0).reshape(4, 2), torch.tensor([0, 1, 0, 1])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        *(
            (lambda f=f, x=x, y=y: f(x, y), error, words)
            for f in (logme, leave_one_out_accuracy, lambda x, y: ncti({"a": x, "b": X}, y))
            for x, y, error, words in (
                (X[0], Y, ValueError, "must have shape .samples, features."),
                (X / 0, Y, ValueError, "NaN or infinite"),
                (X, Y[:2], ValueError, r"target must have shape \(4,\)"),
                (X, Y * 0, ValueError, "target holds class 0 alone"),
                (X, Y * 2, ValueError, "target has no sample of class 1"),
                (X.long(), Y, TypeError, "floating-point"),
            )
        ),
        (lambda: logme(X * 0, Y), ValueError, "features are all 0"),
        (lambda: ncti({"a": X}, Y), ValueError, "candidates holds 1 backbone"),
        (lambda: ncti([X, X], Y), TypeError, "candidates must be a dict"),
        (lambda: ncti({"a": X, "b": X[:2]}, Y), ValueError, r"target must have shape \(2,\)"),
        (lambda: ncti({"a": X, "b": X * 0}, Y), ValueError, r"candidates\['b'\] are the same vector"),
        (lambda: ncti({"a": X[:2], "b": X[:2]}, Y[:2]), ValueError, "has 2 samples of 2 classes: more samples"),
        (lambda: naswot(nn.ReLU().eval(), X[:1]), ValueError, "images holds 1"),
        (lambda: naswot(nn.ReLU(), X), ValueError, "training mode"),
        (lambda: naswot(nn.Linear(2, 2).eval(), X), ValueError, "the model has no ReLU"),
        (lambda: naswot(nn.ReLU().eval(), X.long()), TypeError, "floating-point"),
        (lambda: naswot(nn.ReLU().eval(), X / 0), ValueError, "NaN or infinite"),
    ],
)
def test_what_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
