"""The collapse report as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from recipes.evaluation.collapse_plots import pictures
from recipes.evaluation.collapse_report import MeasuredSplit
from recipes.evaluation.findings import findings, percent, train_against_test
from recipes.evaluation.last_layer import last_layer_of

TEMPLATES = Path(__file__).resolve().parent / "templates"

MOST_ROWS = 50
"""Classes in the table of the page, the weakest first; all of them are in the results."""


def page(
    splits: Sequence[MeasuredSplit], class_names: Sequence[str], head: Any, *, title: str, facts: Sequence[str]
) -> str:
    """The page.

    Args:
        splits: the training images where they were measured, then those that are evaluated.
        class_names: of the outputs.
        head: the last layer.
        title: what was measured.
        facts: sentences on the model, its images and the data.
    """
    main, train = splits[-1].record, splits[0].record if len(splits) > 1 else None
    layer = last_layer_of(head, splits[0].collapse)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("collapse.html.jinja").render(
        title=title,
        facts=facts,
        columns=[split.name for split in splits],
        counts=[split.record["images"] for split in splits],
        comparison=[] if train is None else train_against_test(train, main, splits[-1].name),
        groups=findings(main, train, split=splits[-1].name, classes=len(class_names), layer=layer),
        pictures=pictures(splits, class_names, head),
        pairs=splits[0].record["closest"],
        rows=_class_rows(main),
        classes=len(class_names),
        collapse_word=splits[0].name,
    )


def _class_rows(record: dict[str, Any]) -> list[dict[str, str]]:
    """The weakest classes first, those without images last."""

    def order(item: tuple[str, dict[str, Any]]) -> tuple[float, float]:
        row = item[1]
        accuracy = row["accuracy"] if row["accuracy"] is not None else 2.0 if not row["images"] else 1.0
        return accuracy, -(row["cosine"] if row["cosine"] is not None else -2.0)

    rows = sorted(record["per_class"].items(), key=order)[:MOST_ROWS]
    return [
        {
            "name": name,
            "images": str(row["images"]),
            "accuracy": percent(row["accuracy"]) if row["images"] else "no image",
            "nearest": "–" if row["nearest"] is None else f"{row['nearest']} ({row['cosine']:.2f})".replace("-", "−"),
        }
        for name, row in rows
    ]
