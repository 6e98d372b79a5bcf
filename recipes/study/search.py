"""The search before a comparison: every arm tries equally many points on the same seeds; validation images choose."""

from __future__ import annotations

from typing import Any

from recipes.study.measures import lookup
from recipes.study.records import Records, has_failed, is_done
from recipes.study.spec import Search, Study
from recipes.study.trials import make_trial


def search_results(study: Study, records: Records) -> list[dict[str, Any]]:
    """For each setting and arm, every point with its value by seed, and the chosen point.

    `chosen` is the point with the best mean, the first of equals; null while a run is missing or where every point
    has a run that failed.
    """
    if study.search is None:
        return []
    return [_arm_results(study, study.search, records, data, arm) for data in study.settings for arm in study.arms]


def _arm_results(study: Study, search: Search, records: Records, data: str, arm: str) -> dict[str, Any]:
    entries: list[dict[str, Any]] = []
    missing = 0
    for point in study.points(arm):
        values: dict[str, float | None] = {}
        errors = []
        for seed in search.seeds:
            trial = make_trial(study, data, arm, seed, point, searching=True)
            if is_done(records, trial, None):
                values[str(seed)] = lookup(records[trial.key].result, search.measure)
            elif has_failed(records, trial):
                values[str(seed)] = None
                errors.append(records[trial.key].result["error"])
            else:
                missing += 1
        numbers = [value for value in values.values() if value is not None]
        mean = sum(numbers) / len(numbers) if len(numbers) == len(search.seeds) else None
        entries.append({"point": point, "values": values, "mean": mean, "error": errors[0] if errors else None})
    return {
        "data": data,
        "arm": arm,
        "measure": search.measure,
        "points": entries,
        "missing": missing,
        "chosen": None if missing else _best_point(entries, search),
    }


def _best_point(entries: list[dict[str, Any]], search: Search) -> dict[str, Any] | None:
    sign = 1 if search.better == "larger" else -1
    ranked = [entry for entry in entries if entry["mean"] is not None]
    best = max(ranked, key=lambda entry: sign * entry["mean"], default=None)
    return None if best is None else best["point"]


def chosen_points(study: Study, records: Records) -> dict[tuple[str, str], dict[str, Any]]:
    """The chosen point of each (data, arm) that is ready to be compared; {} if the study has no search."""
    if study.search is None:
        return {(data, arm): {} for data in study.settings for arm in study.arms}
    return {
        (entry["data"], entry["arm"]): entry["chosen"]
        for entry in search_results(study, records)
        if entry["chosen"] is not None
    }
