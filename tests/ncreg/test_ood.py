"""Out-of-distribution scores against pytorch-ood run on a model, numpy oracles, scikit-learn and properties."""

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ncreg import robustness as R
from ncreg._features import least_distances
from ncreg.frames import simplex_etf
from ncreg.heads import ETFHead
from ncreg.robustness.ood.detection import _newcombe

FEATURE_SCORES = {
    "knn": lambda h, train, y: R.knn_score(h, train, neighbours=5),
    "mahalanobis": lambda h, train, y: R.mahalanobis_score(h, train, y),
    "neco": lambda h, train, y: R.neco_score(h, train, num_classes=4),
    "vim": lambda h, train, y: R.vim_score(h, h[:, :4], train, 2 * train[:, :4].abs()),
}


def clusters(samples=120, classes=4, dim=10, spread=1.0, seed=0):
    """Features around class means of length 4, and their classes."""
    draw = torch.Generator().manual_seed(seed)
    means = 4 * F.normalize(torch.randn(classes, dim, generator=torch.Generator().manual_seed(99)).double())
    target = torch.arange(samples) % classes
    return means[target] + spread * torch.randn(samples, dim, generator=draw).double(), target


def others(samples=70, dim=10, seed=7):
    return 3 * torch.randn(samples, dim, generator=torch.Generator().manual_seed(seed)).double()


@pytest.fixture
def trained():
    """A small convolutional net after a few steps on stripes, its encoder, its linear head, and image sets."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 3
    x = 0.3 * torch.rand(400, 1, 8, 8, generator=draw)
    for c, place in enumerate([(slice(None), slice(0, 3)), (slice(0, 3), slice(None)), (slice(5, 8), slice(5, 8))]):
        x[y == c, 0, place[0], place[1]] += 0.5
    encoder = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 12), nn.GELU()
    )
    head = nn.Linear(12, 3)
    model = nn.Sequential(encoder, head)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(15):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:300]), y[:300]).backward()
        optimizer.step()
    return model.eval(), encoder, head, (x[:300], y[:300]), x[300:], R.noise_images(x[300:], "uniform", seed=1)


# ---- AUROC, FPR95 and their intervals


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=40), st.lists(st.integers(0, 6), min_size=1, max_size=40))
def test_auroc_and_fpr95_are_sklearns_with_ties(inside, outside):
    found = R.evaluate_detection(torch.tensor(inside).double(), torch.tensor(outside).double())
    label = np.r_[np.ones(len(inside)), np.zeros(len(outside))]
    score = np.r_[inside, outside]
    assert math.isclose(found.auroc, roc_auc_score(label, score), abs_tol=1e-12)
    false, true, _ = roc_curve(label, score, drop_intermediate=False)
    assert math.isclose(found.fpr95, false[true >= 0.95 - 1e-12].min(), abs_tol=1e-12)
    assert np.mean(np.array(inside) >= found.threshold) >= 0.95
    assert found.auroc_interval[0] <= found.auroc <= found.auroc_interval[1]
    assert 0 <= found.auroc_interval[0] and found.auroc_interval[1] <= 1
    back = R.evaluate_detection(-torch.tensor(outside).double(), -torch.tensor(inside).double())
    assert math.isclose(back.auroc, found.auroc, abs_tol=1e-12)
    np.testing.assert_allclose(back.auroc_interval, found.auroc_interval, atol=1e-9)


def test_the_interval_is_delongs_on_the_logit_scale():
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 30, 50) + 6.0, draw.integers(0, 30, 35) + 0.0
    kernel = (a[:, None] > b) + 0.5 * (a[:, None] == b)
    area = kernel.mean()
    variance = kernel.mean(1).var(ddof=1) / 50 + kernel.mean(0).var(ddof=1) / 35
    half = stats.norm.ppf(0.975) * math.sqrt(variance) / (area * (1 - area))
    wanted = [1 / (1 + math.exp(-(math.log(area / (1 - area)) + sign * half))) for sign in (-1, 1)]
    np.testing.assert_allclose(R.evaluate_detection(*map(torch.tensor, (a, b))).auroc_interval, wanted, rtol=1e-9)


def test_intervals_cover_the_truth():
    """AUROC of N(1, 1) against N(0, 1) is Φ(1/√2): about 95 of 100 intervals hold it."""
    draw, truth = torch.Generator().manual_seed(0), stats.norm.cdf(1 / math.sqrt(2))
    held = 0
    for _ in range(400):
        found = R.evaluate_detection(torch.randn(30, generator=draw) + 1, torch.randn(40, generator=draw))
        held += found.auroc_interval[0] <= truth <= found.auroc_interval[1]
    assert 0.92 < held / 400 < 0.98


def test_perfect_separation_has_an_interval_too():
    found = R.evaluate_detection(torch.arange(100.0) + 100, torch.arange(50.0))
    low, high = found.auroc_interval
    assert found.auroc == high == 1 and 0.9 < low < 0.99 and found.fpr95 == 0
    theta, m, n = _newcombe(0.8, 30, 20), 30, 20  # Newcombe's equation, as he writes it
    star = (m + n) / 2 - 1
    variance = theta * (1 - theta) * (1 + star * (1 - theta) / (2 - theta) + star * theta / (1 + theta)) / (m * n)
    assert math.isclose((0.8 - theta) ** 2, stats.norm.ppf(0.975) ** 2 * variance, rel_tol=1e-9)
    one = R.evaluate_detection(torch.tensor([1.0]), torch.tensor([0.0, 2.0]))
    assert one.auroc == 0.5 and 0 < one.auroc_interval[0] < 0.5 < one.auroc_interval[1] < 1


# ---- agreement with pytorch-ood


def test_scores_are_pytorch_oods_on_a_model(trained):
    """Its classes see images and the model; ours see stored features and logits."""
    from pytorch_ood import detector

    model, encoder, head, (x, y), inside, outside = trained
    loader = DataLoader(TensorDataset(x, y), batch_size=64)
    images = torch.cat([inside, outside])
    with torch.no_grad():
        train, h, z, train_z = encoder(x), encoder(images), model(images), model(x)
    maha = detector.Mahalanobis(encoder).fit(loader)
    pairs = {
        "msp": (R.msp_score(z), detector.MaxSoftmax(model)),
        "max_logit": (R.max_logit_score(z), detector.MaxLogit(model)),
        "energy": (R.energy_score(z, 2.5), detector.EnergyBased(model, t=2.5)),
        "knn": (R.knn_score(h, train, neighbours=7), detector.KNN(encoder, k=7).fit(loader)),
        "vim": (
            R.vim_score(h, z, train, train_z, weight=head.weight, bias=head.bias, dim=6),
            detector.ViM(encoder, d=6, w=head.weight, b=head.bias).fit(loader),
        ),
        "nci": (R.nci_score(h, z, train, head.weight), detector.NCI(encoder, head).fit(loader)),
        "nci with a length": (
            R.nci_score(h, z, train, head.weight, alpha=0.05),
            detector.NCI(encoder, head, alpha=0.05).fit(loader),
        ),
        "mahalanobis": (R.mahalanobis_score(h, train, y) / len(train) / 2, maha),  # ½, and a sum in place of a mean
    }
    for name, (ours, library) in pairs.items():
        with torch.no_grad():
            theirs = -library(images).double()
        rounding = 5e-3 if name in ("vim", "mahalanobis") else 1e-6  # float32 covariances there
        torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding * float(theirs.abs().max()), msg=name)
        areas = [R.evaluate_detection(s[: len(inside)], s[len(inside) :]).auroc for s in (ours, theirs)]
        assert abs(areas[0] - areas[1]) < 2e-3, name


def test_evaluate_ood_puts_the_scores_together(trained):
    model, encoder, head, (x, y), inside, outside = trained
    with torch.no_grad():
        train, h, z, far, far_z = encoder(x), encoder(inside), model(inside), encoder(outside), model(outside)
    report = R.evaluate_ood(train, y, h, z, {"noise": (far, far_z), "self": (h, z)}, weight=head.weight, bias=head.bias)
    assert list(report.detections["noise"]) == [
        "msp",
        "max_logit",
        "energy",
        "knn",
        "mahalanobis",
        "vim",
        "neco",
        "nci",
    ]
    assert not report.skipped and report.num_train == 300
    for name, found in report.detections["self"].items():
        assert found.auroc == 0.5 and found.fpr95 >= 0.95, name
    both = torch.cat([h, far])
    wanted = {
        "max_logit": torch.cat([z, far_z]).amax(1).double(),
        "knn": R.knn_score(both, train, neighbours=30),
        "mahalanobis": R.mahalanobis_score(both, train, y),
        "neco": R.neco_score(both, train, dim=2),
        "vim": R.vim_score(
            both,
            torch.cat([z, far_z]),
            train,
            head.double()(train.double()).detach(),
            weight=head.weight,
            bias=head.bias,
            dim=6,
        ),
    }
    for name, scores in wanted.items():
        got = torch.cat([report.id_scores[name], report.ood_scores["noise"][name]])
        torch.testing.assert_close(got, scores, rtol=1e-6, atol=1e-9, msg=name)
        area = roc_auc_score(np.r_[np.ones(100), np.zeros(100)], scores)
        assert math.isclose(report.detections["noise"][name].auroc, area, abs_tol=1e-12)
    assert report.nc5["noise"] == R.ood_orthogonality(train, y, far)
    assert report.nc5_centred["noise"] == R.ood_orthogonality(train, y, far, centre=True)
    assert max(found.auroc for found in report.detections["noise"].values()) > 0.9


# ---- numpy oracles


def test_mahalanobis_from_its_definition():
    h, y = clusters()
    test = others()
    x, t = h.numpy(), y.numpy()
    means = np.stack([x[t == c].mean(0) for c in range(4)])
    within = sum(np.outer(row - means[c], row - means[c]) for row, c in zip(x, t, strict=True)) / len(x)
    total = np.trace(np.cov(x.T, bias=True)) / x.shape[1]
    inverse = np.linalg.inv(within + 1e-9 * total * np.eye(x.shape[1]))
    wanted = [-min((row - mean) @ inverse @ (row - mean) for mean in means) for row in test.numpy()]
    np.testing.assert_allclose(R.mahalanobis_score(test, h, y), wanted, rtol=1e-9)


@pytest.mark.parametrize("entries", [1, 50, 2**22])
def test_distances_far_below_the_lengths_are_told_exactly(entries, monkeypatch):
    """Whole numbers near 2²⁸: squares are beyond float64's digits, differences are not; some rows are ties."""
    monkeypatch.setattr("ncreg._features.ENTRIES", entries)
    draw = np.random.default_rng(0)
    points, rows = (2**28 + draw.integers(-9, 9, (count, 3)) for count in (12, 40))
    points[5], rows[:2] = points[3], points[[3, 7]]
    gaps = ((rows[:, None] - points) ** 2).sum(2)
    besides = draw.integers(0, 12, 40)
    besides[0] = 3
    others = gaps.copy()
    others[np.arange(40), besides] = 10**6
    x, p = (torch.from_numpy(value).double() for value in (rows, points))
    np.testing.assert_allclose(least_distances(x, p).square(), gaps.min(1), rtol=1e-15)
    found = least_distances(x, p, torch.from_numpy(besides))
    np.testing.assert_allclose(found.square(), others.min(1), rtol=1e-15)
    products = (x.square().sum(1)[:, None] + p.square().sum(1) - 2 * x @ p.T).amin(1)
    assert not np.allclose(products, gaps.min(1), rtol=0.5)


@pytest.mark.parametrize("size", [1e-13, 1e-300, 1e300])
def test_knn_knows_the_direction_of_features_of_any_length(size):
    h, _ = clusters()
    test = others()
    want = R.knn_score(test, h, neighbours=7)
    torch.testing.assert_close(R.knn_score(test * size, h, neighbours=7), want)
    torch.testing.assert_close(R.knn_score(test, h * size, neighbours=7), want)
    assert R.knn_score(0 * test[:3], h, neighbours=7).tolist() == pytest.approx([-1] * 3)  # as documented: no direction


def test_knn_from_its_definition():
    h, _ = clusters()
    test = others()
    unit, rows = (part.numpy() / np.linalg.norm(part.numpy(), axis=1, keepdims=True) for part in (h, test))
    wanted = [-np.sort([np.linalg.norm(row - other) for other in unit])[6] for row in rows]
    np.testing.assert_allclose(R.knn_score(test, h, neighbours=7), wanted, rtol=1e-7)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("dim", [None, 1, 9])
def test_neco_from_sklearns_pca(dim, standardize):
    h, _ = clusters()
    test = others()
    scaler = StandardScaler(with_std=standardize).fit(h.numpy())
    train, rows = scaler.transform(h.numpy()), scaler.transform(test.numpy())
    kept = PCA(dim or 3).fit(train).transform(rows)
    wanted = np.linalg.norm(kept, axis=1) / np.linalg.norm(rows, axis=1)
    got = R.neco_score(test, h, num_classes=4, dim=dim, standardize=standardize)
    np.testing.assert_allclose(got, wanted, rtol=1e-9)
    assert 0 <= got.min() and got.max() <= 1 + 1e-12


def test_neco_with_more_classes_than_features_keeps_nine_tenths_of_the_variance():
    h, _ = clusters()
    share = PCA().fit(h.numpy()).explained_variance_ratio_.cumsum()
    dim = int(np.argmax(share >= 0.9)) + 1
    torch.testing.assert_close(R.neco_score(others(), h, num_classes=50), R.neco_score(others(), h, dim=dim))


def test_vim_from_its_definition():
    """By a projector from an SVD; the residual is what the projector leaves."""
    h, _ = clusters()
    draw = torch.Generator().manual_seed(1)
    w, b = torch.randn(4, 10, generator=draw).double(), torch.randn(4, generator=draw).double()
    test = others()
    origin = -np.linalg.lstsq(w.numpy(), b.numpy(), rcond=None)[0]
    np.testing.assert_allclose(w.numpy() @ origin + b.numpy(), 0, atol=1e-12)
    _, _, right = np.linalg.svd(h.numpy() - origin)
    projector = np.eye(10) - right[:3].T @ right[:3]
    train_z, z = h @ w.T + b, test @ w.T + b
    alpha = train_z.amax(1).mean().item() / np.linalg.norm((h.numpy() - origin) @ projector, axis=1).mean()
    wanted = np.log(np.exp(z.numpy()).sum(1)) - alpha * np.linalg.norm((test.numpy() - origin) @ projector, axis=1)
    got = R.vim_score(test, z, h, train_z, weight=w, bias=b, dim=3)
    np.testing.assert_allclose(got, wanted, rtol=1e-9)


def test_vim_of_class_vectors_that_sum_to_zero_but_for_rounding():
    """W of a simplex has rank C − 1 and W⁺ = (C − 1)/C Wᵀ; in float32 its last singular value is rounding, not 0."""
    classes, dim = 8, 24
    y = torch.arange(160) % classes
    draw = torch.Generator().manual_seed(0)
    w = simplex_etf(classes, dim, generator=draw, dtype=torch.float64)
    b = 0.3 + 0.1 * torch.randn(classes, generator=draw).double()
    h = 3 * w[y] + 0.1 * torch.randn(160, dim, generator=draw).double()
    test = 0.5 * torch.randn(50, dim, generator=draw).double()
    origin = -(classes - 1) / classes * (w.T @ b)
    values, vectors = np.linalg.eigh(((h - origin).T @ (h - origin)).numpy())
    rest = vectors[:, : dim - 12]
    train_z, z = h @ w.T + b, test @ w.T + b
    alpha = train_z.amax(1).mean().item() / np.linalg.norm((h - origin).numpy() @ rest, axis=1).mean()
    wanted = z.logsumexp(1).numpy() - alpha * np.linalg.norm((test - origin).numpy() @ rest, axis=1)
    for dtype in (torch.float64, torch.float32):
        got = R.vim_score(test, z, h, train_z, weight=w.to(dtype), bias=b, dim=12)
        np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_nc5_from_its_definition_and_at_its_ends():
    h, y = clusters()
    test = others() + 1
    means = np.stack([h.numpy()[y.numpy() == c].mean(0) for c in range(4)])
    for centre in (False, True):
        origin = means.mean(0) if centre else 0
        rows, other = means - origin, test.numpy().mean(0) - origin
        wanted = np.mean([abs(row @ other) / np.linalg.norm(row) / np.linalg.norm(other) for row in rows])
        assert math.isclose(R.ood_orthogonality(h, y, test, centre=centre), wanted, rel_tol=1e-9)
    eye = torch.eye(3, dtype=torch.float64)
    assert R.ood_orthogonality(eye[:2], torch.tensor([0, 1]), eye[2:] * 5) == 0
    assert R.ood_orthogonality(eye[:2], torch.tensor([0, 1]), eye[:1]) == 0.5


# ---- properties


@pytest.mark.parametrize("name", FEATURE_SCORES)
def test_rotating_and_reordering_change_nothing(name):
    (h, y), test, score = clusters(), others(), FEATURE_SCORES[name]
    order = torch.randperm(len(h), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(score(test, h[order], y[order]), score(test, h, y))
    torch.testing.assert_close(score(test.flip(0), h, y).flip(0), score(test, h, y))
    if name != "vim":  # whose logits here are features
        turn = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(2)).double())[0]
        torch.testing.assert_close(score(test @ turn, h @ turn, y), score(test, h, y))
        for factor in (1e-8, 1e8):
            torch.testing.assert_close(score(test * factor, h * factor, y), score(test, h, y))
    if name in ("mahalanobis", "neco"):
        torch.testing.assert_close(score(test + 50, h + 50, y), score(test, h, y))


@pytest.mark.parametrize("spread", [0.0, 1e-12, 1e-6, 1e-3])
def test_collapsed_features_give_finite_scores_that_tell(spread):
    """Within-class covariance near nought or exactly so; what lies off the class means is far."""
    h, y = clusters(spread=spread)
    test, _ = clusters(spread=spread, seed=5)
    outside = others()
    for name, score in FEATURE_SCORES.items():
        values = score(torch.cat([test, outside]), h, y)
        assert values.isfinite().all(), name
        assert R.evaluate_detection(values[: len(test)], values[len(test) :]).auroc > 0.99, name
    far = R.mahalanobis_score(outside, h, y)
    if spread == 0:  # then Σ is the floor alone
        means = torch.stack([h[y == c][0] for c in range(4)])
        floor = 1e-9 * (h - h.mean(0)).square().mean()
        torch.testing.assert_close(far, -(torch.cdist(outside, means).amin(1) ** 2) / floor)


@pytest.mark.parametrize("spread", [1e-4, 1e-7, 1e-8])
def test_a_mahalanobis_score_does_not_depend_on_the_rows_beside_it(spread):
    """Nor does it lose digits: against the definition in long double, on features that have collapsed."""
    h, y = clusters(spread=spread, samples=400)
    rows = torch.cat([clusters(spread=spread, samples=40, seed=5)[0], clusters(spread=3 * spread, samples=40)[0]])
    together = R.mahalanobis_score(rows, h, y)
    alone = torch.cat([R.mahalanobis_score(row[None], h, y) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)
    means = torch.stack([h[y == c].mean(0) for c in range(4)])
    within = (h - means[y]).numpy()
    covariance = within.T @ within / len(h) + 1e-9 * float((h - h.mean(0)).square().mean()) * np.eye(h.shape[1])
    gaps = (rows[:, None] - means).numpy()
    wanted = -np.einsum("rcd,rcd->rc", gaps, np.linalg.solve(covariance, gaps[..., None])[..., 0]).min(1)
    np.testing.assert_allclose(together, wanted, rtol=1e-5)


def test_few_samples_dead_units_and_large_offsets_stay_finite():
    h, y = clusters(samples=8, dim=40)
    h[:, :5] = 0
    test = others(dim=40)
    for name in ("mahalanobis", "neco", "knn"):
        assert FEATURE_SCORES[name](test, h, y).isfinite().all()
    distance = -R.mahalanobis_score(test, h, y)
    assert (distance > 0).all()
    moved = -R.mahalanobis_score(test + 1e6, h + 1e6, y)
    torch.testing.assert_close(moved, distance, rtol=1e-3, atol=0)


def test_half_precision_features_are_lifted():
    h, y = clusters()
    test = others()
    for name, score in FEATURE_SCORES.items():
        got = score(test.bfloat16(), h.bfloat16(), y)
        torch.testing.assert_close(got, score(test.bfloat16().double(), h.bfloat16().double(), y), msg=name)


@pytest.mark.parametrize(("classes", "dim"), [(2, 5), (6, 4), (2, 1), (3, 2)])
def test_any_number_of_classes_and_features(classes, dim):
    h, y = clusters(classes=classes, dim=dim, samples=90)
    test = others(dim=dim)
    w = torch.randn(classes, dim, generator=torch.Generator().manual_seed(0)).double()
    w[0] += h[0]
    report = R.evaluate_ood(h, y, h, h @ w.T + 5, {"x": (test, test @ w.T + 5)}, train_logits=h @ w.T + 5)
    assert set(report.skipped) == ({"vim", "neco", "nci"} if dim == 1 else {"nci"})  # it has no weight
    for values in (*report.id_scores.values(), *report.ood_scores["x"].values()):
        assert values.isfinite().all()


@pytest.mark.parametrize("bias", [None, torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)])
def test_vim_is_left_out_where_units_that_are_always_zero_make_it_the_energy(bias):
    """Six of ten units are 0 in every image: five principal directions hold all, and nothing is left over."""
    h, y = clusters()
    far, w = others(), torch.randn(4, 10, generator=torch.Generator().manual_seed(0)).double()
    h[:, 4:], far[:, 4:] = 0, 0
    z, far_z = ((rows @ w.T + (0 if bias is None else bias)) for rows in (h, far))
    args = (h, y, h, z, {"far": (far, far_z)})
    given = {"weight": w, "bias": bias, "train_logits": z}
    report = R.evaluate_ood(*args, **given)
    assert "as the energy does" in report.skipped["vim"] and "vim" not in report.detections["far"]
    kept = R.evaluate_ood(*args, **given, vim_dim=2)  # the way out
    assert "vim" in kept.detections["far"] and not kept.skipped
    with pytest.raises(ValueError, match="pass a smaller vim_dim"):
        R.evaluate_ood(*args, **given, scores=["vim"])


def test_a_head_that_normalises_needs_its_training_logits():
    h, y = clusters(dim=12)
    test, head = others(dim=12), ETFHead(12, 4).double()
    args = (h, y, h, head(h), {"x": (test, head(test))})
    assert "pass train_logits" in R.evaluate_ood(*args).skipped["vim"]
    assert "normalises or scales" in R.evaluate_ood(*args, weight=head.weight).skipped["vim"]
    with pytest.raises(ValueError, match="normalises or scales"):
        R.evaluate_ood(*args, weight=head.weight, scores=["vim"])
    report = R.evaluate_ood(*args, weight=head.weight, train_logits=head(h))
    wanted = R.vim_score(test, head(test), h, head(h))
    torch.testing.assert_close(report.ood_scores["x"]["vim"], wanted)


@pytest.mark.parametrize("length", [1, 100, 1e6])
def test_the_check_of_a_head_that_scales_does_not_depend_on_the_ood_set(length):
    """Long features there once hid that the in-distribution logits are twice what weight and features make."""
    h, y = clusters(dim=12)
    weight = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)).double()
    far = length * others(dim=12)
    twice = (h, y, h, 2 * h @ weight.T, {"far": (far, 2 * far @ weight.T)})
    assert "normalises or scales" in R.evaluate_ood(*twice, weight=weight).skipped["vim"]
    report = R.evaluate_ood(h, y, h, h @ weight.T, {"far": (far, far @ weight.T)}, weight=weight)
    torch.testing.assert_close(
        report.ood_scores["far"]["vim"], R.vim_score(far, far @ weight.T, h, h @ weight.T, weight=weight)
    )


def test_ties_at_saturated_softmax_count_half():
    """Logits of ±1000 have probability 1 exactly; that is chance, not detection."""
    z = 1000.0 * torch.eye(3).repeat(10, 1)
    assert R.evaluate_detection(R.msp_score(z), R.msp_score(2 * z)).auroc == 0.5
    assert R.evaluate_detection(R.max_logit_score(2 * z), R.max_logit_score(z)).auroc == 1


# ---- noise


@pytest.mark.parametrize("kind", ["uniform", "gaussian", "shuffle"])
def test_noise_is_in_range_and_its_seeds_alone_decide(kind):
    images = torch.rand(6, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    noise = R.noise_images(images, kind, seed=4)
    assert noise.shape == images.shape and noise.dtype == images.dtype
    assert noise.min() >= 0 and noise.max() <= 1
    assert torch.equal(noise, R.noise_images(images, kind, seed=4))
    assert not torch.equal(noise, R.noise_images(images, kind, seed=5))
    assert torch.equal(before, torch.get_rng_state())
    assert R.noise_images(images.half(), kind).dtype == torch.float16


def test_noise_has_the_statistics_it_names():
    images = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0)) ** 3
    uniform, normal, shuffled = (R.noise_images(images, kind) for kind in ("uniform", "gaussian", "shuffle"))
    assert stats.kstest(uniform.flatten().numpy(), "uniform").pvalue > 1e-3
    assert abs((normal == 0).float().mean() - stats.norm.cdf(-0.5)) < 0.01  # what clipping at 0 takes
    assert abs((normal == 1).float().mean() - stats.norm.cdf(-0.5)) < 0.01
    assert torch.equal(shuffled.flatten(2).sort().values, images.flatten(2).sort().values)
    colours = {tuple(pixel) for pixel in images[0].flatten(1).T.tolist()}
    assert {tuple(pixel) for pixel in shuffled[0].flatten(1).T.tolist()} == colours  # channels stay together
    first, second = ((shuffled[i, 0] == images[i, 0]).float().mean() for i in (0, 1))
    assert max(first, second) < 0.05
    ramp = torch.arange(256.0).view(1, 1, 16, 16).expand(2, 1, 16, 16) / 256
    one, two = R.noise_images(ramp, "shuffle")
    assert not torch.equal(one, two)  # an order for each image


# ---- the optional library


def test_without_pytorch_ood_the_message_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "pytorch_ood"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pytorch_ood", None)
    h, y = clusters()
    test = others()
    with pytest.raises(ImportError, match=r"ncreg\[robust\]"):
        R.energy_score(h[:, :4])
    report = R.evaluate_ood(
        h, y, h, h[:, :4], {"x": (test, test[:, :4])}, train_logits=h[:, :4], scores=["mahalanobis", "vim", "neco"]
    )
    assert list(report.detections["x"]) == ["mahalanobis", "vim", "neco"]


# ---- refusals

H, Y = clusters(samples=40)
Z = H[:, :4]
OOD = {"x": (H, Z)}
NAN = H.clone()
NAN[3, 2] = math.nan
REFUSED = [
    (lambda: R.evaluate_ood(H, Y, H, Z, {}), ValueError, "ood must name at least one set"),
    (lambda: R.evaluate_ood(H, Y, H, Z, {"x": H}), TypeError, r"ood\['x'\] must be a pair"),
    (lambda: R.evaluate_ood(H, Y, H, Z, {"x": (H[:0], Z[:0])}), ValueError, r"ood\['x'\] features is empty"),
    (lambda: R.evaluate_ood(H, Y, H, Z, {"x": (H[:, :3], Z)}), ValueError, "3 columns where the training .* 10"),
    (lambda: R.evaluate_ood(H, Y, H, Z, {"x": (H, Z[:, :3])}), ValueError, r"ood\['x'\]: logits \(40, 3\)"),
    (lambda: R.evaluate_ood(H, Y, H, Z, {"x": (H[:5], Z)}), ValueError, r"do not go with features \(5, 10\)"),
    (lambda: R.evaluate_ood(H, Y, H, Z.softmax(1), OOD), ValueError, "id logits are probabilities"),
    (lambda: R.evaluate_ood(H, Y, H, Z / 0, OOD), ValueError, "id logits are not finite"),
    (lambda: R.evaluate_ood(NAN, Y, H, Z, OOD), ValueError, "train_features holds NaN .* in 1 of 40 rows"),
    (lambda: R.evaluate_ood(H, Y[:3], H, Z, OOD), ValueError, r"train_target must have shape \(40,\)"),
    (lambda: R.evaluate_ood(H, Y % 3, H, Z, OOD), ValueError, "no sample of class 3"),
    (lambda: R.evaluate_ood(H, Y + 1, H, Z, OOD), ValueError, r"lie in \[0, 4\), got classes from 1 to 4"),
    (lambda: R.evaluate_ood(H, Y.double(), H, Z, OOD), TypeError, "train_target must hold integer"),
    (
        lambda: R.evaluate_ood(H, Y, H, Z, OOD, scores=["knn"], neighbours=50),
        ValueError,
        "neighbours=50 but there are only 40",
    ),
    (lambda: R.evaluate_ood(H, Y, H, Z, OOD, scores="knn"), TypeError, r"scores must be a list, got 'knn': \['knn'\]"),
    (lambda: R.evaluate_ood(H, Y, H, Z, OOD, scores=["odin"]), ValueError, "scores='odin' must be one of 'msp'"),
    (lambda: R.evaluate_ood(H, Y, H, Z, OOD, weight=H, neighbours=5), ValueError, r"weight must .* \(4, 10\)"),
    (lambda: R.evaluate_ood(H, Y, H, Z, OOD, weight=H[:4], bias=Z), ValueError, r"bias must .* \(4,\), got \(40, 4\)"),
    (lambda: R.evaluate_ood(H, Y, H, Z, OOD, weight=H[:4], bias=[0.0] * 4), ValueError, "bias must .* got list"),
    (lambda: R.evaluate_ood(H, Y, H, Z, OOD, neighbours=5, temperature=0), ValueError, "temperature=0"),
    (lambda: R.evaluate_ood(H.long(), Y, H, Z, OOD), TypeError, "train_features must hold floating-point"),
    (lambda: R.mahalanobis_score(H, H[:1].expand(4, -1), torch.arange(4)), ValueError, "the same vector in all 4"),
    (lambda: R.msp_score(Z.long()), TypeError, "logits must be floating-point logits, got torch.int64"),
    (lambda: R.energy_score(Z[:0]), ValueError, r"logits is empty, shape \(0, 4\)"),
    (lambda: R.vim_score(H, Z, H, Z / 0), ValueError, "train_logits are not finite"),
    (lambda: R.vim_score(H, Z / 0, H, Z), ValueError, "^logits are not finite"),
    (lambda: R.vim_score(H, Z, H, Z, dim=10), ValueError, "leave no residual"),
    (lambda: R.vim_score(H, Z, H, Z.abs() * -1), ValueError, "must be above 0"),
    (lambda: R.vim_score(H, Z, H, Z.abs(), bias=Z[0]), ValueError, "bias is given without weight"),
    (lambda: R.vim_score(H, Z, H, Z[:3]), ValueError, "train_logits has 3 rows where the features have 40"),
    (lambda: R.vim_score(H, Z, H, Z[:, :3]), ValueError, "logits have 4 classes where train_logits have 3"),
    (lambda: R.vim_score(H, Z, H, Z, weight=H[:4], bias=[0.0] * 4), TypeError, "bias must be a tensor .* got list"),
    (lambda: R.vim_score(H, Z, H, Z, weight=H[:4], bias=Z[0] / 0), ValueError, "bias must be finite"),
    (lambda: R.neco_score(H, H, dim=2, standardize="no"), TypeError, "standardize='no' must be True or False"),
    (lambda: R.ood_orthogonality(H, Y, H, centre="no"), TypeError, "centre='no' must be True or False"),
    (lambda: R.neco_score(H, H), ValueError, "pass num_classes"),
    (lambda: R.neco_score(H, H, dim=10), ValueError, "leave nothing out"),
    (lambda: R.neco_score(H[:, :1], H[:, :1], num_classes=4), ValueError, "NECO needs at least 2 features"),
    (lambda: R.knn_score(H, H, neighbours=0), ValueError, "neighbours=0 must be at least 1"),
    (lambda: R.evaluate_detection(H[:0, 0], H[:, 0]), ValueError, "id_scores must hold one score an image"),
    (lambda: R.evaluate_detection(H[:, 0], NAN[:, 2]), ValueError, "ood_scores holds NaN in 1 of 40"),
    (lambda: R.evaluate_detection(H[:, 0], Y), TypeError, "ood_scores must be a floating-point tensor"),
    (lambda: R.noise_images(H, "uniform"), ValueError, "images must be .batch, channels"),
    (lambda: R.noise_images(H.view(4, 1, 10, 10), "shuffle"), ValueError, "normalise inside the model"),
    (
        lambda: R.noise_images(H.view(4, 1, 10, 10).sigmoid(), "salt"),
        ValueError,
        "kind='salt' must be one of 'uniform'",
    ),
    (lambda: R.noise_images(H.view(4, 1, 10, 10).sigmoid(), seed=None), TypeError, "seed=None must be an integer"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("call", "error", "words"), REFUSED)
def test_refusals_name_the_argument_and_the_value(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_fewer_training_images_than_neighbours_cost_that_score_alone():
    report = R.evaluate_ood(H, Y, H, Z, OOD, train_logits=Z, neighbours=50)
    assert "knn" not in report.detections["x"] and "only 40 training features" in report.skipped["knn"]
    assert report.detections["x"]["mahalanobis"].auroc == 0.5


@pytest.mark.usefixtures("unchecked")
def test_seeds_of_numpy_are_welcome():
    images = torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    assert R.noise_images(images, seed=np.int64(7)).equal(R.noise_images(images, seed=7))


# ---- NCI


def test_nci_at_collapse_is_the_length_of_the_class_vector():
    """Features on their class vectors, whatever their lengths; a feature across them scores what its cosine says."""
    weight = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])).double()
    weight = weight - weight.mean(0)
    y = torch.arange(40) % 4
    inside = (1 + torch.arange(40) % 3)[:, None] * weight[y]
    train = torch.cat([weight, -weight])  # mean 0
    got = R.nci_score(inside, F.one_hot(y, 4).double() * 9, train, weight)
    torch.testing.assert_close(got, weight[y].norm(dim=1))
    lengths = R.nci_score(inside, F.one_hot(y, 4).double() * 9, train, weight, alpha=0.5) - got
    torch.testing.assert_close(lengths, 0.5 * inside.abs().sum(1))
    middle = R.nci_score(torch.zeros(1, 4).double(), torch.tensor([[5.0, 0.0, 0.0, 1.0]]), train, weight)
    assert middle.tolist() == [0.0]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.eye(3)}, r"weight must have shape \(4, 10\), got \(3, 3\)"),
        ({"logits": 9 * torch.eye(4)}, "logits has 4 rows where the features have 70"),
        ({"alpha": -1.0}, "alpha=-1.0 must be finite and at least 0"),
    ],
)
def test_what_nci_refuses(change, words):
    args = {"logits": 9 * torch.randn(70, 4), "train_features": clusters()[0], "weight": torch.randn(4, 10)}
    with pytest.raises(ValueError, match=words):
        R.nci_score(others(), **(args | change))


@pytest.mark.parametrize(("samples", "k"), [(6, 1), (43, 4), (400, 40), (800, 50)])
def test_few_training_features_have_fewer_neighbours(samples, k):
    draw = torch.Generator().manual_seed(samples)
    train, rows = (torch.randn(size, 5, generator=draw, dtype=torch.float64) for size in (samples, 9))
    target, z = torch.arange(samples) % 3, torch.randn(9, 3, generator=draw, dtype=torch.float64)
    report = R.evaluate_ood(train, target, rows, z, {"far": (rows + 1, z)}, scores=["knn"])
    unit = [F.normalize(part, dim=1) for part in (rows, train)]
    wanted = -torch.cdist(*unit).sort(1).values[:, k - 1]
    torch.testing.assert_close(report.id_scores["knn"], wanted)
    assert report.neighbours == k
