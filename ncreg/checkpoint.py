"""Saving and safely loading training state; the one module of ncreg that touches files."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ncreg.models import Classifier, Normalize, swap_head

FORMAT = 1
"""Version of the checkpoint layout, under the key "format"."""


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write `state` so that `path` holds either the old file or the whole new one, whatever happens meanwhile.

    Args:
        path: file to write; its folder must exist.
        state: nested dicts and lists of tensors, numbers, strings and None: what `load_checkpoint` reads back.

    Raises:
        ValueError: `state` holds an object that `load_checkpoint` would refuse.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> save_checkpoint(folder / "last.pt", {"epoch": 3, "weight": torch.ones(2)})
        >>> load_checkpoint(folder / "last.pt")["epoch"]
        3
    """
    path = Path(path)
    _check_plain(state, "state")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def load_checkpoint(path: str | Path, map_location: str | torch.device | None = "cpu") -> dict[str, Any]:
    """Read what `save_checkpoint` wrote; pickled objects in a file are refused, never executed.

    Args:
        path: the checkpoint.
        map_location: where its tensors go.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a truncated file, one with foreign objects, or one of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if (damage := _damage(path)) is not None:
        raise ValueError(f"checkpoint {path} cannot be read ({damage}): it is truncated, damaged or no checkpoint")
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0] if str(error) else "not a checkpoint"
        raise ValueError(
            f"checkpoint {path} is refused: it holds more than tensors and plain values ({reason})"
        ) from None
    except (RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint {path} cannot be read ({reason}): it is damaged or no checkpoint") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"checkpoint {path} is of format {found!r}; this version reads {FORMAT}")
    return state


def load_classifier(source: str | Path, *, ema: bool = False, device: str | torch.device = "cpu") -> Classifier:
    """The trained classifier of a run, in eval mode, for images in [0, 1].

    Its normalisation is inside; `class_names` and `image_shape` (channels, height, width) say what it was trained on.

    Args:
        source: a run folder (its newest checkpoint), or one checkpoint file of it.
        ema: take the moving average of the weights, which runs with optim.ema keep.
        device: where the classifier goes.

    Raises:
        FileNotFoundError: no such run or file.
        ValueError: a checkpoint that cannot be read, one that was not written by a training run, or one without the
            moving average that is asked for.
    """
    path = Path(source)
    if path.is_dir():
        found = [path / "checkpoints" / f"{name}.pt" for name in ("last", "previous")]
        files = [file for file in found if file.is_file()]
        if not files:
            raise FileNotFoundError(f"{path} is no run folder: it has no {found[0].relative_to(path)}")
        path = files[0]
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a run folder, or a checkpoint of it")
    state = load_checkpoint(path)
    lacking = [key for key in ("build", "class_names", "image_shape", "model") if key not in state]
    if lacking:
        raise ValueError(f"checkpoint {path} lacks {', '.join(lacking)}: it was not written by a training run")
    weights = state.get("ema") if ema else state["model"]
    if weights is None:
        raise ValueError(
            f"ema=True: checkpoint {path} holds no moving average of the weights; its run was without optim.ema"
        )
    channels = int(state["image_shape"][0])
    try:
        classifier = swap_head(**state["build"])
        classifier.preprocess = Normalize([0.0] * channels, [1.0] * channels)
        classifier.to(weights["preprocess.mean"].dtype).load_state_dict(weights)
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"checkpoint {path} does not give back its classifier: {reason}") from None
    classifier.class_names, classifier.image_shape = tuple(state["class_names"]), tuple(state["image_shape"])
    return classifier.to(device).eval()


def _damage(path: Path) -> str | None:
    """What is wrong with the archive or a checksum in it; torch.load itself reads over flipped bits."""
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, EOFError, ValueError, OSError) as error:
        return str(error) or type(error).__name__
    return None if part is None else f"{part} does not fit its checksum"


def _check_plain(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif not (value is None or isinstance(value, torch.Tensor | bool | int | float | str)):
        raise ValueError(
            f"{where} is a {type(value).__name__}: checkpoints hold tensors, numbers, strings, lists, dicts"
        )


def _sync_folder(folder: Path) -> None:
    """Make the new name itself durable, where folders can be opened (not on Windows)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
