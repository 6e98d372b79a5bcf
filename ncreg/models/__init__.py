"""Any timm or torchvision classifier with the head that neural collapse asks for."""

from ncreg.models._classifier import Classifier, ClassifierOutput, EncoderOutput, FeaturesOutput, Normalize
from ncreg.models._fold import fold
from ncreg.models._projector import FixedProjector
from ncreg.models._swap import swap_head
from ncreg.models._weights import MatchedWeights, load_matched, match_weights

__all__ = [
    "Classifier",
    "ClassifierOutput",
    "EncoderOutput",
    "FeaturesOutput",
    "FixedProjector",
    "MatchedWeights",
    "Normalize",
    "fold",
    "load_matched",
    "match_weights",
    "swap_head",
]
