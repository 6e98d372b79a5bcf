"""Losses and measures as pure functions of tensors; each loss stands beside its module in `ncreg.losses`.

features (batch, dim), logits (batch, classes), target (batch,) class indices, weight (classes, dim) class vectors.
`dot_regression_loss`, `ntce_loss`, `mse_one_hot_loss`, `spectral_decoupling_loss`, `logit_adjusted_cross_entropy` and
`expected_cost_loss` also take soft labels (batch, classes); `koleo_loss` takes no labels; the others compare members of
classes and refuse them.
"""

from ncreg.losses.chunked import chunked_argmax, chunked_cross_entropy
from ncreg.losses.contrastive import nonl_loss, ntce_loss, supcon_loss
from ncreg.losses.cosine import (
    inter_class_cosine,
    inter_class_cosine_loss,
    intra_class_cosine,
    intra_class_cosine_loss,
)
from ncreg.losses.costs import expected_cost_loss
from ncreg.losses.imbalance import class_weights, logit_adjusted_cross_entropy
from ncreg.losses.logits import mse_one_hot_loss, smooth_labels, spectral_decoupling_loss
from ncreg.losses.memory import update_class_means
from ncreg.losses.prototypes import center_loss, dot_regression_loss, update_centers
from ncreg.losses.sampled import sampled_cross_entropy
from ncreg.losses.sharded import sharded_argmax, sharded_cross_entropy
from ncreg.losses.spread import koleo_loss

__all__ = [
    "center_loss",
    "chunked_argmax",
    "chunked_cross_entropy",
    "class_weights",
    "dot_regression_loss",
    "expected_cost_loss",
    "inter_class_cosine",
    "inter_class_cosine_loss",
    "intra_class_cosine",
    "intra_class_cosine_loss",
    "koleo_loss",
    "logit_adjusted_cross_entropy",
    "mse_one_hot_loss",
    "nonl_loss",
    "ntce_loss",
    "sampled_cross_entropy",
    "sharded_argmax",
    "sharded_cross_entropy",
    "smooth_labels",
    "spectral_decoupling_loss",
    "supcon_loss",
    "update_centers",
    "update_class_means",
]
