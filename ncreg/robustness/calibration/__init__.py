"""Calibration of confidences, and their use for abstaining. Everything is computed in float64, as plain floats.

The measures take probabilities (softmax of the logits); temperature scaling and the report take logits.
"""

from ncreg.robustness.calibration._measures import (
    ReliabilityBins,
    adaptive_calibration_error,
    brier_score,
    classwise_calibration_error,
    expected_calibration_error,
    negative_log_likelihood,
    reliability_bins,
)
from ncreg.robustness.calibration._report import CalibrationReport, CalibrationScores, evaluate_calibration
from ncreg.robustness.calibration._selective import RiskCoverage, risk_coverage
from ncreg.robustness.calibration._temperature import temperature_scaling

__all__ = [
    "CalibrationReport",
    "CalibrationScores",
    "ReliabilityBins",
    "RiskCoverage",
    "adaptive_calibration_error",
    "brier_score",
    "classwise_calibration_error",
    "evaluate_calibration",
    "expected_calibration_error",
    "negative_log_likelihood",
    "reliability_bins",
    "risk_coverage",
    "temperature_scaling",
]
