"""Small digits for loops of others, and their folder of images; the module of the examples, loaded by path."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "integrations"


def load(name):
    path = SCRIPTS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("digits", module) if name == "digits" else None
    spec.loader.exec_module(module)
    return module


digits = load("digits")
