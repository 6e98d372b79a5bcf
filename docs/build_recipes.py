"""Fill the table and the sections of docs/recipes.md from the comment cards in recipes/configs.

    python docs/build_recipes.py            # rewrite the page
    python docs/build_recipes.py --check    # exit code 1 where the page is not what the cards say

A card begins with one line that says what the recipe is. Fields follow, each one a paragraph `# Name: text`, whose next
lines are indented. The table shows the first line, the first sentence of "When to use it", and "Published". What
we measured stays as it is: `python benchmarks/studies/digest.py` fills it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "recipes.md"
FIELDS = ("What it does", "Formula", "When to use it", "What it costs", "Published", "Source")
MEASURED = re.compile(r"<!-- method: (\w+) -->\n(.*?)<!-- end of method -->", re.DOTALL)
BLOCK = re.compile(r"(<!-- recipes -->\n).*?(<!-- end of recipes -->)", re.DOTALL)
SHOWN_AS = {"Published": "What the literature measured"}
LINKS = (
    (r"\bdocs/(([\w]+\.md)(#[\w-]+)?)", r"[docs/\2](\1)"),
    (r"\bbenchmarks/studies/(\w+)", r"[benchmarks/studies/\1](../benchmarks/studies/\1/report.md)"),
    (r"\barXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)"),
)


def read_card(path: Path) -> dict[str, str]:
    """A recipe's title, its fields and its head.

    Raises:
        ValueError: a card without a title, or with a field that is missing, empty or unknown.
    """
    text = path.read_text()
    title, *lines = [line[1:] for line in text.splitlines() if line.startswith("#")]
    fields: dict[str, list[str]] = {}
    for line in lines:
        name, colon, words = line.strip().partition(":")
        if colon and not line.startswith("   "):
            fields[name] = [words.strip()]
        elif line.strip():
            fields[next(reversed(fields))].append(line.strip())
    card = {name: " ".join(parts) for name, parts in fields.items()}
    if not title.strip() or set(card) | {"Source"} != set(FIELDS) or not all(card.values()):
        raise ValueError(f"{path.name}: a card has a title and {', '.join(FIELDS)} (Source may be left out)")
    model = yaml.safe_load(text).get("model", {})
    bias = model.get("head_args", {}).get("bias", True)
    return card | {"title": title.strip(), "head": model.get("head", "linear") + ("" if bias else ", no bias")}


def table(cards: dict[str, dict[str, str]]) -> str:
    """One row a recipe."""
    rows = [("recipe", "head", "what it is", "worth trying for", SHOWN_AS["Published"].lower()), ("---",) * 5]
    for name, card in cards.items():
        use = card["When to use it"].partition(". ")[0].rstrip(".")
        published = linked(card["Published"].rstrip("."))
        rows.append((f"[`{name}`](#{name})", card["head"], card["title"], linked(use), published))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def section(name: str, card: dict[str, str], measured: str) -> str:
    """What a recipe's card says, field by field; then the table of what we measured ("" for one to be filled)."""
    items = [f"- **{SHOWN_AS.get(field, field)}:** {linked(card[field])}" for field in FIELDS if field in card]
    head = [f"### {name}", "", f"[{card['title']}](../recipes/configs/{name}.yaml)", "", *items]
    if name == "baseline":  # what the others are compared with
        return "\n".join(head)
    block = f"<!-- method: {name} -->\n{measured}<!-- end of method -->"
    return "\n".join([*head, "", "**What we measured**", "", block])


def linked(text: str) -> str:
    """The text with its documents, studies and papers as links."""
    for pattern, link in LINKS:
        text = re.sub(pattern, link, text)
    return text


def filled(text: str, folder: Path = ROOT / "recipes" / "configs") -> str:
    """The page's text with table and sections made new."""
    cards = {path.stem: read_card(path) for path in sorted(folder.glob("*.yaml"))}
    measured = dict(MEASURED.findall(text))
    sections = (section(name, card, measured.get(name, "")) for name, card in cards.items())
    content = "\n\n".join([table(cards), "## Recipe by recipe", *sections])
    return BLOCK.sub(lambda found: f"{found[1]}\n{content}\n\n{found[2]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0, or 1 where --check finds that the page is not what the cards say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page is stale")
    args = parser.parse_args(argv)
    old = PAGE.read_text()
    new = filled(old)
    if new == old:
        return 0
    print(f"{PAGE.relative_to(ROOT)}: {'is not what the cards say' if args.check else 'written anew'}")
    if not args.check:
        PAGE.write_text(new)
    return int(args.check)


if __name__ == "__main__":
    sys.exit(main())
