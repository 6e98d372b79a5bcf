"""What tells one folder of images, or one file of weights, from another: checksums of their bytes."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

from recipes.data.image_folder import image_files, split_folders
from recipes.data.load import Dataset

LARGE = 50_000
"""Folders with more images get no checksums: reading them all once more would delay a run."""


def checksums(root: Path) -> dict[str, int]:
    """CRC-32 of every image file that data.name=folder reads under `root`, by relative path; empty for a large set."""
    found = [path for top in split_folders(root).values() for path in image_files(top)]
    if len(found) > LARGE:
        return {}
    return {path.relative_to(root).as_posix(): zlib.crc32(path.read_bytes()) for path in found if path.is_file()}


def contents(root: Path) -> str:
    """A short description of the images under `root` that differs for other images: their number and a hash.

    The hash is over names and checksums; for a large set, over names and file sizes.
    """
    files = checksums(root) or {
        path.relative_to(root).as_posix(): path.stat().st_size
        for top in split_folders(root).values()
        for path in image_files(top)
    }
    digest = hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()
    return f"{len(files)} images, {digest[:16]}"


WEIGHT_FILES = (".pt", ".pth", ".bin", ".safetensors")
"""How files end that hold weights, in a folder of them."""


def weights_contents(source: Path) -> str:
    """A short description of a file of weights, or of those in a folder, that differs for other bytes.

    Example:
        >>> file = getfixture("tmp_path") / "mine.pth"
        >>> _ = file.write_bytes(b"abc")
        >>> weights_contents(file)
        'weights, ba7816bf8f01cfea'

    Raises:
        OSError: a file cannot be read.
    """
    files = sorted(path for path in source.rglob("*") if path.suffix in WEIGHT_FILES) if source.is_dir() else [source]
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"weights, {digest.hexdigest()[:16]}"


def described(data: Dataset) -> dict[str, Any]:
    """What tells data from others without reading images: classes, sizes of the splits, a checksum of the labels."""
    splits = {"training": data.train, "validation": data.val, "test": data.test}
    return {
        "classes": list(data.class_names),
        "images": {name: len(split) for name, split in splits.items()},
        "labels": {name: zlib.crc32(split.target.cpu().numpy().tobytes()) for name, split in splits.items()},
    }
