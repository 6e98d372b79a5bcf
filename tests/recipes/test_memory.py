"""Freed memory stays with the process: fewer page faults, the same numbers."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.core import memory, script

ROOT = Path(__file__).resolve().parents[2]

FAULTS = """
import ctypes, resource, sys
from recipes.core.memory import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "kept" else None
blocks = ctypes.CDLL(None)
blocks.malloc.restype, blocks.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks.malloc.argtypes = [ctypes.c_size_t]


size = int(sys.argv[2])


def step():
    taken = [blocks.malloc(size) for _ in range(4)]
    for block in taken:
        ctypes.memset(block, 1, size)
    for block in taken:
        blocks.free(block)


step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(word, size=2**24, **environment):
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, word, str(size)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT), **environment},
    )
    kept, count = done.stdout.split()
    return kept, int(count)


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc of glibc")


@glibc
@pytest.mark.parametrize("size", [2**24, 2**26])
def test_freed_blocks_are_taken_again_without_page_faults(size):
    if size > memory.LARGEST_OF_OLD and not takes_large_blocks():
        pytest.skip("this glibc takes no more than 32 MiB")
    assert faults("kept", size)[0] == "True" and faults("kept", size)[1] < 100 < faults("plain", size)[1]


def takes_large_blocks():
    asked = "import ctypes; print(ctypes.CDLL(None).mallopt(-3, 2**28))"
    return subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout == "1\n"


def test_an_older_glibc_is_asked_for_as_much_as_it_takes(monkeypatch):
    class Older:
        asked = []

        def mallopt(self, which, value):
            self.asked.append((which, value))
            return which == memory.M_TRIM_THRESHOLD or value <= 2**25

    for name in [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: Older())
    assert memory.keep_freed_memory()
    assert Older.asked[1:] == [(memory.M_MMAP_THRESHOLD, 2**28), (memory.M_MMAP_THRESHOLD, 2**25)]


def test_every_command_keeps_its_freed_memory(monkeypatch):
    asked = []
    monkeypatch.setattr(script, "keep_freed_memory", lambda: asked.append(True))
    monkeypatch.setattr(script._Outlet, "of", lambda name: None)
    with pytest.raises(SystemExit):
        script.leave_with(lambda: 0)
    assert asked == [True]


@glibc
def test_settings_of_the_user_are_left_alone():
    assert faults("kept", MALLOC_ARENA_MAX="2")[0] == "False"
