"""The smallest change in [0, 1] that makes a model misclassify an image, in L2 or L∞."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from ncreg._checks import check_integer
from ncreg._readable import readable
from ncreg.numerics import at_least_float32, seeded
from ncreg.robustness._inputs import Model, in_parts, outputs_of
from ncreg.robustness.adversarial.attempt import clean_logits
from ncreg.robustness.adversarial.deepfool import deepfool, linearised_distances, logit_differences
from ncreg.robustness.adversarial.objectives import frozen
from ncreg.robustness.adversarial.steps import (
    Norm,
    ascend,
    check_epsilon,
    default_step_size,
    per_image,
    project,
    random_start,
    size_of,
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

    __str__ = readable

    @property
    def median(self) -> float:
        """Median distance over all images, the lower of two middle ones; failures count as inf."""
        return float(self.distance.median())

    def accuracy(self, epsilon: float) -> float:
        """Fraction of images farther away than epsilon: the robust accuracy at that radius by this search."""
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

    The search starts from DeepFool's point, cut to [0, 1], if that is misclassified. Each round attacks within a radius
    of each image's own: halfway between the largest radius that failed and the distance of the nearest point found, or
    twice the last radius while no point is known. Rounds start by turns from the nearest point and from a random one.
    In L∞, where ascent often meets another boundary before the nearest one, the latter rounds aim at one rival class
    each, in order of linearised distance, within the distance of the nearest point, until the rivals are used up. Every
    point found is pulled back until just before it is classified rightly. The scale of the logits does not matter.

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
    rounds, steps = check_integer("rounds", rounds, 1), check_integer("steps", steps, 1)
    clean, target = clean_logits(model, images, target, batch_size)
    images, correct, generator = images.detach(), clean.argmax(1) == target, seeded(seed)
    chosen = correct.nonzero().squeeze(1)
    widest = 1.0 if norm == "linf" else float(images[0].numel()) ** 0.5  # every image lies within it of any other
    low = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    search = _Search(images.clone(), low, high=torch.where(correct, torch.inf, 0.0).to(low))
    for part in in_parts(chosen, batch_size):
        moved = deepfool(model, images[part], norm=norm, batch_size=batch_size).images.clamp(0, 1)
        search.keep(part, *_pull_back(model, images[part], moved, target[part], norm))
    radius = torch.where(search.high.isinf(), widest / 64, search.high / 2)
    with frozen(model):
        rivals = _rivals(model, images, target, clean, batch_size) if norm == "linf" else target[:, None][:, :0]
        for number in range(rounds):
            rival = rivals[:, number // 2] if number % 2 and number // 2 < rivals.shape[1] else None
            if rival is not None:
                start, tried = images, search.high.clamp_max(widest)
            elif number % 2:
                start, tried = random_start(images, radius, norm, generator), radius
            else:
                start, tried = project(search.nearest, images, radius, norm), radius
            for part in in_parts(chosen, batch_size):
                aim = None if rival is None else rival[part]
                point, size = _attack(
                    model, images[part], target[part], tried[part], start[part], aim, norm=norm, steps=steps
                )
                search.keep(part, point, size)
                if rival is None:  # otherwise another rival may be within the ball
                    search.rule_out(part, torch.where(size.isinf(), tried[part], 0))
            radius = search.next_radius(radius if rival is not None else (2 * radius).clamp_max(widest))
    failures = int(search.high.isinf().sum())
    return MinimumNormResult(norm, search.high.to(images.dtype), search.nearest, correct, failures)


@dataclass
class _Search:
    """Bisection of each image's distance.

    Attributes:
        nearest: the nearest misclassified point found so far (B, channels, H, W).
        low: (B,) largest radius in which an attack failed.
        high: (B,) distance of `nearest`, inf where there is none.
    """

    nearest: Tensor
    low: Tensor
    high: Tensor

    def keep(self, chosen: Tensor, points: Tensor, size: Tensor) -> None:
        """Keep points, at these distances from the images `chosen`, that are nearer than those found so far."""
        nearer = size < self.high[chosen]
        self.nearest[chosen[nearer]], self.high[chosen[nearer]] = points[nearer], size[nearer]

    def rule_out(self, chosen: Tensor, radius: Tensor) -> None:
        """An attack within the radius failed for the images `chosen`."""
        self.low[chosen] = torch.maximum(self.low[chosen], radius)

    def next_radius(self, wider: Tensor) -> Tensor:
        """Halfway between `low` and `high`; `wider` where no point has been found."""
        self.low = torch.minimum(self.low, self.high)  # a nearer point may turn up where an attack once failed
        return torch.where(self.high.isinf(), wider, (self.low + self.high) / 2)


def _rivals(
    model: Model, images: Tensor, target: Tensor, logits: Tensor, batch_size: int
) -> Int[Tensor, "batch rivals"]:
    """The ten classes with the largest logits besides the target's, in order of their linearised distance in L∞."""
    others = logits.scatter(1, target[:, None], -torch.inf).argsort(1, descending=True)[:, :-1][:, :10]
    order, ranked = torch.cat([target[:, None], others], 1), []
    for part in torch.arange(len(images), device=images.device).split(batch_size):
        rows, differences = logit_differences(model, images[part], order[part])
        distance, _ = linearised_distances(rows, differences, order[part], "linf")
        ranked.append(others[part].gather(1, distance.T.argsort(1)))
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
    """The points that margin-PGD finds within a radius of each image, pulled back, and their distances, or inf.

    With a rival the margin is the one over that class.
    """
    attacked, label = model, target
    if rival is not None:
        pair, label = torch.stack([target, rival], 1), torch.zeros_like(target)
        attacked = lambda x: model(x).gather(1, pair)  # noqa: E731
    step_size = default_step_size(radius, steps)
    found, _ = ascend(
        attacked, images, label, radius, norm=norm, loss="margin", steps=steps, step_size=step_size, start=start
    )
    return _pull_back(model, images, found, target, norm)


def _pull_back(
    model: Model, images: Tensor, found: Tensor, target: Tensor, norm: Norm, halvings: int = 16
) -> tuple[Tensor, Tensor]:
    """The nearest misclassified point on the way from each image to `found`, and its distance; inf if there is none.

    In L2 the way is the straight line. In L∞ the change is clipped at a smaller and smaller size, so that pixels held
    back by the edge of [0, 1] stay as they are.
    """

    def wrong(x: Tensor) -> Tensor:
        with torch.no_grad():
            return at_least_float32(outputs_of(model, x)).argmax(1) != target

    broken, change = wrong(found), found - images
    whole = size_of(change, norm).to(found.dtype)
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
    return best, torch.where(broken, size_of(best - images, norm), torch.inf)
