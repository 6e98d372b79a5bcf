"""Equal tuning: every arm tries as many points on the same seeds, and validation images choose."""

from __future__ import annotations

from typing import Any

from recipes.study.results import Found, lookup
from recipes.study.spec import Search, Study
from recipes.study.trials import cell


def tried(study: Study, found: Found) -> list[dict[str, Any]]:
    """What the search found so far: for each setting and arm, every point with its value by seed.

    `chosen` is the point of the best mean, the first of equals; null while a run is missing or where every point
    has a run that failed.
    """
    if study.search is None:
        return []
    return [_tried(study, study.search, found, data, arm) for data in study.settings for arm in study.arms]


def _tried(study: Study, search: Search, found: Found, data: str, arm: str) -> dict[str, Any]:
    entries: list[dict[str, Any]] = []
    missing = 0
    for point in study.points(arm):
        values: dict[str, float | None] = {}
        errors = []
        for seed in search.seeds:
            item = cell(study, data, arm, seed, point, searching=True)
            if found.done(item, None):
                values[str(seed)] = lookup(found.runs[item.key], search.measure)
            elif found.failed(item):
                values[str(seed)] = None
                errors.append(found.runs[item.key]["error"])
            else:
                missing += 1
        numbers = [value for value in values.values() if value is not None]
        whole = len(numbers) == len(search.seeds)
        mean = sum(numbers) / len(numbers) if whole else None
        entries.append({"point": point, "values": values, "mean": mean, "error": errors[0] if errors else None})
    sign = 1 if search.better == "larger" else -1
    ranked = [entry for entry in entries if entry["mean"] is not None]
    best = max(ranked, key=lambda entry: sign * entry["mean"], default=None)
    chosen = None if missing or best is None else best["point"]
    return {
        "data": data,
        "arm": arm,
        "measure": search.measure,
        "points": entries,
        "missing": missing,
        "chosen": chosen,
    }


def chosen(study: Study, found: Found) -> dict[tuple[str, str], dict[str, Any]]:
    """The point of each (data, arm) that is ready to be compared; the empty one without a search."""
    if study.search is None:
        return {(data, arm): {} for data in study.settings for arm in study.arms}
    return {
        (entry["data"], entry["arm"]): entry["chosen"] for entry in tried(study, found) if entry["chosen"] is not None
    }
