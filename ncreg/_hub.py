"""Files of the Hugging Face hub, with a clear word at once where there is no network."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, get_session, hf_hub_download, try_to_load_from_cache

SECONDS = 5
"""How long the hub may take to answer before it counts as out of reach."""


def check_hub(repository: str, files: Sequence[str], *, cache: str | Path | None = None) -> None:
    """Refuse at once what huggingface_hub would try for a minute: files that are not on this disk, with no network.

    Args:
        repository: owner/name, or owner/name@revision.
        files: names of a file, any of which will do.
        cache: folder of the downloads; None for huggingface_hub's own.

    Raises:
        ConnectionError: none is on this disk, and the hub does not answer.
    """
    name, _, revision = repository.partition("@")
    for file in files:
        if isinstance(try_to_load_from_cache(name, file, cache_dir=cache, revision=revision or None), str):
            return
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # its class is that of the network library, which differs between versions of the hub's
        reason = " ".join(str(error).split())
        raise ConnectionError(
            f"{name} is not on this disk, and {constants.ENDPOINT} is out of reach ({reason})"
        ) from None


def hub_file(repository: str, file: str) -> Path:
    """A file of a repository, downloaded where it is not on this disk.

    Raises:
        ConnectionError: it is not on this disk, and the hub does not answer.
    """
    check_hub(repository, [file])
    name, _, revision = repository.partition("@")
    return Path(hf_hub_download(name, file, revision=revision or None))
