"""DeepFool and minimum-norm distances: closed forms on affine models, foolbox on a net, models without a way out."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from ncreg.robustness import deepfool, minimum_norm, pgd

NORMS = [("l2", 2), ("linf", 1)]


@pytest.fixture(scope="module")
def net():
    """A small convolutional net on digits, smooth enough for DeepFool to take more than one step."""
    data = load_digits()
    images, target = torch.tensor(data.images / 16, dtype=torch.float32)[:, None], torch.tensor(data.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 8, 3, padding=1), nn.Softplus(), nn.Conv2d(8, 16, 3, 2, 1), nn.Softplus()]
        made = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))
        optimizer = torch.optim.Adam(made.parameters(), 5e-3)
        for _ in range(250):
            chosen = torch.randint(0, 1500, (128,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(made(images[chosen]), target[chosen]).backward()
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return made.eval()


@pytest.fixture(scope="module")
def batch():
    data = load_digits()
    return torch.tensor(data.images[1500:1600] / 16, dtype=torch.float32)[:, None], torch.tensor(data.target[1500:1600])


def affine(classes=7, dtype=torch.float64, seed=0):
    """A model with a bias, images in the middle of [0, 1], and numpy's distances to the nearest boundary, by dual."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, 48, generator=generator, dtype=dtype)
    bias = 0.1 * torch.randn(classes, generator=generator, dtype=dtype)
    images = 0.4 + 0.2 * torch.rand(32, 3, 4, 4, generator=generator, dtype=dtype)

    def model(x):
        return (x - 0.5).flatten(1) @ weight.T + bias

    w, b = weight.double().numpy(), bias.double().numpy()
    distances = {1: [], 2: []}
    for x in images.double().numpy().reshape(32, -1):
        f = w @ (x - 0.5) + b
        top = f.argmax()
        for dual, found in distances.items():
            others = [j for j in range(classes) if j != top]
            found.append(min((f[top] - f[j]) / np.linalg.norm(w[top] - w[j], ord=dual) for j in others))
    return model, images, {dual: torch.tensor(np.array(found)) for dual, found in distances.items()}


class TestDeepFool:
    @pytest.mark.parametrize(("norm", "dual"), NORMS)
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
    @pytest.mark.parametrize("classes", [2, 7])
    def test_is_exact_on_affine_models(self, norm, dual, dtype, tolerance, classes):
        model, images, distances = affine(classes, dtype)
        found = deepfool(model, images, norm=norm)
        torch.testing.assert_close(found.distance.double(), distances[dual], rtol=tolerance, atol=tolerance)
        order = 2 if norm == "l2" else torch.inf
        sizes = torch.linalg.vector_norm(images.flatten(1).double(), ord=order, dim=1)
        torch.testing.assert_close(found.ratio.double(), distances[dual] / sizes, rtol=tolerance, atol=tolerance)
        assert found.rho == pytest.approx(float((distances[dual] / sizes).mean()), rel=10 * tolerance)
        moved = torch.linalg.vector_norm((found.images - images).flatten(1).double(), ord=order, dim=1)
        torch.testing.assert_close(moved, 1.02 * distances[dual], rtol=10 * tolerance, atol=tolerance)
        assert found.crossed.all() and found.failures == 0
        assert torch.equal(model(found.images).argmax(1), found.rival)
        assert torch.equal(model(images).argmax(1), found.predicted) and (found.rival != found.predicted).all()

    def test_fewer_rivals_never_bring_the_boundary_nearer(self):
        model, images, distances = affine()
        one = deepfool(model, images, top_k=1)
        logits = model(images)
        second = logits.argsort(1)[:, -2]
        assert torch.equal(one.rival, second) or not torch.equal(one.rival, deepfool(model, images).rival)
        assert (one.distance >= distances[2] - 1e-12).all() and (one.distance > distances[2] + 1e-6).any()
        torch.testing.assert_close(deepfool(model, images, top_k=6).distance, distances[2])

    @pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e3, 1e25])
    def test_scale_of_the_logits_does_not_matter(self, net, batch, scale):
        plain = deepfool(net, batch[0])
        scaled = deepfool(lambda x: scale * net(x), batch[0])
        assert torch.equal(scaled.rival, plain.rival) and scaled.failures == plain.failures == 0
        torch.testing.assert_close(scaled.distance, plain.distance, rtol=1e-4, atol=1e-6)

    def test_agrees_with_foolbox(self, net, batch):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            foolbox = pytest.importorskip("foolbox")
        images = batch[0]
        model = foolbox.PyTorchModel(net, bounds=(-20, 21))  # as published, without the box
        label = net(images).argmax(1)
        attack = foolbox.attacks.L2DeepFoolAttack(steps=50, candidates=10, overshoot=0.02, loss="logits")
        _, moved, broken = attack(model, images, label, epsilons=None)
        mine = deepfool(net, images)
        assert broken.all() and mine.failures == 0
        theirs = (moved - images).flatten(1).norm(dim=1)
        ratio = (mine.images - images).flatten(1).norm(dim=1) / theirs
        assert float(ratio.mean()) == pytest.approx(1, abs=0.01)
        assert float(ratio.median()) == pytest.approx(1, abs=1e-3)

    def test_batch_size_does_not_matter_and_parameters_are_left_alone(self, net, batch):
        state = torch.random.get_rng_state()
        net.zero_grad(set_to_none=True)
        whole, parts = deepfool(net, batch[0]), deepfool(net, batch[0], batch_size=7)
        torch.testing.assert_close(whole.distance, parts.distance, rtol=1e-4, atol=1e-6)
        assert all(p.grad is None and p.requires_grad for p in net.parameters())
        assert torch.equal(state, torch.random.get_rng_state())

    def test_images_that_cannot_be_moved_are_failures_and_stay(self):
        images = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))

        def half(x):  # the first two images see a constant, the others the sum of their pixels
            bright = x.flatten(1).sum(1) - images.flatten(1).sum(1)[: len(x)] + 1
            flat = torch.tensor([0.0, 0.0, 1.0, 1.0])[: len(x)]
            return torch.stack([3 + flat * (bright - 1), torch.zeros(len(x))], 1)

        found = deepfool(half, images[:2])
        assert found.failures == 2 and not found.crossed.any() and found.distance.isinf().all()
        assert torch.equal(found.images, images[:2]) and torch.equal(found.rival, found.predicted)
        assert np.isnan(found.rho)
        mixed = deepfool(lambda x: torch.stack([x.flatten(1)[:, 0].relu(), torch.full((len(x),), -0.5)], 1), images)
        assert mixed.failures == 4  # beyond 0 the gradient is gone, and the boundary out of reach
        assert torch.equal(mixed.images, images)

    def test_a_failure_does_not_disturb_the_others(self):
        images = torch.tensor([[0.9, 0.0], [0.2, 0.9]]).reshape(2, 1, 1, 2)

        def model(x):  # class 0 is lost only by moving pixel 1, whose gradient is gone where pixel 0 is large
            first, second = x[:, 0, 0, 0], x[:, 0, 0, 1]
            return torch.stack([torch.where(first > 0.5, first.detach(), second), 0 * first + 0.4], 1)

        found = deepfool(model, images)
        assert found.crossed.tolist() == [False, True] and found.failures == 1
        assert float(found.distance[1]) == pytest.approx(0.5, abs=1e-6)
        assert found.rho == pytest.approx(0.5 / float(images[1].norm()), abs=1e-6)

    def test_models_without_a_gradient(self, batch):
        constant = torch.no_grad()(lambda x: x.flatten(1)[:, :10] * 3)
        with pytest.warns(UserWarning, match="no gradient leads from the logits to the images"):
            found = deepfool(constant, batch[0])
        assert found.failures == 100

    def test_under_inference_mode(self, net, batch):
        expected = deepfool(net, batch[0][:5]).distance
        with torch.inference_mode():
            torch.testing.assert_close(deepfool(net, batch[0][:5].clone()).distance, expected)

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"overshoot": 0.0}, ValueError, "overshoot"),
            ({"overshoot": float("nan")}, ValueError, "overshoot"),
            ({"top_k": 0}, ValueError, "top_k"),
            ({"max_steps": 0}, ValueError, "max_steps"),
            ({"max_steps": 1.5}, TypeError, "max_steps"),
            ({"norm": "l1"}, ValueError, "norm"),
            ({"batch_size": 0}, ValueError, "batch_size"),
        ],
    )
    def test_refuses(self, net, batch, arguments, error, message):
        with pytest.raises(error, match=message):
            deepfool(net, batch[0][:2], **arguments)

    @pytest.mark.usefixtures("unchecked")
    def test_refuses_models_and_images(self, net, batch):
        images = batch[0][:4]
        with pytest.raises(ValueError, match="normalise inside"):
            deepfool(net, images * 2 - 1)
        with pytest.raises(ValueError, match="probabilities"):
            deepfool(lambda x: net(x).softmax(1), images)
        with pytest.raises(ValueError, match="not finite"):
            deepfool(lambda x: net(x) * torch.nan, images)
        with pytest.raises(ValueError, match="empty"):
            deepfool(net, images[:0])
        with pytest.raises(ValueError, match=r"model\.eval"):
            deepfool(nn.Sequential(nn.Dropout(), nn.Flatten(), nn.Linear(64, 3)), images)


class TestMinimumNorm:
    @pytest.mark.parametrize(("norm", "dual"), NORMS)
    def test_is_next_to_exact_on_affine_models(self, norm, dual):
        model, images, distances = affine()
        found = minimum_norm(model, images, model(images).argmax(1), norm=norm, rounds=6, steps=10)
        ratio = found.distance / distances[dual]
        assert ratio.min() > 1 and ratio.max() < 1.001
        assert found.failures == 0 and found.clean_correct.all()
        assert found.median == pytest.approx(float(distances[dual].median()), rel=1e-3)
        radius = float(distances[dual].sort().values[10:12].mean())
        assert found.accuracy(radius) == pytest.approx(21 / 32)

    @pytest.mark.parametrize(("classes", "side", "seed"), [(3, 4, 0), (10, 8, 1), (50, 8, 3)])
    @pytest.mark.parametrize("kind", ["plain", "edge", "heavy"])
    def test_linf_is_within_2_percent_on_affine_models_at_the_edges_of_the_box(self, classes, side, seed, kind):
        """Against the distance inside [0, 1], rival by rival: Σ w·clip(x ± r) is monotone in r."""
        draw = torch.Generator().manual_seed(seed)
        weight = torch.randn(classes, side * side, generator=draw, dtype=torch.float64)
        if kind == "heavy":  # rows of very different lengths: the largest rival logit is often not the nearest class
            weight = weight * torch.exp(1.5 * torch.randn(weight.shape, generator=draw, dtype=torch.float64))
        x = torch.rand(40, side * side, generator=draw, dtype=torch.float64)
        x = (3 * x - 1).clamp(0, 1) if kind == "edge" else x  # two thirds of the pixels are 0 or 1
        bias = -weight.sum(1) / 2
        target = (x @ weight.T + bias).argmax(1)
        along = weight[None] - weight[target][:, None]  # (images, rivals, pixels)
        gap = (bias - bias[target][:, None])[..., None]
        low = torch.zeros(*along.shape[:2], 1, dtype=torch.float64)
        high = torch.ones_like(low)
        for _ in range(40):
            middle = (low + high) / 2
            moved = (x[:, None] + middle * along.sign()).clamp(0, 1)
            across = (along * moved).sum(2, keepdim=True) + gap >= 0
            low, high = torch.where(across, low, middle), torch.where(across, middle, high)
        high[torch.arange(40), target] = torch.inf
        exact = high.squeeze(2).amin(1)

        found = minimum_norm(lambda z: z.flatten(1) @ weight.T + bias, x.view(-1, 1, side, side), target, norm="linf")
        ratio = found.distance / exact
        assert ratio.min() > 1 - 1e-9 and ratio.max() < 1.02

    @pytest.mark.parametrize("norm", ["l2", "linf"])
    def test_on_a_net_it_beats_the_curve_of_pgd(self, net, batch, norm):
        images, target = batch
        found = minimum_norm(net, images, target, norm=norm)
        right = found.clean_correct
        assert torch.equal(right, net(images).argmax(1) == target)
        assert (found.distance[~right] == 0).all() and torch.equal(found.images[~right], images[~right])
        assert not (net(found.images).argmax(1)[right] == target[right]).any()
        assert found.images.min() >= 0 and found.images.max() <= 1
        order = 2 if norm == "l2" else torch.inf
        moved = torch.linalg.vector_norm((found.images - images).flatten(1), ord=order, dim=1)
        torch.testing.assert_close(found.distance, moved, rtol=1e-5, atol=1e-7)
        for share in (0.25, 0.5, 0.75):
            radius = float(found.distance.quantile(share))
            attack = pgd(net, images, target, epsilon=radius, norm=norm, steps=40)
            assert found.accuracy(radius) <= attack.accuracy + 0.02

    def test_scale_does_not_matter_and_the_seed_does_not_leak(self, net, batch):
        images, target = batch[0][:30], batch[1][:30]
        state = torch.random.get_rng_state()
        plain = minimum_norm(net, images, target, rounds=4)
        for scale in (1e-3, 1e3):
            scaled = minimum_norm(lambda x, k=scale: k * net(x), images, target, rounds=4)
            torch.testing.assert_close(scaled.distance, plain.distance, rtol=0.01, atol=1e-4)
        assert torch.equal(state, torch.random.get_rng_state())

    def test_black_images_have_no_ratio(self):
        def model(x):
            return torch.stack([x.sum((1, 2, 3)), torch.full((len(x),), 0.4)], 1)

        found = deepfool(model, torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)]))
        assert found.distance.tolist() == pytest.approx([0.2, 1.8]) and found.rho == pytest.approx(0.9)

    def test_images_that_are_all_wrong_are_at_no_distance(self, batch):
        def model(x):
            return 3 * x.view(len(x), -1)[:, 20:24]

        images = batch[0][:4]
        found = minimum_norm(model, images, (model(images).argmax(1) + 1) % 4)
        assert found.distance.tolist() == [0.0] * 4 and torch.equal(found.images, images) and found.failures == 0

    def test_images_that_ask_for_gradients_leave_none_behind(self, net, batch):
        images, target = batch[0][:5].clone().requires_grad_(), batch[1][:5]
        nearest, moved = minimum_norm(net, images, target, rounds=2, steps=3), deepfool(net, images)
        for found in (nearest.images, nearest.distance, moved.images, moved.distance, moved.ratio):
            assert not found.requires_grad

    def test_more_rounds_never_find_worse(self, net, batch):
        images, target = batch[0][:30], batch[1][:30]
        few, many = (minimum_norm(net, images, target, rounds=rounds).distance for rounds in (2, 8))
        assert (many <= few).all() and (many < few).any()

    def test_out_of_reach_is_infinite_and_counted(self):
        images = torch.rand(5, 1, 3, 3, generator=torch.Generator().manual_seed(0))
        model = lambda x: torch.stack([x.sum((1, 2, 3)), -1 - x.sum((1, 2, 3))], 1)  # noqa: E731
        found = minimum_norm(model, images, torch.tensor([0, 0, 0, 0, 1]))
        assert found.distance.tolist() == [torch.inf] * 4 + [0] and found.failures == 4
        assert torch.equal(found.images, images) and found.accuracy(2.0) == 0.8

    @pytest.mark.usefixtures("unchecked")
    def test_refuses(self, net, batch):
        images, target = batch[0][:4], batch[1][:4]
        with pytest.raises(ValueError, match="norm=.* must be one of"):
            minimum_norm(net, images, target, norm="l0")
        with pytest.raises(ValueError, match="rounds"):
            minimum_norm(net, images, target, rounds=0)
        with pytest.raises(ValueError, match="normalise inside"):
            minimum_norm(net, images - 0.5, target)
        with pytest.raises(TypeError, match="integer"):
            minimum_norm(net, images, target.float())
        with pytest.raises(ValueError, match="at least 0"):
            minimum_norm(net, images, target, rounds=1).accuracy(-1.0)
