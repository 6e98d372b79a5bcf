"""Closed forms: what each loss, head and weight decay can reach at best, and a certificate of collapse.

Plain numbers in, plain numbers out. Losses are in nats, logits and lengths in the units of the features. Decays
are coefficients of half squared norms, coupled: (λ/2)‖·‖². Every form is verified by optimising the problem.
"""

from ncreg.theory.certificate import CollapseCertificate, collapse_certificate
from ncreg.theory.contrastive import (
    SpectralDecouplingOptimum,
    binary_spectral_decoupling_optimum,
    nonl_optimum,
    ntce_optimum,
    spectral_decoupling_optimum,
    supcon_optimum,
    supcon_relu_optimum,
)
from ncreg.theory.cross_entropy import (
    CrossEntropyOptimum,
    cross_entropy_optimum,
    last_batch_norm_optimum,
    layer_peeled_optimum,
)
from ncreg.theory.deep import DeepCrossEntropyOptimum, deep_cross_entropy_optimum
from ncreg.theory.imbalance import imbalanced_mse_logits, minority_collapse_threshold
from ncreg.theory.scale import minimal_cross_entropy, scale_for_loss
from ncreg.theory.seli import SELIGeometry, seli_geometry
from ncreg.theory.squared_error import (
    DotRegressionOptimum,
    SquaredErrorOptimum,
    deep_linear_optimum,
    dot_regression_optimum,
    mse_optimum,
    relu_mse_optimum,
)

__all__ = [
    "CollapseCertificate",
    "CrossEntropyOptimum",
    "DeepCrossEntropyOptimum",
    "DotRegressionOptimum",
    "SELIGeometry",
    "SpectralDecouplingOptimum",
    "SquaredErrorOptimum",
    "binary_spectral_decoupling_optimum",
    "collapse_certificate",
    "cross_entropy_optimum",
    "deep_cross_entropy_optimum",
    "deep_linear_optimum",
    "dot_regression_optimum",
    "imbalanced_mse_logits",
    "last_batch_norm_optimum",
    "layer_peeled_optimum",
    "minimal_cross_entropy",
    "minority_collapse_threshold",
    "mse_optimum",
    "nonl_optimum",
    "ntce_optimum",
    "relu_mse_optimum",
    "scale_for_loss",
    "seli_geometry",
    "spectral_decoupling_optimum",
    "supcon_optimum",
    "supcon_relu_optimum",
]
