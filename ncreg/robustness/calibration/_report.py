"""Calibration of a model in one call, before and after temperature scaling."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from ncreg._checks import check_integer
from ncreg._readable import readable
from ncreg.robustness.calibration._measures import (
    ReliabilityBins,
    adaptive_gap,
    binned,
    brier,
    check_logits_and_target,
    classwise_gap,
    gap_of,
)
from ncreg.robustness.calibration._selective import RiskCoverage, risk_of
from ncreg.robustness.calibration._temperature import fit_temperature


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
        aurc: area under the risk-coverage curve of ranking by the largest probability, in [0, 1].
    """

    ece: float
    adaptive_ece: float
    classwise_ece: float
    brier: float
    nll: float
    reliability: ReliabilityBins
    aurc: float

    __str__ = readable


@dataclass(frozen=True)
class CalibrationReport:
    """Calibration of a test set before and after temperature scaling.

    Attributes:
        samples: size of the test set.
        accuracy: fraction of test samples that are classified rightly; no temperature changes it.
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

    __str__ = readable


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
        >>> import torch
        >>> g = torch.Generator().manual_seed(0)
        >>> z = torch.randn(4000, 5, generator=g)
        >>> y = torch.multinomial(z.softmax(1), 1, generator=g).squeeze(1)    # z is calibrated, 3z is not
        >>> report = evaluate_calibration(3 * z[:2000], y[:2000], 3 * z[2000:], y[2000:])
        >>> 2.8 < report.temperature < 3.2, report.before.ece > 0.2, report.after.ece < 0.04
        (True, True, True)
    """
    bins = check_integer("bins", bins, 1)
    test, target_test = check_logits_and_target(logits_test, target_test, "_test")
    val, target_val = check_logits_and_target(logits_val, target_val, "_val")
    if test.shape[1] != val.shape[1]:
        raise ValueError(f"logits_test have {test.shape[1]} classes and logits_val {val.shape[1]}: use one model")
    temperature, at_bound = fit_temperature(val, target_val)
    correct = (test.argmax(1) == target_test).double()  # by the logits: probabilities may round to ties
    return CalibrationReport(
        samples=len(test),
        accuracy=float(correct.mean()),
        before=_scores(test, target_test, correct, bins),
        after=_scores(test / temperature, target_test, correct, bins),
        temperature=temperature,
        temperature_at_bound=at_bound,
        risk_coverage=risk_of(test.log_softmax(1).exp().amax(1), correct),
    )


def _scores(z: Tensor, target: Tensor, correct: Tensor, bins: int) -> CalibrationScores:
    logs = z.log_softmax(1)
    p = logs.exp()
    confidence = p.amax(1)
    reliability = binned(confidence, correct, bins)
    return CalibrationScores(
        ece=gap_of(reliability),
        adaptive_ece=adaptive_gap(confidence, correct, bins),
        classwise_ece=classwise_gap(p, target, bins),
        brier=brier(p, target),
        nll=float(-logs.gather(1, target[:, None]).mean()),
        reliability=reliability,
        aurc=risk_of(confidence, correct).aurc,
    )
