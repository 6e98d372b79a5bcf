"""Freed memory stays with the process: fewer page faults, the same numbers."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FAULTS = """
import ctypes, resource, sys
from recipes.core.memory import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "kept" else None
blocks = ctypes.CDLL(None)
blocks.malloc.restype, blocks.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks.malloc.argtypes = [ctypes.c_size_t]


def step():
    taken = [blocks.malloc(2**24) for _ in range(4)]
    for block in taken:
        ctypes.memset(block, 1, 2**24)
    for block in taken:
        blocks.free(block)


step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(word, **environment):
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, word],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT), **environment},
    )
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc of glibc")
def test_freed_blocks_are_taken_again_without_page_faults():
    assert faults("kept")[0] == "True" and faults("kept")[1] < 100 < faults("plain")[1]


def test_settings_of_the_user_are_left_alone():
    assert faults("kept", MALLOC_ARENA_MAX="2")[0] == "False"
