"""Measures of neural collapse as torchmetrics: exact, mergeable, right near collapse."""

from ._center import NearestClassCenter
from ._collapse import NeuralCollapse

__all__ = ["NearestClassCenter", "NeuralCollapse"]
