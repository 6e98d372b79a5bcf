"""Robust accuracy against the radius of the ball."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from ncreg._checks import check_items
from ncreg._readable import readable
from ncreg.robustness._inputs import Model
from ncreg.robustness.adversarial.attacks import pgd
from ncreg.robustness.adversarial.attempt import clean_logits
from ncreg.robustness.adversarial.objectives import Loss
from ncreg.robustness.adversarial.steps import Norm, check_epsilon
from ncreg.robustness.intervals import binomial_interval


@dataclass(frozen=True, eq=False)
class RobustnessCurve:
    """Robust accuracy at each radius; it never rises, because an image broken in a ball is broken in every wider one.

    Attributes:
        norm: "linf" or "l2".
        epsilons: the radii, rising, in units of images in [0, 1].
        accuracy: robust accuracy at each, in [0, 1].
        intervals: Wilson's 95 % interval of each.
        robust: (E, B) classified rightly before the attack, and after it at this and every smaller radius.
    """

    norm: Norm
    epsilons: tuple[float, ...]
    accuracy: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]
    robust: Bool[Tensor, "epsilons batch"]

    __str__ = readable


@torch.inference_mode(False)
def robustness_curve(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    target: Integer[Tensor, " batch"],
    epsilons: Sequence[float],
    *,
    norm: Norm = "linf",
    loss: Loss = "margin",
    steps: int = 20,
    restarts: int = 1,
    seed: int = 0,
    batch_size: int = 256,
) -> RobustnessCurve:
    """Robust accuracy under `pgd` at rising radii; each radius attacks only what the smaller ones left.

    It is an upper bound, as all PGD is: `autoattack` at one of the radii says how loose. At radius 0 it is the clean
    accuracy.

    Args:
        model: images in [0, 1] (B, channels, H, W) to logits (B, C); a module must be in eval mode.
        images: in [0, 1].
        target: class indices (B,).
        epsilons: radii, strictly rising, in units of images in [0, 1].
        norm: "linf" or "l2".
        loss: what is raised; "cross_entropy" is fooled by the scale of the logits.
        steps: gradients a restart.
        restarts: random starts a radius.
        seed: of the starts.
        batch_size: images at once.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: no radii, radii that do not rise, a loss on costs, and all that `pgd` refuses.

    Example:
        >>> model = lambda x: torch.stack([x.sum((1, 2, 3)), torch.full((len(x),), 1.0)], 1)
        >>> images = torch.tensor([0.3, 0.4]).reshape(2, 1, 1, 1).expand(2, 1, 1, 4)
        >>> robustness_curve(model, images, torch.tensor([0, 0]), [0.0, 0.1, 0.2]).accuracy
        (1.0, 0.5, 0.0)
    """
    if loss in ("cost", "cost_margin"):
        raise ValueError(
            f"loss={loss!r} needs a matrix of costs, and the curve counts images by their classes alone: take 'margin' "
            "or 'cross_entropy', or call pgd(…, cost=) at each radius"
        )
    radii = tuple(check_epsilon(epsilon, norm) for epsilon in check_items("epsilons", epsilons))
    if not radii:
        raise ValueError("epsilons is empty: give at least one radius")
    if any(right <= left for left, right in zip(radii, radii[1:], strict=False)):
        raise ValueError(f"epsilons must rise strictly, got {radii}")
    clean, target = clean_logits(model, images, target, batch_size)
    left = clean.argmax(1) == target
    masks: list[Tensor] = []
    for radius in radii:
        chosen = left.nonzero().squeeze(1)
        if len(chosen):
            attack = pgd(
                model,
                images[chosen],
                target[chosen],
                epsilon=radius,
                norm=norm,
                loss=loss,
                steps=steps,
                restarts=restarts,
                seed=seed,
                batch_size=batch_size,
            )
            left = left.clone()
            left[chosen] = attack.robust
        masks.append(left)
    counts = [int(mask.sum()) for mask in masks]
    n = len(images)
    return RobustnessCurve(
        norm,
        radii,
        tuple(count / n for count in counts),
        tuple(binomial_interval(count, n) for count in counts),
        torch.stack(masks),
    )
