"""Fonts for names in any script: what matplotlib's own font lacks is taken from another font that is installed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from matplotlib import font_manager

DEFAULT = "DejaVu Sans"


def drawable(names: Sequence[str], style: Any) -> tuple[list[str], Any]:
    """The names as a figure can show them, and the style with the fonts that they need.

    A name with a letter that no installed font has is replaced by "class N", N counted from 0.

    Args:
        names: of the classes, in their order.
        style: settings for plt.rc_context.

    Example:
        >>> drawable(["dog", "Füchse"], {"font.size": 10})
        (['dog', 'Füchse'], {'font.size': 10})
    """
    fonts = [DEFAULT]
    shown = []
    for number, name in enumerate(names):
        missing = {letter for letter in name if letter.isprintable()} - _letters_of(fonts)
        while missing and (more := _font_with(frozenset(missing))) is not None:
            fonts.append(more)
            missing -= _letters_of([more])
        unprintable = any(not letter.isprintable() for letter in name)
        shown.append(f"class {number}" if missing or unprintable or not name.strip() else name)
    return shown, style | {"font.family": fonts} if fonts[
        1:
    ] else style  # matplotlib looks further in a list of families


def _letters_of(fonts: Sequence[str]) -> set[str]:
    """Letters of the files that matplotlib takes for these families; other files of a family may have fewer."""
    return set().union(*(_letters(font_manager.findfont(font_manager.FontProperties(family=[font]))) for font in fonts))


@cache
def _letters(path: str) -> frozenset[str]:
    try:
        return frozenset(map(chr, font_manager.get_font(path).get_charmap()))
    except (OSError, RuntimeError, ValueError):  # a font file that FreeType cannot read has no letters for us
        return frozenset()


@cache
def _font_with(missing: frozenset[str]) -> str | None:
    """The installed font that has the most of these letters; None if no font has any."""
    installed = {
        entry.name
        for entry in font_manager.fontManager.ttflist
        if entry.style == "normal" and not entry.name.startswith("Last Resort")  # it draws a box for every letter
    }
    found = {name: len(missing & _letters_of([name])) for name in installed}  # of the file that will be drawn with
    best = max(sorted(found), key=lambda name: found[name], default=None)
    return best if best is not None and found[best] else None
