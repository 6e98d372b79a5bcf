"""The README as a package index shows it: without links to files, which lead nowhere there, and without figures."""

from __future__ import annotations

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


class PackageReadme(MetadataHookInterface):
    """hatchling asks it for the field `readme` when it builds (tool.hatch.metadata.hooks.custom)."""

    def update(self, metadata: dict) -> None:
        """Fill in the readme."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": without_links_to_files(text)}


def without_links_to_files(text: str) -> str:
    """Markdown whose links to files are their own text; a figure goes with the paragraph below it that explains it."""
    text = re.sub(r"^!\[[^\]]*\]\((?!https?:)[^)]*\)\n\n.+?\n\n", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)
