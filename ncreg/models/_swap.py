"""swap_head: take the classifier off a model and put projection, last norm and head in its place."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ncreg._checks import check_integer, check_keywords, check_num_classes, described
from ncreg._copies import copied
from ncreg._modes import evaluating, set_own_mode
from ncreg.heads import HEADS
from ncreg.models._backbone import (
    Headless,
    behead,
    behead_timm,
    dropout_before_head,
    example_image,
    parameter_like,
    pooled_features,
)
from ncreg.models._classifier import Classifier
from ncreg.models._create import from_timm_name
from ncreg.models._keep import WholeModel, keep_head
from ncreg.models._projector import FixedProjector
from ncreg.models._torchvision import PREFIX, torchvision_model
from ncreg.norms import last_norm
from ncreg.numerics import drawn_for


def swap_head(
    model: str | nn.Module,
    head: str | nn.Module = "etf",
    *,
    num_classes: int | None = None,
    norm: str | nn.Module | None = None,
    project: int | str | None = None,
    classifier: str | None = None,
    input_size: Sequence[int] | None = None,
    model_args: Mapping[str, Any] | None = None,
    head_args: Mapping[str, Any] | None = None,
    weights: Mapping[str, Any] | None = None,
) -> Classifier:
    """Replace a model's classifier by projection → last norm → head.

    Args:
        model: a timm name (timm:NAME, hf-hub:… and local-dir:… too), torchvision:NAME, or a module, which is copied
            and never changed.
        head: a name of `ncreg.heads.HEADS`, a module of one's own (copied) from features to logits, or "keep" for the
            model's own classifier: the logits stay the model's, and nothing is drawn.
        num_classes: C; None takes the model's own number.
        norm: a kind that `ncreg.norms.last_norm` knows, or a module of one's own (copied) on (batch, d); None is
            "batch", and none with head "keep".
        project: width d of a learned linear map (no bias) before the norm, or "fixed" for
            `ncreg.models.FixedProjector`, of the backbone's own width, with nothing to learn; None for none.
        classifier: path of the classifier in a module that is not timm's, such as "fc" or "classifier.6";
            None takes the last Linear or Conv2d to run that is as wide as the output.
        input_size: (channels, height, width) of one input, where the model itself does not say it.
        model_args: for names: what `timm.create_model` takes (pretrained, in_chans, img_size, …); of torchvision's
            pretrained, in_chans, and what the model's builder takes.
        head_args: for named heads: what the constructor takes beside in_features and num_classes.
        weights: for names: what `ncreg.load_weights` reads, in place of timm's pretrained weights. The backbone's
            are taken from it, whatever container and prefix they have there; a classifier in it only by head "keep".

    The result keeps device, dtype and train/eval mode of what it was given. Random numbers: the backbone is
    drawn first; projection, norm and head follow in a fork of torch's generator, which is left where the
    backbone left it. Two runs of one seed that differ in the head alone share backbone, projection and every
    later draw. Dropout that a model keeps before its classifier stands before the norm: a warning says so.

    With head "keep" the features are what enters the model's last layer: of several layers that see features of their
    own (distilled pairs), those side by side. Where something stands behind the layers (squeezenet's ReLU, volo's
    maximum over tokens), `head` holds their weights for the measures, and the whole model gives the logits. A name
    without weights is warned of: what is kept is random then.

    Raises:
        ValueError: if the classifier can't be found, features are not (batch, width), the head does not fit, a key of
            head_args or model_args is unknown, neither the caller nor the model says the number of classes, or
            weights do not cover the backbone.
        ConnectionError: if pretrained weights are not on this disk and the hub is out of reach.
        TypeError: if model, head or norm is neither a name nor a module, or a size no integer.

    Example:
        >>> classifier = swap_head("test_resnet", "etf", num_classes=10)
        >>> logits, features = classifier(torch.rand(2, 3, 32, 32), with_features=True)
        >>> logits.shape, features.shape
        (torch.Size([2, 10]), torch.Size([2, 96]))

        >>> trained = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4), torch.nn.Linear(4, 3))
        >>> kept = swap_head(trained, "keep", input_size=(3, 2, 2))
        >>> images = torch.rand(5, 3, 2, 2)
        >>> torch.equal(kept(images), trained(images)), kept.head_hidden_size
        (True, 4)
    """
    keeps = isinstance(head, str) and head == "keep"
    norm = ("none" if keeps else "batch") if norm is None else norm
    _check_types(model, head, norm, model_args=model_args, head_args=head_args, weights=weights, classifier=classifier)
    if isinstance(model, str):
        model = model.removeprefix("timm:")
    if num_classes is not None:
        named = isinstance(head, str) and not keeps  # another head may have a single logit
        num_classes = check_num_classes(num_classes) if named else check_integer("num_classes", num_classes, 1)
    input_size = _checked_size(input_size)
    if keeps:
        _check_keeps(norm, project, head_args)
        return _kept(model, num_classes, model_args, classifier, input_size, weights)
    headless = _headless(model, model_args, classifier, input_size, weights)
    backbone = headless.module
    _warn_of_dropout(model, headless)
    new_head = _head_maker(head, headless, num_classes, head_args)
    *tail, last = _new_parts(headless, project, norm, new_head)
    features, logits = _try_out(headless.features, tail, last)
    if num_classes is not None and logits.shape[1] != num_classes:
        raise ValueError(f"head gives {logits.shape[1]} logits where num_classes={num_classes}")
    swapped = Classifier(
        backbone,
        tail[-1],
        last,
        project=tail[0] if len(tail) == 2 else None,
        preprocess=copied(model.preprocess) if isinstance(model, Classifier) else None,
        num_classes=logits.shape[1],
        head_hidden_size=features.shape[1],
    )
    swapped._removed, swapped._new_head = headless.removed, new_head if isinstance(head, str) else None
    set_own_mode(swapped, backbone.training)
    if isinstance(model, Classifier):
        swapped.image_shape, swapped.data_config = model.image_shape, model.data_config
        swapped.class_names = model.class_names if swapped.num_classes == model.num_classes else None
    if isinstance(head, str) and isinstance(norm, str):
        swapped.built_by = {"head": head, "norm": norm, "project": project, "head_args": dict(head_args or {})}
    return swapped


def _check_types(
    model: object, head: object, norm: object, *, weights: object, classifier: object, **keywords: object
) -> None:
    """Refuse what is of another type; `keywords` are the dicts of keyword arguments by name."""
    for name, value in {"model": model, "head": head, "norm": norm}.items():
        if not isinstance(value, str | nn.Module):
            raise TypeError(f"{name} must be a name or an nn.Module, got {described(value)}")
    for name, args in keywords.items():
        if not (args is None or isinstance(args, Mapping)):
            raise TypeError(f"{name}={args!r} must be a dict of keyword arguments, not {type(args).__name__}")
    if not (weights is None or isinstance(weights, Mapping)):
        raise TypeError(f"weights must be a dict of tensors by name, not {weights!r}: ncreg.load_weights reads a file")
    if not (classifier is None or isinstance(classifier, str)):
        raise TypeError(f"classifier={classifier!r} must be the path of a submodule, such as 'fc', or None")


def _warn_of_dropout(model: str | nn.Module, headless: Headless) -> None:
    """Say where dropout stands before the last norm, and what takes it away."""
    if rates := dropout_before_head(headless):
        inside = model._named_backbone[0] if isinstance(model, Classifier) else ""
        by_hand = "; ".join(f"model.{inside}{place} = 0.0" for place in rates)
        argument = "dropout" if isinstance(model, str) and model.startswith(PREFIX) else "drop_rate"
        by_name = f"model_args={{'{argument}': 0.0}} removes it"
        remedy = by_name if isinstance(model, str) else f"{by_hand} before swap_head(model, ...) removes it"
        warnings.warn(
            f"dropout of rate {max(rates.values())} stands between the backbone and the last norm and blurs its "
            f"statistics; {remedy}",
            UserWarning,
            stacklevel=3,
        )


def _checked_size(input_size: Sequence[int] | None) -> tuple[int, ...] | None:
    if input_size is None:
        return None
    if isinstance(input_size, str) or not isinstance(input_size, Iterable):
        raise TypeError(f"input_size={input_size!r} must be a sequence of integers, such as (3, 224, 224)")
    size = tuple(check_integer(f"input_size[{place}]", side, 1) for place, side in enumerate(input_size))
    if not size:
        raise ValueError("input_size is empty: (channels, height, width) of one input, or None")
    return size


def _check_keeps(norm: str | nn.Module, project: int | str | None, head_args: Mapping[str, Any] | None) -> None:
    """Refuse what would stand between the features and a classifier that is kept."""
    given = {"norm": None if norm == "none" else norm, "project": project, "head_args": head_args or None}
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}={value!r} with head='keep': the model's own classifier takes its own features")


def _kept(
    model: str | nn.Module,
    num_classes: int | None,
    model_args: Mapping[str, Any] | None,
    classifier: str | None,
    input_size: Sequence[int] | None,
    weights: Mapping[str, Any] | None,
) -> Classifier:
    """The model around its own classifier."""
    if isinstance(model, Classifier):
        _check_as_it_is(model, classifier, model_args, weights)
        kept = copied(model)
    else:
        if isinstance(model, str):
            _check_no_path(model, classifier)
            _warn_of_random_weights(model, model_args or {}, weights)
            model = _from_name(model, model_args or {}, weights, num_classes=num_classes, with_head=True)
            model_args = weights = None
        headless = _headless(model, model_args, classifier, input_size, weights)
        kept = keep_head(model, headless)
        kept.built_by = {"head": "keep", "norm": "none", "project": None, "head_args": {}}
    if num_classes is not None and kept.num_classes != num_classes:
        raise ValueError(f"num_classes={num_classes}, but the model's own classifier has {kept.num_classes} outputs")
    return kept


def _warn_of_random_weights(name: str, model_args: Mapping[str, Any], weights: Mapping[str, Any] | None) -> None:
    """Say that there is nothing in the classifier that would be worth keeping."""
    if weights is None and not any(model_args.get(key) for key in ("pretrained", "checkpoint_path")):
        warnings.warn(
            f"head='keep' on random weights: backbone and classifier of {name!r} are drawn; "
            "model_args={'pretrained': True} takes trained ones, weights=ncreg.load_weights(FILE) those of a file",
            UserWarning,
            stacklevel=4,
        )


def _from_name(name: str, model_args: Mapping[str, Any], weights: Mapping[str, Any] | None, **how: Any) -> nn.Module:
    if name.startswith(PREFIX):
        return torchvision_model(name, model_args, weights, **how)
    return from_timm_name(name, model_args, weights, **how)


def _check_no_path(model: str, classifier: str | None) -> None:
    if classifier is not None:
        raise ValueError(f"classifier={classifier!r} is for modules; timm knows where {model!r} has its own")


def _check_as_it_is(
    model: nn.Module,
    classifier: str | None,
    model_args: Mapping[str, Any] | None,
    weights: Mapping[str, Any] | None,
) -> None:
    """Refuse what would build a module that is there already, and another path to a classifier that is known."""
    if model_args:
        raise ValueError(f"model_args={dict(model_args)} is for timm names; a module is taken as it is")
    if weights is not None:
        raise ValueError("weights is for timm names; a module is taken as it is: load its weights before")
    if isinstance(model, Classifier) and classifier is not None:
        raise ValueError(f"classifier={classifier!r} is for other modules: that of a Classifier is its head")


def _headless(
    model: str | nn.Module,
    model_args: Mapping[str, Any] | None,
    classifier: str | None,
    input_size: Sequence[int] | None,
    weights: Mapping[str, Any] | None,
) -> Headless:
    """The model without its classifier, and the features of one example."""
    own_classes: Any
    if isinstance(model, str):
        _check_no_path(model, classifier)
        if model.startswith(PREFIX):
            return behead(torchvision_model(model, model_args or {}, weights), None, input_size)
        backbone = from_timm_name(model, model_args or {}, weights)
        own_classes = backbone.pretrained_cfg.get("num_classes")  # type: ignore[union-attr, operator]
    else:
        _check_as_it_is(model, classifier, model_args, weights)
        if isinstance(model, WholeModel):  # its classifier is still in place
            place = model._removed
            path, size = (None, input_size) if place is None else (place.path, place.input_size)
            return _headless(model.backbone.model, None, path, size, None)
        if isinstance(model, Classifier):
            features = parameter_like(model.backbone).new_zeros(1, model.backbone_width)
            return Headless(copied(model.backbone), features, model.num_classes or None, model._removed)
        if classifier is not None or not callable(getattr(model, "reset_classifier", None)):
            return behead(copied(model), classifier, input_size)
        backbone, own_classes = copied(model), getattr(model, "num_classes", None)
        behead_timm(backbone)
    features = pooled_features(backbone, example_image(backbone, input_size))
    return Headless(backbone, features, own_classes or None)


def _head_maker(
    head: str | nn.Module, headless: Headless, num_classes: int | None, head_args: Mapping[str, Any] | None
) -> Callable[..., nn.Module]:
    """Width (and, for a head by name, perhaps another number of classes) → head."""
    if not isinstance(head, str):
        if head_args:
            raise ValueError(f"head_args={dict(head_args)} is for heads by name; head is a module already")
        return lambda _: copied(head)
    if head not in HEADS:
        raise ValueError(f"head={head!r} is unknown; known: {', '.join(HEADS)}, or pass a module of your own")
    num_classes = headless.num_classes if num_classes is None else num_classes
    if num_classes is None:
        raise ValueError("num_classes is required: the model does not say how many classes it tells apart")
    taken = sorted({"in_features", "num_classes"} & set(head_args or {}))
    if taken:
        raise ValueError(
            f"head_args holds {', '.join(taken)}: swap_head knows the width; pass num_classes to it itself"
        )
    check_keywords("head_args", head_args or {}, HEADS[head], besides=("in_features", "num_classes"))
    return partial(HEADS[head], num_classes=num_classes, **(head_args or {}))


def _new_parts(
    headless: Headless, project: int | str | None, norm: str | nn.Module, new_head: Callable[..., nn.Module]
) -> list[nn.Module]:
    """[projection,] norm and head, on the backbone's device, in its dtype and mode.

    They are drawn on the CPU whatever the default device is: the same numbers everywhere.
    """
    width = headless.features.shape[1]
    parts: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        if project is not None:
            projection = _projection(width, project)
            parts.append(projection)
            width = projection.out_features
        parts.append(last_norm(norm, width) if isinstance(norm, str) else copied(norm))
        with drawn_for(headless.features):  # class vectors of a model in float64 are exact to float64
            parts.append(new_head(width))
    return [part.to(headless.features).train(headless.module.training) for part in parts]


def _projection(width: int, project: int | str) -> nn.Linear | FixedProjector:
    if project == "fixed":
        return FixedProjector(width)
    if isinstance(project, str):
        raise ValueError(f"project={project!r} must be a width (an integer of at least 1), 'fixed' or None")
    return nn.Linear(width, check_integer("project", project, 1), bias=False)


def _normed(norm: nn.Module, features: Tensor) -> Tensor:
    """The norm's output for these features; a norm that does not take them is refused by name."""
    shape = tuple(features.shape)
    try:
        normed = norm(features)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"norm={type(norm).__name__} does not take the features (batch, {shape[1]}) before it ({error}): "
            f"it must be built for width {shape[1]}, or pass project= with the width that it has"
        ) from error
    if not isinstance(normed, Tensor) or normed.ndim != 2:
        got = tuple(normed.shape) if isinstance(normed, Tensor) else type(normed).__name__
        raise ValueError(f"norm={type(norm).__name__} must give features (batch, dim), got {got}")
    return normed


def _try_out(features: Tensor, tail: list[nn.Module], head: nn.Module) -> tuple[Tensor, Tensor]:
    """Features that enter the head, and logits, of one example.

    Raises:
        ValueError: if norm or head don't take these features, or logits are not (batch, classes).
    """
    with evaluating(*tail, head):
        for part in tail[:-1]:
            features = part(features)
        features = _normed(tail[-1], features)
        width = getattr(head, "in_features", features.shape[1])
        if width != features.shape[1]:
            raise ValueError(
                f"head takes {width} features, the model gives {features.shape[1]}: "
                f"pass project={width} or another head"
            )
        logits = head(features)
    if logits.ndim != 2:
        raise ValueError(f"head must give logits (batch, classes), got shape {tuple(logits.shape)}")
    return features, logits
