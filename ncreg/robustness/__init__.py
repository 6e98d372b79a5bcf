"""Generalization and robustness of any `model(images in [0, 1]) -> logits`: functions that return typed results."""

from ncreg.robustness._inputs import Model, binomial_interval, predict
from ncreg.robustness.calibration import (
    CalibrationReport,
    CalibrationScores,
    ReliabilityBins,
    RiskCoverage,
    adaptive_calibration_error,
    brier_score,
    classwise_calibration_error,
    evaluate_calibration,
    expected_calibration_error,
    negative_log_likelihood,
    reliability_bins,
    risk_coverage,
    temperature_scaling,
)

__all__ = [
    "CalibrationReport",
    "CalibrationScores",
    "Model",
    "ReliabilityBins",
    "RiskCoverage",
    "adaptive_calibration_error",
    "binomial_interval",
    "brier_score",
    "classwise_calibration_error",
    "evaluate_calibration",
    "expected_calibration_error",
    "negative_log_likelihood",
    "predict",
    "reliability_bins",
    "risk_coverage",
    "temperature_scaling",
]
