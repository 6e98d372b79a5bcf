"""fold: a Classifier back into the plain model, its own classifier filled in."""

import warnings
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncreg._checks import described
from ncreg._copies import copied
from ncreg._modes import evaluating
from ncreg.models._backbone import example_image, logits_alone, parameter_like, replace_module
from ncreg.models._classifier import Classifier
from ncreg.models._data_config import folded_cfg
from ncreg.models._keep import WholeModel
from ncreg.models._whole import is_sharded, whole_copy
from ncreg.norms import LastBatchNorm
from ncreg.numerics import check_plain, in_float64, seeded

Slots = dict[str, nn.Linear | nn.Conv2d]
EPS = 1e-12  # γ may have decayed to zero
EXACT: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}  # whatever torch's default device is


class LinearMap(NamedTuple):
    """weight (out, in) and bias (out,); `exact` is False where each sample's result has lost its length."""

    weight: Tensor
    bias: Tensor
    exact: bool


def fold(classifier: Classifier, *, normalize: Literal["drop", "keep"] | None = None) -> nn.Module:
    """The plain timm or torchvision model with projection, last norm (eval mode) and head in its own classifier.

    Logits are the classifier's own. Where the head or the norm divides a sample's features by their length, a
    linear classifier can't: without that division the predictions stay the same and the logits do not
    (they are divided by one typical length instead), and a warning says so.

    Args:
        classifier: a `Classifier`; it is not changed. Of a sharded one (FSDP, DTensor) the whole is gathered on every
            rank, and every rank must call.
        normalize: "drop" leaves the division out without a warning; "keep" puts projection, norm and head
            themselves in the classifier's place: the same logits, but other keys in the state_dict.

    The result takes what the backbone takes: images after `preprocess`. If that is `Normalize`, its mean and std
    stand in the result's pretrained_cfg, with the size and resize of the images where `image_shape` is known; there
    `timm.data.resolve_model_data_config` finds them. `timm.models.save_for_hf(folded, folder)` writes both down, and
    `timm.create_model("local-dir:" + folder, pretrained=True)` has them again. Its state_dict alone loads with
    `timm.create_model(name, pretrained_cfg=folded.pretrained_cfg, checkpoint_path=…)`. The config of a model of
    Hugging Face has the `class_names`, where they are known.

    Raises:
        TypeError: if `classifier` is none.
        ValueError: if norm or head is not linear up to length, or the model's own classifier can't hold the result.

    Example:
        >>> from ncreg.models import swap_head
        >>> classifier = swap_head("test_resnet", "linear", num_classes=10).eval()
        >>> images = torch.rand(2, 3, 32, 32)
        >>> torch.allclose(fold(classifier)(images), classifier(images), atol=1e-5)
        True
    """
    if not isinstance(classifier, Classifier):
        raise TypeError(f"fold takes a Classifier, got {described(classifier)}")
    if normalize not in (None, "drop", "keep"):
        raise ValueError(f"normalize={normalize!r} must be 'drop', 'keep' or None")
    if is_sharded(classifier):
        classifier = cast(Classifier, whole_copy(classifier))
    if parameter_like(classifier).is_meta:
        raise ValueError("fold needs a classifier with real weights, this one is on the meta device")
    plain, exact = _folded(classifier, keep=normalize == "keep")
    _say_what_differs(classifier, exact or normalize == "drop")
    _describe_images(plain, classifier, kept=normalize == "keep" and not isinstance(classifier, WholeModel))
    _give_back_output_object(plain, classifier)
    return plain.to(memory_format=torch.contiguous_format)  # safetensors takes no channels_last


def _folded(classifier: Classifier, *, keep: bool) -> tuple[nn.Module, bool]:
    """The plain model, and whether its logits are the classifier's own."""
    if isinstance(classifier, WholeModel):  # its own classifier never left its place
        return copied(classifier.backbone.model), True
    getattr(classifier.head, "weight", None)  # a code too large for a matrix refuses here, before a layer is made
    plain, slots = _plain_model(classifier)
    kinds = filter(torch.amp.is_autocast_available, {"cpu", parameter_like(classifier).device.type})
    with evaluating(classifier, plain), ExitStack() as unrounded:
        for kind in kinds:  # under autocast neither the map nor the comparison would be exact
            unrounded.enter_context(torch.autocast(kind, enabled=False))
        if keep:
            _keep(plain, slots, classifier)
            _demand(_agree(plain, classifier, exact=True))
            return plain, True
        tail = _tail(classifier)
        # all layers together; else one alone, as volo adds a maximum over its other's logits
        choices = dict.fromkeys([tuple(slots), *((name,) for name in slots)])
        _demand(any(_filled(plain, slots, chosen, tail, classifier) for chosen in choices))
        return plain, tail.exact


def _describe_images(plain: Any, classifier: Classifier, *, kept: bool) -> None:
    """Write into the folded model's pretrained_cfg what timm's loaders need to know."""
    try:
        cfg = folded_cfg(classifier)
    except AttributeError:  # a module of no library, and nothing says which images it takes
        return
    if kept and "architecture" in cfg:  # the keys are not those of the architecture: timm shall not build it by name
        cfg["architecture"] = f"ncreg.fold(normalize='keep') of {cfg['architecture']}"
    plain.pretrained_cfg = plain.default_cfg = cfg


def _give_back_output_object(plain: Any, classifier: Classifier) -> None:
    """A model of Hugging Face returns its output object again, and knows its classes and, where told, their names."""
    for number, hook in list(plain._forward_hooks.items()):
        if hook is logits_alone:
            del plain._forward_hooks[number]
            plain.num_labels = plain.config.num_labels = classifier.num_classes
            names = classifier.class_names
            if names is not None and len(names) == classifier.num_classes:
                plain.config.id2label = dict(enumerate(names))
                plain.config.label2id = {name: place for place, name in enumerate(names)}


def _say_what_differs(classifier: Classifier, quiet: bool) -> None:
    if not quiet:
        warnings.warn(
            "features are normalised before the head: the folded model leaves that out; predictions are the same, "
            "logits are not (normalize='keep' keeps the normalisation, normalize='drop' silences this)",
            UserWarning,
            stacklevel=3,
        )
    if not isinstance(classifier.preprocess, nn.Identity):
        warnings.warn(
            "preprocess is not part of the folded model: feed it preprocessed images "
            "(timm.data.resolve_model_data_config reads Normalize's mean and std from its pretrained_cfg)",
            UserWarning,
            stacklevel=3,
        )


def _plain_model(classifier: Classifier) -> tuple[nn.Module, Slots]:
    """A copy of the backbone with a classifier of its own kind back in place, and that classifier's layers."""
    if not classifier.num_classes:
        raise ValueError("the classifier has no head (num_classes=0): reset_classifier(C) first")
    backbone, removed = classifier.backbone, classifier._removed
    plain: Any = copied(backbone)
    with torch.random.fork_rng(devices=[]):
        if removed is not None:
            width = classifier.backbone_width
            conv = issubclass(removed.kind, nn.Conv2d)
            sizes = width, classifier.num_classes
            layer = nn.Conv2d(*sizes, 1, device="cpu") if conv else nn.Linear(*sizes, device="cpu")
            layer = layer.to(parameter_like(backbone)).train(backbone.training)
            replace_module(plain, plain.get_submodule(removed.path), layer)
            if hasattr(plain, "num_classes"):
                plain.num_classes = classifier.num_classes
        elif hasattr(plain, "reset_classifier"):
            pair = getattr(getattr(plain, "head", None), "distillation", None)  # repvit forgets it otherwise
            plain.reset_classifier(classifier.num_classes, **({} if pair is None else {"distillation": pair}))
        else:
            raise ValueError(f"{type(backbone).__name__} does not say where its classifier was: build it by swap_head")
    before = {name: type(module) for name, module in backbone.named_modules()}
    added = {name: module for name, module in plain.named_modules() if type(module) is not before.get(name)}
    for module in added.values():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # levit's and repvit's stand before the classifier
            module.reset_running_stats()
            nn.init.constant_(module.weight, (1 + module.eps) ** 0.5)
            nn.init.zeros_(module.bias)
    return plain, {name: m for name, m in added.items() if isinstance(m, nn.Linear | nn.Conv2d)}


def _tail(classifier: Classifier) -> LinearMap:
    """Projection, norm and head as one linear map of the pooled features."""
    width = classifier.backbone_width
    weight, bias, exact = torch.eye(width, **EXACT), torch.zeros(width, **EXACT), True
    for name in ("project", "norm", "head"):
        part = getattr(classifier, name)
        check_plain(part, "fold the classifier first, then quantize what it gives", f"{name}.")
        step = _as_linear_map(part, weight.shape[0])
        weight, bias = step.weight @ weight, step.weight @ bias + step.bias
        exact = exact and step.exact
        if not exact and step.bias.abs().max() > 1e-12:
            raise ValueError(
                f"{type(part).__name__} adds a bias after features were normalised, which no linear classifier can: "
                "normalize='keep' keeps norm and head in the classifier's place"
            )
    if not exact and isinstance(classifier.norm, LastBatchNorm):
        gamma = classifier.norm.weight
        squared = weight.new_ones(()) if gamma is None else gamma.detach().cpu().to(weight).square().mean()
        length = (squared * classifier.head_hidden_size).sqrt()  # ‖γ‖: the features' root mean square length
        weight, bias = weight / length.clamp_min(EPS), bias / length.clamp_min(EPS)
    return LinearMap(weight, bias, exact)


def _as_linear_map(part: nn.Module, width: int) -> LinearMap:
    """Read weight and bias off the images of 0 and of the unit vectors, then test them on random vectors.

    f(x) = Wx + b is exact; f(x) − b = r(x)·Wx with r(x) > 0, as of a head on unit features, is not.
    """
    part = copied(part).cpu().double().eval()
    bias = part(torch.zeros(1, width, **EXACT))[0]
    weight = (part(torch.eye(width, **EXACT)) - bias).T
    vectors = torch.randn(8, width, generator=seeded(0), **EXACT)
    given, linear = part(vectors) - bias, vectors @ weight.T
    tolerance = 1e-9 * linear.abs().max()
    if (given - linear).abs().max() <= tolerance:
        return LinearMap(weight, bias, True)
    ratio = (given * linear).sum(1, keepdim=True) / linear.square().sum(1, keepdim=True)
    if (ratio > 0).all() and (given / ratio - linear).abs().max() <= tolerance:
        return LinearMap(weight, bias, False)
    raise ValueError(
        f"{type(part).__name__} is not linear in the features, not even up to their length: "
        "normalize='keep' keeps norm and head in the classifier's place"
    )


def _filled(plain: nn.Module, slots: Slots, chosen: tuple[str, ...], tail: LinearMap, classifier: Classifier) -> bool:
    """Write the map into the chosen ones of the classifier's layers, zeros into the others; whether it holds.

    The layers read consecutive slices of the features, starting over once all are read (a distilled pair reads
    them twice, crossvit's two layers a slice each), and the model mixes their outputs by factors that a forward
    pass with one bias at 1 and everything else at 0 reads off.
    """
    for parameter in (p for layer in slots.values() for p in layer.parameters()):
        nn.init.zeros_(parameter)
    layers = [slots[name] for name in chosen]
    factors, starts, position = [], [], 0
    for layer in layers:
        if layer.bias is None:
            raise ValueError(f"the model's own classifier {list(slots)} has no bias to hold the last norm's mean")
        starts.append(position)
        position = (position + layer.weight.shape[1]) % tail.weight.shape[1]
        nn.init.ones_(layer.bias)
        image = _image(classifier)
        factors.append(1.0 if image is None else float(in_float64(plain(image)).mean()))
        nn.init.zeros_(layer.bias)
    for layer, start in zip(layers, starts, strict=True):
        mixed = sum(factor for factor, other in zip(factors, starts, strict=True) if other == start)
        piece = tail.weight[:, start : start + layer.weight.shape[1]] / mixed
        if piece.numel() == layer.weight.numel():  # else the layer stays empty and the comparison fails
            layer.weight.copy_(piece.reshape(layer.weight.shape))
        cast(Tensor, layer.bias).copy_(tail.bias / sum(factors))
    return _agree(plain, classifier, tail.exact)


def _keep(plain: nn.Module, slots: Slots, classifier: Classifier) -> None:
    """Projection, norm and head themselves in the place of the model's one classifier layer."""
    if len(slots) != 1:
        raise ValueError(f"normalize='keep' needs a model with one classifier layer, this has {len(slots)}")
    (layer,) = slots.values()
    parts = [p for p in (classifier.project, classifier.norm, classifier.head) if not isinstance(p, nn.Identity)]
    parts = [copied(part) for part in parts]
    if isinstance(layer, nn.Conv2d):  # it takes a map and gives one
        parts = [nn.AdaptiveAvgPool2d(1), nn.Flatten(1), *parts, nn.Unflatten(1, (-1, 1, 1))]
    replace_module(plain, layer, nn.Sequential(*parts))


def _agree(plain: nn.Module, classifier: Classifier, exact: bool) -> bool:
    """Compare both on noise; what differs is the structure around the classifier, not rounding."""
    image = _image(classifier)
    if image is None:
        return True
    images = torch.cat([image, image.flip(1)])
    expected = in_float64(classifier.head(classifier.norm(classifier.project(classifier.backbone(images)))))
    got = in_float64(plain(images))
    rounding = 1e-3 if image.dtype in (torch.float32, torch.float64) else 5e-2
    if got.shape != expected.shape:
        return False
    if exact:
        return bool((got - expected).abs().max() <= rounding * expected.abs().max())
    return bool((F.normalize(got) - F.normalize(expected)).abs().max() <= rounding)


def _demand(holds: bool) -> None:
    if not holds:
        raise ValueError(
            "the model's own classifier can't hold the folded one (something stands behind it, as squeezenet's ReLU "
            "does, or it is no plain linear layer): use the Classifier itself"
        )


def _image(classifier: Classifier) -> Tensor | None:
    """An example; None where only the caller knows the model's input and named its classifier's path instead."""
    if classifier._removed is None:
        return example_image(classifier.backbone)
    size = classifier._removed.input_size
    return None if size is None else example_image(classifier.backbone, size)
