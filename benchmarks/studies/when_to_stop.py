"""Does anything that is seen up to zero training error tell whether going on will pay?

    python benchmarks/studies/when_to_stop.py

Reads the results of `STUDIES`, all that were committed when this was done (later ones would move settings from one half
to the other): every compared run (not those of the searches) that reached zero training error before its last epoch and
has validation images, once.
Outcome: test accuracy at the end minus at zero error, in points. Writes
benchmarks/results/studies/when_to_stop-cpu.json and the table in docs/evidence.md. No run is made.

Rules, written before any relation was looked at. A setting is a study, its data and its arm. Half of the settings,
drawn with seed 0, are for finding a rule, the other half for testing it; runs of both halves are never mixed. The
candidates are the numbers of `PREDICTORS`, as a run knows them at zero error. Of each, the fitting half gives the one
threshold and direction, "go on where x is above (below) t", under which its runs gain most on average, a run that
stops gaining 0; t is a midpoint of two neighbours among its deciles. The rule of the candidate with the largest gain
is tested: on the other half, its mean gain minus that of always going on, with a 95 % interval by bootstrap over
settings (9,999 draws, seed 0). It is said to pay if the interval lies above zero. For each candidate also Spearman's
rank correlation with the outcome on the other half, with the same interval: described, no claim. All of it twice: with
the study on wrong labels, where going on is known to harm, and without it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
from scipy import stats

from benchmarks import harness
from benchmarks.studies.cells import fill

ROOT = Path(__file__).resolve().parents[2]
DRAWS = 9_999
STUDIES = (
    *("bn_decay", "default", "heads_and_losses", "label_noise", "last_bn", "long_tail", "scale", "second_model"),
    *("terminal_phase", "wider_decay"),
)
PREDICTORS: dict[str, Callable[[dict[str, Any]], float]] = {
    "epochs left / epochs": lambda s: 1 - s["onset_epoch"] / s["epochs"],
    "validation accuracy": lambda s: s["at_onset"]["val"]["accuracy"],
    "validation loss": lambda s: s["at_onset"]["val"]["loss"],
    "validation loss / training loss": lambda s: s["at_onset"]["val"]["loss"] / s["at_onset"]["train"]["loss"],
    "NC1": lambda s: s["at_onset"]["train"]["nc1"],
    "trace ratio": lambda s: s["at_onset"]["train"]["trace_ratio"],
    "NC3": lambda s: s["at_onset"]["train"]["nc3"],
    "mean intra-class cosine": lambda s: s["at_onset"]["train"]["intra_cosine"],
    "mean inter-class cosine": lambda s: s["at_onset"]["train"]["inter_cosine"],
    "normalised margin, tenth": lambda s: s["at_onset"]["train"]["normalized_margin_q10"],
    "normalised margin, mean": lambda s: s["at_onset"]["train"]["normalized_margin_mean"],
}


class Run(NamedTuple):
    """A run that reached zero error: where it belongs, what it knew then, what it gained since in points."""

    setting: str
    known: dict[str, float]
    gain: float


class Rule(NamedTuple):
    """Go on where the predictor lies above the threshold, or below it."""

    predictor: str
    threshold: float
    above: bool

    def goes_on(self, run: Run) -> bool:
        """Whether the run is trained on."""
        return (run.known[self.predictor] > self.threshold) == self.above


def read_runs(folder: Path) -> list[Run]:
    """Every run of these studies once; of one that several studies share, the first study's."""
    found: dict[str, Run] = {}
    for study in STUDIES:
        content = json.loads((folder / study / "results.json").read_text())
        for cell in content["cells"]:
            run = content["runs"].get(cell["key"])
            summary = run and run["summary"]
            if not summary or cell["key"] in found:
                continue
            onset, end = summary.get("at_onset"), summary.get("at_end")
            if not onset or not onset.get("val") or summary["epochs"] <= summary["onset_epoch"]:
                continue
            known = {name: float(of(summary)) for name, of in PREDICTORS.items()}
            gain = 100 * (end["test"]["accuracy"] - onset["test"]["accuracy"])
            found[cell["key"]] = Run(f"{study} {cell['data']} {cell['arm']}", known, gain)
    return [run for run in found.values() if all(math.isfinite(value) for value in run.known.values())]


def halves(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Runs of half of the settings, drawn with seed 0, and those of the others."""
    settings = sorted({run.setting for run in runs})
    first = set(np.random.default_rng(0).permutation(settings)[: len(settings) // 2])
    return [run for run in runs if run.setting in first], [run for run in runs if run.setting not in first]


def mean_gain(rule: Rule | None, runs: Sequence[Run]) -> float:
    """Mean gain where the rule decides; None: always going on."""
    return float(np.mean([run.gain if rule is None or rule.goes_on(run) else 0.0 for run in runs]))


def best_rule(predictor: str, runs: Sequence[Run]) -> Rule:
    """The threshold and direction under which the runs gain most."""
    deciles = np.unique(np.quantile([run.known[predictor] for run in runs], np.linspace(0, 1, 11)))
    middles = (deciles[1:] + deciles[:-1]) / 2
    rules = [Rule(predictor, float(t), above) for t in middles for above in (True, False)]
    return max(rules, key=lambda rule: mean_gain(rule, runs))


def resampled(runs: Sequence[Run], of: Callable[[list[Run]], float]) -> tuple[float, float]:
    """95 % percentile interval of a number of the runs, by bootstrap over their settings."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.setting, []).append(run)
    members, generator = list(groups.values()), np.random.default_rng(0)
    values = []
    for _ in range(DRAWS):
        drawn = generator.integers(len(members), size=len(members))
        values.append(of([run for index in drawn for run in members[index]]))
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def correlation(predictor: str, runs: Sequence[Run]) -> float:
    """Spearman's rank correlation of a predictor and the gain."""
    ranks = [stats.rankdata([run.known[predictor] for run in runs]), stats.rankdata([run.gain for run in runs])]
    return float(np.corrcoef(ranks)[0, 1])


def analysis(runs: Sequence[Run]) -> dict[str, Any]:
    """The rule of the fitting half, its test on the other, and each candidate's correlation there."""
    fitting, testing = halves(runs)
    rules = [best_rule(predictor, fitting) for predictor in PREDICTORS]
    rule = max(rules, key=lambda candidate: mean_gain(candidate, fitting))
    difference = mean_gain(rule, testing) - mean_gain(None, testing)
    low, high = resampled(testing, lambda drawn: mean_gain(rule, drawn) - mean_gain(None, drawn))
    rows = []
    for candidate in rules:
        at = resampled(testing, partial(correlation, candidate.predictor))
        rows.append(candidate._asdict() | {"fitting": mean_gain(candidate, fitting)})
        rows[-1] |= {"correlation": correlation(candidate.predictor, testing), "low": at[0], "high": at[1]}
    return {
        "runs": {"fitting": len(fitting), "testing": len(testing)},
        "settings": {"fitting": len({r.setting for r in fitting}), "testing": len({r.setting for r in testing})},
        "always": {"fitting": mean_gain(None, fitting), "testing": mean_gain(None, testing)},
        "rule": rule._asdict() | {"goes_on": float(np.mean([rule.goes_on(run) for run in testing]))},
        "test": {"gain": mean_gain(rule, testing), "difference": difference, "low": low, "high": high},
        "pays": low > 0,
        "candidates": rows,
    }


def table(content: dict[str, Any]) -> str:
    """The table of docs/evidence.md in Markdown."""
    titles = {"with": "with wrong labels", "without": "without"}
    lines = ["| | " + " | ".join(titles[key] for key in content) + " |", "| --- | --- | --- |"]

    def add(label: str, cell: Callable[[dict[str, Any]], str]) -> None:
        lines.append(f"| {label} | " + " | ".join(cell(found) for found in content.values()) + " |")

    add("runs (settings) to find the rule", lambda f: f"{f['runs']['fitting']} ({f['settings']['fitting']})")
    add("runs (settings) to test it", lambda f: f"{f['runs']['testing']} ({f['settings']['testing']})")
    add("mean gain of always going on (points)", lambda f: f"{f['always']['testing']:+.2f}")
    add("the rule found: go on where", lambda f: _words(f["rule"]))
    add("it goes on in", lambda f: f"{100 * f['rule']['goes_on']:.0f} % of the runs")
    add(
        "its gain minus that of always going on",
        lambda f: f"{f['test']['difference']:+.2f} [{f['test']['low']:+.2f}, {f['test']['high']:+.2f}]",
    )
    for number, name in enumerate(PREDICTORS):
        add(f"rank correlation of the gain with {name}", partial(_correlation, number))
    return "\n".join(lines)


def _words(rule: dict[str, Any]) -> str:
    return f"{rule['predictor']} {'>' if rule['above'] else '<'} {rule['threshold']:.3g}"


def _correlation(candidate: int, found: dict[str, Any]) -> str:
    row = found["candidates"][candidate]
    return f"{row['correlation']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"


def main() -> None:
    """Read, analyse, save, fill the page."""
    args = harness.parser(
        "Does anything seen up to zero error tell whether going on pays?", rounds=None, threads=False, device=False
    ).parse_args()
    runs = read_runs(ROOT / "benchmarks" / "studies")
    content = {"with": analysis(runs)}
    content["without"] = analysis([run for run in runs if not run.setting.startswith("label_noise")])
    goals = ["a rule found on half of the settings gains more than always going on in the other half"]
    print(harness.save("studies/when_to_stop", [content], goals=goals, out=args.out))
    fill("when_to_stop", table(content))
    print(table(content))


if __name__ == "__main__":
    main()
