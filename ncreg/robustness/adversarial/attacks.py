"""FGSM and PGD on cross-entropy, margin or DLR, and a random search that sees no gradient."""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from ncreg._checks import check_count, check_flag, check_positive
from ncreg.robustness._inputs import Model, check_attackable, check_target, in_parts, predict, seeded
from ncreg.robustness.adversarial.steps import (
    Loss,
    Norm,
    ascend,
    check_epsilon,
    frozen,
    length,
    lift,
    logit_margin,
    loss_of,
    per_image,
    project,
    random_start,
)
from ncreg.robustness.intervals import binomial_interval


@dataclass(frozen=True, eq=False)
class AttackResult:
    """What one attack left of a model's accuracy.

    Attributes:
        name: which attack, with its settings.
        norm: "linf" or "l2".
        epsilon: radius of the ball, in units of images in [0, 1].
        images: for each image the attacked one of lowest margin; wrongly classified ones as they came.
        clean_correct: (B,) classified rightly before the attack.
        robust: (B,) classified rightly before **and** after the attack.
    """

    name: str
    norm: Norm
    epsilon: float
    images: Float[Tensor, "batch channels height width"]
    clean_correct: Bool[Tensor, " batch"]
    robust: Bool[Tensor, " batch"]

    @property
    def accuracy(self) -> float:
        """Robust accuracy, in [0, 1]."""
        return float(self.robust.double().mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the robust accuracy."""
        return binomial_interval(int(self.robust.sum()), len(self.robust))


@torch.inference_mode(False)
def pgd(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    target: Integer[Tensor, " batch"],
    *,
    epsilon: float,
    norm: Norm = "linf",
    loss: Loss = "margin",
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

    Args:
        model: images in [0, 1] (B, channels, H, W) to logits (B, C); a module must be in eval mode.
        images: in [0, 1].
        target: class indices (B,).
        epsilon: radius, in units of images in [0, 1].
        norm: "linf" or "l2".
        loss: what is raised: "margin", "dlr" (C ≥ 3) or "cross_entropy".
        steps: gradients a restart.
        step_size: length of a step in the units of epsilon; None takes 2.5 · epsilon/steps.
        restarts: how many times, each from its own start.
        random: start from a point drawn evenly from the ball; without it one restart, from the image.
        seed: of the starts; they do not depend on batch_size or device.
        batch_size: images at once.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: images outside [0, 1], a target out of range, a model in training mode or one that returns
            probabilities or no finite logits, epsilon < 0, "dlr" with two classes.

    Example:
        >>> model = lambda x: (x - 0.5).flatten(1) @ torch.tensor([[1.0, -1.0], [1.0, -1.0]])
        >>> images = torch.tensor([[0.6, 0.5], [0.9, 0.9], [0.0, 0.0]]).reshape(3, 1, 1, 2)
        >>> pgd(model, images, torch.tensor([0, 0, 0]), epsilon=0.1).robust
        tensor([False,  True, False])
    """
    epsilon = check_epsilon(epsilon, norm)
    steps, restarts = check_count("steps", steps), check_count("restarts", restarts)
    if not check_flag("random", random) and restarts > 1:
        raise ValueError(f"restarts={restarts} without random starts would all be the same: random=True, or restarts=1")
    if step_size is None:
        step_size = 2.5 * epsilon / steps
    else:
        check_positive("step_size", step_size)
    name = f"PGD-{steps} {loss}" + (f" x{restarts}" if restarts > 1 else "")
    return _attack(
        model,
        images,
        target,
        name=name,
        epsilon=epsilon,
        norm=norm,
        loss=loss,
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
    steps: int,
    step_size: float,
    restarts: int,
    random: bool,
    seed: int,
    batch_size: int,
) -> AttackResult:
    raised, generator = loss_of(loss), seeded(seed)
    clean, target = clean_logits(model, images, target, batch_size)
    images = images.detach()
    raised(clean, target)  # refuses too few classes
    attacked, correct = images.clone(), clean.argmax(1) == target
    lowest = logit_margin(clean, target).double()
    with frozen(model):
        for _ in range(restarts if epsilon > 0 and bool(correct.any()) else 0):
            radius = torch.full((len(images),), epsilon, dtype=torch.float64, device=images.device)
            start = random_start(images, radius, norm, generator) if random else images
            for chosen in in_parts(correct.nonzero().squeeze(1), batch_size):
                ball = radius[chosen]
                best, margin = ascend(
                    model,
                    images[chosen],
                    target[chosen],
                    ball,
                    norm=norm,
                    loss=loss,
                    steps=steps,
                    step=torch.full_like(ball, step_size),
                    start=start[chosen],
                )
                keep_lower(attacked, lowest, chosen, best, margin)
    return scored(model, name, norm, epsilon, attacked, target, correct, batch_size)


@torch.inference_mode(False)
def random_search(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    target: Integer[Tensor, " batch"],
    *,
    epsilon: float,
    norm: Norm = "linf",
    queries: int = 200,
    seed: int = 0,
    batch_size: int = 256,
) -> AttackResult:
    """A black-box attack: random squares are moved by ±2ε a channel, and kept where the margin falls.

    After the Square Attack (Andriushchenko et al. 2020, arXiv 1912.00049), without its tuning: it starts from random
    vertical stripes, its squares shrink from half the side to one pixel, and every proposal is projected onto the
    ball. It needs no gradient, so where it beats an attack that has one, that gradient is to be distrusted.
    Arguments, results and errors are those of `pgd`; `queries` are forward passes an image.

    Example:
        >>> model = lambda x: torch.stack([x.sum((1, 2, 3)), torch.full((len(x),), 1.0)], 1)
        >>> random_search(model, torch.full((1, 1, 2, 2), 0.3), torch.tensor([0]), epsilon=0.1).robust
        tensor([False])
    """
    epsilon, queries = check_epsilon(epsilon, norm), check_count("queries", queries)
    generator = seeded(seed)
    clean, target = clean_logits(model, images, target, batch_size)
    images = images.detach()
    attacked, correct = images.clone(), clean.argmax(1) == target
    lowest = logit_margin(clean, target).double()
    left = correct.clone()
    for number in range(queries if epsilon > 0 else 0):
        draw = torch.rand(len(images), 2 + images.shape[1], generator=generator, dtype=torch.float64, device="cpu")
        if number == 0:
            draw = torch.rand(
                len(images), images.shape[1] * images.shape[3], generator=generator, dtype=torch.float64, device="cpu"
            )
        for part in in_parts(left.nonzero().squeeze(1), batch_size):
            x, drawn = images[part], draw[part.cpu()].to(images.device)
            moved = _stripes(x, drawn) if number == 0 else _square(x, drawn, 1 - number / queries)
            if norm == "l2":  # the same bump, as long as the ball is wide
                moved = moved / per_image(length(moved))
            proposal = (attacked[part].double() + 2 * epsilon * moved).to(x.dtype)
            radius = torch.full((len(part),), epsilon, dtype=torch.float64, device=x.device)
            proposal = project(proposal, x, radius, norm)
            with torch.no_grad():
                margin = logit_margin(lift(model(proposal)), target[part]).double()
            keep_lower(attacked, lowest, part, proposal, margin)
        left = correct & (lowest >= 0)
    return scored(model, f"random search {queries}", norm, epsilon, attacked, target, correct, batch_size)


def _stripes(images: Tensor, drawn: Tensor) -> Tensor:
    """A sign for each column of each channel."""
    return rearrange(drawn.round() * 2 - 1, "b (c w) -> b c 1 w", c=images.shape[1]).expand(images.shape)


def _square(images: Tensor, drawn: Tensor, share: float) -> Tensor:
    """A sign a channel within a square of half the side, times the squared `share` of queries left; 0 outside."""
    height, width = images.shape[2:]
    side = max(1, round(min(height, width) / 2 * share**2))
    top, left = (drawn[:, :1] * (height - side + 1)).floor(), (drawn[:, 1:2] * (width - side + 1)).floor()
    rows, columns = torch.arange(height, device=drawn.device), torch.arange(width, device=drawn.device)
    vertical, horizontal = (rows >= top) & (rows < top + side), (columns >= left) & (columns < left + side)
    inside = vertical[:, None, :, None] & horizontal[:, None, None, :]
    return inside * (drawn[:, 2:].round() * 2 - 1)[:, :, None, None]


def clean_logits(model: Model, images: Tensor, target: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Logits of the images as they are, and the target; everything checked before the first gradient."""
    check_attackable(images)
    logits = predict(model, images, check_count("batch_size", batch_size))
    return logits, check_target(target, logits, logits.shape[1]).clone()  # a clone of an inference tensor is none


def keep_lower(attacked: Tensor, lowest: Tensor, chosen: Tensor, found: Tensor, margin: Tensor) -> None:
    """Write the images of lower margin into `attacked`, and their margins into `lowest`."""
    lower = margin < lowest[chosen]
    attacked[chosen[lower]] = found[lower]
    lowest[chosen[lower]] = margin[lower]


def scored(
    model: Model,
    name: str,
    norm: Norm,
    epsilon: float,
    attacked: Tensor,
    target: Tensor,
    correct: Tensor,
    batch_size: int,
) -> AttackResult:
    """The result, from a fresh look at the attacked images: no attack is believed about its own success."""
    right = predict(model, attacked, batch_size).argmax(1) == target
    return AttackResult(name, norm, epsilon, attacked, correct, correct & right)
