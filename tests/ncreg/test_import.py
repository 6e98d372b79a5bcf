"""`import ncreg` is light: what it adds to timm and torchmetrics, and what it leaves for later."""

import subprocess
import sys

import pytest

import ncreg

ADDED = """
import sys, timm, torchmetrics
before = set(sys.modules)
import ncreg
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
print("ncreg.robustness" in sys.modules, "robustness" in dir(ncreg), ncreg.robustness.pgd.__name__)
"""


def test_import_adds_little_and_robustness_comes_with_its_first_use():
    done = subprocess.run([sys.executable, "-c", ADDED], capture_output=True, text=True, check=True)
    added, robustness = done.stdout.splitlines()
    assert set(added.split()) <= {"ncreg", "einops", "jaxtyping", "wadler_lindig"} | set(sys.stdlib_module_names)
    assert robustness == "False True pgd"


def test_every_public_name_is_there_and_no_other():
    assert all(hasattr(ncreg, name) for name in ncreg.__all__)
    with pytest.raises(AttributeError, match="module 'ncreg' has no attribute 'robust'"):
        _ = ncreg.robust
