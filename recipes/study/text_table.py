"""Tables as plain text: in columns for a terminal, and the pipe tables of Markdown with their columns lined up."""

from __future__ import annotations

import re
from collections.abc import Sequence

CELL = re.compile(r"(?<!\\)\|")


def columns(rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), gap: str = "  ") -> list[str]:
    """Rows as lines, each column as wide as its widest cell; those numbered in `right` end together.

    Example:
        >>> columns([["etf", "1.5"], ["baseline", "10.5"]], right=[1])
        ['etf        1.5', 'baseline  10.5']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        gap.join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def lined_up(markdown: str) -> str:
    r"""The same Markdown with the columns of its pipe tables padded; `---:` puts a column's cells to the right.

    Example:
        >>> print(lined_up("| arm | n |\n|---|---:|\n| etf | 10 |"))
        | arm |  n |
        |-----|---:|
        | etf | 10 |
    """
    lines: list[str] = []
    table: list[list[str]] = []
    for line in [*markdown.split("\n"), ""]:
        if line.startswith("|"):
            table.append([cell.strip() for cell in CELL.split(line.strip())[1:-1]])
            continue
        lines += [*_table(table), line]
        table = []
    return "\n".join(lines[:-1])


def _table(rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    head, rule, *body = rows
    right = [number for number, mark in enumerate(rule) if mark.endswith(":")]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    rules = ["-" * (width + 1) + (":" if number in right else "-") for number, width in enumerate(widths)]
    room = sum(widths) + 3 * (len(widths) - 1)
    first, *others = [f"| {line.ljust(room)} |" for line in columns([head, *body], right=right, gap=" | ")]
    return [first, f"|{'|'.join(rules)}|", *others]
