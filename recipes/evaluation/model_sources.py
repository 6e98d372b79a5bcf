"""From the word MODEL to a classifier: timm, torchvision, a folder, a function in a file."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.imagenet_info import ImageNetInfo
from torch import nn

from ncreg.models import Classifier, load_matched, match_weights, swap_head
from recipes.core.errors import UserError
from recipes.core.own_code import in_a_line, is_own, load_own, where
from recipes.core.suggestions import a_kind
from recipes.evaluation.model_images import first_channels, stated_sides
from recipes.evaluation.model_options import OTHER_MODELS, ModelOptions
from recipes.training.image_side import TrainedSide, built_for, native_size, side_args, trained_side
from recipes.training.start import read_weights

NAMES_IN_FILES = ("class_names", "label_names", "classes", "class_to_idx")
"""Keys under which files of weights hold the names of their classes."""

MOST_UNUSED = 4
FAULTS = (ValueError, TypeError, KeyError, RuntimeError, OSError, AttributeError, AssertionError)
"""What building a model from arguments or a file that do not fit raises."""


OPTION_OF = {
    "input_size=(channels, height, width)": "--image-size N and --channels N",
    "classifier='…'": "--classifier PATH",
}
"""Options that stand for arguments of swap_head in its messages."""


@dataclass
class FoundModel:
    """A classifier with its own head.

    Attributes:
        classifier: the model.
        names: lists of the names of its outputs, any of which may be the data's; empty where it has none.
        notes: sentences for the user.
    """

    classifier: Classifier
    names: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def source_of(word: str) -> Callable[[ModelOptions], FoundModel]:
    """What builds the classifier that a word names.

    Raises:
        UserError: the word names none; the message says what it can be.
    """
    kind, _, rest = word.partition(":")
    if kind in ("timm", "torchvision") and rest:
        return partial(_by_name, word, rest if kind == "timm" else word)
    if kind == "hf-hub" and rest:
        return partial(_of_hub, word, rest)
    if is_own(word):
        return partial(_of_function, word)
    if Path(word).is_dir() and (Path(word) / "config.json").is_file():
        return partial(_of_folder, word, Path(word))
    if Path(word).suffix == ".py":
        raise UserError(f"MODEL {word}: name the function that returns the model, {word}:FUNCTION")
    if Path(word).suffix in (".pth", ".safetensors", ".bin") and Path(word).is_file():
        raise UserError(f"MODEL {word} holds weights alone: name their model, timm:NAME --weights {word}")
    raise UserError(
        f"RUN {word} is no run folder: it has no config.yaml; recipes/train.py makes run folders, and prints their "
        f"names. Another MODEL is {OTHER_MODELS}"
    )


def find_model(word: str, options: ModelOptions) -> FoundModel:
    """The classifier that a word names.

    Raises:
        UserError: there is none, or it cannot be built.
    """
    build = source_of(word)
    try:
        return build(options)
    except ConnectionError as error:
        reason = str(error).partition("; swap_head takes")[0]
        raise UserError(f"MODEL {word}: {reason}; --weights FILE takes weights on this disk") from None
    except FAULTS as error:
        reason = " ".join(str(error).split())
        for argument, option in OPTION_OF.items():
            reason = reason.replace(argument, option)
        if "forward returns a " in reason and "not logits" in reason:
            what = reason.partition("forward returns a ")[2].partition(",")[0]
            reason = (
                f"forward returns a {what}: wrap it in a module that returns logits (batch, classes), alone or under "
            )
            reason += "the name logits"
        raise UserError(f"MODEL {word}: {reason}") from None


def _by_name(word: str, name: str, options: ModelOptions) -> FoundModel:
    """A model of timm or torchvision, with the weights of a file or pretrained."""
    args: dict[str, Any] = {} if options.channels is None else {"in_chans": options.channels}
    if options.weights is None and options.untrained is None:
        if name == word.removeprefix("timm:") and timm.is_model(name) and not _has_weights(name):
            raise UserError(f"MODEL {word} has no pretrained weights: --weights FILE")
        args["pretrained"] = True
    weights = read_weights(options.weights, f"--weights {options.weights}")
    notes = []
    if weights is not None:
        trained, (native, fixed) = _trained_side(name, weights), native_size(name)
        if options.image_size is None:
            notes = _told_side(trained, native)
            options = replace(options, image_size=trained.pixels if trained and trained.pixels != native else None)
        if fixed and trained and native != trained.pixels == options.image_size:
            args |= built_for(name, trained.pixels)  # also where a model would resample its embedding each time
    with drawn(options.untrained):
        classifier = keep(name, options, num_classes=options.num_classes, model_args=args, weights=weights)
    if options.untrained is not None:
        return FoundModel(classifier)
    if weights is None:
        return FoundModel(classifier, _imagenet_names(classifier))
    return FoundModel(
        classifier, names_in(weights), [f"--weights {options.weights}: {told(weights, classifier)}", *notes]
    )


def _told_side(trained: TrainedSide | None, native: int) -> list[str]:
    """A sentence on the side of the images that weights were trained on, unless it is the model's usual one."""
    if trained is None:
        return [
            f"the file does not tell the side of the images that it was trained on: {native} pixels, the usual of "
            "MODEL, are taken; --image-size N says another"
        ]
    return [] if trained.pixels == native else [f"{trained.told_by} of {trained.pixels} pixels, which are taken"]


def _trained_side(name: str, weights: Mapping[str, Any]) -> TrainedSide | None:
    """The side of the images of weights; None also for a name that is no model."""
    try:
        return trained_side(name, weights)
    except FAULTS:
        return None  # building the model says what is wrong


def keep(model: str | nn.Module, options: ModelOptions, **more: Any) -> Classifier:
    """The model around its own classifier, in eval mode."""
    size = None
    if options.image_size is not None and isinstance(model, str):
        args = more.get("model_args", {})
        more["model_args"] = {**args, **side_args(model, options.image_size, args)}
    elif not isinstance(model, str):
        stated = stated_sides(model) if options.image_size is None else (options.image_size,) * 2
        size = None if stated is None else (options.channels or first_channels(model), *stated)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="dropout of rate")  # the model runs in eval mode
        if options.untrained is not None:  # asked for
            warnings.filterwarnings("ignore", message="head='keep' on random weights")
        kept = swap_head(model, "keep", classifier=options.classifier, input_size=size, **more)
    return kept.eval()


@contextmanager
def drawn(seed: int | None) -> Iterator[None]:
    """Random weights are drawn with this seed inside the block; None changes nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def names_in(weights: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The class names that a file of weights holds beside its tensors."""
    for key in NAMES_IN_FILES:
        held = weights.get(key)
        if isinstance(held, Mapping) and held and sorted(held.values()) == list(range(len(held))):
            return [tuple(map(str, sorted(held, key=held.__getitem__)))]
        if isinstance(held, list | tuple) and held and all(isinstance(name, str) for name in held):
            return [tuple(held)]
    return []


def told(weights: Mapping[str, Any], classifier: Classifier) -> str:
    """How much of a file a model took, in words."""
    backbone = getattr(classifier.backbone, "model", classifier.backbone)  # a WholeModel holds it all there
    found = match_weights(weights, backbone)
    head = _classifier_paths(classifier)
    unused = [name for name in found.unused if not name.startswith(head)]
    count = len(found.matched) + len(found.misshapen) + len(found.unused) - len(unused)
    taken = f"{count} tensors taken" if not found.missing else "taken, translated by timm"
    under = f", from under {found.prefix.rstrip('.')}" if found.prefix else ""
    more = f" and {len(unused) - MOST_UNUSED} more" if len(unused) > MOST_UNUSED else ""
    left = f"; not used: {', '.join(unused[:MOST_UNUSED])}{more}" if unused else ""
    return f"{taken}{under}{left}{_fitted(found.misshapen)}"


def _fitted(misshapen: Sequence[str]) -> str:
    """What timm brought to the model's shape, in words; images of the size of training need no such thing."""
    if not misshapen:
        return ""
    position = any("pos" in words.partition(" ")[0] for words in misshapen)
    way = "; --image-size N, the side of the images that it was trained on, leaves it as it is" if position else ""
    more = f" and {len(misshapen) - MOST_UNUSED} more" if len(misshapen) > MOST_UNUSED else ""
    return f"; resampled to MODEL's shape: {', '.join(misshapen[:MOST_UNUSED])}{more}{way}"


def _classifier_paths(classifier: Classifier) -> tuple[str, ...]:
    removed: Any = classifier._removed
    if removed is not None:
        return (f"{removed.path}.",)
    cfg: Mapping[str, Any] = getattr(classifier.backbone, "pretrained_cfg", {})
    paths = cfg.get("classifier") or "head"
    return tuple(f"{path}." for path in ([paths] if isinstance(paths, str) else paths))


def _has_weights(name: str) -> bool:
    found = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    return found is None or found.has_weights


def _imagenet_names(classifier: Classifier) -> list[tuple[str, ...]]:
    """The names of ImageNet's 1,000 classes, as WordNet's numbers and in words; none for other numbers of classes."""
    if classifier.num_classes != 1000:
        return []
    info = ImageNetInfo("imagenet-1k")
    return [tuple(info.label_names()), tuple(info.label_descriptions(detailed=False, as_dict=False))]


def _of_hub(word: str, repository: str, options: ModelOptions) -> FoundModel:
    _refuse(word, options, "weights", "num_classes", "untrained")
    try:
        return _as_classifier(Classifier.from_pretrained(repository))
    except ValueError as error:
        if "its architecture is" not in str(error):
            raise
    return _written_by_timm(keep(word, options, model_args={"pretrained": True}))


def _of_folder(word: str, folder: Path, options: ModelOptions) -> FoundModel:
    """A folder that `Classifier.save_pretrained`, or timm of a folded model, wrote."""
    _refuse(word, options, "weights", "num_classes", "untrained")
    architecture = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architecture", "")
    if architecture == "ncreg.Classifier":
        return _as_classifier(Classifier.from_pretrained(folder))
    return _written_by_timm(keep(f"local-dir:{folder}", options, model_args={"pretrained": True}))


def _as_classifier(classifier: Classifier) -> FoundModel:
    return FoundModel(classifier.eval(), [] if classifier.class_names is None else [tuple(classifier.class_names)])


def _written_by_timm(classifier: Classifier) -> FoundModel:
    names = getattr(classifier.backbone, "pretrained_cfg", {}).get("label_names")
    return FoundModel(classifier, [tuple(names)] if names else _imagenet_names(classifier))


def _of_function(word: str, options: ModelOptions) -> FoundModel:
    """What a function in a file returns."""
    _refuse(word, options, "num_classes")
    with drawn(options.untrained):
        module = _called(word, load_own(word, "MODEL"))
    module.register_forward_hook(_logits_of_mapping)
    notes, names, weights = [], _own_names(module), read_weights(options.weights, f"--weights {options.weights}")
    if weights is not None:
        found = load_matched(module, weights, source=f"--weights {options.weights}")
        notes = [f"--weights {options.weights}: {len(found.matched)} tensors taken"]
        names = names or names_in(weights)
    return FoundModel(keep(module, options), names, notes)


def _logits_of_mapping(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Hook after `forward`: of a mapping with logits, such as an output of Hugging Face's models, the logits."""
    return output["logits"] if isinstance(output, Mapping) and "logits" in output else output


def _called(word: str, build: Callable[[], Any]) -> nn.Module:
    """The module that somebody's function returns; its error as one line that names the line of their file."""
    file = Path(word.rpartition(":")[0]).expanduser().absolute()
    try:
        module = build()
    except Exception as error:  # the user's code may raise anything
        raise UserError(f"MODEL {word}: calling it fails{where(error, file)}: {in_a_line(error)}") from None
    if not isinstance(module, nn.Module):
        raise UserError(f"MODEL {word} returns {a_kind(module)}, not a torch.nn.Module")
    return module


def _own_names(module: nn.Module) -> list[tuple[str, ...]]:
    """Names that a module carries: class_names, timm's label_names, or those of Hugging Face."""
    cfg: Any = getattr(module, "pretrained_cfg", None) or {}
    labels: Any = getattr(getattr(module, "config", None), "id2label", None)
    held: Any = getattr(module, "class_names", None) or cfg.get("label_names")
    if not held and isinstance(labels, Mapping):
        held = [labels[key] for key in sorted(labels, key=_class_number)]
        if all(re.fullmatch(r"LABEL_\d+", str(name)) for name in held):  # transformers' stand-ins for names
            return []
    return [tuple(map(str, held))] if isinstance(held, Sequence) and held else []


def _class_number(key: Any) -> tuple[int, str]:
    """Where a key of id2label stands: config.json holds the numbers as strings, and "10" comes after "9"."""
    return (int(key), "") if str(key).isdecimal() else (0, str(key))


def _refuse(word: str, options: ModelOptions, *names: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            option = name.replace("_", "-")
            raise UserError(f"--{option} is for timm: and torchvision: models; MODEL {word} has its own")
