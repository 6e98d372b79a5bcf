"""The expected cost of a classifier's mistakes as a loss."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ncreg._checks import check_flag
from ncreg._features import check_cost, exact_cost
from ncreg._transforms import fx_leaf
from ncreg.distributed import gather_batch
from ncreg.losses._inputs import (
    GatheredLosses,
    Logits,
    Losses,
    LossModule,
    Reduction,
    average,
    check_reduction,
    check_rows,
    dot_products,
)
from ncreg.losses._targets import Target, check_target, is_soft, reads_are_free
from ncreg.numerics import at_least_float32

CostMatrix = Float[Tensor, "classes classes"]


def expected_cost_loss(logits: Logits, target: Target, cost: CostMatrix, *, reduction: Reduction = "mean") -> Losses:
    """Σ_j M[y,j]·softmax(z)_j: what mistakes cost, by the model's probabilities.

    Every plan of transport to a one-hot target is forced, so this is the Wasserstein distance between prediction and
    label under the costs M, exactly. M = 11ᵀ − I gives 1 − p_y. Its gradient dies where probabilities saturate, on
    wrong samples too: put it beside cross-entropy. Scale M freely: it multiplies the loss.
    Source: Terzi, Susto & Chaudhari, "Directional Adversarial Training for Cost Sensitive Deep Learning Classification
    Applications" (arXiv 1910.03468).

    Args:
        logits: z.
        target: class indices in [0, C), or soft labels, which mix the losses of their classes.
        cost: M, what it costs to take class y for j in row y and column j; 0 on the diagonal.
        reduction: "mean", "sum" or "none" (one value a sample).

    Raises:
        ValueError: shapes, labels, costs or reduction that do not fit.
        TypeError: logits that are not floating-point, labels that are not integers.

    Example:
        >>> cost = torch.tensor([[0.0, 4.0], [1.0, 0.0]])  # taking class 0 for 1 is worse than the reverse
        >>> expected_cost_loss(torch.zeros(2, 2), torch.tensor([0, 1]), cost, reduction="none")
        tensor([2.0000, 0.5000])
    """
    check_rows("logits", logits)
    if not isinstance(cost, Tensor) or reads_are_free(cost):
        check_cost(cost, logits.shape[1])
    return _expected_cost_loss(logits, target, cost, reduction)


def _expected_cost_loss(logits: Tensor, target: Target, cost: Tensor, reduction: Reduction) -> Tensor:
    target = check_target(target, logits, cost.shape[0])
    chances = at_least_float32(logits).softmax(1)
    cost = cost.to(chances)
    prices = dot_products(target.to(cost), cost.T) if is_soft(target) else cost.index_select(0, target)
    return average((prices * chances).sum(1), reduction)


class ExpectedCostLoss(LossModule):
    """`expected_cost_loss` as a module; the costs are a buffer.

    Args:
        cost: M (C, C), 0 on the diagonal: row y and column j hold what it costs to take class y for j.
        reduction: "mean", "sum" or "none" (one value a sample).
        gather: take the batches of all ranks together; `ncreg.losses` says what for.

    Example:
        >>> ExpectedCostLoss([[0.0, 4.0], [1.0, 0.0]])(torch.zeros(1, 2), torch.tensor([0]))  # logits, target
        tensor(2.)
    """

    consumes = ("logits", "target")
    cost: Tensor

    def __init__(
        self, cost: CostMatrix | Sequence[Sequence[float]], *, reduction: Reduction = "mean", gather: bool = False
    ) -> None:
        super().__init__()
        matrix = exact_cost(cost if isinstance(cost, Tensor) else torch.tensor(cost, dtype=torch.float64, device="cpu"))
        device = cost.device if isinstance(cost, Tensor) else None
        self.register_buffer("cost", matrix.to(device, torch.get_default_dtype()))
        self.reduction = check_reduction(reduction)
        self.gather = check_flag("gather", gather)

    @fx_leaf
    def forward(self, logits: Logits, target: Target) -> GatheredLosses:
        """The loss of the batch."""
        if self.gather:
            logits, target = gather_batch(logits, target)
        check_rows("logits", logits, self.cost.shape[0])
        return _expected_cost_loss(logits, target, self.cost, self.reduction)
