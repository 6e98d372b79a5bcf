"""What timm's loaders read of a model, pretrained_cfg: size, channels, scaling and normalisation of its images."""

from collections.abc import Mapping, Sequence
from typing import Any

from timm.models import get_model_input_config
from torch import nn

from ncreg.models._backbone import example_image

RECIPES_RESIZE = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
"""The resize of recipes/, in timm's words: the shorter edge is scaled to the side, then the centre is cropped."""

OF_OTHER_IMAGES = ("test_input_size", "test_crop_pct", "test_pool_size", "min_input_size")
OF_OTHER_CLASSES = ("label_names", "label_descriptions", "label_offset")


def classifier_cfg(classifier: Any) -> dict[str, Any]:
    """pretrained_cfg of a `Classifier`: names with its prefixes; mean 0 and std 1 where it normalises inside.

    Raises:
        AttributeError: the backbone is not timm's, and nothing says which images it takes.
    """
    cfg = _shared_cfg(classifier)
    first = cfg.get("first_conv")
    if first:
        prefix, _ = classifier._named_backbone
        cfg["first_conv"] = f"{prefix}{first}" if isinstance(first, str) else [f"{prefix}{f}" for f in first]
    cfg["classifier"] = "head"
    if not isinstance(classifier.preprocess, nn.Identity):
        channels = cfg["input_size"][0]
        cfg |= {"mean": (0.0,) * channels, "std": (1.0,) * channels}
    return cfg


def folded_cfg(classifier: Any) -> dict[str, Any]:
    """pretrained_cfg of the folded model: normalisation stays outside it, so mean and std are those of `Normalize`.

    Raises:
        AttributeError: the backbone is not timm's, and nothing says which images it takes.
    """
    cfg = _shared_cfg(classifier)
    for name in ("mean", "std"):
        numbers = getattr(classifier.preprocess, name, None)
        if numbers is not None:
            values = tuple(numbers.flatten().tolist())
            cfg[name] = values if len(values) > 1 else values * cfg["input_size"][0]
    return cfg


def _shared_cfg(classifier: Any) -> dict[str, Any]:
    """The backbone's own pretrained_cfg with this classifier's images and classes in place of the former ones."""
    backbone = classifier.backbone
    own: Mapping[str, Any] = getattr(backbone, "pretrained_cfg", {})
    cfg = {key: value for key, value in own.items() if key not in OF_OTHER_CLASSES}
    cfg["num_classes"] = classifier.num_classes
    if classifier.class_names is not None and len(classifier.class_names) == classifier.num_classes:
        cfg["label_names"] = tuple(classifier.class_names)
    if own:
        cfg |= {key: get_model_input_config(backbone)[key] for key in ("input_size", "fixed_input_size")}
    else:
        cfg["input_size"] = _input_size(classifier)
    if classifier.image_shape is None:
        return cfg
    return cfg | _cfg_of_images(cfg, classifier.image_shape, classifier.data_config)


def _cfg_of_images(
    cfg: dict[str, Any], image_shape: Sequence[int], data_config: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Size and resize of the images that a classifier was trained on; takes away what was said of others, in place."""
    for key in OF_OTHER_IMAGES:
        cfg.pop(key, None)
    resized = tuple(image_shape[1:]) != tuple(cfg["input_size"][1:])
    pool = {"pool_size": None} if resized and "pool_size" in cfg else {}
    return {"input_size": tuple(image_shape), **pool, **(RECIPES_RESIZE if data_config is None else data_config)}


def _input_size(classifier: Any) -> tuple[int, ...]:
    """(channels, height, width) of the images of a backbone that is not timm's."""
    if classifier.image_shape is not None:
        return tuple(classifier.image_shape)
    known = None if classifier._removed is None else classifier._removed.input_size
    size = tuple(example_image(classifier.backbone, known).shape[1:])
    if isinstance(classifier.preprocess, nn.Identity) or len(size) != 3:
        raise AttributeError(
            f"pretrained_cfg is timm's: the backbone {type(classifier.backbone).__name__} has none; "
            "set image_shape and preprocess for the classifier to have one"
        )
    return size
