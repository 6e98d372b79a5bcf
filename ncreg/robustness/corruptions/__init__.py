"""Common corruptions of images, batched: the same bits for an image whatever its batch.

Source: Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
ICLR 2019 (arXiv 1903.12261); types and constants of their published code.
"""

from ncreg.robustness.corruptions._corrupt import CORRUPTION_GROUPS, CORRUPTIONS, corrupt
from ncreg.robustness.corruptions._report import CorruptionReport, corruption_accuracy, mean_corruption_error

__all__ = [
    "CORRUPTIONS",
    "CORRUPTION_GROUPS",
    "CorruptionReport",
    "corrupt",
    "corruption_accuracy",
    "mean_corruption_error",
]
