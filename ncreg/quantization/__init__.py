"""Few bits a weight: what rounding does to a trained model and to a frame, and a head of −1, 0 and 1.

The weights come back as ordinary floating-point tensors that take few values: what a change of bits does to accuracy,
calibration and collapse is measured with the same tools as before. Nothing here runs faster.
"""

from ncreg.quantization.rounding import RoundedFrame, round_frame, round_weight, round_weights, rounded_names
from ncreg.quantization.ternary import TernaryHead, ternary_head

__all__ = [
    "RoundedFrame",
    "TernaryHead",
    "round_frame",
    "round_weight",
    "round_weights",
    "rounded_names",
    "ternary_head",
]
