"""Losses and measures as pure functions of tensors; `ncreg.losses` wraps each loss in a module."""

from ncreg.functional.cosine import (
    inter_class_cosine,
    inter_class_cosine_loss,
    intra_class_cosine,
    intra_class_cosine_loss,
)
from ncreg.functional.prototypes import dot_regression_loss

__all__ = [
    "dot_regression_loss",
    "inter_class_cosine",
    "inter_class_cosine_loss",
    "intra_class_cosine",
    "intra_class_cosine_loss",
]
