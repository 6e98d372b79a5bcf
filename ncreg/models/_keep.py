"""head="keep": a model's own classifier as the head of a `Classifier`, so that its logits stay the model's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from ncreg._copies import copied
from ncreg._modes import evaluating, set_own_mode
from ncreg.models._backbone import Headless, example_image, logits_alone, parameter_like
from ncreg.models._classifier import Classifier, ClassifierOutput, EncoderOutput, WithFeatures, output_of
from ncreg.numerics import fill, float64_device, in_float64, is_dtensor

Parts = dict[str, nn.Module]


class Observed(nn.Module):
    """A whole model: its features are what enters its classifier's layers, pooled and side by side.

    Args:
        model: the model, with its classifier.
        layers: paths of the classifier's layers.
    """

    def __init__(self, model: Any, layers: Sequence[str]) -> None:
        super().__init__()
        self.model, self.layers = model, tuple(layers)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The model's own, with the size of the images that it takes now."""
        return {**dict(self.model.pretrained_cfg), **get_model_input_config(self.model)}

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, d)."""
        return self.with_logits(x).features

    def with_logits(self, x: Tensor) -> ClassifierOutput:
        """The model's own logits, and the features of the same pass."""
        seen: dict[str, Tensor] = {}
        handles = [
            self.model.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs, name=name: seen.__setitem__(name, inputs[0])
            )
            for name in self.layers
        ]
        try:
            logits = self.model(x)
        finally:
            for handle in handles:
                handle.remove()
        return ClassifierOutput(logits, torch.cat([_pooled(seen[name]) for name in self.layers], dim=1))


class WholeModel(Classifier):
    """A classifier whose logits are no affine function of its pooled features: the whole model gives them.

    So it is where something stands behind the classifier's layers (squeezenet's ReLU, the maximum over tokens of
    volo), or where several layers see features of their own (distilled pairs, efficientvim). `head` holds a copy of the
    layers' weights for the measures; nothing trains it, and `train()` and `eval()` bring it up to date where the layers
    are not sharded.
    """

    backbone: Observed

    def train(self, mode: bool = True) -> WholeModel:
        """Training or eval mode; `head` gets the weights that the layers have now."""
        super().train(mode)
        layers = [self.backbone.model.get_submodule(name) for name in self.backbone.layers]
        if not any(is_dtensor(tensor) for layer in layers for tensor in layer.parameters()):
            for tensor, now in zip((self.head.weight, self.head.bias), _averaged(layers), strict=True):
                fill(tensor, now)
        return self

    def forward(self, x: Tensor, with_features: WithFeatures = False) -> Tensor | ClassifierOutput | EncoderOutput:
        """The model's own logits (B, C), with True also the features; those of the encoder are the same."""
        if isinstance(with_features, str) and with_features == "alone":
            raise TypeError("with_features='alone': the logits of this model are no function of its features and head")
        logits, features = self.backbone.with_logits(self.preprocess(x))
        return output_of(logits, features, features, with_features)

    def forward_head(self, x: Any, pre_logits: bool = False) -> Tensor:
        """Refused: that of the model gives its logits, which are no function of its pooled features."""
        raise AttributeError("forward_head: the logits of this model are no function of its pooled features and head")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Refused: the whole model gives the logits, whatever `head` is."""
        raise ValueError("the whole model gives the logits here: swap_head(the model, HEAD) puts another head on it")

    @property
    def _named_backbone(self) -> tuple[str, nn.Module]:
        return "backbone.model.", self.backbone.model


def keep_head(model: nn.Module, headless: Headless) -> Classifier:
    """A copy of a model as a `Classifier` around its own classifier.

    Args:
        model: the model, with its classifier.
        headless: a copy of it without.

    Raises:
        ValueError: there is no classifier to keep, or none of its layers can be seen at work.
    """
    whole = copied(model)
    if headless.removed is not None:
        parts: Parts = {headless.removed.path: whole.get_submodule(headless.removed.path)}
        if hasattr(getattr(whole, "config", None), "num_labels"):  # a model of Hugging Face
            whole.register_forward_hook(logits_alone)
    else:
        parts = _outermost(whole, headless.module)
    if not parts:
        raise ValueError("head='keep': the model has no classifier to keep; pass the head by name, or as a module")
    like = parameter_like(headless.module)
    head = _affine_head(whole, headless, parts)
    if head is not None:
        return _classifier(headless.module, head, headless, like)
    leaves = _seen_layers(whole, headless, parts)
    observed = Observed(whole, list(leaves))
    observed.training = whole.training
    copy_of_layers = _side_by_side(list(leaves.values())).requires_grad_(False)  # no gradient would reach it
    return _classifier(observed, copy_of_layers, headless, like, WholeModel)


def _classifier(
    backbone: nn.Module, head: nn.Module, headless: Headless, like: Tensor, kind: type[Classifier] = Classifier
) -> Classifier:
    head = head.to(like).train(headless.module.training)
    width = getattr(head, "in_features", headless.features.shape[1])
    classes = getattr(head, "out_features", headless.num_classes)
    if classes is None:  # a head of several layers
        with evaluating(head):
            classes = head(headless.features).shape[1]
    kept = kind(backbone, nn.Identity(), head, num_classes=classes, head_hidden_size=width)
    kept._removed = headless.removed
    set_own_mode(kept, headless.module.training)
    return kept


def _outermost(whole: nn.Module, beheaded: nn.Module) -> Parts:
    """The modules that `reset_classifier(0)` took off or replaced, without those inside of others of them."""
    left = {name: type(module) for name, module in beheaded.named_modules()}
    gone = {name: module for name, module in whole.named_modules() if type(module) is not left.get(name)}
    return {
        name: module
        for name, module in gone.items()
        if not any(name.startswith(f"{other}.") for other in gone) and any(True for _ in module.parameters())
    }


def _affine_head(whole: nn.Module, headless: Headless, parts: Parts) -> nn.Module | None:
    """The head that gives the model's logits from the pooled features; None if no affine map does."""
    example = _example(whole, headless)
    if example is None:  # the path was named, and nothing says which input the model takes: trust it
        return _as_head(next(iter(parts.values())))
    images = torch.cat([example, example.flip(-1)])
    with evaluating(whole, headless.module):
        logits, features = whole(images), headless.module(images)
    if not isinstance(logits, Tensor) or logits.is_meta:
        return _as_head(next(iter(parts.values()))) if len(parts) == 1 else None
    for candidate in _candidates(list(parts.values()), features.shape[1]):
        with evaluating(candidate):
            try:
                given = candidate(features)
            except RuntimeError:  # of another width
                continue
        if given.shape == logits.shape and _agree(given, logits):
            return candidate
    return None


def _example(whole: nn.Module, headless: Headless) -> Tensor | None:
    if headless.removed is None:
        return example_image(whole)
    size = headless.removed.input_size
    return None if size is None else example_image(whole, size)


def _agree(given: Tensor, wanted: Tensor) -> bool:
    rounding = 1e-4 if wanted.dtype in (torch.float32, torch.float64) else 5e-2
    gap = (in_float64(given) - in_float64(wanted)).abs().max()
    return bool(gap <= rounding * in_float64(wanted).abs().max().clamp_min(1e-3))


def _candidates(modules: list[nn.Module], width: int) -> list[nn.Module]:
    """One layer as it is; several on the same features, averaged; several on slices of them, averaged."""
    heads = [_as_head(module) for module in modules]
    if len(heads) == 1:
        return heads
    maps = [_affine(head) for head in heads]
    weights, biases = [weight for weight, _ in maps], torch.stack([bias for _, bias in maps])
    candidates: list[nn.Module] = []
    if all(weight.shape[1] == width for weight in weights):
        candidates.append(_linear(torch.stack(weights).mean(0), biases.mean(0)))
    if sum(weight.shape[1] for weight in weights) == width:
        candidates.append(_linear(torch.cat(weights, 1) / len(weights), biases.mean(0)))
    return candidates


def _as_head(module: nn.Module) -> nn.Module:
    """A classifier layer as a module from (B, d) to (B, C): Linear as it is, others read off; a copy."""
    if isinstance(module, nn.Linear) or not _is_affine(module):
        return copied(module)
    weight, bias = _affine(module)
    return _linear(weight, bias if getattr(module, "bias", True) is not None else None)


def _is_affine(module: nn.Module) -> bool:
    """A Linear or 1 × 1 convolution, or one behind a BatchNorm, as levit's and repvit's."""
    leaves = [part for part in module.modules() if not list(part.children())]
    kinds = (nn.Linear, nn.Conv2d, nn.modules.batchnorm._BatchNorm, nn.Dropout, nn.Identity)
    return all(isinstance(leaf, kinds) for leaf in leaves) and sum(isinstance(x, nn.Linear) for x in leaves) <= 1


def _affine(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight (C, d) and bias (C,) of an affine layer in eval mode."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        weight = module.weight.detach().flatten(1)
        bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach()
        return weight, bias
    linear = next(part for part in module.modules() if isinstance(part, nn.Linear))
    place = float64_device(linear.weight.device)
    exact = copied(module).to(place).double().eval()
    with torch.no_grad():
        eye = torch.eye(linear.in_features, dtype=torch.float64, device=place)
        bias = exact(torch.zeros_like(eye[:1]))[0]
        return (exact(eye) - bias).T.to(linear.weight), bias.to(linear.weight)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device)
    layer = layer.to(weight.dtype)
    layer.weight.data.copy_(weight)
    if bias is not None:
        layer.bias.data.copy_(bias)
    return layer


def _seen_layers(whole: nn.Module, headless: Headless, parts: Parts) -> dict[str, nn.Module]:
    """The classifier's layers that see features (B, d) or maps (B, d, H, W), by path.

    Layers on tokens, such as the auxiliary head of volo, have no pooled features: their share is in the logits alone.
    """
    shapes: dict[str, int] = {}
    inside = {
        f"{name}.{path}".rstrip("."): layer
        for name, part in parts.items()
        for path, layer in part.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: shapes.__setitem__(name, inputs[0].ndim))
        for name, layer in inside.items()
    ]
    example = cast(Tensor, _example(whole, headless))
    try:
        with evaluating(whole):
            whole(example)
    finally:
        for handle in handles:
            handle.remove()
    found: Parts = {name: layer for name, layer in inside.items() if shapes.get(name) in (2, 4)}
    if not found:
        raise ValueError("head='keep': no Linear or Conv2d of the model's classifier sees pooled features")
    return found


def _side_by_side(layers: list[nn.Module]) -> nn.Linear:
    """One layer on the features of several, side by side, that averages their logits."""
    return _linear(*_averaged(layers))


def _averaged(layers: list[nn.Module]) -> tuple[Tensor, Tensor]:
    """Its weight and bias."""
    maps = [_affine(layer) for layer in layers]
    weight = torch.cat([weight for weight, _ in maps], dim=1) / len(maps)
    return weight, torch.stack([bias for _, bias in maps]).mean(0)


def _pooled(features: Any) -> Tensor:
    return features.mean((2, 3)) if features.ndim == 4 else features
