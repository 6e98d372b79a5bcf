"""Weights from a file for a backbone: which of its tensors they cover, under which prefix, and what is left over."""

import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

from torch import Tensor, nn

from ncreg._wrappers import without_marks

PREFERRED = ("state_dict_ema.", "model_ema.", "state_dict.", "model.", "")
"""Of equally good prefixes the one of these, as timm prefers the average; an `ncreg` checkpoint's is under "model"."""

MOST_NAMED = 4
"""Tensors that a message names at most."""


class MatchedWeights(NamedTuple):
    """Weights as they fit a backbone.

    Attributes:
        prefix: what stands before the backbone's names in the weights, such as "module." or "model.backbone.".
        tensors: what stands under this prefix, without it; the classifier's tensors may be among them.
        matched: names of the backbone's tensors that are among them, in the right shape.
        missing: names of the backbone's parameters and running statistics that are not.
        misshapen: part of a sentence on each tensor of another shape.
        unused: names of the model in the file that the backbone does not have, such as "fc.weight" or "norm.weight".
    """

    prefix: str
    tensors: dict[str, Tensor]
    matched: list[str]
    missing: list[str]
    misshapen: list[str]
    unused: list[str]


def match_weights(weights: Mapping[str, Any], backbone: nn.Module) -> MatchedWeights:
    """The weights of a file as they fit a backbone, whatever container and prefix they have in it.

    Args:
        weights: name → tensor; containers such as {"state_dict": {…}} may be nested, other entries are passed over.
        backbone: a model, with or without its classifier.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> found = match_weights({"state_dict": {"module.weight": model.weight, "module.bias": model.bias}}, model)
        >>> found.prefix, found.missing
        ('state_dict.module.', [])
    """
    flat = {without_marks(name): value for name, value in _flattened(weights)}  # of parts that were compiled alone
    prefix = _best_prefix(flat, backbone.state_dict())
    found = _compared(_under(flat, prefix), backbone)
    around = _under(flat, whole) if (whole := prefix.removesuffix("backbone.")) != prefix else {}
    beside = [name for name in around if not name.startswith("backbone.")]  # norm and head of a Classifier
    return found._replace(prefix=prefix, unused=found.unused + beside)


def load_matched(
    model: nn.Module, weights: Mapping[str, Any], *, source: str = "weights", optional: Sequence[str] = ()
) -> MatchedWeights:
    """Load the weights of a file into a whole model, its classifier with it; what does not cover it is refused.

    Args:
        model: takes the weights, in place.
        weights: name → tensor, in any container and under any prefix, as `ncreg.load_weights` reads them.
        source: the words for the weights in an error.
        optional: beginnings of names that need not be there, and are left as they are where their shape differs.

    Raises:
        ValueError: tensors that are missing, of another shape, or NaN; the model is as it was then.

    Example:
        >>> model, trained = nn.Linear(2, 3), nn.Linear(2, 3)
        >>> found = load_matched(model, {"model": trained.state_dict(), "epoch": 4})
        >>> found.prefix, found.matched, bool((model.weight == trained.weight).all())
        ('model.', ['weight', 'bias'], True)
    """
    found = match_weights(weights, model)
    ignored = tuple(optional)
    needed = found._replace(
        missing=[name for name in found.missing if not name.startswith(ignored)],
        misshapen=[words for words in found.misshapen if not words.startswith(ignored)],
    )
    if needed.missing or needed.misshapen or not found.matched:
        raise ValueError(_incomplete(needed, model, source, part="model"))
    _check_numbers(found, model, source)
    model.load_state_dict({name: found.tensors[name] for name in found.matched}, strict=False)
    return found


def _under(flat: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in flat.items() if name.startswith(prefix)}


def _best_prefix(names: Iterable[str], wanted: Iterable[str]) -> str:
    """The prefix under which most of the wanted names are among the names.

    Where fewer than half are, names may be of another project, which timm translates: then it is the container's.
    """
    names, wanted, counts = list(names), set(wanted), Counter[str]()
    for name in names:
        parts = name.split(".")
        for place in range(len(parts)):
            if ".".join(parts[place:]) in wanted:
                counts["".join(f"{part}." for part in parts[:place])] += 1
    if not counts or 2 * max(counts.values()) < len(wanted):
        return next(start for start in PREFERRED if not start or any(name.startswith(start) for name in names))

    def order(prefix: str) -> tuple[int, int]:
        rank = next(place for place, start in enumerate(PREFERRED) if prefix.startswith(start))
        return -counts[prefix], rank

    return min(counts, key=order)


def _essential_names(model: nn.Module) -> set[str]:
    """Names of parameters and running statistics; other buffers (counters, masks, indices) a model makes itself."""
    statistics = {name for name, _ in model.named_buffers() if name.rpartition(".")[2].startswith("running_")}
    return {name for name, _ in model.named_parameters()} | statistics


def _flattened(weights: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in weights.items():
        if isinstance(value, Tensor):
            yield f"{above}{name}", value.detach()
        elif isinstance(value, Mapping):
            yield from _flattened(value, f"{above}{name}.")


def _compared(tensors: dict[str, Tensor], model: nn.Module) -> MatchedWeights:
    """Tensors, as they are named, with those of a model."""
    own, essential = model.state_dict(), _essential_names(model)
    there = {name: tensors[name] for name in own if name in tensors}
    matched = [name for name, value in there.items() if value.shape == own[name].shape]
    misshapen = [
        f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
        for name, value in there.items()
        if value.shape != own[name].shape
    ]
    missing = [name for name in own if name in essential and name not in there]
    unused = [name for name in tensors if name not in own]
    return MatchedWeights("", tensors, matched, missing, misshapen, unused)


@contextmanager
def complete_loading(source: str, *, strict: bool) -> Iterator[None]:
    """Within the block, weights that cover a part of a model are not loaded without a word.

    timm takes what fits, and says what did not in its log alone; all its loading goes through `load_state_dict`.

    Args:
        source: the words for the weights in the message.
        strict: whether a part is refused; else a warning names what is missing, and only no match at all is refused.

    Raises:
        ValueError: from within the block, when weights are loaded that do not fit.
    """
    load, thread = nn.Module.load_state_dict, threading.get_ident()

    def load_if_complete(module: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return load(module, state_dict, *args, **kwargs)
        found = _compared(dict(state_dict), module)
        if found.misshapen or (found.missing and (strict or not found.matched)):
            raise ValueError(_incomplete(found, module, source))
        _check_numbers(found, module, source)
        if found.missing or (strict and found.unused):
            what = f"lack {_some(found.missing)}" if found.missing else f"hold more, not used: {_some(found.unused)}"
            warnings.warn(f"{source} {what}", UserWarning, stacklevel=2)
        return load(module, state_dict, *args, **kwargs)

    with patch.object(nn.Module, "load_state_dict", load_if_complete):
        yield


def _check_numbers(found: MatchedWeights, model: nn.Module, source: str) -> None:
    """NaN anywhere, or an infinite weight, makes every logit NaN; other buffers may be infinite, as masks are."""
    essential = _essential_names(model)
    for what, names in (
        ("NaN", [name for name in found.matched if found.tensors[name].isnan().any()]),
        (
            "infinite values",
            [name for name in found.matched if name in essential and found.tensors[name].isinf().any()],
        ),
    ):
        if names:
            raise ValueError(f"{source} hold {what}: {_some(names)}: they are of a diverged run, take earlier ones")


def _incomplete(found: MatchedWeights, model: nn.Module, source: str, *, part: str = "backbone") -> str:
    """The message on weights that do not cover a model, with the prefix that would help."""
    count = len(model.state_dict())
    message = f"{source}: {len(found.matched)} of the {count} tensors of the {part} {type(model).__name__} match"
    better = match_weights(found.tensors, model)
    named = len(better.matched) + len(better.misshapen)
    if named > len(found.matched) + len(found.misshapen):
        return (
            f"{message}; {named} have the right names without the prefix {better.prefix!r}: "
            "swap_head(…, weights=ncreg.load_weights(FILE)) takes it off, and so does --model.weights FILE of a recipe"
        )
    if _lacks_classifier(found, model):
        return (
            f"{message}; only the classifier is missing, {_some(found.missing)}: they are of a backbone alone. Train a "
            "head on it, swap_head(…, head=NAME, num_classes=C, weights=…) or recipes/train.py --model.weights FILE, "
            "or take the file of the whole model"
        )
    parts = [
        message,
        f"missing are {_some(found.missing)}" if found.missing else "",
        f"of another shape are {_some(found.misshapen)}" if found.misshapen else "",
        f"the names there are {_some(list(found.tensors))}" if not found.matched else "",
    ]
    return "; ".join(part for part in parts if part) + ": are they of another architecture?"


def _lacks_classifier(found: MatchedWeights, model: nn.Module) -> bool:
    """Whether weights cover all of a model but its classifier, which they do not know at all."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    paths = cfg.get("classifier") or list(model.state_dict())[-1].rpartition(".")[0]
    heads = tuple(f"{path}." for path in ([paths] if isinstance(paths, str) else paths))
    rest = [name for name in found.missing if not name.startswith(heads)]
    known = any(name.startswith(heads) for name in found.matched)
    return bool(found.matched and found.missing) and not (rest or known or found.misshapen)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
