"""Which backbone for my images: scores of frozen features, or of an untrained network, before anything is trained.

Features come from one forward pass in eval mode over the labelled images of the task. All is computed in float64 on the
CPU. Higher is better in each. Beside them stand `ncreg.robustness.linear_probe`, and `cdnv` and `nc1` of
`ncreg.metrics.NeuralCollapse`, where lower is better.
"""

from ncreg.transferability.logme import logme
from ncreg.transferability.naswot import naswot
from ncreg.transferability.ncti import NCTIScore, ncti
from ncreg.transferability.nearest_center import leave_one_out_accuracy

__all__ = ["NCTIScore", "leave_one_out_accuracy", "logme", "naswot", "ncti"]
