"""Generalization and robustness of any `model(images in [0, 1]) -> logits`: functions that return typed results."""

from ncreg.robustness._inputs import Model, binomial_interval, predict

__all__ = [
    "Model",
    "binomial_interval",
    "predict",
]
