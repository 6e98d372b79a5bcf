"""Calibration errors: how far predicted probabilities are from the observed frequencies."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ncreg._checks import check_integer, described
from ncreg.numerics import exact
from ncreg.robustness._inputs import check_logits, check_target


@dataclass(frozen=True)
class ReliabilityBins:
    """The bins of a reliability diagram; means of empty bins are NaN.

    Attributes:
        edges: the bins' ends (bins + 1,); bin m holds confidences in (edges[m], edges[m + 1]].
        count: samples in a bin.
        confidence: mean confidence of the bin's samples, in [0, 1].
        accuracy: fraction of the bin's samples that are classified rightly, in [0, 1].
    """

    edges: Float[Tensor, " ends"]
    count: Int[Tensor, " bins"]
    confidence: Float[Tensor, " bins"]
    accuracy: Float[Tensor, " bins"]


def reliability_bins(
    probabilities: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"], *, bins: int = 15
) -> ReliabilityBins:
    """Confidence max_c p_c and accuracy in equal-width bins ((m−1)/M, m/M].

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (arXiv 1706.04599). Ties of the largest
    probability go to the first class, as in argmax. The ends m/M are compared as the dtype of `probabilities` rounds
    them: 0.2 of float32 belongs to the bin that ends at 0.2; in bfloat16 an end may lie 0.2 % of its value beside m/M.

    Args:
        probabilities: softmax of the logits (n, C), rows that sum to 1.
        target: class indices (n,).
        bins: number of bins M.

    Raises:
        ValueError: rows that are no probabilities, C = 1, no samples, NaN, classes out of range, bins < 1.
        TypeError: no tensors, or of another kind.

    Example:
        >>> reliability_bins(torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.tensor([0, 0]), bins=2).accuracy
        tensor([   nan, 0.5000], dtype=torch.float64)
    """
    bins = check_integer("bins", bins, 1)
    confidence, correct = top_class(*check_probabilities(probabilities, target))
    return binned(confidence, correct, bins, probabilities.dtype)


def expected_calibration_error(
    probabilities: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"], *, bins: int = 15
) -> float:
    """ECE = Σ_m (n_m/n)·|accuracy_m − confidence_m| over equal-width bins, in [0, 1].

    Source: Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI 2015; Guo et al. 2017
    (arXiv 1706.04599). It is biased upwards by about √(bins/n) and depends on the bins: compare at the same of both.

    Arguments and errors are those of `reliability_bins`.

    Example:
        >>> round(expected_calibration_error(torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.tensor([0, 0])), 4)
        0.4
    """
    bins = check_integer("bins", bins, 1)
    confidence, correct = top_class(*check_probabilities(probabilities, target))
    return gap_of(binned(confidence, correct, bins, probabilities.dtype))


def adaptive_calibration_error(
    probabilities: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"], *, bins: int = 15
) -> float:
    """ECE over bins that hold n/M samples each, in order of confidence.

    Source: Nguyen & O'Connor, "Posterior calibration and exploratory analysis for natural language processing models",
    EMNLP 2015 (arXiv 1508.05154). Samples of equal confidence share their mean accuracy, so that their order plays no
    part where a bin's end falls among them. Of n < M samples each is a bin of its own.

    Arguments and errors are those of `reliability_bins`.

    Example:
        >>> round(adaptive_calibration_error(torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.tensor([0, 0]), bins=2), 4)
        0.4
    """
    bins = check_integer("bins", bins, 1)
    return adaptive_gap(*top_class(*check_probabilities(probabilities, target)), bins)


def classwise_calibration_error(
    probabilities: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"], *, bins: int = 15
) -> float:
    """Mean over classes c of the ECE of p_c as a forecast of [y = c].

    Source: Kull et al., "Beyond temperature scaling", NeurIPS 2019 (arXiv 1910.12656); bins of equal width.

    Arguments and errors are those of `reliability_bins`.

    Example:
        >>> round(classwise_calibration_error(torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.tensor([0, 0])), 4)
        0.4
    """
    bins = check_integer("bins", bins, 1)
    return classwise_gap(*check_probabilities(probabilities, target), bins, probabilities.dtype)


def brier_score(probabilities: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"]) -> float:
    """Mean over samples of Σ_c (p_c − [y = c])², in [0, 2] (Brier, Monthly Weather Review 1950).

    Arguments and errors are those of `reliability_bins`.

    Example:
        >>> brier_score(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
        0.5
    """
    return brier(*check_probabilities(probabilities, target))


def negative_log_likelihood(probabilities: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"]) -> float:
    """Mean over samples of −log p_y, in nats; infinite where a p_y is 0.

    Arguments and errors are those of `reliability_bins`.

    Example:
        >>> round(negative_log_likelihood(torch.tensor([[0.5, 0.5]]), torch.tensor([0])), 4)
        0.6931
    """
    p, target = check_probabilities(probabilities, target)
    return float(-p.gather(1, target[:, None]).log().mean())


def check_probabilities(probabilities: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (n, C) in float64 and labels (n,); what rounding left outside [0, 1] is brought back to it."""
    if not isinstance(probabilities, Tensor):
        raise TypeError(f"probabilities must be a tensor, got {described(probabilities)}")
    if not probabilities.is_floating_point():
        raise TypeError(f"probabilities must be floating-point, got {probabilities.dtype}")
    if probabilities.ndim != 2:
        raise ValueError(f"probabilities must be (batch, classes), got shape {tuple(probabilities.shape)}")
    if len(probabilities) == 0:
        raise ValueError(f"probabilities is empty, shape {tuple(probabilities.shape)}")
    if probabilities.shape[1] < 2:
        raise ValueError(f"probabilities have {probabilities.shape[1]} column: of one class p make two, (1 − p, p)")
    half = probabilities.dtype in (torch.float16, torch.bfloat16)
    p = exact(probabilities)
    low, high = (float(v) for v in torch.aminmax(p))
    off, rounding = float((p.sum(1) - 1).abs().max()), 16 * torch.finfo(probabilities.dtype).eps
    if not (low >= -rounding and high <= 1 + rounding and off <= (2e-2 if half else 1e-4)):  # NaN fails as well
        raise ValueError(
            f"probabilities must be finite rows in [0, 1] that sum to 1, got values from {low:.4g} to {high:.4g} and "
            f"sums off by up to {off:.2g}: pass logits.softmax(1)"
        )
    return p.clamp(0, 1), check_target(target, p, p.shape[1])


def check_logits_and_target(logits: Tensor, target: Tensor, of: str = "") -> tuple[Tensor, Tensor]:
    """Logits (n, C) in float64 and labels (n,); `of` ends the names of both arguments."""
    z = exact(check_logits(logits, name=f"logits{of}"))
    return z, check_target(target, z, z.shape[1], name=f"target{of}")


def top_class(p: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence and correctness (0 or 1) of each prediction."""
    confidence, predicted = p.max(1)
    return confidence, (predicted == target).double()


def binned(confidence: Tensor, correct: Tensor, bins: int, dtype: torch.dtype = torch.float64) -> ReliabilityBins:
    """`reliability_bins` of checked input, which came in this dtype."""
    edges = torch.arange(bins + 1, dtype=torch.float64, device="cpu") / bins  # m/M as it rounds; linspace may be off
    ends = edges[1:-1].to(dtype).double()  # 0.6 of float32, 3 of 5 votes, lies above that of float64
    index = torch.bucketize(confidence, ends)  # a confidence on an edge belongs below it
    count = torch.bincount(index, minlength=bins)
    total = confidence.new_zeros(2, bins).index_add(1, index, torch.stack([confidence, correct]))
    mean = total / count  # 0/0 of an empty bin is NaN
    return ReliabilityBins(edges, count, mean[0], mean[1])


def gap_of(found: ReliabilityBins) -> float:
    """Mean of |accuracy − confidence| over the bins, weighted by their counts."""
    weight = found.count.double() / found.count.sum()
    return float((weight * (found.accuracy - found.confidence).abs()).nansum())


def adaptive_gap(confidence: Tensor, correct: Tensor, bins: int) -> float:
    """`adaptive_calibration_error` of checked input."""
    group, size = ties(confidence)
    shared = correct.new_zeros(len(size)).index_add(0, group, correct) / size
    order = confidence.argsort()
    gap = (shared[group] - confidence)[order]
    return float(sum(part.sum().abs() for part in gap.tensor_split(bins)) / len(gap))


def classwise_gap(p: Tensor, target: Tensor, bins: int, dtype: torch.dtype = torch.float64) -> float:
    """`classwise_calibration_error` of checked input."""
    gaps = (gap_of(binned(p[:, c].contiguous(), (target == c).double(), bins, dtype)) for c in range(p.shape[1]))
    return sum(gaps) / p.shape[1]


def brier(p: Tensor, target: Tensor) -> float:
    """`brier_score` of checked input."""
    errors = p.scatter_add(1, target[:, None], p.new_full((len(p), 1), -1.0))
    return float(errors.square_().sum(1).mean())


def ties(values: Tensor) -> tuple[Tensor, Tensor]:
    """Group of equal values that each sample belongs to, in ascending order, and the groups' sizes."""
    _, group, size = values.unique(return_inverse=True, return_counts=True)
    return group, size
