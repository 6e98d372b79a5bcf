"""What tells one folder of images from another: checksums of its files."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path

from recipes.data.image_folder import image_files, parts_of

LARGE = 50_000
"""Images of a folder beyond which reading them all once more would hold up a run."""


def checksums(root: Path) -> dict[str, int]:
    """CRC-32 of every image file that data.name=folder reads under `root`, by its path there; none of a large set."""
    found = [path for top in parts_of(root).values() for path in image_files(top)]
    if len(found) > LARGE:
        return {}
    return {path.relative_to(root).as_posix(): zlib.crc32(path.read_bytes()) for path in found if path.is_file()}


def contents(root: Path) -> str:
    """The images under `root` in a few words, others for other images: their number, and a hash of names and contents.

    Of a set beyond the size up to which there are checksums the files' sizes stand for their contents.
    """
    files = checksums(root) or {
        path.relative_to(root).as_posix(): path.stat().st_size
        for top in parts_of(root).values()
        for path in image_files(top)
    }
    digest = hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()
    return f"{len(files)} images, {digest[:16]}"
