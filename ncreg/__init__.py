"""Neural collapse on purpose: heads, norms, losses, measures and a terminal-phase scheduler."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ncreg import frames, functional, losses, theory
from ncreg.averaging import update_bn
from ncreg.frames import (
    etf_distance,
    hypercube,
    max_cosine,
    nearest_simplex_etf,
    one_vs_rest_distance,
    orthoplex,
    simplex_etf,
    softmax_code,
    tammes,
)
from ncreg.heads import CosineHead, ETFHead, FixedHead, LinearHead, NearestETFHead
from ncreg.losses import (
    CenterLoss,
    ClassMeanMemory,
    DotRegressionLoss,
    ExpectedCostLoss,
    InterClassCosineLoss,
    IntraClassCosineLoss,
    KoLeoLoss,
    LogitAdjustedLoss,
    NONLLoss,
    NTCELoss,
    OneHotMSELoss,
    SpectralDecouplingLoss,
    SupConLoss,
)
from ncreg.norms import LastBatchNorm, last_norm
from ncreg.theory import collapse_certificate
from ncreg.tpt import TPTScheduler

if TYPE_CHECKING:
    from ncreg import metrics, robustness, transferability
    from ncreg.checkpoint import load_checkpoint, load_classifier, save_checkpoint
    from ncreg.metrics import LayerwiseCollapse, NearestClassCenter, NeuralCollapse
    from ncreg.models import Classifier, ClassifierOutput, Normalize, fold, swap_head
    from ncreg.optim import param_groups
    from ncreg.pretrained import load_weights

__version__ = "0.2.0"

__all__ = [
    "CenterLoss",
    "ClassMeanMemory",
    "Classifier",
    "ClassifierOutput",
    "CosineHead",
    "DotRegressionLoss",
    "ETFHead",
    "ExpectedCostLoss",
    "FixedHead",
    "InterClassCosineLoss",
    "IntraClassCosineLoss",
    "KoLeoLoss",
    "LastBatchNorm",
    "LayerwiseCollapse",
    "LinearHead",
    "LogitAdjustedLoss",
    "NONLLoss",
    "NTCELoss",
    "NearestClassCenter",
    "NearestETFHead",
    "NeuralCollapse",
    "Normalize",
    "OneHotMSELoss",
    "SpectralDecouplingLoss",
    "SupConLoss",
    "TPTScheduler",
    "collapse_certificate",
    "etf_distance",
    "fold",
    "frames",
    "functional",
    "hypercube",
    "last_norm",
    "load_checkpoint",
    "load_classifier",
    "load_weights",
    "losses",
    "max_cosine",
    "metrics",
    "nearest_simplex_etf",
    "one_vs_rest_distance",
    "orthoplex",
    "param_groups",
    "robustness",
    "save_checkpoint",
    "simplex_etf",
    "softmax_code",
    "swap_head",
    "tammes",
    "theory",
    "transferability",
    "update_bn",
]


_MODULES = ("checkpoint", "metrics", "models", "optim", "pretrained", "robustness", "transferability")
_HOME = {
    "checkpoint": ("load_checkpoint", "load_classifier", "save_checkpoint"),
    "metrics": ("LayerwiseCollapse", "NearestClassCenter", "NeuralCollapse"),
    "models": ("Classifier", "ClassifierOutput", "Normalize", "fold", "swap_head"),
    "optim": ("param_groups",),
    "pretrained": ("load_weights",),
}


def __getattr__(name: str) -> Any:
    """What needs timm or torchmetrics, seconds to import, comes with its first use: many programs need one of them."""
    if name in _MODULES:
        return import_module(f"ncreg.{name}")
    for home, names in _HOME.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"ncreg.{home}"), name)
            return value
    raise AttributeError(f"module 'ncreg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
