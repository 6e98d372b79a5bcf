"""Saving and safely loading training state; the one module of ncreg that touches files."""

from __future__ import annotations

import os
import pickle
import struct
import warnings
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ncreg._checks import check_flag, check_integer, described, plain_values
from ncreg.models import Classifier, Normalize, swap_head

FORMAT = 1
"""Version of the checkpoint layout, under the key "format"."""

SIMPLE = (bool, int, float, str, type(None))
"""Types of values that need no further look; a state has thousands."""


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write `state` so that `path` holds either the old file or the whole new one, whatever happens meanwhile.

    Args:
        path: file to write; its folder must exist.
        state: nested dicts and lists of tensors, numbers, strings and None: what `load_checkpoint` reads back. The
            key "format" is the checkpoint's own.

    Raises:
        TypeError: `state` is no dict.
        ValueError: `state` holds an object that `load_checkpoint` would refuse, or another "format".
        OSError: the file cannot be written, as on a full disk.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> save_checkpoint(folder / "last.pt", {"epoch": 3, "weight": torch.ones(2)})
        >>> load_checkpoint(folder / "last.pt")["epoch"]
        3
    """
    path = Path(path)
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a dict, not {described(state)}")
    state = dict(state)
    try:
        _check_plain(state, "state")
    except RecursionError:
        raise ValueError("state is nested too deeply, or holds itself") from None
    given = state.setdefault("format", FORMAT)
    if not (type(given) is int and given == FORMAT):
        raise ValueError(f"state['format']={given!r}: this key is the checkpoint's own ({FORMAT}); use another")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            _write(state, file)
            file.flush()
            os.fsync(file.fileno())
        _check_readable(unfinished)
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

    Example:
        >>> path = getfixture("tmp_path") / "last.pt"
        >>> save_checkpoint(path, {"weight": torch.zeros(2)})
        >>> load_checkpoint(path)["weight"]
        tensor([0., 0.])
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if (damage := archive_damage(path)) is not None:
        raise ValueError(f"checkpoint {path} cannot be read ({damage}): it is truncated, damaged or no checkpoint")
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {path} is refused: it holds more than tensors and plain values ({_reason(error)})"
        ) from None
    except (RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"checkpoint {path} cannot be read ({_reason(error)}): it is damaged or no checkpoint"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"checkpoint {path} is of format {found!r}; this version reads {FORMAT}")
    return state


def classifier_header(
    *,
    build: Mapping[str, Any],
    class_names: Sequence[str],
    image_shape: Sequence[int],
    data_config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The entries of a checkpoint that `load_classifier` reads beside the weights, which are under "model" and "ema".

    Args:
        build: arguments of `swap_head` that build the classifier.
        class_names: one for each class, in the order of the logits.
        image_shape: (channels, height, width) of the images that it was trained on.
        data_config: how images are brought to that size, in timm's words, such as {"interpolation": "bicubic",
            "crop_pct": 0.95}; None for the way of the recipes, see `Classifier.data_config`.

    Raises:
        TypeError: class names that are no list of strings, a size that is no integer.
        ValueError: an image shape of another length, or with a size below 1.

    Example:
        >>> build = {"model": "test_resnet", "head": "etf", "num_classes": 2}
        >>> header = classifier_header(build=build, class_names=["cat", "dog"], image_shape=(3, 32, 32))
        >>> classifier = swap_head(**build)
        >>> classifier.preprocess = Normalize([0.5] * 3, [0.25] * 3)
        >>> path = getfixture("tmp_path") / "last.pt"
        >>> save_checkpoint(path, header | {"model": classifier.state_dict()})
        >>> load_classifier(path).class_names
        ('cat', 'dog')
    """
    return {
        "build": dict(plain_values(build)),
        "class_names": list(checked_names(class_names)),
        "image_shape": list(_checked_shape(image_shape)),
        **({} if data_config is None else {"data_config": dict(plain_values(data_config))}),
    }


def load_classifier(source: str | Path, *, ema: bool = False, device: str | torch.device = "cpu") -> Classifier:
    """The trained classifier of a run, in eval mode, for images in [0, 1].

    Its normalisation is inside; `class_names` and `image_shape` (channels, height, width) say what it was trained on,
    and so does `pretrained_cfg`: `timm.data.create_transform(**timm.data.resolve_model_data_config(classifier))`
    prepares images as training did.

    Args:
        source: a run folder (its newest checkpoint), or one checkpoint file of it.
        ema: take the moving average of the weights, which runs with optim.ema keep.
        device: where the classifier goes.

    Raises:
        FileNotFoundError: no such run or file.
        ValueError: a checkpoint that cannot be read, one that was not written by a training run, one of a diverged
            run (NaN weights), or one without a moving average where `ema` is on.

    Example:
        >>> build, folder = {"model": "test_resnet", "head": "etf", "num_classes": 2}, getfixture("tmp_path")
        >>> header = classifier_header(build=build, class_names=["cat", "dog"], image_shape=(3, 32, 32))
        >>> trained = swap_head(**build)
        >>> trained.preprocess = Normalize([0.5] * 3, [0.25] * 3)
        >>> save_checkpoint(folder / "last.pt", header | {"model": trained.state_dict()})
        >>> classifier, images = load_classifier(folder / "last.pt"), torch.rand(4, 3, 32, 32)
        >>> torch.equal(classifier(images), trained.eval()(images))
        True
    """
    check_flag("ema", ema)
    path = newest_checkpoint(Path(source))
    try:
        state = load_checkpoint(path)
    except ValueError as error:
        older = path.with_name("previous.pt")
        there = path.name == "last.pt" and older.is_file()
        raise ValueError(f"{error}; the epoch before is in {older}: name that file" if there else str(error)) from None
    lacking = [key for key in ("build", "class_names", "image_shape", "model") if key not in state]
    if lacking:
        raise ValueError(f"checkpoint {path} lacks {', '.join(lacking)}: it was not written by a training run")
    weights = state.get("ema") if ema else state["model"]
    if weights is None:
        raise ValueError(
            f"ema=True: checkpoint {path} holds no moving average of the weights; its run was without optim.ema"
            if ema
            else f"checkpoint {path} holds no weights: its model is None"
        )
    try:
        classifier = rebuild_classifier(state, weights)
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"checkpoint {path} does not give back its classifier: {reason}") from None
    _check_finite(classifier, path)
    return classifier.to(device).eval()


def newest_checkpoint(source: Path) -> Path:
    """The file itself, or the newest one of a run folder to go on from."""
    if source.is_dir():
        candidates = [source / "checkpoints" / f"{name}.pt" for name in ("last", "previous")]
        files = [file for file in candidates if file.is_file()]
        if not files:
            raise FileNotFoundError(f"{source} is no run folder: it has no {candidates[0].relative_to(source)}")
        return files[0]
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: give a run folder, or a checkpoint of it")
    return source


def rebuild_classifier(header: Mapping[str, Any], weights: Mapping[str, Any]) -> Classifier:
    """The classifier that a header describes, with these weights.

    Args:
        header: what `classifier_header` gives; class names and image shape may be None in it.
        weights: its state_dict.

    Raises:
        ValueError: header and weights do not fit each other; other errors come from `swap_head` and torch.
    """
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten below
        classifier = rebuilt(header["build"])
    if (mean := weights.get("preprocess.mean")) is not None:
        classifier.preprocess = Normalize([0.0] * len(mean), [1.0] * len(mean))
    name, _ = next(classifier.named_parameters())
    classifier.to(weights[name].dtype)
    for name, value in (*classifier.named_parameters(), *classifier.named_buffers()):  # a norm may be kept in float32
        saved = weights.get(name)
        if isinstance(saved, Tensor) and saved.is_floating_point() and value.is_floating_point():
            value.data = value.data.to(saved.dtype)
    classifier.load_state_dict(weights)
    if header["class_names"] is not None:
        classifier.class_names = checked_names(header["class_names"], classifier.num_classes)
    if header["image_shape"] is not None:
        classifier.image_shape = _checked_shape(header["image_shape"])
    classifier.data_config = header.get("data_config")
    return classifier


def rebuilt(build: Mapping[str, Any]) -> Classifier:
    """`swap_head` of recorded arguments, for weights that are filled in afterwards: that it draws some is no news."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "head='keep' on random weights", UserWarning)
        return swap_head(**build)


def _checked_shape(image_shape: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(check_integer("image_shape", size, 1) for size in image_shape)
    if len(sizes) != 3:
        raise ValueError(f"image_shape={image_shape!r} must be (channels, height, width)")
    return sizes


def checked_names(class_names: Sequence[str], num_classes: int | None = None) -> tuple[str, ...]:
    """Class names as Python's own strings.

    Raises:
        TypeError: no list of strings.
        ValueError: not one for each of `num_classes`.
    """
    if isinstance(class_names, str) or not all(isinstance(name, str) for name in class_names):
        raise TypeError(f"class_names={class_names!r} must be a list of names")
    if num_classes not in (None, len(class_names)):
        raise ValueError(f"{len(class_names)} class_names for a classifier of {num_classes} classes")
    return tuple(map(str, class_names))


def _check_finite(classifier: Classifier, path: Path) -> None:
    """NaN anywhere, or an infinite parameter, makes every logit NaN; a buffer may be infinite, as a mask is."""
    trained = dict(classifier.named_parameters())
    for name, value in classifier.state_dict().items():
        if value.isnan().any() or (name in trained and value.isinf().any()):
            raise ValueError(
                f"checkpoint {path} is of a diverged run: {name} holds NaN or infinite values; take an earlier one "
                "(checkpoints/best.pt), or look at it with load_checkpoint"
            )


def archive_damage(path: Path) -> str | None:
    """What is wrong with the archive or a checksum in it; torch.load itself reads over flipped bits."""
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, EOFError, ValueError, OSError) as error:
        return str(error) or type(error).__name__
    return None if part is None else f"{part} does not fit its checksum"


def _check_plain(value: Any, where: str) -> None:
    """Exact types: a subclass, such as numpy's float64 of float, is pickled as an object of its own."""
    kind = type(value)
    if kind in (dict, OrderedDict, Counter):  # state dicts, and those of schedules
        for key, item in value.items():
            if type(key) not in SIMPLE:
                _check_plain(key, f"{where}: the key {key!r}")
            if type(item) not in SIMPLE:
                _check_plain(item, f"{where}[{key!r}]")
    elif kind in (list, tuple, torch.Size):
        for index, item in enumerate(value):
            if type(item) not in SIMPLE:
                _check_plain(item, f"{where}[{index}]")
    elif not isinstance(value, torch.Tensor):
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        raise ValueError(
            f"{where} is a {name}: checkpoints hold tensors, Python's own numbers and strings, lists, dicts"
        )


def _write(state: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(state, file)
    except (pickle.PicklingError, TypeError, AttributeError, NotImplementedError, RecursionError) as error:
        raise ValueError(f"state holds an object that cannot be saved ({_reason(error)})") from error
    except RuntimeError as error:  # torch's archive is closed after a full disk too, and then misses what it wrote
        cause = error.__context__
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None


def _check_readable(path: Path) -> None:
    """What types do not show: tensor subclasses, attributes of tensors. Tensors are mapped, so none is read."""
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"state holds an object that load_checkpoint would refuse ({_reason(error)})") from error
    except (OSError, RuntimeError):
        return  # a file system that maps no files into memory; the types have been looked at


def _reason(error: Exception) -> str:
    """The line of torch's long message that says what it met, else the first."""
    lines = [line.strip().partition(" Please use")[0] for line in str(error).splitlines()] or [type(error).__name__]
    return next((line for line in lines if line.startswith("WeightsUnpickler error")), lines[0])


def _sync_folder(folder: Path) -> None:
    """Make the new name itself durable, where folders can be opened (not on Windows)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
