"""Which processor made each run of a pair: another one changes the last bits of every step, and so the whole run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from recipes.core.files import processor
from recipes.study.records import Records, is_done
from recipes.study.spec import Study
from recipes.study.trials import Trial

UNKNOWN = "a processor that was not recorded"
EFFECT = "one seed differed between two processors by up to 0.5 points of accuracy and 4 of attacks"


def mixed_pairs(content: Mapping[str, Any]) -> list[str]:
    """A line for each data setting and seed whose runs were made on more than one processor, with their arms by name.

    `content` is that of results.json; runs of earlier versions, which record no processor, count as one of their own.
    """
    by_pair: dict[tuple[str, int], dict[str, list[str]]] = {}
    for cell in content["cells"]:
        run = content["runs"].get(cell["key"])
        if run is not None and run["status"] == "done":
            name = content["environments"][run["environment"]].get("processor", UNKNOWN)
            by_pair.setdefault((cell["data"], cell["seed"]), {}).setdefault(name, []).append(cell["arm"])
    return [
        f"{data} seed {seed} mixes processors: "
        + "; ".join(f"{', '.join(arms)} on {name}" for name, arms in by_processor.items())
        + f" ({EFFECT})"
        for (data, seed), by_processor in by_pair.items()
        if len(by_processor) > 1
    ]


def pairs_to_be_mixed(study: Study, trials: Iterable[Trial], records: Records) -> str | None:
    """A line that names the pairs whose missing runs would be made here and whose others come from elsewhere."""
    here, elsewhere, missing = processor(), {}, set()
    for trial in trials:
        if trial.searching:
            continue
        if is_done(records, trial, study.evaluations):
            name = records[trial.key].result["environment"].get("processor", UNKNOWN)
            if name != here:
                elsewhere[trial.data, trial.seed] = name
        else:
            missing.add((trial.data, trial.seed))
    mixed = [f"{data} seed {seed}" for data, seed in elsewhere if (data, seed) in missing]
    if not mixed:
        return None
    others = ", ".join(sorted(set(elsewhere.values())))
    return (
        f"note: {', '.join(mixed)}: some arms were run on {others}, the missing ones would be on {here}: {EFFECT}. "
        "Go on there, or remove those seeds"
    )
