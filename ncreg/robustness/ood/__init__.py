"""Out-of-distribution detection: scores of images, and how well they separate in- from out-of-distribution images."""

from ncreg.robustness.ood.detection import Detection, evaluate_detection
from ncreg.robustness.ood.evaluate import OODReport, evaluate_ood, noise_images
from ncreg.robustness.ood.scores import (
    energy_score,
    knn_score,
    mahalanobis_score,
    max_logit_score,
    msp_score,
    nci_score,
    neco_score,
    vim_score,
)

__all__ = [
    "Detection",
    "OODReport",
    "energy_score",
    "evaluate_detection",
    "evaluate_ood",
    "knn_score",
    "mahalanobis_score",
    "max_logit_score",
    "msp_score",
    "nci_score",
    "neco_score",
    "noise_images",
    "vim_score",
]
