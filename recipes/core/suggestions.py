"""What an unknown word may have meant: a word that looks like it, or the name that other trainers use for a key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

USUAL_NAMES = {
    "amp": "precision",
    "amp_dtype": "precision",
    "arch": "model.backbone",
    "b": "data.batch_size",
    "bf16": "precision",
    "bs": "data.batch_size",
    "checkpoint": "resume",
    "clip_grad": "optim.clip",
    "data": "data.name",
    "data_dir": "data.root",
    "data_path": "data.root",
    "dataset": "data.name",
    "epochs": "tpt.max_epochs",
    "eps": "adversarial.epsilon",
    "fp16": "precision",
    "gpu": "device",
    "grad_accum_steps": "optim.accumulate",
    "hflip": "augment.flip",
    "img_size": "data.image_size",
    "input_size": "data.image_size",
    "j": "data.workers",
    "label_smoothing": "augment.smoothing",
    "learning_rate": "optim.lr",
    "log_tensorboard": "tensorboard",
    "model": "model.backbone",
    "model.args": "model.model_args",
    "model_ema": "optim.ema",
    "model_ema_decay": "optim.ema",
    "model_kwargs": "model.model_args",
    "num_workers": "data.workers",
    "opt": "optim.name",
    "optim": "optim.name",
    "optimizer": "optim.name",
    "output": "out",
    "output_dir": "out",
    "sched": "optim.schedule",
    "scheduler": "optim.schedule",
    "torchcompile": "compile",
    "val_split": "data.val_share",
    "wd": "optim.weight_decay",
}
"""Keys of a run under the names that timm's train.py and other trainers give them, with underscores for hyphens."""


def a_kind(value: object) -> str:
    """The type of a value behind its article.

    Example:
        >>> a_kind(3), a_kind([])
        ('an int', 'a list')
    """
    kind = type(value).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"


def did_you_mean(word: str, known: Iterable[str], usual: Mapping[str, str] | None = None, *, prefix: str = "") -> str:
    """A question to put behind an error, or nothing where no known word comes near.

    Args:
        word: what was given, without `prefix`.
        known: words that would have been right; a dotted one also answers to its last part.
        usual: names from elsewhere, each with the known word that it stands for.
        prefix: of every word in the question, such as "--".

    Example:
        >>> did_you_mean("lr", ["seed", "optim.lr"], prefix="--")
        '; did you mean --optim.lr?'
        >>> did_you_mean("calibratoin", ["ood", "calibration"])
        '; did you mean calibration?'
        >>> did_you_mean("colour", ["seed", "optim.lr"])
        ''
    """
    found = _nearest(word.replace("-", "_"), list(known), usual or {})
    return f"; did you mean {' or '.join(prefix + name for name in found)}?" if found else ""


def _nearest(word: str, known: list[str], usual: Mapping[str, str]) -> list[str]:
    """At most two suggestions, the best kind first: usual name, same word, same last part, similar spelling."""
    if word in usual:
        return [usual[word]]
    exact = [name for name in known if name.replace("-", "_") == word]
    if exact:
        return exact
    group, dot, end = word.rpartition(".")
    if dot:  # alike in its own group, or in the one whose name looks like it
        groups = _alike(group, {name.rpartition(".")[0] for name in known})
        return [f"{one}.{close}" for one in groups[:1] for close in _alike(end, _ends(known, one))]
    same_end = [name for name in known if name.endswith(f".{word}")]
    return same_end or _alike(word, known) or _full(known, _alike(word, {name.rpartition(".")[2] for name in known}))


def _ends(known: Iterable[str], group: str) -> list[str]:
    return [end for name in known for start, _, end in [name.rpartition(".")] if start == group]


def _full(known: Iterable[str], ends: Iterable[str]) -> list[str]:
    return [name for end in ends for name in known if name.rpartition(".")[2] == end]


def _alike(word: str, known: Iterable[str]) -> list[str]:
    """The word that looks most alike, and another one that does so almost as much."""
    lower = {name.lower(): name for name in known if name}
    close = difflib.get_close_matches(word.lower(), lower, n=2)
    ratios = [difflib.SequenceMatcher(None, name, word.lower()).ratio() for name in close]
    return [lower[name] for name, ratio in zip(close, ratios, strict=True) if ratio > ratios[0] - 0.1]
