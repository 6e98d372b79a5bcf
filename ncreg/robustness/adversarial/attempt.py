"""What every attack starts from and ends with: clean predictions, the best image found so far, the robust accuracy."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ncreg._checks import check_integer
from ncreg._features import exact_cost
from ncreg._readable import readable
from ncreg.numerics import at_least_float32
from ncreg.robustness._inputs import Model, check_attackable, check_target, outputs_of, predict
from ncreg.robustness.adversarial.steps import Norm, margin_or_cost
from ncreg.robustness.intervals import binomial_interval


@dataclass(frozen=True, eq=False)
class AttackResult:
    """Robust accuracy under one attack.

    Attributes:
        name: which attack, with its settings.
        norm: "linf" or "l2".
        epsilon: radius of the ball, in units of images in [0, 1].
        images: for each image the attacked one of lowest margin; wrongly classified ones as they came. Of an attack
            on costs the one of highest expected cost, for each image.
        clean_correct: (B,) classified rightly before the attack.
        robust: (B,) classified rightly before **and** after the attack.
        expected_cost: (B,) Σ_j M[y,j] p_j after the attack, float64; None without costs.
    """

    name: str
    norm: Norm
    epsilon: float
    images: Float[Tensor, "batch channels height width"]
    clean_correct: Bool[Tensor, " batch"]
    robust: Bool[Tensor, " batch"]
    expected_cost: Float[Tensor, " batch"] | None = field(default=None, kw_only=True)

    __str__ = readable

    @property
    def accuracy(self) -> float:
        """Robust accuracy, in [0, 1]."""
        return float(self.robust.double().mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the robust accuracy."""
        return binomial_interval(int(self.robust.sum()), len(self.robust))


def clean_logits(model: Model, images: Tensor, target: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Logits of the images before the attack, and the target; everything is checked before the first gradient."""
    check_attackable(images)
    logits = predict(model, images, check_integer("batch_size", batch_size, 1))
    return logits, check_target(target, logits, logits.shape[1]).clone()  # a clone of an inference tensor is none


class Attempt:
    """Images under attack: the image of lowest margin found so far for each, and which were classified rightly before.

    With costs the expected cost takes the place of the margin, with its sign turned.

    Attributes:
        images: as they came (B, channels, H, W).
        target: their classes (B,).
        num_classes: C.
        correct: (B,) classified rightly before the attack.
        attacked: the image of lowest margin found so far for each.
        lowest: (B,) that margin.
    """

    def __init__(
        self, model: Model, images: Tensor, target: Tensor, batch_size: int, cost: Tensor | None = None
    ) -> None:
        logits, self.target = clean_logits(model, images, target, batch_size)
        self.model, self.batch_size, self.images = model, batch_size, images.detach()
        self.num_classes, self.correct = logits.shape[1], logits.argmax(1) == self.target
        self.cost = None if cost is None else exact_cost(cost, self.num_classes).to(logits.device)
        self.attacked, self.lowest = self.images.clone(), margin_or_cost(logits, self.target, self.cost)

    def radius(self, epsilon: float) -> Float[Tensor, " batch"]:
        """The same radius for each image, in float64."""
        return torch.full((len(self.images),), epsilon, dtype=torch.float64, device=self.images.device)

    def keep(self, chosen: Tensor, found: Tensor, margin: Tensor) -> None:
        """Keep the images found for the indices `chosen` where their margin is the lowest so far."""
        lower = margin < self.lowest[chosen]
        self.attacked[chosen[lower]] = found[lower]
        self.lowest[chosen[lower]] = margin[lower]

    @torch.no_grad()
    def look(self, chosen: Tensor, proposal: Tensor) -> None:
        """Keep the proposals for the indices `chosen` where the model gives them the lowest margin so far."""
        logits = at_least_float32(outputs_of(self.model, proposal))
        self.keep(chosen, proposal, margin_or_cost(logits, self.target[chosen], self.cost))

    def robust(self) -> Bool[Tensor, " batch"]:
        """Images classified rightly before and after the attack, judged by a new forward pass."""
        return self.correct & (predict(self.model, self.attacked, self.batch_size).argmax(1) == self.target)

    def result(self, name: str, norm: Norm, epsilon: float) -> AttackResult:
        """The attack's result."""
        found = None if self.cost is None else -self.lowest
        return AttackResult(name, norm, epsilon, self.attacked, self.correct, self.robust(), expected_cost=found)
