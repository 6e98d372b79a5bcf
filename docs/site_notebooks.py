"""A notebook as a page of the site: its Markdown, its code, and the outputs that were committed with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def page(path: Path) -> str:
    """The Markdown of a notebook, figures inside it."""
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join(part for cell in cells for part in parts(cell)) + "\n"


def parts(cell: dict[str, Any]) -> list[str]:
    """A cell and what it gave."""
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":
        return [source]
    return [f"~~~~python\n{source}\n~~~~", *(shown(output) for output in cell["outputs"])]


def shown(output: dict[str, Any]) -> str:
    """One output: a figure, or text."""
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "image/png" in data:
        code = "".join("".join(data["image/png"]).split())
        return f'<img alt="" src="data:image/png;base64,{code}">'
    return f"~~~~text\n{''.join(data['text/plain']).rstrip()}\n~~~~"
