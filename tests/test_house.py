"""Imports run one way, and what begins with an underscore stays where it is written."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("ncreg", "recipes", "benchmarks")
SOURCES = [path for folder in (*PACKAGES, "examples") for path in sorted((ROOT / folder).rglob("*.py"))]
OWN_IMPORT = re.compile(rf"^(?:from|import) (?:{'|'.join(PACKAGES)})\b", re.MULTILINE)


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def is_module(dotted):
    path = ROOT.joinpath(*dotted.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def private_names_of_others(text):
    """The private names that a file takes out of other modules of this project, by import or by attribute."""
    tree, found, modules = ast.parse(text), [], {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            for item in node.names:
                name = f"{node.module}.{item.name}"
                if is_module(name):
                    modules[item.asname or item.name] = name
                elif is_private(item.name):
                    found.append(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and isinstance(node.value, ast.Name):
            if node.value.id in modules:
                found.append(f"{modules[node.value.id]}.{node.attr}")
    return found


def test_no_file_uses_private_names_of_another():
    found = {str(path.relative_to(ROOT)): private_names_of_others(path.read_text()) for path in SOURCES}
    assert len(found) > 100 and {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from recipes.study.tables import _needed", ["recipes.study.tables._needed"]),
        ("def f():\n    from ncreg.norms import LastBatchNorm, _kind", ["ncreg.norms._kind"]),
        ("from recipes.study import tables as t\nt._needed(1)", ["recipes.study.tables._needed"]),
        ("from ncreg.metrics import _formulas\n_formulas.nc1(0)", []),  # a private module: a contract decides
        ("from torch import _C\nfrom ncreg import __version__", []),
    ],
)
def test_a_private_name_is_found(text, found):
    assert private_names_of_others(text) == found


def starts_from_the_root(path, text):
    """Whether a script puts the project's root first before it imports from the project, and only as a script."""
    start = (
        '\nif __package__ in (None, ""):  # run as a script: import from the project\'s root, not from this folder\n'
        f"    sys.path[0] = str(Path(__file__).resolve().parents[{len(path.relative_to(ROOT).parts) - 1}])\n"
    )
    before, found, after = text.partition(start)
    return found == start and not OWN_IMPORT.search(before) and "sys.path" not in before + after


def test_every_script_imports_from_the_root_and_leaves_the_path_of_who_imports_it():
    paths = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in ("recipes", "benchmarks")]
    texts = {path: path.read_text() for path in paths}
    scripts = {path: text for path, text in texts.items() if "__main__" in text and OWN_IMPORT.search(text)}
    assert len(scripts) > 25 and [path for path, text in scripts.items() if not starts_from_the_root(path, text)] == []
    for path, text in scripts.items():  # the ways that scripts had before
        assert not starts_from_the_root(path, text.replace('\nif __package__ in (None, ""):', "\nif True:"))
        assert not starts_from_the_root(path, text.replace(".parents[", ".parents[1 + "))


REFUSED = {"rounds": "rounds=None", "threads": "threads=False", "device": "device=False"}


def unread_options(text):
    """Options of benchmarks.harness.parser that a script offers and never reads."""
    calls = [ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    made = next(call for call in calls if re.match(r"(harness\.)?parser\(", call))
    read = set(re.findall(r"\b(?:args|arguments)\.(\w+)", text))
    return [name for name, word in (REFUSED | {"out": "-"}).items() if name not in read and word not in made]


def test_benchmarks_offer_only_the_options_that_they_read():
    paths = [path for path in SOURCES if path.relative_to(ROOT).parts[0] == "benchmarks" and path.stem != "harness"]
    texts = {path.name: path.read_text() for path in paths}
    shared = re.compile(r"^from benchmarks(\.harness)? import .*\b(harness|parser)\b", re.MULTILINE)
    scripts = {name: text for name, text in texts.items() if shared.search(text)}
    assert len(scripts) > 18 and [name for name, text in scripts.items() if unread_options(text)] == []
    assert unread_options(texts["many_classes.py"].replace(", device=False", "")) == ["device"]


def check_contracts(folder):
    """Run the import contracts of pyproject.toml on the packages in a folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_import_contracts_hold():
    done = check_contracts(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("path", "imported", "broken"),
    [
        ("ncreg/optim.py", "recipes.core.errors", "The recipes use the library"),
        ("recipes/core/errors.py", "benchmarks.harness", "The recipes use the library"),
        ("ncreg/norms.py", "tests.oracles", "Nothing imports tests or examples"),
        ("recipes/data/split.py", "ncreg._checks", "A private module is used inside its own package alone"),
        ("ncreg/frames/__init__.py", "ncreg.heads", "The layers of the library"),
        ("ncreg/losses/__init__.py", "ncreg.metrics", "The layers of the library"),
        ("ncreg/robustness/long_tail.py", "ncreg.robustness.ood", "The parts of robustness do not know each other"),
        ("recipes/predict.py", "recipes.train", "no command imports another"),
        ("recipes/core/errors.py", "recipes.training.build", "The layers of the recipes"),
        ("recipes/data/split.py", "recipes.data.load", "No circles inside a package"),
        ("ncreg/new_module.py", "torch", "The layers of the library"),  # each module has a layer
    ],
)
def test_import_contracts_can_break(path, imported, broken, tmp_path):
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=not_python)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / path).open("a") as file:
        file.write(f"\nimport {imported}\n")
    done = check_contracts(tmp_path)
    assert done.returncode == 1
    assert broken in done.stdout.partition("Broken contracts")[2], done.stdout


def not_python(folder, names):
    return [name for name in names if Path(folder, name).is_file() and not name.endswith(".py")]


def public_definitions():
    """Functions and classes that the library names in `__all__`, but results and what timm's flags build."""
    paths = [path for path in sorted((ROOT / "ncreg").rglob("*.py")) if "timm" not in path.parts]
    trees = {path: ast.parse(path.read_text()).body for path in paths}
    named = {
        name
        for path, body in trees.items()
        for node in body
        if path.name == "__init__.py" and isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for name in ast.literal_eval(node.value)
    }
    for body in trees.values():
        for node in body:
            result = isinstance(node, ast.ClassDef) and (
                any("dataclass" in ast.unparse(one) for one in node.decorator_list)
                or any(ast.unparse(base) == "NamedTuple" for base in node.bases)
            )
            stub = isinstance(node, ast.FunctionDef) and any(
                ast.unparse(one) == "overload" for one in node.decorator_list
            )
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in named and not result and not stub:
                yield node


def test_every_public_function_and_class_has_an_example():
    found = {node.name: ast.get_docstring(node) or "" for node in public_definitions()}
    assert len(found) > 100 and {"swap_head", "NeuralCollapse", "round_weights"} <= set(found)
    assert [name for name, text in found.items() if ">>> " not in text] == []
