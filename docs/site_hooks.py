"""What `make docs` adds to the Markdown files of docs/: pages that are made anew, and links that lead out of docs/.

- API pages from `site_api.py`; a page for each recipe, which is its section of recipes.md; pages of notebooks from
  `site_notebooks.py`.
- A link to a file of the repository outside docs/ (a recipe, a study's report, an example) leads to a page under
  `source/` that shows the file, so that the same link works on a code host and on the site.
- Python-Markdown wants an empty line before a list and reads `>>>` as Python; code hosts need neither.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

import site_api
import site_notebooks
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2 *$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\()([^)#\s]+)?(#[^)\s]*)?\)")
SHOWN = {
    ".py": "python",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".json": "json",
    ".toml": "toml",
    ".txt": "text",
    ".cff": "yaml",
}
LONGEST = 200_000  # characters of a file that are shown
FIRST = "index.md"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages that are made here into the navigation."""
    sections = {title: pages for section in config.nav or [] for title, pages in section.items()}
    recipes = next(pages["Recipes"] for pages in sections["Methods"] if "Recipes" in pages)
    recipes += [{name: f"methods/{name}.md"} for name in recipe_names()]
    sections["API"] += [{module: f"api/{module}.md"} for module in site_api.MODULES if module != "ncreg"]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here, then those of the repository's files that any page links to."""
    made = site_api.pages() | {f"methods/{name}.md": method_page(name) for name in recipe_names()}
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        text = site_notebooks.page(Path(notebook.abs_src_path or ""))
        files.append(File.generated(config, notebook.src_uri.replace(".ipynb", ".md"), content=text))
    waiting = [file for file in files if file.is_documentation_page()]
    while waiting:
        page = waiting.pop()
        for target in targets(page.content_string, place_of(page.src_uri)):
            if files.get_file_from_path(site_path(target)) is None and (ROOT / target).exists():
                waiting += add(files, config, target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A page's text as the site needs it."""
    place = page.file.src_uri
    if place == FIRST:
        page.meta["hide"] = ["toc", "navigation"]
    elif "\n## " not in markdown and not place.startswith("api/"):
        page.meta["hide"] = ["toc"]  # a page without sections has the whole width
    if place == "recipes.md":
        markdown = markdown.partition("## Recipe by recipe")[0]
    return outside_fences(markdown, lambda text: rewritten(spaced(text), place)).replace(
        "```python\n>>>", "```pycon\n>>>"
    )


def recipe_names() -> list[str]:
    """The recipes in recipes/configs."""
    return sorted(path.stem for path in (ROOT / "recipes" / "configs").glob("*.yaml"))


def method_page(name: str) -> str:
    """A recipe's section of docs/recipes.md as a page of its own, with links as there."""
    text = (ROOT / "docs" / "recipes.md").read_text()
    section = text.partition(f"\n### {name}\n")[2].partition("\n### ")[0].partition("\n<!-- end of recipes -->")[0]
    return f"# {name}\n{section}"


def place_of(uri: str) -> str:
    """Where in the repository a page's relative links start: the path of the file that its text comes from."""
    if uri.startswith("source/"):
        return uri.removeprefix("source/").removesuffix(".page.md")
    return "docs/recipes.md" if uri.startswith("methods/") else f"docs/{uri}"


def site_path(target: str) -> str:
    """Where the site has a file or folder of the repository."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/").replace(".ipynb", ".md")
    if target.endswith((".png", ".svg")):
        return f"source/{target}"
    return f"source/{target}.page.md"


def targets(text: str, place: str) -> set[str]:
    """The files of the repository that a text links to."""
    found = (link for _, link, _ in LINK.findall(FENCE.sub("", text)))
    return {resolved(link, place) for link in found if link and ":" not in link}


def resolved(link: str, place: str) -> str:
    """A relative link as a path inside the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(place), link))


def add(files: Files, config: MkDocsConfig, target: str) -> list[File]:
    """Put a file or folder of the repository on the site; the pages among it, whose links count too."""
    path, uri = ROOT / target, site_path(target)
    if target.startswith(("docs/", "../")):
        return []  # on the site already, or not of this repository: mkdocs says so
    if not uri.endswith(".md"):
        files.append(File.generated(config, uri, abs_src_path=str(path)))
        return []
    files.append(File.generated(config, uri, content=shown(path, target)))
    return [file] if (file := files.get_file_from_path(uri)) else []


def shown(path: Path, target: str) -> str:
    """The text of the page that shows a file or lists a folder."""
    if path.is_dir():
        kept = [item for item in sorted(path.iterdir()) if item.suffix in (".md", *SHOWN) and item.name[0] not in "._"]
        return "\n".join([f"# {target}", "", *(f"- [{item.name}]({path.name}/{item.name})" for item in kept)])
    if path.suffix == ".md":
        return path.read_text()
    text = path.read_text()
    cut = text if len(text) <= LONGEST else f"{text[:LONGEST]}\n... ({len(text)} characters in all)"
    return f"# {target}\n\n~~~~{SHOWN.get(path.suffix, 'text')}\n{cut}\n~~~~\n"


def outside_fences(markdown: str, change) -> str:
    """The text with a change made everywhere but in code blocks."""
    parts, start = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[start : fence.start()]), fence[0]]
        start = fence.end()
    return "".join([*parts, change(markdown[start:])])


def spaced(text: str) -> str:
    """An empty line before each list that follows a paragraph at once."""
    return re.sub(r"^(?![-*] |\d+\. |\s|\||$)(.+)\n(?=[-*] |\d+\. )", r"\1\n\n", text, flags=re.MULTILINE)


def rewritten(text: str, uri: str) -> str:
    """Links to where the site has what they mean."""

    def link(found: re.Match[str]) -> str:
        opening, target, anchor = found[1], found[2] or "", found[3] or ""
        if ":" in target or not (target or uri == "recipes.md"):
            return found[0]
        file = resolved(target, place_of(uri)) if target else "docs/recipes.md"
        name = anchor.removeprefix("#")
        at = f"methods/{name}.md" if file == "docs/recipes.md" and name in recipe_names() else site_path(file) + anchor
        return f"{opening}{posixpath.relpath(at, posixpath.dirname(uri) or '.')})"

    return LINK.sub(link, text)
