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
from ncreg.robustness.detection import (
    Detection,
    evaluate_detection,
)
from ncreg.robustness.ood import (
    OODReport,
    evaluate_ood,
    noise_images,
)
from ncreg.robustness.ood_scores import (
    energy_score,
    knn_score,
    mahalanobis_score,
    max_logit_score,
    msp_score,
    neco_score,
    ood_orthogonality,
    vim_score,
)

__all__ = [
    "CalibrationReport",
    "CalibrationScores",
    "Detection",
    "Model",
    "OODReport",
    "ReliabilityBins",
    "RiskCoverage",
    "adaptive_calibration_error",
    "binomial_interval",
    "brier_score",
    "classwise_calibration_error",
    "energy_score",
    "evaluate_calibration",
    "evaluate_detection",
    "evaluate_ood",
    "expected_calibration_error",
    "knn_score",
    "mahalanobis_score",
    "max_logit_score",
    "msp_score",
    "neco_score",
    "negative_log_likelihood",
    "noise_images",
    "ood_orthogonality",
    "predict",
    "reliability_bins",
    "risk_coverage",
    "temperature_scaling",
    "vim_score",
]
