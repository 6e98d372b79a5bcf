"""The Python in README and docs runs, and prints what the page says it prints."""

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}  # one namespace a page: later blocks go on with earlier ones
    for number, block in enumerate(blocks(page)):
        if ">>>" not in block:
            exec(compile(block, f"{page.name} block {number}", "exec"), names)
            continue
        test = doctest.DocTestParser().get_doctest(block, names, f"{page.name}[{number}]", str(page), 0)
        lines = []
        result = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=lines.append, clear_globs=False)
        assert result.attempted and not result.failed, "".join(lines)
        names = test.globs


def test_links_inside_the_repository_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith(("http", "mailto:")):
                assert (page.parent / target).exists(), f"{page.name} points to {target}"
