"""Measures of neural collapse as torchmetrics: exact, mergeable, right near collapse.

NeuralCollapse measures last-layer features and the classifier, NearestClassCenter what the class means decide on
other features, LayerwiseCollapse the layers inside. docs/metrics.md says what each number means.
"""

from ncreg.metrics._layerwise import LayerwiseCollapse
from ncreg.metrics._nearest_center import NearestClassCenter
from ncreg.metrics._neural_collapse import NeuralCollapse

__all__ = ["LayerwiseCollapse", "NearestClassCenter", "NeuralCollapse"]
