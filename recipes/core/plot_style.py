"""How every figure looks: colours, markers and lines that the colour-blind can tell apart."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")  # figures are written to files, also on machines without a screen

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B07C00", "#3D3D3D", "#56B4E9")
"""Okabe & Ito's colours, safe for the colour-blind; their yellow darkened to be seen on white."""

MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "p", "h", "*")

LINES = (
    "-",
    (0, (6, 2)),
    (0, (1, 1.5)),
    (0, (6, 2, 1, 2)),
    (0, (3, 1.5)),
    (0, (8, 2, 1, 2, 1, 2)),
)
"""Dashes; their number and that of the colours have no common factor, so that pairs of both repeat late."""

GRAY = "#666666"

STYLE: Any = {
    "font.size": 10,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib; each text of an SVG repeats the whole list
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "ncreg",
    "axes.unicode_minus": True,
    "text.parse_math": False,  # a label may hold a dollar
}
"""Settings of matplotlib, for plt.rc_context."""

MATH_STYLE = STYLE | {"text.parse_math": True}
"""The same where an axis is logarithmic: its powers of ten are formulas."""
