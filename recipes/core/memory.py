"""How much memory there is; and what the C library would give back is kept from batch to batch."""

from __future__ import annotations

import ctypes
import os
import sys

from recipes.core.errors import UserError

CPU_REFUSES = "DefaultCPUAllocator: "
"""How torch begins where a CPU's memory is used up; a GPU's has an error of its own."""

FULL = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "alloc_failed",
)
"""What systems, drivers and their libraries say, in small letters."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
NEVER = 2**31 - 1
LARGEST, LARGEST_OF_OLD = 2**28, 2**25
"""Bytes of the largest block that is kept; older versions of glibc refuse a limit above the second."""


def keep_freed_memory() -> bool:
    """Have glibc keep freed blocks of up to 256 MiB; whether it keeps any now. No number that is computed changes.

    Every batch frees the activations of the one before. By default glibc returns them to the system, which hands them
    out again page by page and cleared: thousands of page faults a batch, up to a third of a pass's time. Older versions
    of glibc keep blocks of up to 32 MiB at most. A process that the user has set up by environment variables of malloc
    is left alone, as are other C libraries.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, NEVER)) and any(
        mallopt(M_MMAP_THRESHOLD, size) for size in (LARGEST, LARGEST_OF_OLD)
    )


def physical_memory() -> int:
    """Bytes of this machine's memory; 16 GiB where the system does not say."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**34


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up: Python's and numpy's, torch's, or one of a driver or library below.

    Example:
        >>> is_out_of_memory(MemoryError()), is_out_of_memory(ValueError("too large"))
        (True, False)
    """
    if isinstance(error, MemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in said for words in FULL)


def out_of_memory(error: BaseException, way_out: str) -> str:
    """The line for such an error, with torch's numbers.

    Example:
        >>> out_of_memory(MemoryError("Unable to allocate 8.00 PiB"), "fewer images")
        'out of memory (Unable to allocate 8.00 PiB): fewer images'
    """
    said = str(error).split(CPU_REFUSES)[-1].strip().splitlines() or [type(error).__name__]
    return f"out of memory ({said[0].strip()}): {way_out}"


def check_fits(what: str, size: int, way_out: str) -> None:
    """Refuse what would take more than half of this machine's memory.

    Raises:
        UserError: it would; the line has its bytes and the way out.
    """
    if size > physical_memory() // 2:
        raise UserError(f"{what} take {size:,} bytes, and this machine has {physical_memory():,}: {way_out}")
