"""Which class on which vertex: similar classes near to each other, for frames whose vertices are not all alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ncreg.frames._measures import check_weight
from ncreg.numerics import exact, in_float64, seeded

CONGRUENT = 1e-6
"""Spread of the cosines between vertices below which they are all one number."""

STARTS, FEW_STARTS, FEW_CLASSES = 64, 8, 32
"""Random starts for up to so many classes, and for more: 300 classes take seconds."""


def similar_permutation(
    weight: Float[Tensor, "num_classes dim"],
    similarity: Float[Tensor, "num_classes num_classes"] | Sequence[Sequence[float]],
) -> Int[Tensor, " num_classes"]:
    """The permutation p with a large Σ_{c≠k} s_ck·cos(w_p(c), w_p(k)): similar classes on vertices near to each other.

    A quadratic assignment: scipy's FAQ from the barycentre and from random starts, each result improved by the best
    exchange of two classes until none helps. For few classes that is the optimum (7 and less were compared with all
    permutations), for many a good one; the starts are the same ones each time. In a simplex all vertices are at the
    same angle, so that all permutations are congruent and there is nothing to choose; in an orthoplex (cosines 0 and
    −1) or a softmax code there is.

    Args:
        weight: class vectors of the frame, in the frame's own order; `weight[p]` has class c on vertex p(c).
        similarity: s (C, C), larger for classes that are more alike: the cosines of class means,
            `ncreg.functional.inter_class_cosine(features, target, C, center=…)`, of features at hand, or any judgement
            of yours, such as a confusion matrix. The mean of it and its transpose is used; the diagonal plays no part.

    Raises:
        ValueError: a simplex, a similarity that is not (C, C) or not finite, a class vector of length 0.
        ImportError: scipy is not installed.

    Source: the question is from Gao et al. 2023 (arXiv 2310.08358); FAQ from Vogelstein et al. 2015.

    Example:
        >>> from ncreg.frames import orthoplex
        >>> weight = orthoplex(4, 2, rotate=False)  # opposite vertices are 0 and 2, 1 and 3
        >>> alike = torch.tensor([[1.0, 0.9, 0.1, 0.1], [0.9, 1, 0, 0], [0.1, 0, 1, 0.8], [0.1, 0, 0.8, 1]])
        >>> cosines = weight[similar_permutation(weight, alike)] @ weight[similar_permutation(weight, alike)].T
        >>> cosines[0, 1].item(), cosines[2, 3].item()  # the pairs that are alike do not oppose each other
        (0.0, 0.0)
    """
    check_weight(weight)
    wanted = _checked_similarity(similarity, len(weight))
    unit = F.normalize(in_float64(weight.detach()).cpu(), dim=1)
    if not torch.linalg.vector_norm(unit, dim=1).gt(0.5).all():
        raise ValueError("weight has a class vector of length 0, which has no cosine")
    near = _off_diagonal(unit @ unit.T)
    _refuse_congruent(near)
    found = [_exchanged(wanted, near, start) for start in _starts(wanted, near)]
    return max(found, key=lambda order: float((wanted * near[order][:, order]).sum()))


def _refuse_congruent(cosines: Float[Tensor, "num_classes num_classes"]) -> None:
    """Refuse vertices that are all at the same angle."""
    others = cosines[~torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)]
    if float(others.max() - others.min()) < CONGRUENT:
        raise ValueError(
            f"weight is a simplex of {len(cosines)} classes: every two vertices are at the same angle, all "
            "permutations are congruent, and similar classes have no nearer place; an orthoplex, a softmax code or "
            "tammes with more classes than dimensions + 1 has some"
        )


def _checked_similarity(similarity: Tensor | Sequence[Sequence[float]], num_classes: int) -> Tensor:
    """The symmetric part of a similarity in float64 on the CPU, its diagonal 0."""
    try:
        given = exact(similarity) if isinstance(similarity, Tensor) else similarity
        rows = torch.as_tensor(given, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError) as error:
        raise ValueError(f"similarity must be a matrix of numbers, a row for each class: {error}") from None
    if rows.shape != (num_classes, num_classes):
        raise ValueError(f"similarity of shape {tuple(rows.shape)}: it must be ({num_classes}, {num_classes})")
    wanted = _off_diagonal((rows + rows.T) / 2)
    if not wanted.isfinite().all():
        raise ValueError("similarity must be finite: each class needs a sample where it comes from class means")
    return wanted


def _off_diagonal(rows: Tensor) -> Tensor:
    return rows - rows.diagonal().diag() if rows.isfinite().all() else rows.clone().fill_diagonal_(0)


def _starts(wanted: Tensor, near: Tensor) -> list[Tensor]:
    """FAQ's permutations from the barycentre and from random doubly stochastic matrices."""
    try:
        from scipy.optimize import quadratic_assignment
    except ImportError:
        raise ImportError("similar_permutation needs scipy: pip install scipy") from None
    size, generator, found = len(wanted), seeded(0), []
    for number in range(1 + (STARTS if size <= FEW_CLASSES else FEW_STARTS)):
        options: dict[str, Any] = {"maximize": True, "rng": np.random.default_rng(0)}  # else numpy's global one is read
        if number:
            drawn = torch.randperm(size, generator=generator, device="cpu")
            corner = torch.eye(size, dtype=torch.float64, device="cpu")[drawn]
            options["P0"] = ((corner + 1 / size) / 2).numpy()
        result = quadratic_assignment(wanted.numpy(), near.numpy(), method="faq", options=options)
        found.append(torch.from_numpy(result.col_ind).long())
    return found


def _exchanged(wanted: Tensor, near: Tensor, order: Tensor) -> Tensor:
    """The permutation after the best exchange of two classes, again and again until none raises the sum.

    Exchanging i and j changes it by 2(M_ij + M_ji − M_ii − M_jj + 2·s_ij·g_ij), M = s·g, g the cosines in the present
    order; both matrices are symmetric with diagonal 0.
    """
    order = order.clone()
    smallest = 1e-12 * float(wanted.abs().sum())
    while True:
        seated = near[order][:, order]
        product = wanted @ seated
        own = product.diagonal()
        gain = product + product.T - own[:, None] - own + 2 * wanted * seated
        first, second = divmod(int(gain.argmax()), len(order))
        if not float(gain[first, second]) > smallest:
            return order
        order[[first, second]] = order[[second, first]]
