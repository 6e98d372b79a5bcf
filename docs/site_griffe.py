"""Docstrings as the site reads them: `Example:` is the section with doctests, and a formula's brackets are no link."""

from __future__ import annotations

import re

import griffe


class Docstrings(griffe.Extension):
    """Change the text of each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **arguments: object) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring's text; outside doctests `](` would begin a link's address."""
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    return re.sub(r"^(?! *(?:>>>|\.\.\. )).*", lambda line: line[0].replace("](", r"]\("), text, flags=re.MULTILINE)
