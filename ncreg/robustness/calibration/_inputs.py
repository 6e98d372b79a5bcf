"""What the measures take: probabilities, or logits; each refuses the other where it can be told apart."""

import torch
from torch import Tensor

from ncreg.robustness._inputs import check_logits, check_target


def checked(probabilities: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (n, C) in float64 and labels (n,)."""
    if not isinstance(probabilities, Tensor):
        raise TypeError(f"probabilities must be a tensor, got {type(probabilities).__name__}")
    if not probabilities.is_floating_point():
        raise TypeError(f"probabilities must be floating-point, got {probabilities.dtype}")
    if probabilities.ndim != 2:
        raise ValueError(f"probabilities must be (batch, classes), got shape {tuple(probabilities.shape)}")
    if len(probabilities) == 0:
        raise ValueError(f"probabilities is empty, shape {tuple(probabilities.shape)}")
    if probabilities.shape[1] < 2:
        raise ValueError(f"probabilities have {probabilities.shape[1]} column: of one class p make two, (1 − p, p)")
    half = probabilities.dtype in (torch.float16, torch.bfloat16)
    p = probabilities.detach().to("cpu", torch.float64)
    low, high = (float(v) for v in torch.aminmax(p))
    off = float((p.sum(1) - 1).abs().max())
    if not (low >= 0 and high <= 1 and off <= (2e-2 if half else 1e-4)):  # NaN fails as well
        raise ValueError(
            f"probabilities must be finite rows in [0, 1] that sum to 1, got values from {low:.4g} to {high:.4g} and "
            f"sums off by up to {off:.2g}: pass logits.softmax(1)"
        )
    return p, check_target(target, p, p.shape[1])


def checked_logits(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n, C) in float64 and labels (n,)."""
    if isinstance(logits, Tensor) and logits.numel() == 0:
        raise ValueError(f"logits is empty, shape {tuple(logits.shape)}")
    z = check_logits(logits).detach().to("cpu", torch.float64)
    return z, check_target(target, z, z.shape[1])


def top(p: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence and correctness (0 or 1) of each prediction."""
    confidence, predicted = p.max(1)
    return confidence, (predicted == target).double()
