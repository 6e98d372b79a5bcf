"""Cross-entropy against a sample of the classes, with the correction for how they were drawn."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncreg._checks import check_flag, check_integer, described
from ncreg._transforms import fx_leaf
from ncreg.losses._factors import classes_of, taken_apart
from ncreg.losses._inputs import (
    ClassWeight,
    Features,
    Labels,
    Losses,
    LossModule,
    Reduction,
    average,
    check_reduction,
    check_rows,
)
from ncreg.losses._targets import check_labels, reads_are_free
from ncreg.numerics import widest


def sampled_cross_entropy(
    features: Features,
    head: nn.Module,
    target: Labels,
    num_sampled: int,
    *,
    probabilities: ClassWeight | None = None,
    reduction: Reduction = "mean",
    sparse: bool = False,
    generator: torch.Generator | None = None,
) -> Losses:
    """−z_y + ln(e^{z_y} + Σ_{k in S, k ≠ y} e^{z_k}/(S·q_k)): cross-entropy against S classes drawn with chances q.

    The classes are drawn once for the batch, with replacement. The correction −ln(S·q_k) makes the sum of the other
    classes an unbiased estimate of Σ_{k≠y} e^{z_k}; the loss, its logarithm, is biased all the same: on average it lies
    below the exact one, by about Var(Ẑ)/(2Z²) with Z = Σ_k e^{z_k}, which falls as 1/S. Nearest class vectors that are
    seldom drawn are pushed away seldom: `chunked_cross_entropy` is exact.

    Source: Jean et al., "On Using Very Large Target Vocabulary for Neural Machine Translation", ACL 2015 (arXiv
    1412.2007); Bengio & Senécal 2008.

    Args:
        features: h.
        head: nn.Linear, or a head of `ncreg.heads` that is no structured simplex.
        target: class indices in [0, C).
        num_sampled: S, draws for the batch.
        probabilities: q (C,), above 0, scaled to sum 1 here; None draws all classes alike.
        reduction: "mean", "sum" or "none" (one value a sample).
        sparse: whether the weight gets a sparse gradient, of the rows drawn alone (SGD without momentum, SparseAdam).
        generator: of the draws, on the features' device.

    Raises:
        ValueError: shapes, labels, probabilities or numbers that do not fit.
        TypeError: a head of another kind.

    Example:
        >>> head, features, target = nn.Linear(4, 1000), torch.randn(8, 4), torch.arange(8)
        >>> draws = [sampled_cross_entropy(features, head, target, 500) for _ in range(50)]
        >>> bool((torch.stack(draws).mean() - F.cross_entropy(head(features), target)).abs() < 0.05)
        True
    """
    check_rows("features", features)
    check_reduction(reduction)
    check_flag("sparse", sparse)
    classes, number = classes_of(head), check_integer("num_sampled", num_sampled, 1)
    labels = check_labels(target, features, classes)
    drawn, correction = _drawn(number, classes, probabilities, features, generator)
    factors = taken_apart(features, head, None)
    rows = factors.live_rows(torch.cat([drawn, labels]), sparse)
    others, own = rows[:number], rows[number:]
    z_others, z_own = F.linear(factors.inputs, others), torch.linalg.vecdot(factors.inputs, own)
    z_others, z_own = (z if z.dtype == torch.float64 else z.float() for z in (z_others, z_own))
    if factors.bias is not None:
        z_others, z_own = z_others + factors.bias[drawn], z_own + factors.bias[labels]
    z_others = (z_others - correction.to(z_others)).masked_fill(drawn == labels[:, None], -torch.inf)
    return average(torch.logsumexp(torch.cat([z_own[:, None], z_others], dim=1), dim=1) - z_own, reduction)


def _drawn(
    number: int, classes: int, probabilities: Tensor | None, features: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """The classes drawn, and ln(S·q) of each."""
    device = features.device
    if probabilities is None:
        drawn = torch.randint(classes, (number,), device=device, generator=generator)
        return drawn, torch.full((number,), math.log(number / classes), dtype=torch.float32, device=device)
    if not isinstance(probabilities, Tensor) or probabilities.shape != (classes,):
        got = tuple(probabilities.shape) if isinstance(probabilities, Tensor) else described(probabilities)
        raise ValueError(f"probabilities must be a tensor of shape ({classes},), one a class, got {got}")
    valid = ((probabilities > 0) & (probabilities < torch.inf)).all()
    words = "probabilities must be finite and above 0: a class that is never drawn is never pushed away"
    if not reads_are_free(valid):
        torch._assert_async(valid, words)
    elif not valid:
        raise ValueError(words)
    exact = probabilities.to(widest(probabilities.device))
    chances = (exact / exact.sum()).to(device, widest(device))
    places = torch.rand(number, dtype=widest(device), device=device, generator=generator)
    drawn = torch.searchsorted(chances.cumsum(0), places).clamp_max(classes - 1)  # multinomial stops at 2²⁴ classes
    return drawn, (number * chances[drawn]).log()


class SampledCrossEntropyLoss(LossModule):
    """`sampled_cross_entropy` as a module.

    Args:
        num_sampled: S, draws for the batch.
        probabilities: q (C,), above 0, scaled to sum 1 there; None draws all classes alike.
        reduction: "mean", "sum" or "none" (one value a sample).
        sparse: whether the weight gets a sparse gradient, of the rows drawn alone (SGD without momentum, SparseAdam).

    Example:
        >>> loss = SampledCrossEntropyLoss(100)
        >>> loss(torch.randn(8, 4), nn.Linear(4, 1000), torch.arange(8)).shape
        torch.Size([])
    """

    consumes = ("features", "head", "target")
    probabilities: Tensor | None

    def __init__(
        self,
        num_sampled: int,
        *,
        probabilities: ClassWeight | None = None,
        reduction: Reduction = "mean",
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self.num_sampled = check_integer("num_sampled", num_sampled, 1)
        self.register_buffer("probabilities", probabilities)
        self.reduction, self.sparse = check_reduction(reduction), check_flag("sparse", sparse)

    @fx_leaf
    def forward(self, features: Features, head: nn.Module, target: Labels) -> Losses:
        """The loss of the batch."""
        return sampled_cross_entropy(
            features,
            head,
            target,
            self.num_sampled,
            probabilities=self.probabilities,
            reduction=self.reduction,
            sparse=self.sparse,
        )
