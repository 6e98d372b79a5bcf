"""Where a run starts: the backbone's weights from a file or another run, of a run its projection, norm and head too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ncreg.models import Classifier, MatchedWeights
from ncreg.pretrained import load_weights
from recipes.core.config import ModelConfig
from recipes.core.errors import UserError
from recipes.core.own_code import is_own

MOST_NAMED = 4
"""Unused parts of a file of weights, or classes, that a note names at most."""

BEHIND = ("project", "norm", "head")
"""The parts of a classifier behind its backbone."""


def start_of(model: ModelConfig) -> tuple[str | None, str]:
    """What a configuration starts from, and the key that says it, for messages."""
    if model.start_from is not None:
        return model.start_from, f"start-from={model.start_from}"
    return model.weights, f"model.weights={model.weights}"


def read_weights(source: str | Path | None, argument: str) -> dict[str, Any] | None:
    """The tensors of a file, run or folder, None without one.

    Args:
        source: what the user named.
        argument: how, for messages.

    Raises:
        UserError: they cannot be read.
    """
    if source is None:
        return None
    try:
        return load_weights(source)
    except (FileNotFoundError, ValueError) as error:
        run = Path(source).parent
        wanted = f"; {run} is the run, which can be given itself, or a file in its checkpoints/"
        raise UserError(f"{argument}: {error}{wanted if (run / 'config.yaml').is_file() else ''}") from None


def check_run(weights: Mapping[str, Any], args: Mapping[str, Any], argument: str) -> None:
    """Refuse to start from what is no run of recipes/train.py, or from one with another backbone.

    Args:
        weights: what `read_weights` gave.
        args: arguments of `swap_head` for the new run.
        argument: what the user named, for messages.

    Raises:
        UserError: says what to give instead.
    """
    if not {"build", "class_names", "model"} <= weights.keys():
        raise UserError(f"{argument} is no run of recipes/train.py: --model.weights takes the backbone of other files")
    backbone = weights["build"]["model"]
    if backbone.partition(".")[0] != args["model"].partition(".")[0]:  # behind the point timm names the pretraining
        raise UserError(
            f"{argument}: its backbone is {backbone}, this run's {args['model']}; --model.backbone {backbone} fits, "
            "--model.weights takes weights for another"
        )


def keep_head(
    classifier: Classifier, weights: Mapping[str, Any], args: Mapping[str, Any], class_names: Sequence[str]
) -> str:
    """Take projection, norm and head from another run where they fit; a sentence on what was done, and why.

    Args:
        classifier: the new run's, changed in place.
        weights: a checkpoint of the other run.
        args: arguments of `swap_head` that built `classifier`.
        class_names: of the new run's data.

    Raises:
        UserError: the other run has diverged.
    """
    why = why_new(classifier, weights, args, class_names)
    if why:
        return f"projection, norm and head are new: {why}"
    order = torch.tensor([list(weights["class_names"]).index(name) for name in class_names])
    for part in BEHIND:
        tensors = _under(weights["model"], part)
        if not all(value.isfinite().all() for value in tensors.values()):
            raise UserError(f"the {part} of the run to start from is not finite: it has diverged")
        if part == "head":
            tensors = {
                name: value[order] if len(order) in value.shape[:1] else value for name, value in tensors.items()
            }
        getattr(classifier, part).load_state_dict(tensors)
    return f"projection, norm and head are kept: the same {len(class_names)} classes, the same kind of head"


def why_new(
    classifier: Classifier, weights: Mapping[str, Any], args: Mapping[str, Any], class_names: Sequence[str]
) -> str:
    """Why projection, norm and head cannot be taken from another run; empty if they can, see `keep_head`."""
    then, known = weights["build"], list(weights["class_names"])
    if single := sorted({*class_names} ^ {*known}):
        more = f" and {len(single) - MOST_NAMED} more" if len(single) > MOST_NAMED else ""
        return f"{', '.join(single[:MOST_NAMED])}{more} are classes of one of the two runs alone"
    for key in ("head", "norm", "project"):
        if then.get(key) != args[key]:
            return f"{key} is {then.get(key)} there, {args[key]} here"
    frame_is_kept = "weight" in classifier.head.state_dict()
    if known != list(class_names) and (not frame_is_kept or is_own(args["head"])):
        return f"the classes are in another order, which head {args['head']} cannot follow"
    for part in BEHIND:
        theirs, ours = _under(weights["model"], part), getattr(classifier, part).state_dict()
        if {name: value.shape for name, value in theirs.items()} != {name: value.shape for name, value in ours.items()}:
            return f"the {part} there has other tensors"
    for key in sorted(then["head_args"].keys() | args["head_args"].keys()):
        there, here = (held["head_args"].get(key) for held in (then, args))
        if there != here and not (key == "seed" and frame_is_kept):
            return f"{key} of the head is {there} there, {here} here; --model.head_args '{{{key}: {there}}}' keeps it"
    return ""


def _under(tensors: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}


def describe(found: MatchedWeights, *, kept: bool = False) -> str:
    """A sentence on what a file gives to the backbone, and, unless the rest is `kept`, what it does not."""
    names = [] if kept else sorted({name.rpartition(".")[0] or name for name in found.unused})
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    unused = f"; not used: {', '.join(names[:MOST_NAMED])}{more}" if names else ""
    count = len(found.matched) + len(found.misshapen)  # timm fits first convolutions and position embeddings
    taken = f"{count} tensors" if not found.missing else "translated by timm"
    return f"the backbone's weights ({taken}{f', under {found.prefix}' if found.prefix else ''}){unused}"


def moments_beside(weights: Mapping[str, Any], prefix: str) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation that a classifier of ours normalises with, from the weights beside its backbone."""
    around = prefix.removesuffix("backbone.")
    held: Any = weights
    for part in around.split(".")[:-1]:
        held = held.get(part, {})
    if "preprocess.mean" not in held:
        return None
    return held["preprocess.mean"].flatten().tolist(), held["preprocess.std"].flatten().tolist()
