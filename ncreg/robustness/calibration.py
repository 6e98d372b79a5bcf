"""Does the confidence mean what it says, and is it of use for abstaining? Everything in float64, as plain floats.

The measures take probabilities (softmax of the logits), temperature scaling and the report take logits; each refuses
the other where it can be told apart.
"""

import warnings
from dataclasses import dataclass
from math import exp, log

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ncreg.robustness._inputs import check_count, check_logits, check_target

# How far from the logits' own size 1/T may go: softmax of logits with root mean square 1e3 is one-hot or a tie.
SHARPEST = 1e3


@dataclass(frozen=True)
class ReliabilityBins:
    """What a reliability diagram shows, a bin an entry; means of empty bins are NaN.

    Attributes:
        edges: the bins' ends (bins + 1,); bin m holds confidences in (edges[m], edges[m + 1]].
        count: samples in a bin.
        confidence: mean confidence of the bin's samples, in [0, 1].
        accuracy: share of the bin's samples that are right, in [0, 1].
    """

    edges: Float[Tensor, " ends"]
    count: Int[Tensor, " bins"]
    confidence: Float[Tensor, " bins"]
    accuracy: Float[Tensor, " bins"]


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


@dataclass(frozen=True)
class CalibrationScores:
    """Calibration of one set of probabilities.

    Attributes:
        ece: expected calibration error, in [0, 1].
        adaptive_ece: the same with equally filled bins.
        classwise_ece: the same over all classes' probabilities.
        brier: Brier score, in [0, 2].
        nll: negative log-likelihood, in nats.
        reliability: the bins behind `ece`.
    """

    ece: float
    adaptive_ece: float
    classwise_ece: float
    brier: float
    nll: float
    reliability: ReliabilityBins


@dataclass(frozen=True)
class CalibrationReport:
    """Calibration of a test set before and after temperature scaling.

    Attributes:
        samples: size of the test set.
        accuracy: share of test samples that are right; no temperature changes it.
        before: scores of softmax(z).
        after: scores of softmax(z/T).
        temperature: T, fitted on the validation set.
        temperature_at_bound: "lower" or "upper" where the validation set has no best temperature (all of it is right,
            or the logits are worse than none) and T is the bound, so that `after` says little; "flat" where all its
            logits are equal and T = 1; None else.
        risk_coverage: ranking by the largest probability before scaling.
    """

    samples: int
    accuracy: float
    before: CalibrationScores
    after: CalibrationScores
    temperature: float
    temperature_at_bound: str | None
    risk_coverage: RiskCoverage


def reliability_bins(
    probabilities: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"], *, bins: int = 15
) -> ReliabilityBins:
    """Confidence max_c p_c and accuracy in equal-width bins ((m−1)/M, m/M].

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (arXiv 1706.04599). Ties of the largest
    probability go to the first class, as in argmax.

    Args:
        probabilities: softmax of the logits, rows that sum to 1.
        target: class indices.
        bins: M.

    Raises:
        ValueError: rows that are no probabilities, C = 1, no samples, NaN, classes out of range, bins < 1.
        TypeError: no tensors, or of another kind.

    Example:
        >>> reliability_bins(torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.tensor([0, 0]), bins=2).accuracy
        tensor([   nan, 0.5000], dtype=torch.float64)
    """
    bins = check_count("bins", bins)
    confidence, correct = _top(*_checked(probabilities, target))
    return _bin(confidence, correct, bins)


def expected_calibration_error(
    probabilities: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"], *, bins: int = 15
) -> float:
    """ECE = Σ_m (n_m/n)·|accuracy_m − confidence_m| over equal-width bins, in [0, 1].

    Source: Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI 2015; Guo et al. 2017
    (arXiv 1706.04599). It is biased upwards by about √(bins/n) and depends on the bins: compare at the same of both.

    Args:
        probabilities: softmax of the logits, rows that sum to 1.
        target: class indices.
        bins: number of bins.

    Raises:
        ValueError: rows that are no probabilities, C = 1, no samples, NaN, classes out of range, bins < 1.
        TypeError: no tensors, or of another kind.

    Example:
        >>> round(expected_calibration_error(torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.tensor([0, 0])), 4)
        0.4
    """
    bins = check_count("bins", bins)
    confidence, correct = _top(*_checked(probabilities, target))
    return _gap(_bin(confidence, correct, bins))


def adaptive_calibration_error(
    probabilities: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"], *, bins: int = 15
) -> float:
    """ECE over bins that hold n/M samples each, in order of confidence.

    Source: Nguyen & O'Connor, "Posterior calibration and exploratory analysis for natural language processing models",
    EMNLP 2015 (arXiv 1508.05154). Samples of equal confidence share their mean accuracy, so that their order plays no
    part where a bin's end falls among them. Of n < M samples each is a bin of its own.

    Args:
        probabilities: softmax of the logits, rows that sum to 1.
        target: class indices.
        bins: number of bins.

    Raises:
        ValueError: rows that are no probabilities, C = 1, no samples, NaN, classes out of range, bins < 1.
        TypeError: no tensors, or of another kind.

    Example:
        >>> round(adaptive_calibration_error(torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.tensor([0, 0]), bins=2), 4)
        0.4
    """
    bins = check_count("bins", bins)
    return _adaptive(*_top(*_checked(probabilities, target)), bins)


def classwise_calibration_error(
    probabilities: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"], *, bins: int = 15
) -> float:
    """Mean over classes c of the ECE of p_c as a forecast of [y = c].

    Source: Kull et al., "Beyond temperature scaling", NeurIPS 2019 (arXiv 1910.12656); bins of equal width.

    Args:
        probabilities: softmax of the logits, rows that sum to 1.
        target: class indices.
        bins: number of bins.

    Raises:
        ValueError: rows that are no probabilities, C = 1, no samples, NaN, classes out of range, bins < 1.
        TypeError: no tensors, or of another kind.

    Example:
        >>> round(classwise_calibration_error(torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.tensor([0, 0])), 4)
        0.4
    """
    bins = check_count("bins", bins)
    return _classwise(*_checked(probabilities, target), bins)


def brier_score(probabilities: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"]) -> float:
    """Mean over samples of Σ_c (p_c − [y = c])², in [0, 2] (Brier, Monthly Weather Review 1950).

    Args:
        probabilities: softmax of the logits, rows that sum to 1.
        target: class indices.

    Raises:
        ValueError: rows that are no probabilities, C = 1, no samples, NaN, classes out of range.
        TypeError: no tensors, or of another kind.

    Example:
        >>> brier_score(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
        0.5
    """
    return _brier(*_checked(probabilities, target))


def negative_log_likelihood(probabilities: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"]) -> float:
    """Mean over samples of −log p_y, in nats; infinite where a p_y has become 0.

    Args:
        probabilities: softmax of the logits, rows that sum to 1.
        target: class indices.

    Raises:
        ValueError: rows that are no probabilities, C = 1, no samples, NaN, classes out of range.
        TypeError: no tensors, or of another kind.

    Example:
        >>> round(negative_log_likelihood(torch.tensor([[0.5, 0.5]]), torch.tensor([0])), 4)
        0.6931
    """
    p, target = _checked(probabilities, target)
    return float(-p.gather(1, target[:, None]).log().mean())


def risk_coverage(
    probabilities: Float[Tensor, "batch classes"],
    target: Int[Tensor, " batch"],
    *,
    confidence: Float[Tensor, " batch"] | None = None,
) -> RiskCoverage:
    """Error rate against the share of samples that the model answers, the most confident first, and its area.

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
    p, target = _checked(probabilities, target)
    score, correct = _top(p, target)
    if confidence is not None:
        if not isinstance(confidence, Tensor) or confidence.shape != target.shape:
            got = tuple(confidence.shape) if isinstance(confidence, Tensor) else type(confidence).__name__
            raise ValueError(f"confidence must be a tensor of shape ({len(target)},), got {got}")
        if not bool(confidence.isfinite().all()):
            raise ValueError("confidence holds NaN or infinite values, which have no rank")
        score = confidence.detach().double()
    return _risk(score, correct)


def temperature_scaling(logits: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"]) -> float:
    """The T that minimises the mean of −log softmax(z/T)_y, in units of the logits; fit it on validation data.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (arXiv 1706.04599). The likelihood is
    convex in 1/T, so the minimum is unique; safeguarded Newton steps in log T find it in float64. T is sought within
    a factor `SHARPEST` = 1000 of the logits' own size (the root mean square about each row's mean), so that
    temperature_scaling(k·z) = k·temperature_scaling(z).

    Args:
        logits: z, before softmax.
        target: class indices.

    Returns:
        T > 0. Where there is no minimum (all samples right: T → 0; logits worse than none: T → ∞) the bound comes back,
        with a UserWarning; where all logits of every row are equal, 1.

    Raises:
        ValueError: probabilities, C = 1, no samples, NaN, classes out of range.
        TypeError: no tensors, or of another kind.

    Example:
        >>> z = torch.tensor([[2.0, 0.0]] * 4)
        >>> round(temperature_scaling(z, torch.tensor([0, 0, 0, 1])), 4)    # 2 / log 3
        1.8205
    """
    temperature, at_bound = _fit_temperature(*_checked_logits(logits, target))
    if at_bound is not None:
        why = {
            "lower": "every sample is right or nearly, so that the likelihood only grows as T falls",
            "upper": "the logits tell the classes apart no better than chance",
            "flat": "all logits are equal",
        }[at_bound]
        warnings.warn(f"the data do not determine a temperature ({why}): T={temperature:.4g}", stacklevel=2)
    return temperature


def evaluate_calibration(
    logits_test: Float[Tensor, "test classes"],
    target_test: Int[Tensor, " test"],
    logits_val: Float[Tensor, "val classes"],
    target_val: Int[Tensor, " val"],
    *,
    bins: int = 15,
) -> CalibrationReport:
    """Calibration and selective prediction on test data, before and after a temperature fitted on validation data.

    Args:
        logits_test: z of the test set, before softmax.
        target_test: its class indices.
        logits_val: z of the validation set: data neither trained nor tested on.
        target_val: its class indices.
        bins: number of bins of all three calibration errors.

    Raises:
        ValueError: probabilities, C = 1, no samples, NaN, classes out of range, numbers of classes that differ.
        TypeError: no tensors, or of another kind.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> z = torch.randn(4000, 5, generator=g)
        >>> y = torch.multinomial(z.softmax(1), 1, generator=g).squeeze(1)    # z is calibrated, 3z is not
        >>> report = evaluate_calibration(3 * z[:2000], y[:2000], 3 * z[2000:], y[2000:])
        >>> 2.8 < report.temperature < 3.2, report.before.ece > 0.2, report.after.ece < 0.04
        (True, True, True)
    """
    bins = check_count("bins", bins)
    test, target_test = _checked_logits(logits_test, target_test)
    val, target_val = _checked_logits(logits_val, target_val)
    if test.shape[1] != val.shape[1]:
        raise ValueError(
            f"logits_test have {test.shape[1]} classes and logits_val {val.shape[1]}: pass the same model's"
        )
    temperature, at_bound = _fit_temperature(val, target_val)
    confidence, correct = _top(test.softmax(1), target_test)
    return CalibrationReport(
        samples=len(test),
        accuracy=float(correct.mean()),
        before=_scores(test, target_test, bins),
        after=_scores(test / temperature, target_test, bins),
        temperature=temperature,
        temperature_at_bound=at_bound,
        risk_coverage=_risk(confidence, correct),
    )


def _checked(probabilities: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (n, C) in float64 and labels (n,)."""
    if not isinstance(probabilities, Tensor):
        raise TypeError(f"probabilities must be a tensor, got {type(probabilities).__name__}")
    if not probabilities.is_floating_point():
        raise TypeError(f"probabilities must be floating-point, got {probabilities.dtype}")
    if probabilities.ndim != 2:
        raise ValueError(f"probabilities must be (batch, classes), got shape {tuple(probabilities.shape)}")
    if len(probabilities) == 0:
        raise ValueError(f"probabilities is empty, shape {tuple(probabilities.shape)}")
    if probabilities.shape[1] < 2:
        raise ValueError(f"probabilities have {probabilities.shape[1]} column: of one class p make two, (1 − p, p)")
    half = probabilities.dtype in (torch.float16, torch.bfloat16)
    p = probabilities.detach().double()
    low, high = (float(v) for v in torch.aminmax(p))
    off = float((p.sum(1) - 1).abs().max())
    if not (low >= 0 and high <= 1 and off <= (2e-2 if half else 1e-4)):  # NaN fails as well
        raise ValueError(
            f"probabilities must be finite rows in [0, 1] that sum to 1, got values from {low:.4g} to {high:.4g} and "
            f"sums off by up to {off:.2g}: pass logits.softmax(1)"
        )
    return p, check_target(target, p, p.shape[1])


def _checked_logits(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n, C) in float64 and labels (n,)."""
    if isinstance(logits, Tensor) and logits.numel() == 0:
        raise ValueError(f"logits is empty, shape {tuple(logits.shape)}")
    z = check_logits(logits).detach().double()
    return z, check_target(target, z, z.shape[1])


def _top(p: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence and correctness (0 or 1) of each prediction."""
    confidence, predicted = p.max(1)
    return confidence, (predicted == target).double()


def _bin(confidence: Tensor, correct: Tensor, bins: int) -> ReliabilityBins:
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)
    index = torch.bucketize(confidence, edges[1:-1])  # a confidence on an edge belongs below it
    count = torch.bincount(index, minlength=bins)
    total = confidence.new_zeros(2, bins).index_add(1, index, torch.stack([confidence, correct]))
    mean = total / count  # 0/0 of an empty bin is NaN
    return ReliabilityBins(edges, count, mean[0], mean[1])


def _gap(found: ReliabilityBins) -> float:
    share = found.count / found.count.sum()
    return float((share * (found.accuracy - found.confidence).abs()).nansum())


def _ties(values: Tensor) -> tuple[Tensor, Tensor]:
    """Group of equal values that each sample belongs to, in ascending order, and the groups' sizes."""
    _, group, size = values.unique(return_inverse=True, return_counts=True)
    return group, size


def _adaptive(confidence: Tensor, correct: Tensor, bins: int) -> float:
    group, size = _ties(confidence)
    shared = correct.new_zeros(len(size)).index_add(0, group, correct) / size
    order = confidence.argsort()
    gap = (shared[group] - confidence)[order]
    return float(sum(part.sum().abs() for part in gap.tensor_split(bins)) / len(gap))


def _classwise(p: Tensor, target: Tensor, bins: int) -> float:
    hits = torch.nn.functional.one_hot(target, p.shape[1]).double()
    return sum(_gap(_bin(p[:, c].contiguous(), hits[:, c], bins)) for c in range(p.shape[1])) / p.shape[1]


def _brier(p: Tensor, target: Tensor) -> float:
    return float((p - torch.nn.functional.one_hot(target, p.shape[1])).square().sum(1).mean())


def _risk(score: Tensor, correct: Tensor) -> RiskCoverage:
    n = len(score)
    group, size = _ties(-score)
    errors = correct.new_zeros(len(size)).index_add(0, group, 1 - correct)
    # Expected errors among the first k: those of the groups before, and the share of the own group that is in.
    expected = (errors / size).repeat_interleave(size).cumsum(0)
    kept = torch.arange(1, n + 1, dtype=torch.float64, device=score.device)
    risk = (expected / kept).clamp_max(1)
    best = (kept - correct.sum()).clamp_min(0) / kept
    area = float(risk.mean())
    return RiskCoverage(kept / n, risk, area, max(0.0, area - float(best.mean())))


def _scores(z: Tensor, target: Tensor, bins: int) -> CalibrationScores:
    logs = z.log_softmax(1)
    p = logs.exp()
    confidence, correct = _top(p, target)
    reliability = _bin(confidence, correct, bins)
    return CalibrationScores(
        ece=_gap(reliability),
        adaptive_ece=_adaptive(confidence, correct, bins),
        classwise_ece=_classwise(p, target, bins),
        brier=_brier(p, target),
        nll=float(-logs.gather(1, target[:, None]).mean()),
        reliability=reliability,
    )


def _fit_temperature(z: Tensor, target: Tensor) -> tuple[float, str | None]:
    """The best T and, where there is none, the bound it ran into."""
    z = z - z.mean(1, keepdim=True)
    largest = float(z.abs().max())
    if largest == 0:
        return 1.0, "flat"
    z = z / largest  # squares of huge logits overflow
    size = float(z.square().mean().sqrt())
    z, unit = z / size, size * largest
    own = z.gather(1, target[:, None]).mean()

    def slope(u: float) -> tuple[float, float]:
        """First and second derivative of the mean loss in u = log(1/T)."""
        p = (exp(u) * z).softmax(1)
        mean = (p * z).sum(1, keepdim=True)
        first = exp(u) * float(mean.mean() - own)
        return first, first + exp(2 * u) * float((p * (z - mean).square()).sum(1).mean())

    low, high = -log(SHARPEST), log(SHARPEST)
    if slope(low)[0] >= 0:
        return unit * SHARPEST, "upper"
    if slope(high)[0] <= 0:
        return unit / SHARPEST, "lower"
    u = 0.0
    for _ in range(200):
        first, second = slope(u)
        low, high = (u, high) if first < 0 else (low, u)
        step = u - first / second if second > 0 else low
        new = step if low < step < high else (low + high) / 2
        if abs(new - u) < 1e-13 or first == 0:
            break
        u = new
    return unit * exp(-u), None
