"""A head of −1, 0 and 1 on frozen features, found by changing one weight at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8, Integer
from torch import Tensor

from ncreg._checks import check_integer, check_positive
from ncreg._features import check_all_present, check_features, check_indices
from ncreg._readable import readable
from ncreg.numerics import seeded

GAIN = 1e-12  # a change must lower the loss by more than rounding does


@dataclass(frozen=True, eq=False)
class TernaryHead:
    """The best head found.

    Attributes:
        weight: −1, 0 or 1 (C, d). `FixedHead(weight.float(), normalize=False, scale=scale)` is the head.
        scale: factor on the logits.
        losses: mean cross-entropy at the start and after each sweep; it never rises.
        converged: whether no single weight can lower it any more.
    """

    weight: Int8[Tensor, "classes dim"]
    scale: float
    losses: tuple[float, ...]
    converged: bool

    __str__ = readable


def ternary_head(
    features: Float[Tensor, "samples dim"],
    target: Integer[Tensor, " samples"],
    *,
    scale: float = 1.0,
    sweeps: int = 20,
    restarts: int = 1,
    seed: int = 0,
) -> TernaryHead:
    """Min over W in {−1, 0, 1} of the mean cross-entropy of scale·W h, by coordinate search.

    A weight touches one column of logits, so that a trial costs O(samples). Each sweep tries both other values of every
    weight, in an order drawn anew, and keeps what lowers the loss. The first start is W = 0, further ones are drawn;
    the best result counts. A local search: no proof that it is the best head.

    Args:
        features: h, frozen, of the training images.
        target: their classes, each of 0 … C−1 present.
        scale: factor on the logits; with features of length 1 take about that of `ncreg.theory.scale_for_loss`.
        sweeps: at most; it stops earlier where no weight changes.
        restarts: starts.
        seed: of the orders and starts.

    Raises:
        TypeError: no tensors of the right kind.
        ValueError: shapes that do not fit, features not finite, a class without a sample, arguments out of range.

    Source: a coordinate search on ternary weights as in CoNNTrA (arXiv 2009.00540), here for the head alone.

    Example:
        >>> h = torch.tensor([[1.0, 0.1], [0.9, -0.1], [-1.0, 0.2], [-1.1, -0.2]])
        >>> found = ternary_head(h, torch.tensor([0, 0, 1, 1]))
        >>> found.weight[:, 0].tolist(), found.converged
        ([1, -1], True)
    """
    rows = check_features("features", features)
    labels = check_indices("target", target, len(rows))
    classes = int(labels.max()) + 1
    check_all_present("target", labels, classes)
    if classes < 2:
        raise ValueError("target holds class 0 alone: a head needs at least 2 classes")
    check_integer("sweeps", sweeps, 1)
    columns, generator = check_positive("scale", scale) * rows.T.contiguous(), seeded(seed)
    best: TernaryHead | None = None
    for start in range(check_integer("restarts", restarts, 1)):
        shape = (classes, rows.shape[1])
        weight = torch.zeros(shape, dtype=torch.float64, device="cpu")
        if start:
            weight = torch.randint(-1, 2, shape, generator=generator, device="cpu").double()
        found = _search(columns, labels, weight, sweeps, generator, float(scale))
        if best is None or found.losses[-1] < best.losses[-1]:
            best = found
    assert best is not None
    return best


def _search(
    columns: Float[Tensor, "dim samples"],
    labels: Tensor,
    weight: Float[Tensor, "classes dim"],
    sweeps: int,
    generator: torch.Generator,
    scale: float,
) -> TernaryHead:
    """Sweeps from one start."""
    logits = weight @ columns  # a row a class
    losses, changed = [_loss(logits, labels)], True
    for _ in range(sweeps):
        changed = False
        for c in torch.randperm(len(weight), generator=generator, device="cpu").tolist():
            changed |= _sweep_class(columns, labels == c, weight[c], logits, c, generator)
        losses.append(min(losses[-1], _loss(logits, labels)))
        if not changed:
            break
    return TernaryHead(weight.to(torch.int8), scale, tuple(losses), not changed)


def _sweep_class(
    columns: Tensor, own: Tensor, weight: Tensor, logits: Tensor, c: int, generator: torch.Generator
) -> bool:
    """Try every weight of one class, whose row of logits alone changes; whether one changed."""
    rest = torch.cat([logits[:c], logits[c + 1 :]]).logsumexp(0)
    row, share = logits[c].clone(), own.double()

    def part(rows: Tensor) -> Tensor:  # what of the loss hangs on this class's logits, a row a candidate
        return (torch.logaddexp(rest, rows) - share * rows).mean(-1)

    loss, changed = float(part(row)), False
    for place in torch.randperm(len(weight), generator=generator, device="cpu").tolist():
        steps = torch.tensor([v for v in (-1.0, 0.0, 1.0) if v != weight[place]], dtype=torch.float64, device="cpu")
        candidates = row + (steps - weight[place])[:, None] * columns[place]
        values = part(candidates)
        lowest = int(values.argmin())
        if float(values[lowest]) < loss - GAIN:
            weight[place], row, loss, changed = steps[lowest], candidates[lowest], float(values[lowest]), True
    logits[c] = weight @ columns  # not the sum of many steps
    return changed


def _loss(logits: Tensor, labels: Tensor) -> float:
    return float((logits.logsumexp(0) - logits.gather(0, labels[None])[0]).mean())
