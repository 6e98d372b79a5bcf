"""Parameter groups in which the theory of last-layer normalisation and weight decay holds."""

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any, cast

from timm.models import group_parameters
from torch import nn

from ncreg._checks import check_non_negative, check_number
from ncreg.models import Classifier
from ncreg.norms import LastBatchNorm


def param_groups(model: nn.Module, weight_decay: float, *, layer_decay: float | None = None) -> list[dict[str, Any]]:
    """Matrices, the learned head and the last norm's γ decay; biases, other norms and timm's exempted names don't.

    Pan & Cao (arXiv 2309.04644) bound collapse by CE + (λ/2)(‖γ‖² + ‖W‖²): γ must decay although it is
    one-dimensional, which timm's and most other groupings exempt. The decay must be coupled (L2 in the gradient,
    as torch.optim.SGD does it): AdamW's decoupled one keeps NC0 and NC3 from closing. Every trainable parameter
    is in one group, frozen ones are left out.

    Args:
        model: a `Classifier`, or any module; a `LastBatchNorm` in it counts as a last norm.
        weight_decay: λ of the decayed groups.
        layer_decay: factor on the learning rate from one layer to the one before it, as `lr_scale` of each group
            (timm's schedulers and optimizer factory read it); needs timm's group_matcher. None for one rate.

    Returns:
        Groups for a torch optimizer, or for `timm.optim.create_optimizer_v2` in the model's place, whose own
        grouping would leave γ out.

    Raises:
        TypeError: if `model` is no module, or a decay no number.
        ValueError: if `weight_decay` is negative or not finite, `layer_decay` not in (0, 1], or layers unknown.

    Example:
        >>> import torch
        >>> from ncreg.models import swap_head
        >>> classifier = swap_head("test_resnet", "etf", num_classes=10)
        >>> optimizer = torch.optim.SGD(param_groups(classifier, 5e-4), lr=0.1, momentum=0.9)
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.0005, 0.0]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    check_non_negative("weight_decay", weight_decay)
    model = cast(nn.Module, getattr(model, "_orig_mod", model))  # of torch.compile, which puts that before all names
    scales = _layer_scales(model, layer_decay)
    gammas = {id(parameter) for parameter in _last_norm_weights(model)}
    exempt = _exempt_patterns(model)
    groups: dict[tuple[float | None, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim > 1 and not name.endswith("bias")
        decays = id(parameter) in gammas or matrix and not any(fnmatchcase(name, e) for e in exempt)
        groups.setdefault((scales.get(name), decays), []).append(parameter)
    return [
        {"params": groups[scale, decays], "weight_decay": weight_decay if decays else 0.0}
        | ({} if scale is None else {"lr_scale": scale})
        for scale, decays in sorted(groups, key=lambda key: (key[0] or 0.0, not key[1]))
    ]


def _last_norm_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        norm = module.norm if isinstance(module, Classifier) else module
        if isinstance(module, Classifier | LastBatchNorm):
            yield from (p for name, p in norm.named_parameters() if not name.endswith(("bias", "eps")))


def _exempt_patterns(model: nn.Module) -> set[str]:
    """Patterns of names that the model, or the one inside a DistributedDataParallel, exempts from decay."""
    for prefix, module in model.named_modules():
        names: Callable[[], set[str]] | None = getattr(module, "no_weight_decay", None)
        if names is not None and "_orig_mod" not in module._modules:
            return {f"{prefix}.{name}" if prefix else name for name in names()}
    return set()


def _layer_scales(model: nn.Module, layer_decay: float | None) -> dict[str, float]:
    """Parameter name → layer_decay^(layers above it)."""
    if layer_decay is None:
        return {}
    if not 0 < check_number("layer_decay", layer_decay) <= 1:
        raise ValueError(f"layer_decay={layer_decay} must lie in (0, 1]; None switches it off")
    matcher: Callable[..., Any] | None = getattr(model, "group_matcher", None)
    if matcher is None:
        raise ValueError(f"layer_decay needs timm's group_matcher, which {type(model).__name__} does not have")
    layers = group_parameters(model, matcher(coarse=False), reverse=True)
    return {name: layer_decay ** (max(layers.values()) - layer) for name, layer in layers.items()}
