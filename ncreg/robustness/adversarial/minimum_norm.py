"""How far each image is from being misclassified, in L2 or L∞, inside [0, 1]."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from ncreg._checks import check_count
from ncreg.robustness._inputs import Model, in_parts, seeded
from ncreg.robustness.adversarial.attacks import clean_logits
from ncreg.robustness.adversarial.deepfool import _differences, deepfool
from ncreg.robustness.adversarial.steps import (
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
    as long as there is none; by turns from the nearest point and from a random one. In L∞, where the boundary that is
    nearest is often not the first one met, these other turns go at one rival each as long as there are some, the one
    whose linearised boundary is nearest first, and as far as the nearest point. Every point found is pulled back
    until just before it is classified rightly. The scale of the logits does not matter.

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
        rivals = _rivals(model, images, target, clean, batch_size) if norm == "linf" else target[:, None][:, :0]
        for number in range(rounds):
            aimed = number % 2 == 1 and number // 2 < rivals.shape[1]
            if aimed:
                start, tried = images, high.clamp_max(widest)
            elif number % 2:
                start, tried = random_start(images, radius, norm, generator), radius
            else:
                start, tried = project(nearest, images, radius, norm), radius
            for chosen in in_parts(correct.nonzero().squeeze(1), batch_size):
                rival = rivals[chosen, number // 2] if aimed else None
                found, size = _attack(
                    model, images[chosen], target[chosen], tried[chosen], start[chosen], rival, norm=norm, steps=steps
                )
                nearer = size < high[chosen]
                nearest[chosen[nearer]], high[chosen[nearer]] = found[nearer], size[nearer]
                if not aimed:  # another rival may be within the ball
                    low[chosen] = torch.where(size.isinf(), torch.maximum(low[chosen], tried[chosen]), low[chosen])
            # A nearer point may turn up inside a ball in which the attack once failed.
            low = torch.minimum(low, high)
            wider = radius if aimed else (2 * radius).clamp_max(widest)
            radius = torch.where(high.isinf(), wider, (low + high) / 2)
    found_none = int(high.isinf().sum())
    return MinimumNormResult(norm, high.to(images.dtype), nearest, correct, found_none)


def _rivals(
    model: Model, images: Tensor, target: Tensor, logits: Tensor, batch_size: int
) -> Int[Tensor, "batch rivals"]:
    """The ten classes with the largest logits besides the target's; first that with the nearest linearised boundary.

    Distances are in L∞: gaps of logits over the sums of their gradient's absolute values.
    """
    others = logits.scatter(1, target[:, None], -torch.inf).argsort(1, descending=True)[:, :-1][:, :10]
    order, ranked = torch.cat([target[:, None], others], 1), []
    for part in torch.arange(len(images), device=images.device).split(batch_size):
        rows, differences = _differences(model, images[part], order[part])
        own, rest = rows.gather(1, order[part]).double().tensor_split([1], 1)
        slope = differences.flatten(2).double().abs().sum(2).T
        ranked.append(others[part].gather(1, ((own - rest) / slope).nan_to_num(torch.inf).argsort(1)))
    return torch.cat(ranked)


def _attack(
    model: Model,
    images: Tensor,
    target: Tensor,
    radius: Tensor,
    start: Tensor,
    rival: Tensor | None,
    *,
    norm: Norm,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """What margin-PGD finds within a radius of each image, pulled back, and how far that is; inf where it finds none.

    With a rival the margin is the one over that class.
    """
    attacked, label = model, target
    if rival is not None:
        pair, label = torch.stack([target, rival], 1), torch.zeros_like(target)
        attacked = lambda x: model(x).gather(1, pair)  # noqa: E731
    found, _ = ascend(
        attacked, images, label, radius, norm=norm, loss="margin", steps=steps, step=2.5 * radius / steps, start=start
    )
    found, broken = _pull_back(model, images, found, target, norm)
    return found, torch.where(broken, size_in(norm, found - images), torch.inf)


def _from_deepfool(
    model: Model, images: Tensor, target: Tensor, correct: Tensor, norm: Norm, batch_size: int
) -> tuple[Tensor, Tensor]:
    """DeepFool's points, cut to [0, 1], and their distances; inf where they are then classified rightly."""
    points, size = images.clone(), torch.full((len(images),), torch.inf, dtype=torch.float64, device=images.device)
    for chosen in in_parts(correct.nonzero().squeeze(1), batch_size):
        moved = deepfool(model, images[chosen], norm=norm, batch_size=batch_size).images.clamp(0, 1)
        points[chosen], broken = _pull_back(model, images[chosen], moved, target[chosen], norm)
        size[chosen] = torch.where(broken, size_in(norm, points[chosen] - images[chosen]), torch.inf)
    return points, size


def _pull_back(
    model: Model, images: Tensor, found: Tensor, target: Tensor, norm: Norm, halvings: int = 16
) -> tuple[Tensor, Tensor]:
    """The point nearest to the image on the way to `found` that is still misclassified, and whether there is one.

    The way is the line in L2. In L∞ the change is cut off at a size: what the edge of [0, 1] held back stays as it is.
    """

    def wrong(x: Tensor) -> Tensor:
        with torch.no_grad():
            return lift(model(x)).argmax(1) != target

    broken, change = wrong(found), found - images
    whole = size_in(norm, change).to(found.dtype)
    inner, outer = torch.zeros_like(target, dtype=found.dtype), torch.ones_like(target, dtype=found.dtype)
    best = found
    for _ in range(halvings):
        middle = (inner + outer) / 2
        limit = per_image(middle * whole)
        part = change.clamp(-limit, limit) if norm == "linf" else per_image(middle) * change
        x = (images + part).clamp(0, 1)
        still = wrong(x) & broken
        best = torch.where(per_image(still), x, best)
        inner, outer = torch.where(still, inner, middle), torch.where(still, middle, outer)
    return best, broken
