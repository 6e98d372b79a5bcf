"""`import ncreg` is light: what it adds to torch, and what it leaves for later."""

import subprocess
import sys
from pathlib import Path

import pytest

import ncreg

ROOT = Path(__file__).resolve().parents[2]
STEPS = """
import sys, torch
before = set(sys.modules)
import ncreg
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))

import ncreg.robustness, ncreg.transferability
from ncreg.metrics import hessian_norms, minority_angles
print(*sorted({"timm", "torchvision", "torchmetrics", "matplotlib"} & set(sys.modules)))

for name in [name for name in sys.modules if name.startswith("ncreg.robustness")]:
    del sys.modules[name]
vars(ncreg).pop("robustness", None)
ncreg.NeuralCollapse, ncreg.swap_head, ncreg.param_groups, ncreg.load_checkpoint, ncreg.load_weights
print("ncreg.robustness" in sys.modules, "robustness" in dir(ncreg), ncreg.robustness.pgd.__name__)

from ncreg.metrics import *
import ncreg.metrics
print(NeuralCollapse is ncreg.metrics.NeuralCollapse, {"LayerwiseCollapse", "hessian_norms"} <= set(dir(ncreg.metrics)))
"""


def test_import_adds_little_and_the_rest_comes_with_its_first_use():
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    added, heavy, robustness, metrics = done.stdout.splitlines()
    assert set(added.split()) <= {"ncreg", "einops", "jaxtyping", "numpy", "wadler_lindig"} | set(
        sys.stdlib_module_names
    )
    assert heavy == ""  # neither robustness nor measures that are functions need torchmetrics
    assert robustness == "False True pgd"
    assert metrics == "True True"


def test_help_of_train_loads_neither_timm_nor_torchmetrics():
    command = [sys.executable, "-X", "importtime", "recipes/train.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "Names that exist:" in done.stdout and "torch" in loaded
    assert not loaded & {"timm", "torchvision", "torchmetrics", "sklearn", "scipy", "matplotlib", "torch._dynamo"}


def test_help_of_compare_loads_no_torch():
    command = [sys.executable, "-X", "importtime", "recipes/compare.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "--report-only" in done.stdout and not loaded & {"torch", "timm", "scipy", "matplotlib"}


def test_names_that_come_late_are_those_of_their_modules():
    late = {name: home for home, names in ncreg._HOME.items() for name in names}
    assert {*late, *ncreg._MODULES} - {*ncreg.__all__} == {"checkpoint", "models", "optim", "pretrained"}
    for name, home in late.items():
        assert getattr(ncreg, name) is getattr(getattr(ncreg, home), name)


def test_every_public_name_is_there_and_no_other():
    assert all(hasattr(ncreg, name) for name in ncreg.__all__)
    with pytest.raises(AttributeError, match="module 'ncreg' has no attribute 'robust'"):
        _ = ncreg.robust
