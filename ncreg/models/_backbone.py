"""Taking the classifier off: timm by its own contract, any other module by the classifier's attribute path."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ncreg._modes import evaluating


class Removed(NamedTuple):
    """Where the classifier sat in a module without timm's reset_classifier, its kind, and one input's size if known.

    The kind is nn.Conv2d, or nn.Linear for all others: a class of its own, as parametrizations make one for each layer,
    could not be pickled.
    """

    path: str
    kind: type[nn.Linear | nn.Conv2d]
    input_size: tuple[int, ...] | None


class Headless(NamedTuple):
    """A model without its classifier, its features (1, width) of one example, and the dropout that ends it if seen."""

    module: nn.Module
    features: Tensor
    num_classes: int | None
    removed: Removed | None = None
    dropout: tuple[str, ...] = ()


def behead_timm(model: nn.Module) -> None:
    """Take the classifier off a timm module in place; a distilled pair gives way to its averaged tokens."""
    reset: Any = model.reset_classifier
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(False)  # type: ignore[operator]
    pair = {}
    if "distillation" in inspect.signature(reset).parameters:  # repvit forgets otherwise that it had a pair
        pair["distillation"] = getattr(model.head, "distillation", False)
    known = set(model.modules())
    reset(0, **pair)
    for part in model.modules():
        if part not in known:  # what timm puts in the classifier's place would be in training mode
            part.training = model.training


def behead(model: nn.Module, path: str | None, input_size: Sequence[int] | None) -> Headless:
    """Replace the classifier of any module by an identity, in place.

    One example finds the classifier, or shows that the one at `path` is the last to run. Where `path` names a
    Linear or Conv2d and nothing says the size of an input, its width is taken as it stands, without a forward pass.

    Raises:
        ValueError: if there is no classifier to be found; the message lists the candidates.
    """
    _drop_auxiliary_heads(model)
    _refuse_teachers(model)
    if hasattr(getattr(model, "config", None), "num_labels"):  # a model of Hugging Face
        model.register_forward_hook(logits_alone)
    found = path if path is not None else _last_module_of_width(model, example_image(model, input_size))
    try:
        classifier = model.get_submodule(found)
    except AttributeError:
        raise ValueError(f"classifier={found!r} is no module of the model; {_candidates(model)}") from None
    if not found:
        raise ValueError(f"classifier='' is the whole model; {_candidates(model)}")
    num_classes = getattr(classifier, "out_features", getattr(classifier, "out_channels", None))
    if path is not None and input_size is None:
        input_size = _size_of_vectors(model)
    replace_module(model, classifier, nn.Identity().train(classifier.training))
    named_layer = path is not None and isinstance(classifier, nn.Linear | nn.Conv2d)
    size = None if named_layer and input_size is None else tuple(example_image(model, input_size).shape[1:])
    removed = Removed(found, nn.Conv2d if isinstance(classifier, nn.Conv2d) else nn.Linear, size)
    if size is None:
        weight = cast(Tensor, classifier.weight)
        features = weight.new_zeros(1, weight.shape[1])
        return Headless(model, features, num_classes, removed)
    with _last_dropouts(model) as dropout:
        features = _identity_features(model, found, size)
    return Headless(model, features, num_classes, removed, tuple(dropout))


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, under every name that it has there."""
    for name in [name for name, part in model.named_modules(remove_duplicate=False) if part is old]:
        model.set_submodule(name, new)


@contextmanager
def _last_dropouts(model: nn.Module) -> Iterator[list[str]]:
    """Paths of the dropout layers that run behind the last layer with parameters, once a forward pass is over."""
    since: list[str] = []
    layers = [(name, part) for name, part in model.named_modules() if part._parameters or isinstance(part, _DropoutNd)]
    handles = [
        part.register_forward_pre_hook(
            lambda part, *_, name=name: since.append(name) if isinstance(part, _DropoutNd) else since.clear()
        )
        for name, part in layers
    ]
    try:
        yield since
    finally:
        for handle in handles:
            handle.remove()


def logits_alone(model: nn.Module, inputs: Any, output: Any) -> Any:
    """Hook after `forward`: of an output object with `.logits`, as Hugging Face's models return, the logits."""
    return getattr(output, "logits", output)


def _size_of_vectors(model: nn.Module) -> tuple[int] | None:
    """(width,) where the model's first layer is a Linear and the model runs on vectors of its width, else None."""
    first = next((layer for layer in model.modules() if any(True for _ in layer.parameters(recurse=False))), None)
    if not isinstance(first, nn.Linear):
        return None
    size = (first.in_features,)
    try:
        evaluated(model, example_image(model, size))
    except ValueError:
        return None
    return size


def _drop_auxiliary_heads(model: nn.Module) -> None:
    """GoogLeNet and Inception of torchvision return auxiliary logits in training: those heads go as well."""
    if getattr(model, "aux_logits", False):
        for name, gone in {"aux_logits": False, "aux1": None, "aux2": None, "AuxLogits": None}.items():
            if hasattr(model, name):
                setattr(model, name, gone)


def _refuse_teachers(model: nn.Module) -> None:
    """Refuse Hugging Face's distilled pairs: the mean of two classifiers' logits, on features of their own."""
    pair = next((kind.__name__ for kind in type(model).__mro__ if kind.__name__.endswith("WithTeacher")), None)
    if pair is not None:
        plain = pair.removesuffix("WithTeacher")
        raise ValueError(
            f"model={pair} returns the mean of two classifiers, each on features of its own, which no one head can "
            f"replace: take the backbone with one classifier, {plain}.from_pretrained(…), or timm's model of that kind"
        )


def _candidates(model: nn.Module) -> str:
    layers = [
        f"{name!r} ({type(module).__name__}, {getattr(module, 'out_features', None) or module.out_channels} out)"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    if not layers:
        return "it holds no Linear or Conv2d that could be one"
    return f"candidates, the last first: {', '.join(layers[:-9:-1])}{', …' if len(layers) > 8 else ''}"


def _last_module_of_width(model: nn.Module, image: Tensor) -> str:
    """The last Linear or Conv2d to run whose output is as wide as the model's."""
    ran: list[str] = []
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name)) for name, module in layers.items()
    ]
    try:
        logits = evaluated(model, image)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = f" of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else ""
        raise ValueError(
            f"the model's classifier can't be found: forward returns a {type(logits).__name__}{shape}, not logits "
            f"(batch, classes); name the classifier's path, classifier='…', on a model whose forward returns its "
            f"output; {_candidates(model)}"
        )
    for name in reversed(ran):
        if layers[name].weight.shape[0] == logits.shape[1]:
            return name
    raise ValueError(
        f"the model's classifier can't be found: no Linear or Conv2d has the {logits.shape[1]} outputs of the model; "
        f"name the classifier's path, classifier='…'; {_candidates(model)}"
    )


def _identity_features(model: nn.Module, path: str, input_size: Sequence[int] | None) -> Tensor:
    """Features of an example, shown to be what the classifier saw (pooled, where it saw a map)."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        features = pooled_features(model, example_image(model, input_size), f"the model without {path!r}")
    finally:
        handle.remove()
    entering = seen[-1].mean((2, 3)) if seen and seen[-1].ndim == 4 else seen[-1] if seen else None
    if entering is None or entering.shape != features.shape:
        raise ValueError(f"classifier={path!r} is not what the model ends in; {_candidates(model)}")
    if not features.is_meta and not torch.allclose(
        entering.float(), features.float(), rtol=1e-3, atol=1e-5, equal_nan=True
    ):
        raise ValueError(
            f"something follows the classifier {path!r} (a softmax, a scale?) and would change the features: "
            f"take it off the model first, or name another path, classifier='…'; {_candidates(model)}"
        )
    return features


def evaluated(model: nn.Module, image: Tensor, name: str = "the model") -> Any:
    """The model's output for that image, in eval mode.

    Raises:
        ValueError: if the model can't take that image.
    """
    with evaluating(model):
        try:
            return model(image)
        except Exception as error:
            raise ValueError(
                f"{name} failed on an example of shape {tuple(image.shape)} ({error}); pass the shape that it "
                "takes, input_size=(channels, height, width), or name its Linear classifier's path, classifier='…'"
            ) from error


def example_image(model: nn.Module, input_size: Sequence[int] | None = None) -> Tensor:
    """Noise in [0, 1), (1, channels, height, width), on the model's device, in its dtype, always the same."""
    if input_size is None and hasattr(model, "pretrained_cfg"):
        input_size = get_model_input_config(model)["input_size"]
    elif input_size is None:
        config = getattr(model, "config", None)  # of Hugging Face; torchvision's vit keeps its size itself
        side = getattr(config, "image_size", getattr(model, "image_size", 224))
        sides = tuple(side) if isinstance(side, list | tuple) else (side, side)
        sides = sides if all(isinstance(length, int) for length in sides) else (224, 224)
        channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
        input_size = (channels, *sides)
    noise = torch.rand(1, *input_size, generator=torch.Generator().manual_seed(0), device="cpu")
    return noise.to(parameter_like(model))


def parameter_like(model: nn.Module) -> Tensor:
    """A tensor on the model's device, in its dtype."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))


def pooled_features(model: nn.Module, image: Tensor, name: str = "the model") -> Tensor:
    """Features (1, width) of that image, in the parameters' dtype (under autocast they may come in another).

    Raises:
        ValueError: if features are not (batch, width).
    """
    features = evaluated(model, image, name)
    if isinstance(features, Tensor) and features.ndim == 2:
        return features.to(image.dtype)
    got = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else f"type {type(features).__name__}"
    raise ValueError(
        f"the backbone's features have {got}, a head takes pooled ones (batch, width): give the model a global pool "
        "(model_args={'global_pool': 'avg'}, or model.reset_classifier(n, global_pool='avg') before the swap)"
    )


def dropout_before_head(headless: Headless) -> dict[str, float]:
    """What stands between the pooled features and the classifier and drops them, and at which rate."""
    model, heads = headless.module, {"head", "head_drop", "classifier", "fc", "dropout"}
    rates = {
        f"get_submodule({name!r}).p": float(module.p)
        for name, module in model.named_modules()
        if isinstance(module, _DropoutNd) and (name.partition(".")[0] in heads or name in headless.dropout)
    }
    rates["drop_rate"] = float(getattr(model, "drop_rate", None) or 0.0)
    return {place: rate for place, rate in rates.items() if rate > 0}
