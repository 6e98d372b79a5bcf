"""The value of frozen features for another task: linear probe, nearest neighbours, few labelled samples a class."""

from ncreg.robustness.transfer.evaluate import FewShotResult, ProbeResult, few_shot, knn_probe, linear_probe
from ncreg.robustness.transfer.linear_probe import LinearProbe, fit_linear_probe

__all__ = [
    "FewShotResult",
    "LinearProbe",
    "ProbeResult",
    "few_shot",
    "fit_linear_probe",
    "knn_probe",
    "linear_probe",
]
