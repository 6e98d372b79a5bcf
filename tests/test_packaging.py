"""What an install puts on a machine: the package ncreg and nothing else of this folder."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import editables
import pytest
from hatchling import build

import ncreg

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORT_NAMES = {"pyyaml": "yaml", "scikit-learn": "sklearn"}
TOOLS = ("dev", "docs", "release")  # extras that hold programs, which nothing has to import
IMPORTED_BY_OTHERS = {"docstring-parser", "onnx"}  # by jsonargparse, which shows docstrings as help; by onnxscript


@pytest.fixture
def built(tmp_path, monkeypatch):
    """Build one of sdist, wheel and editable into a temporary folder and return its path."""
    monkeypatch.chdir(ROOT)
    return lambda kind: tmp_path / getattr(build, f"build_{kind}")(str(tmp_path))


def test_wheel_holds_the_package_alone(built):
    names = zipfile.ZipFile(built("wheel")).namelist()
    assert "ncreg/__init__.py" in names and "ncreg/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"ncreg", f"ncreg-{ncreg.__version__}.dist-info"}


def test_metadata_has_the_version_of_the_package_and_a_readme_without_dead_links(built):
    path = built("wheel")
    text = zipfile.ZipFile(path).read(f"ncreg-{ncreg.__version__}.dist-info/METADATA").decode()
    fields, _, readme = text.partition("\n\n")
    assert f"Version: {ncreg.__version__}\n" in fields and "Description-Content-Type: text/markdown" in fields
    assert readme.lstrip().startswith("# ncreg") and "swap_head" in readme
    assert len(re.findall(r"\]\(https?:", readme)) >= 1 and not re.findall(r"\]\((?!https?:)", readme)


def test_one_version_everywhere():
    assert "version" not in PROJECT and f"version: {ncreg.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"version = {{{ncreg.__version__}}}" in (ROOT / "docs" / "citing.md").read_text()
    assert f"\n## {ncreg.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_sdist_is_small(built):
    path = built("sdist")
    names = {name.partition("/")[2] for name in tarfile.open(path).getnames()}
    assert path.stat().st_size < 1_200_000
    assert {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "ncreg/py.typed",
        "recipes/train.py",
        "tests/conftest.py",
        "tests/ncreg/test_heads.py",
    } <= names
    assert not [name for name in names if name.endswith((".png", ".html", ".pt", ".safetensors", "results.json"))]


@pytest.mark.slow  # half a minute: it imports all tests of the library once more
def test_tests_in_the_sdist_find_what_they_need(built, tmp_path):
    tarfile.open(built("sdist")).extractall(tmp_path, filter="data")
    folder = tmp_path / f"ncreg-{ncreg.__version__}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", ""]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    collect = subprocess.run([*command, "--collect-only"], cwd=folder, env=environment, capture_output=True, text=True)
    assert collect.returncode == 0, collect.stdout
    assert int(re.findall(r"(\d+)(?:/\d+)? tests collected", collect.stdout)[0]) > 3000
    reading = ["tests/ncreg/test_theory.py", "tests/ncreg/test_checkpoint.py", "ncreg/heads"]
    done = subprocess.run([*command, *reading], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_editable_install_finds_the_package_alone(built, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(built("editable")).extractall(site)
    code = f"""if True:
        import site, sys
        from importlib.util import find_spec
        sys.path.append({str(Path(editables.__file__).parents[1])!r})   # without what is installed there by .pth files
        site.addsitedir({str(site)!r})
        specs = [find_spec(name) for name in ("ncreg", "recipes", "benchmarks", "examples", "tests")]
        print([spec.origin for spec in specs if spec and (spec.origin or "").startswith({str(ROOT)!r})])"""
    found = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=empty, capture_output=True, text=True)
    assert found.stdout.strip() == str([str(ROOT / "ncreg" / "__init__.py")]), found.stderr


def test_every_optional_package_is_imported_somewhere():
    sources = [path.read_text() for folder in ("ncreg", "recipes", "benchmarks", "tests") for path in files(folder)]
    extras = PROJECT["optional-dependencies"]
    wanted = {line.split(">")[0] for extra, lines in extras.items() if extra not in TOOLS for line in lines}
    unread = {
        name
        for name in wanted - IMPORTED_BY_OTHERS
        if not any(mentions(text, IMPORT_NAMES.get(name, name.replace("-", "_"))) for text in sources)
    }
    assert wanted > IMPORTED_BY_OTHERS and unread == set()


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def mentions(text, module):
    return re.search(rf"\b(import|from) {module}\b|[\"']{module}[.\"']", text)
