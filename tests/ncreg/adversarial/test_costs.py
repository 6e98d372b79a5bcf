"""Attacks on what a mistake costs: transport by a linear program, closed forms, affine models where all is known."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch.autograd import gradcheck

from ncreg import functional as nf
from ncreg.robustness import evaluate_adversarial, expected_cost, fgsm, logit_margin, pgd, robustness_curve
from ncreg.robustness.adversarial.objectives import loss_of

C = 4


def random_costs(seed=0, classes=C):
    cost = torch.rand(classes, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 5
    return cost.fill_diagonal_(0)


def logits_and_target(rows=6, seed=1, classes=C):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64), torch.arange(rows) % classes


def transport(chances, wanted, cost):
    """The cheapest plan that moves the label's mass to the prediction, cost[y, j] from class y to class j."""
    size = len(chances)
    plan = [[float(cell // size == i) for cell in range(size**2)] for i in range(size)]  # mass that leaves i
    plan += [[float(cell % size == j) for cell in range(size**2)] for j in range(size)]  # mass that comes to j
    found = linprog(cost.flatten(), A_eq=plan, b_eq=[*wanted, *chances], method="highs")
    return found.fun


def test_the_expected_cost_is_the_transport_of_a_linear_program():
    cost, (logits, target) = random_costs(), logits_and_target()
    chances = logits.softmax(1).numpy()
    wanted = [transport(p, np.eye(C)[y], cost.numpy()) for p, y in zip(chances, target, strict=True)]
    np.testing.assert_allclose(expected_cost(logits, target, cost), wanted, atol=1e-9)
    np.testing.assert_allclose(nf.expected_cost_loss(logits, target, cost, reduction="none"), wanted, atol=1e-9)
    assert gradcheck(lambda z: nf.expected_cost_loss(z, target, cost), logits.requires_grad_())


def test_equal_costs_are_one_minus_the_own_probability_and_the_margin():
    logits, target = logits_and_target()
    equal = 1 - torch.eye(C, dtype=torch.float64)
    own = logits.softmax(1).gather(1, target[:, None]).squeeze(1)
    torch.testing.assert_close(expected_cost(logits, target, equal), 1 - own)
    right = logits.argmax(1)
    torch.testing.assert_close(loss_of("cost_margin", equal)(logits, right), loss_of("margin")(logits, right))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16], ids=str)
def test_labels_of_every_integer_type_name_the_same_classes(dtype):
    """As many images as classes: uint8 as an index would be a mask of the rows of the cost matrix."""
    cost, (logits, _) = random_costs(classes=2), logits_and_target(rows=2, classes=2)
    target = torch.tensor([0, 1])
    p, m = logits.softmax(1).numpy(), cost.numpy()
    np.testing.assert_allclose(expected_cost(logits, target.to(dtype), cost), [m[0] @ p[0], m[1] @ p[1]], atol=1e-12)
    z = logits.numpy()
    wanted = [z[0, 0] - z[0, 1], z[1, 1] - z[1, 0]]
    np.testing.assert_allclose(logit_margin(logits, target.to(dtype)), wanted, atol=1e-12)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("measure", [logit_margin, lambda z, y: expected_cost(z, y, random_costs(classes=3))])
def test_what_is_no_logit_and_no_class_is_named(measure):
    logits, target = torch.zeros(2, 3), torch.tensor([0, -1])
    for labels in (target, torch.tensor([0, 3])):  # −1 would be the last class
        with pytest.raises(ValueError, match=rf"target must .*{int(labels.min())} to {int(labels.max())}"):
            measure(logits, labels)
    with pytest.raises(TypeError, match="target must hold integer class indices, got torch.float32"):
        measure(logits, target.float())
    with pytest.raises(ValueError, match=r"target must have shape \(2,\)"):
        measure(logits, target[:1])
    with pytest.raises(TypeError, match=r"logits must .*floating-point.*torch.int64"):
        measure(logits.long(), target)
    with pytest.raises(ValueError, match=r"logits must be .*got shape \(3,\)"):
        measure(logits[0], target)


def test_soft_labels_mix_the_losses_of_their_classes():
    cost, (logits, _) = random_costs(), logits_and_target()
    soft = torch.full((6, C), 0.1, dtype=torch.float64)
    soft[:, 2] = 0.7
    each = [nf.expected_cost_loss(logits, torch.full((6,), c), cost, reduction="none") for c in range(C)]
    mixed = sum(share * loss for share, loss in zip((0.1, 0.1, 0.7, 0.1), each, strict=True))
    torch.testing.assert_close(nf.expected_cost_loss(logits, soft, cost, reduction="none"), mixed)


@pytest.mark.parametrize("loss", ["cost", "cost_margin"])
def test_two_affine_classes_reach_the_best_corner(loss):
    """With two classes the cost rises with z_j − z_y alone: the best point is the corner of the gradient."""
    weight = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, -1.0, 2.0]], dtype=torch.float64)
    images = torch.full((3, 1, 2, 2), 0.5, dtype=torch.float64) + torch.tensor([0.0, 0.05, -0.1]).reshape(3, 1, 1, 1)
    target, cost, epsilon = torch.tensor([0, 1, 0]), torch.tensor([[0.0, 4.0], [1.0, 0.0]]), 0.1

    def model(x):
        return x.flatten(1) @ weight.T

    found = pgd(model, images, target, epsilon=epsilon, loss=loss, cost=cost, steps=20, random=False)
    corners = torch.tensor(list(itertools.product((-epsilon, epsilon), repeat=4)), dtype=torch.float64)
    best = [
        max(float(expected_cost(model(x[None] + c.reshape(1, 1, 2, 2)), y[None], cost)) for c in corners)
        for x, y in zip(images, target, strict=True)
    ]
    np.testing.assert_allclose(found.expected_cost, best, rtol=1e-12)
    np.testing.assert_allclose(expected_cost(model(found.images), target, cost.double()), best, rtol=1e-12)


def test_it_goes_where_mistakes_are_dear(net, batch):
    """Costs of one wrong class alone: the attack on costs raises its probability more than an attack on the margin."""
    images, target = (part[:32] for part in batch)
    classes = net(images).shape[1]
    cost = torch.zeros(classes, classes)
    cost[:, 3] = 10
    cost.fill_diagonal_(0)
    how = {"epsilon": 0.05, "steps": 10}
    with torch.no_grad():
        clean = expected_cost(net(images), target, cost)
        margin = expected_cost(net(pgd(net, images, target, loss="margin", **how).images), target, cost)
    for loss in ("cost", "cost_margin"):
        found = pgd(net, images, target, loss=loss, cost=cost, **how)
        assert (found.expected_cost >= clean - 1e-6).all()
        assert found.expected_cost.mean() > margin.mean()
        assert (found.images - images).abs().max() <= 0.05
    step = fgsm(net, images, target, epsilon=0.05, loss="cost", cost=cost)
    assert clean.mean() < step.expected_cost.mean()


def test_an_attack_that_ends_at_a_cheaper_class_makes_no_mistake_cheaper():
    """At 0.5 class 2, at cost 9, leads with p = (0.32, 0.32, 0.36); at 0.6 class 1, at 8, with (0.09, 0.63, 0.28)."""

    def model(x):
        change = x.flatten(1)[:, :1] - 0.5
        return torch.cat([0 * change, 20 * change, 0.1 + 10 * change], 1)

    cost = torch.tensor([[0.0, 8.0, 9.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    images, target = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
    costs = evaluate_adversarial(model, images, target, epsilon=0.1, autoattack=False, cost=cost).costs
    assert costs.expected > costs.expected_clean + 1.5
    assert (costs.decided_clean, costs.decided, costs.confusion[0].tolist()) == (9, 9, [0, 0, 1])


def test_the_report_says_what_mistakes_cost(net, batch):
    images, target = (part[:16] for part in batch)
    classes = net(images).shape[1]
    cost = random_costs(2, classes)
    report = evaluate_adversarial(net, images, target, epsilon=0.03, autoattack=False, cost=cost)
    costs = report.costs
    with torch.no_grad():
        clean = net(images)
    assert costs.expected_clean == pytest.approx(float(expected_cost(clean.double(), target, cost).mean()))
    assert costs.decided_clean == pytest.approx(float(cost[target, clean.argmax(1)].mean()))
    assert costs.expected > costs.expected_clean and costs.decided >= costs.decided_clean
    assert costs.confusion.sum(1).tolist() == torch.bincount(target, minlength=classes).tolist()
    assert float((costs.confusion * cost).sum()) / len(images) == pytest.approx(costs.decided)
    assert report.as_dict()["costs"]["confusion"] == costs.confusion.tolist() and "cost of predictions" in str(report)
    assert [row.name for row in report.rows][-2:] == ["PGD-20 cost", "PGD-20 cost_margin"]
    plain = evaluate_adversarial(net, images[:2], target[:2], epsilon=0.03, autoattack=False)
    assert plain.costs is None and "costs" not in plain.as_dict()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ({"loss": "cost"}, ValueError, "loss='cost' needs cost="),
        ({"loss": "margin", "cost": torch.zeros(3, 3)}, ValueError, "loss='margin' takes no cost"),
        ({"loss": "cost", "cost": torch.zeros(2, 2)}, ValueError, "cost is for 2 classes where there are"),
        ({"loss": "cost", "cost": torch.ones(3, 3)}, ValueError, "cost of the right class must be 0"),
        ({"loss": "cost", "cost": -random_costs(0, 3)}, ValueError, "finite and not negative"),
        ({"loss": "cost", "cost": [[0.0]]}, TypeError, "cost must be a tensor of numbers, got list"),
    ],
)
def test_costs_that_do_not_fit(args, error, words):
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    with pytest.raises(error, match=words):
        pgd(lambda x: x.flatten(1) @ weight.T, torch.full((1, 1, 1, 2), 0.5), torch.tensor([2]), epsilon=0.1, **args)


@pytest.mark.parametrize("loss", ["cost", "cost_margin"])
def test_a_curve_has_no_costs_and_says_where_to_give_them(loss):
    images, target = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=rf"loss='{loss}' needs a matrix of costs.*'margin'.*pgd\(…, cost=\)"):
        robustness_curve(lambda x: x.flatten(1)[:, :2], images, target, [0.1], loss=loss)
