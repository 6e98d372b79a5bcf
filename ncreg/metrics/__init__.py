"""Measures of neural collapse: three torchmetrics, and functions of class vectors and features.

NeuralCollapse measures last-layer features and the classifier, NearestClassCenter what the class means decide on
other features, LayerwiseCollapse the layers inside; all are exact, mergeable and right near collapse. docs/metrics.md
says what each number means. minority_angles, minority_collapse and seli_distance look at rare classes,
ood_orthogonality (NC5) at out-of-distribution features; hessian_norms and batch_norm_condensation look at a network
before it is trained.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ncreg.metrics._direction import HIGHER_IS_BETTER
from ncreg.metrics.condensation import batch_norm_condensation
from ncreg.metrics.curvature import hessian_norms
from ncreg.metrics.minority import Angles, MinorityCollapse, minority_angles, minority_collapse
from ncreg.metrics.nc5 import ood_orthogonality
from ncreg.metrics.seli import GramDistance, seli_distance

if TYPE_CHECKING:
    from ncreg.metrics._layerwise import LayerwiseCollapse
    from ncreg.metrics._nearest_center import NearestClassCenter
    from ncreg.metrics._neural_collapse import NeuralCollapse

__all__ = [
    "HIGHER_IS_BETTER",
    "Angles",
    "GramDistance",
    "LayerwiseCollapse",
    "MinorityCollapse",
    "NearestClassCenter",
    "NeuralCollapse",
    "batch_norm_condensation",
    "hessian_norms",
    "minority_angles",
    "minority_collapse",
    "ood_orthogonality",
    "seli_distance",
]

_HOME = {
    "LayerwiseCollapse": "_layerwise",
    "NearestClassCenter": "_nearest_center",
    "NeuralCollapse": "_neural_collapse",
}


def __getattr__(name: str) -> Any:
    """The torchmetrics come with their first use: torchmetrics takes seconds to import, the functions do without."""
    if name not in _HOME:
        raise AttributeError(f"module 'ncreg.metrics' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"ncreg.metrics.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
