"""FGSM and PGD on cross-entropy, margin, DLR or the cost of each confusion."""

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from ncreg._checks import check_flag, check_integer, check_positive
from ncreg.numerics import seeded
from ncreg.robustness._inputs import Model, in_parts
from ncreg.robustness.adversarial.attempt import AttackResult, Attempt
from ncreg.robustness.adversarial.objectives import Loss, frozen, loss_of
from ncreg.robustness.adversarial.steps import Norm, ascend, check_epsilon, default_step_size, random_start


@torch.inference_mode(False)
def pgd(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    target: Integer[Tensor, " batch"],
    *,
    epsilon: float,
    norm: Norm = "linf",
    loss: Loss = "margin",
    cost: Float[Tensor, "classes classes"] | None = None,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    random: bool = True,
    seed: int = 0,
    batch_size: int = 256,
) -> AttackResult:
    """Projected gradient ascent: x ← Π(x + step_size · u), u the sign of the gradient (linf) or its direction (l2).

    Π is the ball of radius epsilon around the image cut with [0, 1]; it holds exactly. Of all points visited, over all
    restarts, the one with the lowest margin is kept. The steps are of one length, 2.5 · epsilon/steps by default
    (Madry et al. 2018, arXiv 1706.06083). "margin" is z_y − max_{j≠y} z_j (Carlini & Wagner 2017, arXiv 1608.04644),
    "dlr" that over z_(1) − z_(3) (Croce & Hein 2020, arXiv 2003.01690): neither is changed by the scale of the logits.
    "cross_entropy" is: large logits make its gradient vanish, so never report it without one of the others.

    "cost" raises the expected cost Σ_j M[y,j]·softmax(z)_j under a matrix M of costs (Terzi, Susto & Chaudhari, arXiv
    1910.03468); it saturates as cross-entropy does. "cost_margin" raises Σ_j M[y,j](z_j − z_y)₊ over the logits'
    spread, and until a class that costs leads, the lead of the nearest one (with M = 11ᵀ − I "margin", until then).
    Both attack every image, wrongly classified ones too, and keep the point of the highest expected cost.

    Args:
        model: images in [0, 1] (B, channels, H, W) to logits (B, C); a module must be in eval mode.
        images: in [0, 1].
        target: class indices (B,).
        epsilon: radius, in units of images in [0, 1].
        norm: "linf" or "l2".
        loss: what is raised: "margin", "dlr" (C ≥ 3), "cross_entropy", "cost" or "cost_margin".
        cost: M (C, C) for the last two, 0 on the diagonal: row y and column j hold the cost of taking y for j.
        steps: gradients a restart.
        step_size: length of a step in the units of epsilon; None takes 2.5 · epsilon/steps.
        restarts: how many times, each from its own start.
        random: start from a point drawn evenly from the ball; without it one restart, from the image.
        seed: of the starts; they do not depend on batch_size or device.
        batch_size: images at once.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: images outside [0, 1], a target out of range, a model in training mode or one that returns
            probabilities or no finite logits, epsilon < 0, "dlr" with two classes, costs that do not fit.

    Example:
        >>> model = lambda x: (x - 0.5).flatten(1) @ torch.tensor([[1.0, -1.0], [1.0, -1.0]])
        >>> images = torch.tensor([[0.6, 0.5], [0.9, 0.9], [0.0, 0.0]]).reshape(3, 1, 1, 2)
        >>> pgd(model, images, torch.tensor([0, 0, 0]), epsilon=0.1).robust
        tensor([False,  True, False])
    """
    epsilon = check_epsilon(epsilon, norm)
    steps, restarts = check_integer("steps", steps, 1), check_integer("restarts", restarts, 1)
    if not check_flag("random", random) and restarts > 1:
        raise ValueError(f"restarts={restarts} without random starts would all be the same: random=True, or restarts=1")
    step_size = default_step_size(epsilon, steps) if step_size is None else check_positive("step_size", step_size)
    name = f"PGD-{steps} {loss}" + (f" x{restarts}" if restarts > 1 else "")
    return _attack(
        model,
        images,
        target,
        name=name,
        epsilon=epsilon,
        norm=norm,
        loss=loss,
        cost=cost,
        steps=steps,
        step_size=step_size,
        restarts=restarts,
        random=random,
        seed=seed,
        batch_size=batch_size,
    )


@torch.inference_mode(False)
def fgsm(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    target: Integer[Tensor, " batch"],
    *,
    epsilon: float,
    norm: Norm = "linf",
    loss: Loss = "cross_entropy",
    cost: Float[Tensor, "classes classes"] | None = None,
    batch_size: int = 256,
) -> AttackResult:
    """One step of length epsilon from the image: x + ε · sign ∇ loss (Goodfellow et al. 2015, arXiv 1412.6572).

    Arguments, results and errors are those of `pgd`.

    Example:
        >>> model = lambda x: torch.stack([x.sum((1, 2, 3)), torch.full((len(x),), 1.0)], 1)
        >>> fgsm(model, torch.full((1, 1, 1, 4), 0.3), torch.tensor([0]), epsilon=0.1).images.flatten()
        tensor([0.2000, 0.2000, 0.2000, 0.2000])
    """
    epsilon = check_epsilon(epsilon, norm)
    return _attack(
        model,
        images,
        target,
        name=f"FGSM {loss}",
        epsilon=epsilon,
        norm=norm,
        loss=loss,
        cost=cost,
        steps=1,
        step_size=epsilon,
        restarts=1,
        random=False,
        seed=0,
        batch_size=batch_size,
    )


def _attack(
    model: Model,
    images: Tensor,
    target: Tensor,
    *,
    name: str,
    epsilon: float,
    norm: Norm,
    loss: Loss,
    cost: Tensor | None,
    steps: int,
    step_size: float,
    restarts: int,
    random: bool,
    seed: int,
    batch_size: int,
) -> AttackResult:
    objective, generator = loss_of(loss, cost), seeded(seed)
    attempt = Attempt(model, images, target, batch_size, cost)
    objective(attempt.images.new_zeros(1, attempt.num_classes), attempt.target[:1])  # refuses too few classes
    attacked = attempt.correct if cost is None else torch.ones_like(attempt.correct)
    radius, chosen = attempt.radius(epsilon), attacked.nonzero().squeeze(1)
    with frozen(model):
        for _ in range(restarts if epsilon > 0 and len(chosen) else 0):
            start = random_start(attempt.images, radius, norm, generator) if random else attempt.images
            for part in in_parts(chosen, batch_size):
                best, margin = ascend(
                    model,
                    attempt.images[part],
                    attempt.target[part],
                    radius[part],
                    norm=norm,
                    loss=loss,
                    steps=steps,
                    step_size=torch.full_like(radius[part], step_size),
                    start=start[part],
                    cost=attempt.cost,
                )
                attempt.keep(part, best, margin)
    return attempt.result(name, norm, epsilon)
