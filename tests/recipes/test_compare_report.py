"""The report: HTML that stands alone and is accessible, and the same in Markdown."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from recipes import compare

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"


class Page(HTMLParser):
    """Checks as it reads: tags close in turn, ids are one of a kind; keeps what the tests ask for."""

    VOID = {"meta", "link", "br", "img", "input", "hr"}

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.found = [], [], []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), list(self.open)))
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs), list(self.open)))
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def of(self, tag):
        return [attrs for name, attrs, _ in self.found if name == tag]


def test_the_html_stands_alone_and_can_be_read_by_all(miniature):
    text = (miniature.parent / miniature.stem / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert not page.open and len(page.ids) == len(set(page.ids))
    assert page.of("html")[0]["lang"] == "en" and page.of("title") and page.of("main") and page.of("meta")
    for tag in ("script", "link", "img", "iframe"):
        assert not page.of(tag)
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert not re.search(r"(src|href)=\"(?!#)", without_names) and "@import" not in text and "url(http" not in text
    targets = re.findall(r'href="#([^"]+)"', text) + re.findall(r"url\(#([^)]+)\)", text)
    assert targets and set(targets) <= set(page.ids)
    assert len(page.of("table")) == text.count("<caption>") == len(re.findall(r'<div class="scroll"', text))
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.of("th"))
    cards = [attrs for attrs in page.of("div") if attrs.get("role") == "img"]
    assert len(cards) == len(page.of("svg")) >= 5 and all(len(card["aria-label"]) > 20 for card in cards)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert "fixed simplex" in text and "too few seeds" in text
    assert text.count("Collapse on the simplex") == 2  # the first seed of each arm


def test_the_markdown_says_the_same_as_the_html(miniature):
    out = miniature.parent / miniature.stem
    html, markdown = (out / "report.html").read_text(), (out / "report.md").read_text()
    rows = [line for line in markdown.splitlines() if line.startswith("| fixed simplex")]
    (overview,) = [line for line in markdown.splitlines() if line.startswith("| test accuracy (%) ")]
    assert len(overview.split("|")) == 5  # the arms side by side
    arms, contrasts = (
        [[cell.strip() for cell in row.split("|")] for row in rows if ("| baseline " in row) == asked]
        for asked in (False, True)
    )
    assert len(arms) == len(contrasts) == 5  # a row a measure; the contrast is the same difference once more
    assert [row[4:6] for row in arms] == [row[4:6] for row in contrasts]
    for value in re.findall(r"\d+\.\d+(?:e[-+]\d+)?", " ".join([*rows, overview])):
        assert value in html
    for picture in re.findall(r"\]\((figures/[^)]+)\)", markdown):
        assert (out / picture).read_text().startswith("<?xml")


@pytest.mark.parametrize(
    "out",
    sorted(path.with_suffix("") for path in STUDIES.glob("*.yaml") if path.with_suffix("").is_dir()),
    ids=lambda out: out.name,
)
def test_a_committed_report_shows_few_small_figures_and_links_to_nothing_else(out):
    text = (out / "report.md").read_text()
    shown = re.findall(r"\]\(([^)#]+)\)", text)
    assert 1 <= len(shown) <= 3 and len(set(shown)) == len(shown)
    assert {out / name for name in shown} == set((out / "figures").glob("*.svg"))
    assert all((out / name).stat().st_size < 64 * 1024 for name in shown)
    assert f"`python recipes/compare.py benchmarks/studies/{out.name}.yaml --report-only`" in text


def test_report_only_makes_every_file_of_a_report_from_the_committed_ones_without_runs(tmp_path):
    committed = STUDIES / "bn_decay"
    for path in committed.glob("*.json"):
        shutil.copy(path, tmp_path)
    command = [
        str(STUDIES / "bn_decay.yaml"),
        "--report-only",
        "--out",
        str(tmp_path),
        "--runs",
        str(tmp_path / "runs"),
    ]
    assert compare.main(command) == 0
    assert (tmp_path / "report.md").read_text() == (committed / "report.md").read_text()
    for name in ("timing.json", "curves.json", "collapse.json"):
        assert (tmp_path / name).read_bytes() == (committed / name).read_bytes()
    now, then = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path, committed))
    for tables in (now.pop("statistics"), then.pop("statistics")):
        assert [len(table["arms"]) for table in tables] == [4] * 10
    assert now == then
    figures = {path.name for path in (tmp_path / "figures").rglob("*.svg")}
    assert len(figures) == (tmp_path / "report.html").read_text().count("<figure>") == 14
    assert {path.name for path in (committed / "figures").glob("*.svg")} < figures
