"""A loss that spreads features over the sphere, whatever their classes."""

import warnings

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from ncreg._checks import check_flag
from ncreg._transforms import fx_leaf, recorded, row_count
from ncreg.distributed import gather_batch
from ncreg.losses._inputs import (
    Features,
    GatheredLosses,
    Losses,
    LossModule,
    Reduction,
    average,
    check_reduction,
    check_rows,
    dot_products,
    unit_rows,
    without_diagonal,
)
from ncreg.numerics import widest

EPS = 1e-8


def koleo_loss(features: Features, *, reduction: Reduction = "mean") -> Losses:
    """−ln(min_{j≠i}‖u_i − u_j‖ + 1e−8), u the unit features: the Kozachenko–Leonenko estimate of their entropy.

    Each sample is pushed from its nearest neighbour, of its own class or not: this works against collapse. It is for
    the features of an encoder behind which something else collapses (`swap_head(…, project="fixed")`). Rows in the
    same direction are at distance 0: they count 18.42 each and have no gradient, since no direction leads away. A
    sample without another one has no neighbour: its loss and gradient are 0, and a warning says so. At a simplex of C
    vectors the loss is −½ ln(2C/(C−1)). The B × B matrix that finds the neighbours, in float64, is the loss's own.

    Source: Sablayrolles et al., "Spreading vectors for similarity search", ICLR 2019 (arXiv 1806.03198); against
    collapse of an encoder Harun, Gallardo & Kanan, ICML 2025 (arXiv 2502.10691), with weight 0.1.

    Args:
        features: h, any scale; lengths below 1e-6, in float16 1e-3, are divided by that.
        reduction: "mean", "sum" or "none" (one value a sample).

    Raises:
        ValueError: shapes or reduction that do not fit.
        TypeError: features that are not floating-point.

    Example:
        >>> koleo_loss(torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]))  # every nearest distance is √2
        tensor(-0.3466)
    """
    check_rows("features", features)
    directions = unit_rows(features)
    if row_count(features) == 1:
        if not recorded(features):
            warnings.warn("koleo_loss of a single sample is 0: it has no neighbour", stacklevel=2)
        return average(directions.sum(1) * 0, reduction)
    others = directions.index_select(0, nearest_neighbours(directions))
    distances = torch.linalg.vector_norm(directions - others, dim=1)
    return average(-(distances + EPS).log(), reduction)


def nearest_neighbours(rows: Float[Tensor, "batch dim"]) -> Integer[Tensor, " batch"]:
    """For each of several rows the index of another one at the least distance; no gradient.

    Found in float64: cosines in float32 tell no angles below 3e-4 apart, and collapsed features are closer than that.
    """
    fixed = rows.detach().to(widest(rows.device))
    nearness = dot_products(fixed, fixed) - fixed.square().sum(1) / 2  # (|u_i|² − |u_i − u_j|²)/2
    return without_diagonal(nearness).argmax(1)


class KoLeoLoss(LossModule):
    """`koleo_loss` as a module; with `gather` the neighbours are sought among the batches of all ranks.

    Args:
        reduction: "mean", "sum" or "none" (one value a sample).
        gather: take the batches of all ranks together; `ncreg.losses` says what for.

    Example:
        >>> KoLeoLoss()(torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]))  # every nearest distance is √2
        tensor(-0.3466)
    """

    consumes = ("features",)

    def __init__(self, *, reduction: Reduction = "mean", gather: bool = True) -> None:
        super().__init__()
        self.reduction = check_reduction(reduction)
        self.gather = check_flag("gather", gather)

    @fx_leaf
    def forward(self, features: Features) -> GatheredLosses:
        """The loss of the batch."""
        if self.gather:
            (features,) = gather_batch(features)
        return koleo_loss(features, reduction=self.reduction)
