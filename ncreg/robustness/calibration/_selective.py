"""Selective prediction: the error rate where a model may abstain from its least confident answers."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ncreg._readable import readable
from ncreg.numerics import exact
from ncreg.robustness.calibration._measures import check_probabilities, ties, top_class


@dataclass(frozen=True)
class RiskCoverage:
    """Error rate among the k most confident samples, for every k.

    Attributes:
        coverage: k/n, from 1/n to 1.
        risk: expected error rate of the k samples kept, in [0, 1].
        aurc: area under risk over coverage, the mean of `risk`; lower is better.
        excess_aurc: aurc less that of a perfect ranking of the same predictions, at least 0.
    """

    coverage: Float[Tensor, " samples"]
    risk: Float[Tensor, " samples"]
    aurc: float
    excess_aurc: float

    __str__ = readable


def risk_coverage(
    probabilities: Float[Tensor, "batch classes"],
    target: Int[Tensor, " batch"],
    *,
    confidence: Float[Tensor, " batch"] | None = None,
) -> RiskCoverage:
    """Error rate against the fraction of samples that the model answers, the most confident first, and its area.

    Source: Geifman & El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017 (arXiv 1705.08500);
    excess area: Geifman, Uziel & El-Yaniv, ICLR 2019 (arXiv 1805.08206), here against the exact best of n samples.
    Among samples of equal confidence the risk is the expectation over their random order.

    Args:
        probabilities: softmax of the logits, rows that sum to 1.
        target: class indices.
        confidence: another score to rank by, e.g. the logits' margin, which does not saturate; default max_c p_c.

    Raises:
        ValueError: rows that are no probabilities, C = 1, no samples, NaN, classes out of range, confidence of another
            shape or not finite.
        TypeError: no tensors, or of another kind.

    Example:
        >>> curve = risk_coverage(torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.tensor([0, 0]))
        >>> curve.risk, curve.aurc, curve.excess_aurc
        (tensor([0.0000, 0.5000], dtype=torch.float64), 0.25, 0.0)
    """
    p, target = check_probabilities(probabilities, target)
    score, correct = top_class(p, target)
    if confidence is not None:
        if not isinstance(confidence, Tensor) or confidence.shape != target.shape:
            got = tuple(confidence.shape) if isinstance(confidence, Tensor) else type(confidence).__name__
            raise ValueError(f"confidence must be a tensor of shape ({len(target)},), got {got}")
        if not bool(confidence.isfinite().all()):
            raise ValueError("confidence holds NaN or infinite values, which have no rank")
        score = exact(confidence)
    return risk_of(score, correct)


def risk_of(score: Tensor, correct: Tensor) -> RiskCoverage:
    n = len(score)
    group, size = ties(-score)
    errors = correct.new_zeros(len(size)).index_add(0, group, 1 - correct)
    # Expected errors among the first k: those of the groups before, and the fraction of the own group that is in.
    expected = (errors / size).repeat_interleave(size).cumsum(0)
    kept = torch.arange(1, n + 1, dtype=torch.float64, device="cpu")
    risk = (expected / kept).clamp_max(1)
    best = (kept - correct.sum()).clamp_min(0) / kept
    area = float(risk.mean())
    return RiskCoverage(kept / n, risk, area, max(0.0, area - float(best.mean())))
