"""Parameter groups in which the theory of last-layer normalisation and weight decay holds."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any

from timm.models import group_parameters
from torch import nn

from ncreg._checks import check_non_negative, check_number, described
from ncreg._wrappers import plain_name, weight_names
from ncreg.models import Classifier
from ncreg.norms import LastBatchNorm


def param_groups(
    model: nn.Module, weight_decay: float, *, layer_decay: float | None = None, lr: float | None = None
) -> list[dict[str, Any]]:
    """Matrices, the learned head and the last norm's γ decay; biases, other norms and timm's exempted names don't.

    Pan & Cao (arXiv 2309.04644) bound collapse by CE + (λ/2)(‖γ‖² + ‖W‖²): γ must decay although it is
    one-dimensional, which timm's and most other groupings exempt. The decay must be coupled (L2 in the gradient,
    as torch.optim.SGD does it): AdamW's decoupled one keeps NC0 and NC3 from closing. Every trainable parameter
    is in one group, frozen ones are left out. Names are read without wrappers (DistributedDataParallel, FSDP,
    torch.compile, activation checkpointing, PEFT), wherever in the model these stand, and what a parametrization,
    pruning or the older weight and spectral norm make a weight of counts by that weight's name.

    Args:
        model: a `Classifier`, or any module; a `LastBatchNorm` in it counts as a last norm.
        weight_decay: λ of the decayed groups.
        layer_decay: factor on the learning rate from one layer to the one before it; needs timm's group_matcher.
            None for one rate.
        lr: the learning rate of the last layer. With it each group has its own `lr`, which every optimizer and
            torch's schedules keep (OneCycleLR and CyclicLR take rates of their own: give them a list of the groups'
            rates). Without it `layer_decay` becomes an `lr_scale` of each group, which timm's schedules and
            `TPTScheduler` multiply the rate by; an optimizer by itself and torch's schedules ignore that.

    Returns:
        Groups for a torch optimizer, or for `timm.optim.create_optimizer_v2` in the model's place, whose own
        grouping would leave γ out.

    Raises:
        TypeError: if `model` is no module, or a decay or rate no number.
        ValueError: if `weight_decay` or `lr` is negative or not finite, `layer_decay` not in (0, 1], layers are
            unknown or all parameters are in one, or parameters have lost their shapes to FSDP (version 1).

    Example:
        >>> import torch
        >>> from ncreg.models import swap_head
        >>> classifier = swap_head("test_resnet", "etf", num_classes=10)
        >>> optimizer = torch.optim.SGD(param_groups(classifier, 5e-4), lr=0.1, momentum=0.9)
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.0005, 0.0]
        >>> [round(group["lr"], 4) for group in param_groups(classifier, 5e-4, layer_decay=0.5, lr=0.1)][-1]
        0.1
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {described(model)}")
    weight_decay = check_non_negative("weight_decay", weight_decay)
    rate = None if lr is None else check_non_negative("lr", lr)
    _check_shapes(model)
    names = weight_names(model)
    scales = _layer_scales(model, names, layer_decay)
    gammas = {id(parameter) for parameter in _last_norm_weights(model)}
    exempt = set(_exempt_patterns(model))
    groups: dict[tuple[float | None, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim > 1 and not names[name].endswith("bias")
        decays = id(parameter) in gammas or matrix and not any(fnmatchcase(names[name], e) for e in exempt)
        groups.setdefault((scales.get(name), decays), []).append(parameter)
    return [
        {"params": groups[scale, decays], "weight_decay": weight_decay if decays else 0.0} | _rate(scale, rate)
        for scale, decays in sorted(groups, key=lambda key: (key[0] or 0.0, not key[1]))
    ]


def _rate(scale: float | None, rate: float | None) -> dict[str, float]:
    """What a group says about its learning rate."""
    if rate is not None:
        return {"lr": rate if scale is None else rate * scale}
    return {} if scale is None else {"lr_scale": scale}


def _check_shapes(model: nn.Module) -> None:
    """Refuse FSDP of the first version, which flattens parameters: matrices could not be told from biases."""
    for module in model.modules():
        strategy = getattr(getattr(module, "sharding_strategy", None), "name", "NO_SHARD")
        if "_fsdp_wrapped_module" in module._modules and strategy != "NO_SHARD":
            raise ValueError(
                f"model is wrapped in FullyShardedDataParallel ({strategy}), which flattens its parameters, so "
                "that matrices cannot be told from biases: use torch.distributed.fsdp.fully_shard, which keeps shapes"
            )


def _last_norm_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        norm = module.norm if isinstance(module, Classifier) else module
        if isinstance(module, Classifier | LastBatchNorm):
            names = weight_names(norm)
            yield from (p for name, p in norm.named_parameters() if not names[name].endswith(("bias", "eps")))


def _owners(model: nn.Module, method: str, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that have a method of their own (wrappers only hand it on), with their plain prefixes."""
    if hasattr(type(model), method) or method in vars(model):
        yield prefix, model
        return
    for name, child in model.named_children():
        yield from _owners(child, method, plain_name(f"{prefix}{name}."))


def _exempt_patterns(model: nn.Module) -> Iterator[str]:
    """Patterns of plain names that a model, or models inside it, exempt from decay."""
    for prefix, module in _owners(model, "no_weight_decay"):
        yield from (f"{prefix}{plain_name(name)}" for name in module.no_weight_decay())  # type: ignore[operator]


def _layer_scales(model: nn.Module, names: dict[str, str], layer_decay: float | None) -> dict[str, float]:
    """Parameter name → layer_decay^(layers above it); parameters outside the model with layers are above all."""
    if layer_decay is None:
        return {}
    layer_decay = check_number("layer_decay", layer_decay)
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay={layer_decay} must lie in (0, 1]; None switches it off")
    owners = list(_owners(model, "group_matcher"))
    try:
        (prefix, owner), *others = owners
        matcher = owner.group_matcher(coarse=False)  # type: ignore[operator]
    except (ValueError, AttributeError):  # there is none, or a Classifier whose backbone is not timm's
        raise ValueError(
            f"layer_decay needs timm's group_matcher, which {type(model).__name__} does not have"
        ) from None
    if others:
        raise ValueError(f"layer_decay needs one model with timm's group_matcher, this one holds {len(owners)}")
    inside = {name: plain.removeprefix(prefix) for name, plain in names.items() if plain.startswith(prefix)}
    plain_parameters: Any = SimpleNamespace(named_parameters=lambda: ((plain, None) for plain in inside.values()))
    layers = group_parameters(plain_parameters, matcher, reverse=True)
    if len(set(layers.values())) < 2:
        raise ValueError(
            f"layer_decay={layer_decay}: the group_matcher of {type(owner).__name__} puts all {len(layers)} parameters "
            f"in one layer, such as {next(iter(inside), 'none')!r}: its patterns do not fit these names; layer_decay="
            "None gives all one rate"
        )
    top = max(layers.values())
    return {name: layer_decay ** (top - layers[inside[name]]) if name in inside else 1.0 for name in names}
