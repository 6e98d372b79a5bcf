"""The site builds without a warning and without a network, shows every public name, and its links lead somewhere."""

import importlib
import inspect
import os
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))
import site_api  # noqa: E402
import site_griffe  # noqa: E402
import site_hooks  # noqa: E402


class References(HTMLParser):
    """What a page links to, what a browser loads with it, and the places in it."""

    def __init__(self, page):
        super().__init__()
        self.links, self.loaded, self.places = [], [], set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.places |= {given.get("id"), given.get("name")}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") != "canonical" and given.get("href"):
            self.loaded.append(given["href"])
        elif given.get("src"):
            self.loaded.append(given["src"])


def dead_links(pages):
    """(page, link) where a file or a place in it is missing."""
    for page, found in pages.items():
        for link in (*found.links, *found.loaded):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link.startswith("data:"):
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if not target.is_file():
                yield page.name, link
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].places:
                yield page.name, link


def public_names():
    """The full name of each public object of ncreg, as Python sees it."""
    for dotted in site_api.MODULES:
        module = importlib.import_module(dotted)
        for name in getattr(module, "__all__", ()):
            found = getattr(module, name)
            if not isinstance(found, ModuleType):
                yield dotted, name, found


def inventory(site):
    """The names in objects.inv, the list by which other projects' documentation links to this one."""
    header, _, packed = (site / "objects.inv").read_bytes().partition(b"zlib.\n")
    return {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}


def test_the_site(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {
        "NO_MKDOCS_2_WARNING": "1",
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    site = (tmp_path / "site").resolve()
    pages = {path: References(path) for path in site.rglob("*.html") if path.name not in ("404.html", "report.html")}
    assert len(pages) > 80 and list(dead_links(pages)) == []
    method = (site / "methods" / "etf.html").read_text()
    assert all(part in method for part in ("Formula:", "What we measured", "second_model</a>", "Source:"))
    from_elsewhere = {link for page in pages.values() for link in page.loaded if urlsplit(link).netloc}
    assert from_elsewhere == set()
    shown = inventory(site)
    missing = [
        f"{module}.{name}"
        for module, name, found in public_names()
        if not {f"{module}.{name}", f"{getattr(found, '__module__', '')}.{name}"} & shown
    ]
    assert len(shown) > 250 and missing == []


def test_every_module_with_public_names_has_its_page():
    listed = set(site_api.MODULES)
    for path in (ROOT / "ncreg").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        dotted = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if "__all__" in path.read_text() and not any(part.startswith("_") for part in dotted.split(".")):
            assert dotted in listed, f"docs/site_api.py lacks {dotted}"


def test_names_of_the_pages_are_those_of_all():
    shown = {name.path for names in site_api.public_names().values() for name in names}
    assert {f"{module}.{name}" for module, name, _ in public_names()} <= shown
    assert all(name.summary for names in site_api.public_names().values() for name in names)
    functions = [f"{m}.{n}" for m, n, found in public_names() if inspect.isroutine(found)]
    assert "ncreg.transferability.logme" in functions  # hides the submodule of its name


@pytest.mark.parametrize(
    ("page", "link", "leads_to"),
    [
        ("heads.md", "[a](models.md#fold)", "[a](models.md#fold)"),
        ("heads.md", "![a](figures/frames.png)", "![a](figures/frames.png)"),
        ("index.md", "[a](notebooks/b.ipynb)", "[a](notebooks/b.md)"),
        ("heads.md", "[a](../README.md)", "[a](source/README.md.page.md)"),
        ("tutorials/long_tail.md", "[a](../recipes.md#etf)", "[a](../methods/etf.md)"),
        ("recipes.md", "[a](#etf) [b](#recipes)", "[a](methods/etf.md) [b](recipes.md#recipes)"),
        ("methods/etf.md", "[a](../recipes/configs/etf.yaml)", "[a](../source/recipes/configs/etf.yaml.page.md)"),
        ("source/benchmarks/x.md.page.md", "[a](../docs/compare.md#b)", "[a](../../compare.md#b)"),
        ("heads.md", "[a](https://arxiv.org/abs/1) [b](#here)", "[a](https://arxiv.org/abs/1) [b](#here)"),
    ],
)
def test_links_lead_to_the_same_file_on_the_site(page, link, leads_to):
    assert site_hooks.rewritten(link, page) == leads_to


def test_lists_get_their_empty_line_and_code_stays():
    text = "Words:\n- a\n- b\n\n```\nx:\n- a\n```\n| a |\n- b\n"
    spaced = site_hooks.outside_fences(text, site_hooks.spaced)
    assert spaced == "Words:\n\n- a\n- b\n\n```\nx:\n- a\n```\n| a |\n- b\n"


def test_docstrings_become_markdown():
    text = "max[a](b)\n\n    Example:\n        >>> x[0](1)\n        2"
    assert site_griffe.as_markdown(text) == "max[a]\\(b)\n\n    Examples:\n        >>> x[0](1)\n        2"
