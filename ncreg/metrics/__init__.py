"""Measures of neural collapse as torchmetrics: exact, mergeable, right near collapse.

NeuralCollapse measures last-layer features and the classifier, NearestClassCenter what the class means decide on
other features, LayerwiseCollapse the layers inside. docs/metrics.md says what each number means.
"""

from ncreg.metrics._center import NearestClassCenter
from ncreg.metrics._collapse import NeuralCollapse
from ncreg.metrics._layers import LayerwiseCollapse

__all__ = ["LayerwiseCollapse", "NearestClassCenter", "NeuralCollapse"]
