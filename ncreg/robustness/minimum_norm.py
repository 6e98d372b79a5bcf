"""How far each image is from being misclassified, in L2 or L∞, inside [0, 1]."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from ncreg.robustness._inputs import Model, check_count, in_parts, seeded
from ncreg.robustness.adversarial._ascent import (
    Norm,
    ascend,
    check_epsilon,
    frozen,
    lift,
    per_image,
    project,
    random_start,
    size_in,
)
from ncreg.robustness.adversarial.attacks import clean_logits
from ncreg.robustness.deepfool import deepfool


@dataclass(frozen=True, eq=False)
class MinimumNormResult:
    """The nearest misclassified point that was found for each image: an upper bound of the true distance.

    Attributes:
        norm: "linf" or "l2".
        distance: (B,) in units of images in [0, 1]; 0 where the image is misclassified as it is, inf where no point
            was found.
        images: those points; as they came where distance is 0 or inf.
        clean_correct: (B,) classified rightly as they are.
        failures: how many images have distance inf.
    """

    norm: Norm
    distance: Float[Tensor, " batch"]
    images: Float[Tensor, "batch channels height width"]
    clean_correct: Bool[Tensor, " batch"]
    failures: int

    @property
    def median(self) -> float:
        """Median distance over all images, the lower of two middle ones; failures count as inf."""
        return float(self.distance.median())

    def accuracy(self, epsilon: float) -> float:
        """Share of images farther away than epsilon: robust accuracy at that radius, as far as this search saw."""
        return float((self.distance > check_epsilon(epsilon, self.norm)).double().mean())


@torch.inference_mode(False)
def minimum_norm(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    target: Integer[Tensor, " batch"],
    *,
    norm: Norm = "l2",
    rounds: int = 12,
    steps: int = 20,
    seed: int = 0,
    batch_size: int = 256,
) -> MinimumNormResult:
    """The smallest ball in which margin-PGD succeeds, found by bisection for every image at once.

    It begins with DeepFool's point, cut to [0, 1], if that is misclassified. Each round then attacks within a radius
    of the image's own: halfway between the largest that failed and the nearest point found, or twice the last radius
    as long as there is none; by turns from the nearest point and from a random one. Every point found is pulled back
    along its line to the image until just before it is classified rightly. The scale of the logits does not matter.

    Args:
        model: images in [0, 1] (B, channels, H, W) to logits (B, C); a module must be in eval mode.
        images: in [0, 1].
        target: class indices (B,).
        norm: "linf" or "l2".
        rounds: of bisection.
        steps: gradients a round.
        seed: of the random starts.
        batch_size: images at once.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: images outside [0, 1], a target out of range, a model in training mode or one that returns
            probabilities or no finite logits, an unknown norm.

    Example:
        >>> model = lambda x: torch.stack([x.sum((1, 2, 3)), torch.full((len(x),), 1.0)], 1)
        >>> found = minimum_norm(model, torch.full((1, 1, 2, 2), 0.3), torch.tensor([0]))
        >>> round(float(found.distance), 3)  # (1.2 - 1) / sqrt(4)
        0.1
    """
    check_epsilon(0.0, norm)
    rounds, steps = check_count("rounds", rounds), check_count("steps", steps)
    clean, target = clean_logits(model, images, target, batch_size)
    correct, generator = clean.argmax(1) == target, seeded(seed)
    images = images.detach()
    nearest = images.clone()
    widest = 1.0 if norm == "linf" else float(images[0].numel()) ** 0.5  # every image lies within it of any other
    low = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    high = torch.where(correct, torch.inf, 0.0).to(low)
    radius = torch.full_like(low, widest / 64)
    first = _from_deepfool(model, images, target, correct, norm, batch_size)
    nearer = first[1] < high
    nearest[nearer], high[nearer] = first[0][nearer], first[1][nearer]
    radius = torch.where(high.isinf(), radius, high / 2)
    with frozen(model):
        for number in range(rounds):
            if number % 2:
                start = random_start(images, radius, norm, generator)
            else:
                start = project(nearest, images, radius, norm)
            for chosen in in_parts(correct.nonzero().squeeze(1), batch_size):
                ball = radius[chosen]
                found, _ = ascend(
                    model,
                    images[chosen],
                    target[chosen],
                    ball,
                    norm=norm,
                    loss="margin",
                    steps=steps,
                    step=2.5 * ball / steps,
                    start=start[chosen],
                )
                found, broken = _pull_back(model, images[chosen], found, target[chosen])
                size = torch.where(broken, size_in(norm, found - images[chosen]), torch.inf)
                nearer = size < high[chosen]
                nearest[chosen[nearer]], high[chosen[nearer]] = found[nearer], size[nearer]
                low[chosen] = torch.where(broken, low[chosen], torch.maximum(low[chosen], ball))
            # A nearer point may turn up inside a ball in which the attack once failed.
            low = torch.minimum(low, high)
            radius = torch.where(high.isinf(), (2 * radius).clamp_max(widest), (low + high) / 2)
    found_none = int(high.isinf().sum())
    return MinimumNormResult(norm, high.to(images.dtype), nearest, correct, found_none)


def _from_deepfool(
    model: Model, images: Tensor, target: Tensor, correct: Tensor, norm: Norm, batch_size: int
) -> tuple[Tensor, Tensor]:
    """DeepFool's points, cut to [0, 1], and their distances; inf where they are then classified rightly."""
    points, size = images.clone(), torch.full((len(images),), torch.inf, dtype=torch.float64, device=images.device)
    for chosen in in_parts(correct.nonzero().squeeze(1), batch_size):
        moved = deepfool(model, images[chosen], norm=norm, batch_size=batch_size).images.clamp(0, 1)
        points[chosen], broken = _pull_back(model, images[chosen], moved, target[chosen])
        size[chosen] = torch.where(broken, size_in(norm, points[chosen] - images[chosen]), torch.inf)
    return points, size


def _pull_back(
    model: Model, images: Tensor, found: Tensor, target: Tensor, halvings: int = 16
) -> tuple[Tensor, Tensor]:
    """The point nearest to the image on the line to `found` that is still misclassified, and whether there is one."""

    def wrong(x: Tensor) -> Tensor:
        with torch.no_grad():
            return lift(model(x)).argmax(1) != target

    broken = wrong(found)
    inner, outer = torch.zeros_like(target, dtype=found.dtype), torch.ones_like(target, dtype=found.dtype)
    best = found
    for _ in range(halvings):
        middle = (inner + outer) / 2
        x = (images + per_image(middle) * (found - images)).clamp(0, 1)
        still = wrong(x) & broken
        best = torch.where(per_image(still), x, best)
        inner, outer = torch.where(still, inner, middle), torch.where(still, middle, outer)
    return best, broken
