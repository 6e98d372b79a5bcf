"""Parameter groups in which the theory of last-layer normalisation and weight decay holds."""

from typing import Any

from torch import nn

from ncreg.models import Classifier


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decayed and undecayed parameters: matrices, the head and the last norm's γ decay; biases and norms don't.

    Pan & Cao (arXiv 2309.04644) bound the collapse by ‖γ‖² + ‖W‖², so γ, though one-dimensional, must decay.
    Frozen parameters are left out.

    Args:
        model: a `Classifier` or any other module.
        weight_decay: of the decayed group, not negative.

    Raises:
        ValueError: if `weight_decay` is negative or not finite.
    """
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay must be a finite number ≥ 0, got {weight_decay}")
    theory = set()
    if isinstance(model, Classifier):
        theory = {model.get_parameter(f"norm.{n}") for n, _ in model.norm.named_parameters() if n != "bias"}
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim > 1 and not name.endswith("bias")
        (decay if parameter in theory or matrix else rest).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
