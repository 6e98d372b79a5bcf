"""Weights and whole classifiers in the formats of others: files of torch and timm, folders as on the hub."""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from timm.models import get_model_args
from torch import Tensor, nn

from ncreg._checks import described, plain_values
from ncreg._hub import hub_file
from ncreg.checkpoint import archive_damage, checked_names, newest_checkpoint, rebuild_classifier, rebuilt
from ncreg.models import Classifier, Normalize
from ncreg.numerics import check_plain

WEIGHTS, CONFIG = "model.safetensors", "config.json"

NOT_SAVED = ("state_dict", "file", "source")
"""Of a pretrained_cfg: where weights came from, on this disk or as tensors."""

ARCHITECTURE = "ncreg.Classifier"
"""Under "architecture" in config.json: timm does not know it, so it refuses the folder instead of misreading it."""


def load_weights(source: str | Path) -> dict[str, Any]:
    """The tensors of a file by name, for `swap_head(…, weights=…)`; pickled objects in it are refused.

    Args:
        source: a file .pth, .pt, .bin or .safetensors, a run folder of recipes/train.py (its newest checkpoint), or a
            folder with model.safetensors, as `Classifier.save_pretrained` and `timm.models.save_for_hf` write it.

    Raises:
        FileNotFoundError: no such file, or a folder without weights.
        ValueError: a file that cannot be read, or that holds no tensors by name.

    Example:
        >>> from ncreg import swap_head
        >>> source, path = swap_head("test_resnet", num_classes=10), getfixture("tmp_path") / "mine.pth"
        >>> torch.save({"state_dict": {f"module.{name}": value for name, value in source.state_dict().items()}}, path)
        >>> start = swap_head("test_resnet", num_classes=5, weights=load_weights(path))
        >>> torch.equal(start.backbone.conv1[0].weight, source.backbone.conv1[0].weight)
        True
    """
    path = _weights_file(Path(source))
    if not path.stat().st_size:
        raise ValueError(f"weights {path} cannot be read: the file is empty")
    if path.suffix != ".safetensors" and _is_text(path):
        raise ValueError(f"weights {path} cannot be read: it is a text file")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        damage = archive_damage(path) if zipfile.is_zipfile(path) else None
        if damage is not None:
            raise ValueError(damage)
        with torch.serialization.safe_globals(_plain_objects()):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make torch raise errors of any class
        if (foreign := re.search(r"Unsupported global: GLOBAL ([\w.]+)", str(error))) is not None:
            raise ValueError(
                f"weights {path} hold objects of Python ({foreign[1]}), such as a whole model, not tensors by name "
                "alone: torch.save(model.state_dict(), FILE) where it was made writes these"
            ) from None
        reason = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())[:200] or type(error).__name__
        raise ValueError(f"weights {path} cannot be read ({reason}): damaged, or more than tensors") from None
    if not isinstance(found, Mapping):
        raise ValueError(f"weights {path} hold {described(found)}, not tensors by name")
    return dict(found)


def _plain_objects() -> list[Any]:
    """What training scripts keep beside weights and what runs no code: arguments, numpy's numbers and arrays, paths."""
    functions: Any = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    arrays = [(f, f"numpy.{core}.multiarray.{f.__name__}") for f in functions for core in ("core", "_core")]
    paths = [
        (kind, f"{module}.{kind.__name__.removeprefix('Pure')}")
        for kind in (PurePosixPath, PureWindowsPath)
        for module in ("pathlib", "pathlib._local")  # the second in Python 3.13
    ]
    dtypes = [type(np.dtype(code)) for code in np.typecodes["All"]]
    return [argparse.Namespace, np.ndarray, np.dtype, *dtypes, *arrays, *paths]


def _is_text(path: Path) -> bool:
    """Whether a file begins with readable characters alone, as no file of torch does."""
    with path.open("rb") as file:
        start = file.read(256)
    return not start.startswith(b"PK") and all(32 <= byte < 127 or byte in b"\t\n\r" for byte in start)


def _weights_file(source: Path) -> Path:
    if source.is_dir() and not (source / "checkpoints").is_dir():
        files = [source / name for name in (WEIGHTS, "pytorch_model.bin") if (source / name).is_file()]
        if not files:
            raise FileNotFoundError(f"weights {source}: the folder holds neither checkpoints/ of a run nor {WEIGHTS}")
        return files[0]
    if not source.exists():
        raise FileNotFoundError(
            f"{source} does not exist: weights are a file .pth, .pt, .bin or .safetensors, a run folder, or a folder "
            f"with {WEIGHTS}"
        )
    return newest_checkpoint(source)


def save_pretrained(classifier: Classifier, folder: str | Path) -> None:
    """Write a classifier as model.safetensors and config.json, for `from_pretrained`.

    Args:
        classifier: built by `swap_head` from a timm backbone, and from head and norm by name.
        folder: where the two files go; `huggingface_hub.upload_folder` takes it to the hub.

    Raises:
        ValueError: a part that was given as a module or changed since, which no file can describe; weights that
            are quantized (torchao) or spread over ranks; class names that are not one for each class.
        TypeError: class names that are no list of strings.
    """
    check_plain(classifier, "save the classifier first, then quantize what from_pretrained gives")
    build = _build_arguments(classifier)
    _check_rebuilds(build, classifier)
    names: Any = classifier.class_names
    _, backbone = classifier._named_backbone
    config = {
        "library_name": "ncreg",
        "architecture": ARCHITECTURE,
        "num_classes": classifier.num_classes,
        "build": build,
        "class_names": None if names is None else list(checked_names(names, classifier.num_classes)),
        "image_shape": classifier.image_shape,
        "data_config": None if classifier.data_config is None else dict(classifier.data_config),
        "pretrained_cfg": _savable(classifier.pretrained_cfg),
        "backbone_cfg": _savable(backbone.pretrained_cfg),  # of its own weights, which its architecture does not say
    }
    text = json.dumps(plain_values(config), indent=2)
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in classifier.state_dict().items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)  # written last: a folder that has it is whole
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(text, encoding="utf-8")


def from_pretrained(source: str | Path, *, device: str | torch.device = "cpu") -> Classifier:
    """The classifier that `save_pretrained` wrote into a folder or that lies on the hub, in eval mode.

    Args:
        source: a folder, or a repository of the hub, owner/name or owner/name@revision.
        device: where the classifier goes.

    Raises:
        FileNotFoundError: no such folder, or no classifier in it.
        ValueError: files that cannot be read, or that do not fit together.
        ConnectionError: a repository that is not on this disk, with the hub out of reach.
    """
    files = _files_of(source)
    try:
        config = json.loads(files[CONFIG].read_text(encoding="utf-8"))
        if config.get("architecture") != ARCHITECTURE:
            raise ValueError(
                f"its architecture is {config.get('architecture')!r}, not {ARCHITECTURE}; a model of timm is built by "
                f"timm.create_model('local-dir:FOLDER', pretrained=True)"
            )
        classifier = rebuild_classifier(config, load_file(files[WEIGHTS]))
        if "backbone_cfg" in config:  # files of earlier versions hold none
            backbone: Any = classifier._named_backbone[1]
            backbone.pretrained_cfg = backbone.default_cfg = _with_tuples(config["backbone_cfg"])
    except Exception as error:  # damaged files make json, safetensors and torch raise errors of many classes
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{source} does not give back a Classifier: {reason}") from None
    return classifier.to(device).eval()


def _savable(cfg: Any) -> dict[str, Any]:
    return {key: value for key, value in cfg.items() if key not in NOT_SAVED}


def _with_tuples(value: Any) -> Any:
    """What JSON made lists of, as a pretrained_cfg holds it."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _files_of(source: str | Path) -> dict[str, Path]:
    folder = Path(source)
    if not folder.is_dir():
        if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
            raise FileNotFoundError(f"{source} is no folder, and no repository of the hub (owner/name)")
        return {name: hub_file(str(source), name) for name in (CONFIG, WEIGHTS)}
    files = {name: folder / name for name in (CONFIG, WEIGHTS)}
    lacking = [name for name, path in files.items() if not path.is_file()]
    if lacking:
        hint = ": a run folder is read by ncreg.load_classifier" if (folder / "checkpoints").is_dir() else ""
        raise FileNotFoundError(f"{source} holds no Classifier: it has no {' and no '.join(lacking)}{hint}")
    return files


def _build_arguments(classifier: Classifier) -> dict[str, Any]:
    """The arguments of `swap_head` that build the classifier again, as they come back from JSON."""
    cfg: Mapping[str, Any] = getattr(classifier.backbone, "pretrained_cfg", {})
    architecture = cfg.get("architecture")
    if classifier.built_by is None or architecture is None:
        raise ValueError(
            "save_pretrained needs a classifier that swap_head built from a timm backbone, or from torchvision:NAME, "
            "and from head and norm by name; keep the code of other parts, and save state_dict() or "
            "ncreg.fold(classifier)"
        )
    if architecture.startswith("ncreg.fold("):
        raise ValueError(
            f"the backbone comes from {architecture}, which no name builds: swap_head of what fold(classifier, "
            "normalize='drop') gives has the same backbone, and save_pretrained can name it"
        )
    if not isinstance(classifier.preprocess, nn.Identity | Normalize):
        raise ValueError(f"preprocess={type(classifier.preprocess).__name__} cannot be saved: Normalize or none can")
    if not classifier.num_classes:
        raise ValueError("the classifier has no head (num_classes=0): reset_classifier(C) first")
    _, backbone = classifier._named_backbone
    recorded: Mapping[str, Any] = getattr(backbone, "_model_args", {})
    drop_rates = {key: rate for key, rate in recorded.items() if "drop" in key and key.endswith("_rate")}
    model_args = get_model_args(backbone) | drop_rates  # timm leaves these out
    model_args.pop("num_classes", None)
    build = {"model": architecture, "model_args": model_args, "num_classes": classifier.num_classes}
    try:
        return dict(json.loads(json.dumps(plain_values(build | classifier.built_by))))
    except TypeError as error:
        raise ValueError(
            f"save_pretrained writes arguments as JSON: {error}; among {build | classifier.built_by}"
        ) from None


def _check_rebuilds(build: Mapping[str, Any], classifier: Classifier) -> None:
    """Refuse a classifier whose parts are not those that its arguments give."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        again = rebuilt(build)
    for part in ("backbone", "project", "norm", "head"):
        if _structure(getattr(again, part)) != _structure(getattr(classifier, part)):
            raise ValueError(
                f"{part} has changed since swap_head built it, so save_pretrained cannot describe it: keep the code "
                "that changes it, and save state_dict(), or ncreg.fold(classifier)"
            )
    for part in ("backbone", "project", "norm", "head"):
        built = _settings(getattr(again, part))
        for name, value in _settings(getattr(classifier, part)).items():
            if value != built.get(name):
                raise ValueError(
                    f"{part}.{name}={value!r} was set later: the arguments of swap_head, which save_pretrained writes, "
                    f"give {built.get(name)!r}; build the classifier with it, and load this one's state_dict() into it"
                )


def _structure(module: nn.Module) -> tuple[dict[str, type], dict[str, torch.Size]]:
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    return {name: type(part) for name, part in module.named_modules()}, shapes


def _settings(module: nn.Module) -> dict[str, Any]:
    """The settings among a module's attributes, such as a head's scale or a stride: they are in no state_dict.

    Of modules that are no kind of torch's or ours the fractional numbers alone: timm's keep notes in the others.
    """
    found = {}
    for path, part in module.named_modules():
        kinds = {kind.__module__ for kind in type(part).__mro__ if kind not in (nn.Module, nn.Sequential)}
        known = any(kind.startswith(("torch.nn.", "ncreg.")) for kind in kinds)
        for key, value in vars(part).items():
            plain = _plain(value)
            if (
                not key.startswith("_")
                and key not in ("training", "inplace", "grad_checkpointing")
                and isinstance(plain, float | int | str | tuple | None if known else float)
            ):
                found[f"{path}.{key}".lstrip(".")] = plain
    return found


def _plain(value: Any) -> Any:
    """A number that a tensor or numpy holds, as Python's."""
    one = isinstance(value, Tensor) and value.ndim == 0 and not value.is_meta
    return value.item() if one or isinstance(value, np.generic) else value
