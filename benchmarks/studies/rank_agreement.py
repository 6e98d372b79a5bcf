"""How far scores of backbones agree with fine-tuned accuracies: correlations of ranks, intervals, a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import kendalltau, spearmanr

SCORES: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "linear probe": lambda row: row["linear_probe"],
    "nearest centre": lambda row: row["nearest_center"],
    "−CDNV": lambda row: -row["cdnv"],
    "LogME": lambda row: row["logme"],
    "NCTI": lambda row: row["ncti"],
    "parameters": lambda row: row["parameters"],
    "NASWOT": lambda row: row["naswot"],
}
DRAWS = 2_000


def correlations(score: np.ndarray, accuracy: np.ndarray) -> dict[str, Any]:
    """Mean of Kendall's τ-b and Spearman's ρ over seeds (rows) across candidates (columns), with bootstrap intervals.

    Example:
        >>> found = correlations(np.arange(12.0).reshape(2, 6), np.arange(12.0).reshape(2, 6))
        >>> round(found["kendall"]["mean"], 6), [round(end, 6) for end in found["spearman"]["interval"]]
        (1.0, [1.0, 1.0])
    """
    generator, count = np.random.default_rng(0), score.shape[1]
    draws: list[np.ndarray] = []
    while len(draws) < DRAWS:
        drawn = generator.integers(0, count, (count,))
        draws += [drawn] if len(set(drawn)) >= 4 else []
    result = {}
    for name, statistic in (("kendall", kendalltau), ("spearman", spearmanr)):

        def mean(columns: np.ndarray, statistic: Any = statistic) -> float:
            pairs = zip(score[:, columns], accuracy[:, columns], strict=True)
            return float(np.mean([_correlation(statistic, x, y) for x, y in pairs]))

        ends = np.quantile([mean(drawn) for drawn in draws], [0.025, 0.975])
        result[name] = {"mean": mean(np.arange(count)), "interval": [float(end) for end in ends]}
    return result


def _correlation(statistic: Any, x: np.ndarray, y: np.ndarray) -> float:
    """0 where all values of one side are the same, for then nothing is ranked."""
    return 0.0 if np.ptp(x) == 0 or np.ptp(y) == 0 else float(statistic(x, y).statistic)


def agreement(scores: Mapping[int, list[dict[str, Any]]], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every score against test accuracy, over all candidates and over those that start trained."""
    by_name = {seed: {row["name"]: row for row in found} for seed, found in scores.items()}
    accuracy = {(row["candidate"], row["seed"]): row["test"] for row in rows}
    names = sorted({row["candidate"] for row in rows})
    trained = [name for name in names if not name.endswith("untrained")]
    groups = {"all": names, "trained": trained, "untrained": [name for name in names if name not in trained]}
    result: dict[str, Any] = {}
    for score, value in SCORES.items():
        for group in ("untrained",) if score == "NASWOT" else ("all", "trained"):
            chosen = groups[group]
            table = np.array([[value(by_name[seed][name]) for name in chosen] for seed in scores], dtype=float)
            tests = np.array([[accuracy[name, seed] for name in chosen] for seed in scores])
            result.setdefault(score, {})[group] = correlations(table, tests) | {"candidates": len(chosen)}
    return result


def table(settings: Sequence[Mapping[str, Any]]) -> str:
    """Rows of Markdown: τ and ρ of every score, of each target and group of candidates."""
    lines = ["| target | candidates | score | Kendall's τ | Spearman's ρ |", "|---|---|---|---|---|"]
    for setting in settings:
        for group in ("all", "trained", "untrained"):
            for score, found in setting["correlations"].items():
                if group in found:
                    cells = [
                        f"{found[group][name]['mean']:+.2f} [{low:+.2f}, {high:+.2f}]"
                        for name in ("kendall", "spearman")
                        for low, high in [found[group][name]["interval"]]
                    ]
                    count = found[group]["candidates"]
                    label = f"all {count}" if group == "all" else f"{count} {group}"
                    lines.append(f"| {setting['target']} | {label} | {score} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)
