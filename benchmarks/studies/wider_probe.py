"""Does a shorter reach of the probe's penalties decide which features transfer?

    python benchmarks/studies/wider_probe.py --runs RUNS [--study as_good_as]

A study's linear probe chooses its L2 penalty among eight, 1e2 to 1e-5, on validation images. In as_good_as the smallest
was chosen in most runs of some arms and in few of others, so that a part of a difference may be the grid's. Here the
same runs are probed again on the same images, with penalties down to 1e-9; nothing else changes, and no run is trained.
RUNS is the folder that the study's runs are in. Writes benchmarks/results/studies/wider_probe-cpu.json and the table in
docs/evidence.md.

Rules, written before the first wider probe: the measure is the study's, mean accuracy of the linear probes over the
sets, with its margin of one point, its baseline, and Holm's correction over its arms, of which those that wait for runs
count. Accuracy on the study's own grid must come out as the study has it, or the run is named. A claim of the study
about transfer stays where the wider grid gives the same word, and is taken back where it does not.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from benchmarks import harness
from benchmarks.studies.cells import difference, fill
from ncreg.robustness import linear_probe
from recipes.evaluation.evaluations import transfer_tasks
from recipes.evaluation.presets import PRESETS, Settings
from recipes.evaluation.run_under_test import RunUnderTest
from recipes.study.paired_tests import compare_arms
from recipes.study.spec import Measure

ROOT = Path(__file__).resolve().parents[2]
STUDIES = ROOT / "benchmarks" / "studies"
GRID = tuple(10.0**power for power in range(-9, 3))
MEASURE = Measure("robustness.transfer.mean.linear", label="transfer, linear probe", form="percent", margin=0.01)

Row = dict[str, Any]


def probed(folder: Path, *, root: Path, threads: int) -> Row:
    """Both probes of one run: for each set, accuracy and penalty on the study's grid, as it has them, and on the wide.

    Args:
        folder: of the run, with one folder of the run in it.
        root: folder of the image sets.
        threads: of this process.
    """
    torch.set_num_threads(threads)
    (run,) = (path.parent for path in folder.glob("*/summary.json"))
    evaluated = json.loads((run / "robustness" / "results.json").read_text())
    about, known = evaluated["about"], evaluated["parts"]["transfer"]
    tested = RunUnderTest.open(run, device="cpu", seed=about["seed"])
    settings = Settings.create(PRESETS[about["preset"]], norm="linf", epsilon=None, seed=about["seed"], root=root)
    row: Row = {}
    for name, splits in transfer_tasks(tested, settings)[0].items():
        fitted, other = (tested.outputs(split, encoder=tested.has_two_spaces) for split in splits)
        features = (fitted.features, fitted.target, other.features, other.target)
        found = linear_probe(*features, l2_grid=GRID, seed=settings.seed)
        told = known["tasks"][name]["linear"]
        row[name] = {"accuracy": found.accuracy, "chosen": found.chosen, "at_edge": found.at_edge}
        row[name] |= {"study": told["accuracy"], "study_chosen": told["chosen"], "study_at_edge": told["at_edge"]}
        row[name]["validation_agrees"] = all(
            abs(found.validation[float(l2)] - value) < 1e-9 for l2, value in told["validation"].items()
        )
    return row


def compared(rows: list[Row], arms: list[str], base: str, min_seeds: int) -> dict[str, list[Row]]:
    """For each data setting the arms' comparison with the baseline, on the study's grid and on the wider one."""
    tables = {}
    for data in dict.fromkeys(row["data"] for row in rows):
        for grid in ("study", "accuracy"):
            values: dict[str, dict[int, float | None]] = {arm: {} for arm in arms}
            for row in rows:
                if row["data"] == data:
                    values[row["arm"]][row["seed"]] = fmean(task[grid] for task in row["tasks"].values())
            name = f"{data}, {'wider' if grid == 'accuracy' else 'study'}"
            tables[name] = compare_arms(MEASURE, values, base=base, min_seeds=min_seeds)
    return tables


def edges(rows: list[Row], data: str, arm: str, key: str) -> float:
    """Share of an arm's probes whose penalty lies at an end of the grid."""
    found = [task[key] for row in rows if (row["data"], row["arm"]) == (data, arm) for task in row["tasks"].values()]
    return sum(found) / len(found)


def table(rows: list[Row], tables: dict[str, list[Row]]) -> str:
    """The table of docs/evidence.md in Markdown."""
    lines = [
        "| set, arm | study's grid | at its edge | down to 1e-9 | at its edge |",
        "| --- | --- | --- | --- | --- |",
    ]
    for data in dict.fromkeys(row["data"] for row in rows):
        for narrow, wide in zip(tables[f"{data}, study"], tables[f"{data}, wider"], strict=True):
            if not wide["runs"]:
                continue
            cells = [f"{data}, {wide['arm']}"]
            for entry, key in ((narrow, "study_at_edge"), (wide, "at_edge")):
                cells += [_cell(entry), f"{100 * edges(rows, data, entry['arm'], key):.0f} %"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(entry: Row) -> str:
    text = f"{100 * entry['mean']:.2f} ± {100 * entry['sd']:.2f}"
    return text if entry["verdict"] == "baseline" else f"{text}; {difference(entry, MEASURE)}"


def main() -> None:
    """Probe, compare, save."""
    parser = harness.parser("Transfer of a study's runs with smaller penalties.", rounds=None, device=False)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the study's runs")
    parser.add_argument("--study", default="as_good_as", help="folder of its results.json beside this script")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of image sets")
    parser.add_argument("--workers", type=int, default=2, help="processes, of --threads each")
    parser.add_argument(
        "--known", type=Path, default=Path("runs/wider_probe.json"), help="probes that are made already"
    )
    args = parser.parse_args()
    args.known.parent.mkdir(parents=True, exist_ok=True)
    known: dict[str, Row] = json.loads(args.known.read_text()) if args.known.is_file() else {}
    content = json.loads((STUDIES / args.study / "results.json").read_text())
    cells = [cell for cell in content["cells"] if cell["key"] in content["runs"]]
    missing = [cell for cell in cells if cell["key"] not in known]
    job = partial(probed, root=args.root, threads=args.threads)
    # a fork would copy torch's pool of threads without its threads, and may hang
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        for cell, tasks in zip(missing, pool.map(job, [args.runs / cell["key"] for cell in missing]), strict=True):
            known[cell["key"]] = {name: cell[name] for name in ("data", "arm", "seed")} | {"tasks": tasks}
            args.known.write_text(json.dumps(known))
            print(f"[{len(known)}/{len(cells)}] {cell['data']} {cell['arm']} seed {cell['seed']}", flush=True)
    study, rows = content["study"], [known[cell["key"]] for cell in cells]
    arms = list(study["arms"])
    tables = compared(rows, arms, study["baseline"] or arms[0], study["min_seeds"])
    goals = ["a word about transfer stays where smaller penalties give the same one"]
    settings = [{"study": args.study, "grid": GRID, "tables": tables, "runs": rows}]
    print(harness.save("studies/wider_probe", settings, goals=goals, out=args.out))
    text = table(rows, tables)
    fill("wider_probe", text)
    print(text)


if __name__ == "__main__":
    main()
